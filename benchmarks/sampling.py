"""
Times sampling: the model's sequential solver, plain and compiled, against the published token loop, alternately and in
one run, and refuses to report times of results that differ.

    python benchmarks/sampling.py --batch_sizes 1 16 --threads 1 --compile
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from baselines import published_token_loop
from reporting import markdown_table, seconds_of, write_report

from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel


NUM_CLASSES = 1000
LARGEST_DIFFERENCE = 1e-4
Sampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample_size", type=int, default=64)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--num_blocks", type=int, default=4)
    parser.add_argument("--num_layers", type=int, default=4, help="Transformer layers in every flow block.")
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--attention_head_dim", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="1.0 is off.")
    parser.add_argument("--repeats", type=int, default=3, help="Timed runs of each sampler, after one that is not.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=None, help="Of the CPU; torch's own choice if not given.")
    parser.add_argument("--compile", action="store_true", help="Also time the solver with compiled layers.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sampling.json"))
    args = parser.parse_args(arguments)
    if min(args.repeats, *args.batch_sizes) < 1:
        parser.error("--repeats and --batch_sizes must be at least 1")
    return args


def build_model(args: argparse.Namespace) -> TarFlowTransformer2DModel:
    torch.manual_seed(0)
    model = TarFlowTransformer2DModel(
        sample_size=args.sample_size,
        patch_size=args.patch_size,
        num_blocks=args.num_blocks,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_classes=NUM_CLASSES,
    )
    for block in model.blocks:
        # An untrained flow is the identity; with large output weights, sampling from a random one overflows.
        torch.nn.init.normal_(block.proj_out.weight, std=0.1 * block.proj_out.in_features**-0.5)
        # Classes far enough apart for guidance to matter.
        torch.nn.init.normal_(block.class_embed)
    return model.to(args.device, getattr(torch, args.dtype)).eval()


def build_samplers(args: argparse.Namespace) -> dict[str, Sampler]:
    """Samplers by name, the baseline first."""
    model = build_model(args)

    def solver_of(model: TarFlowTransformer2DModel) -> Sampler:
        def sample(latents: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            return model(latents, class_labels, inverse=True, guidance_scale=args.guidance_scale).sample

        return torch.no_grad()(sample)

    def baseline(latents: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return published_token_loop(model, latents, class_labels, args.guidance_scale)

    samplers = {"baseline": baseline, "sequential": solver_of(model)}
    if args.compile:
        compiled_model = copy.deepcopy(model)
        compiled_model.compile_repeated_blocks()
        samplers["compiled"] = solver_of(compiled_model)
    return samplers


def draw_noise_and_labels(args: argparse.Namespace, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch_size)
    latents = torch.randn(batch_size, 3, args.sample_size, args.sample_size, generator=generator)
    class_labels = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
    return latents.to(args.device, getattr(torch, args.dtype)), class_labels.to(args.device)


def largest_difference(samples: dict[str, torch.Tensor]) -> float:
    # torch's maximum of numbers with a NaN is NaN; Python's depends on their order.
    return torch.stack([(sample - samples["baseline"]).abs().max() for sample in samples.values()]).max().item()


def measure(samplers: dict[str, Sampler], args: argparse.Namespace, batch_size: int) -> dict:
    inputs = draw_noise_and_labels(args, batch_size)
    difference = largest_difference({name: sampler(*inputs) for name, sampler in samplers.items()})  # and warm up
    if not difference <= LARGEST_DIFFERENCE:  # NaN is refused too
        sys.exit(
            f"The samples of {', '.join(samplers)} differ by up to {difference:.2e} at batch size {batch_size}, more"
            f" than {LARGEST_DIFFERENCE:.0e}: times of different results are not compared, and nothing was written."
        )
    seconds = {name: [] for name in samplers}
    for _ in range(args.repeats):
        # Alternately, so that whatever else the machine does meets all of them.
        for name, sampler in samplers.items():
            seconds[name].append(seconds_of(lambda: sampler(*inputs), args.device))
    return {"batch_size": batch_size, "max_difference": difference, **summarise(seconds)}


def summarise(seconds: dict[str, list[float]]) -> dict[str, dict]:
    baseline = statistics.median(seconds["baseline"])
    return {
        name: {
            "median_seconds": statistics.median(values),
            "min_seconds": min(values),
            "max_seconds": max(values),
            "times_faster_than_baseline": baseline / statistics.median(values),
        }
        for name, values in seconds.items()
    }


def results_table(results: list[dict]) -> str:
    """Seconds per batch: the median of the repeats, then their range."""
    has_compiled = "compiled" in results[0]
    header = ["batch size", "baseline, s", "sequential, s", "ratio"]
    header += ["compiled, s", "ratio"] if has_compiled else []
    rows = []
    for result in results:
        row = [str(result["batch_size"]), seconds_cell(result["baseline"])]
        for name in ("sequential", "compiled") if has_compiled else ("sequential",):
            row += [seconds_cell(result[name]), f"{result[name]['times_faster_than_baseline']:.2f}"]
        rows.append([*row, f"{result['max_difference']:.1e}"])
    return markdown_table([*header, "max. difference"], rows)


def seconds_cell(timing: dict) -> str:
    return f"{timing['median_seconds']:.3f} ({timing['min_seconds']:.3f} to {timing['max_seconds']:.3f})"


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    samplers = build_samplers(args)
    results = [measure(samplers, args, batch_size) for batch_size in args.batch_sizes]
    table = results_table(results)
    print(table)
    write_report(args.output, arguments, args.device, results, table)


if __name__ == "__main__":
    main()
