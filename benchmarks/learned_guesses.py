"""
What the heads of a learned inverse know: whether they can tell a good sample from a bad one, and whether the Jacobi
solver settles earlier when it starts from what they estimate.

    python benchmarks/learned_inverse.py --variants data_pairs --seeds 0
    python benchmarks/learned_guesses.py

The first is a rank correlation over samples, within each class, of the true error `|x' - F^-1(z)|` and the certificate
`|F(x') - z|`, where `x'` is the heads' estimate of the noisy sample. The second counts sweeps of all flow blocks.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from noise import draw_noise
from reporting import add_run_arguments, seconds_of, write_report

from flowback_hf import FlowBackPipeline
from flowback_hf.models.transformer_tarflow import Guidance, SolverSettings, allocate_state, run_jacobi_solver
from flowback_hf.reporting import markdown_table


GUESSES = ("latents", "heads")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("outputs/learned_inverse/digits-data_pairs-seed0"),
        help="Output folder of training/train_reverse.py, trained with heads and for these guidance scales. Default:"
        " %(default)s.",
    )
    parser.add_argument("--num_samples", type=int, default=300, help="Samples that are judged. Default: %(default)s.")
    parser.add_argument("--batch_size", type=int, default=50, help="Samples that are inverted. Default: %(default)s.")
    parser.add_argument(
        "--guidance_scales", type=float, nargs="+", default=[1.0, 2.0], help="Of the inversion. Default: 1 2."
    )
    parser.add_argument(
        "--tolerances",
        type=float,
        nargs="+",
        default=[1e-2, 1e-4, 1e-5],
        help="Of the inversion. Default: 0.01 0.0001 0.00001.",
    )
    add_run_arguments(parser, "learned_guesses_digits.json", device=False)
    return parser.parse_args(arguments)


def load(model: Path) -> FlowBackPipeline:
    pipeline = FlowBackPipeline.from_pretrained(model)
    pipeline.reverse_transformer.load_heads(model)
    return pipeline


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's correlation of values without ties."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (first, second)])
    return torch.corrcoef(ranks)[0, 1].item()


@torch.no_grad()
def judge_certificate(pipeline: FlowBackPipeline, num_samples: int) -> dict[str, float]:
    """Compare the certificate with the true error, without guidance."""
    flow, (noise, class_labels) = pipeline.transformer, draw_noise(pipeline, num_samples)
    exact = flow(noise, class_labels, inverse=True, solver="sequential").sample
    estimate = pipeline.reverse_transformer(noise, class_labels, output_trajectory=True).trajectory[0]
    error = (estimate - exact).flatten(1).norm(dim=1)
    certificate = (flow(estimate, class_labels).sample - noise).flatten(1).norm(dim=1)
    classes = [torch.ones_like(error, dtype=torch.bool)]
    if class_labels is not None:
        classes = [class_labels == label for label in class_labels.unique()]
    within = [rank_correlation(error[rows], certificate[rows]) for rows in classes]
    return {
        "rank_correlation": rank_correlation(error, certificate),
        "rank_correlation_within_classes": sum(within) / len(within),
        "relative_error": (error / exact.flatten(1).norm(dim=1)).mean().item(),
    }


@torch.no_grad()
def count_sweeps(
    pipeline: FlowBackPipeline, guess: str, batch_size: int, guidance_scale: float, tolerance: float
) -> float:
    """Invert all blocks from a guess. Returns the sweeps of a sample over all of them, averaged over samples."""
    flow, (noise, class_labels) = pipeline.transformer, draw_noise(pipeline, batch_size)
    guidance = Guidance(guidance_scale, pipeline.config.guidance_rule)
    tokens, sweeps = flow.patchify(noise), 0.0
    settings = SolverSettings(tokens.shape[1] - 1, "latents", tolerance)
    if guess == "heads":
        trajectory = pipeline.reverse_transformer(
            noise, class_labels, guidance_scale, output_trajectory=True
        ).trajectory
    for number in range(flow.config.num_blocks - 1, -1, -1):
        block = flow.blocks[number]
        state = allocate_state(block, block._permute(tokens), class_labels, guidance, settings)
        if guess == "heads":
            state.tokens[:, 1:] = block._permute(flow.patchify(trajectory[number]))[:, 1:]
        rows, block_sweeps = run_jacobi_solver(block, state, settings)
        tokens = block._permute(state.tokens[rows])
        sweeps += block_sweeps.float().mean().item()
    return sweeps


def measure_sweeps(pipeline: FlowBackPipeline, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Sweeps and seconds from each guess, beside the seconds token by token."""
    noise, class_labels = draw_noise(pipeline, args.batch_size)
    rule, cases = pipeline.config.guidance_rule, []
    for guidance_scale in args.guidance_scales:
        sequential = functools.partial(
            pipeline.invert_blocks, noise, class_labels, guidance_scale, rule, solver="sequential"
        )
        sequential_seconds = min(seconds_of(sequential, "cpu") for _ in range(3))
        for tolerance in args.tolerances:
            case: dict[str, Any] = {"guidance_scale": guidance_scale, "tolerance": tolerance}
            case["token_by_token_seconds"] = sequential_seconds
            for guess in GUESSES:
                arguments = (pipeline, guess, args.batch_size, guidance_scale, tolerance)
                case[guess] = {"sweeps": count_sweeps(*arguments)}
                case[guess]["seconds"] = min(seconds_of(lambda: count_sweeps(*arguments), "cpu") for _ in range(3))
            cases.append(case)
    return cases


def sweeps_table(results: dict[str, Any]) -> str:
    rows = []
    for case in results["cases"]:
        row = [f"{case['guidance_scale']:g}", f"{case['tolerance']:g}"]
        rows.append([*row, *(f"{case[guess]['sweeps']:.1f} ({case[guess]['seconds']:.2f} s)" for guess in GUESSES)])
    header = ["guidance", "tolerance", *(f"sweeps from the {guess}" for guess in GUESSES)]
    return markdown_table(header, rows)


def main(args: argparse.Namespace, arguments: list[str] | None = None):
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipeline = load(args.model)
    config = pipeline.transformer.config
    num_tokens = (config.sample_size // config.patch_size) ** 2
    results = {
        "certificate": judge_certificate(load(args.model).to(torch.float64), args.num_samples),
        "token_by_token": config.num_blocks * (num_tokens - 1),
        "num_samples": args.batch_size,
        "cases": measure_sweeps(pipeline, args),
    }
    certificate = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in results["certificate"].items())
    text = f"{certificate}; {results['token_by_token']} steps token by token\n\n{sweeps_table(results)}"
    print(text)
    write_report(args.output, arguments, "cpu", results, text)


if __name__ == "__main__":
    main(parse_args())
