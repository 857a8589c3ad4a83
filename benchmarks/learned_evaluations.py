"""
Fréchet distance against network evaluations: the exact sampler, stopped after a number of Jacobi sweeps, beside the
learned inverse, which takes one evaluation.

    python benchmarks/learned_evaluations.py --model outputs/learned --figure docs/images/learned_evaluations.png

A sweep evaluates every block once, as a forward pass of the flow does. After as many sweeps as there are tokens, less
one, the sampler is exact. Its samples are denoised, which takes one more evaluation and a gradient.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from demo_samples import load_images
from noise import draw_noise
from reporting import add_run_arguments, write_report
from tqdm.auto import tqdm

from flowback_hf import FlowBackPipeline
from flowback_hf.metrics import FrechetDistance, ReferenceFeatures, load_feature_extractor
from flowback_hf.models.transformer_tarflow import Guidance, SolverSettings
from flowback_hf.reporting import figure_file, markdown_table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("outputs/learned"),
        help="Output folder of training/train_reverse.py. Default: %(default)s.",
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path("outputs/quickstart/digits"),
        help="The folder of the demo data, with images/ and judge/. Default: %(default)s.",
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=1.5, help="Guidance scale of all samplers. Default: %(default)s."
    )
    parser.add_argument(
        "--sweeps",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4, 6, 8, 15],
        help="Jacobi sweeps of each block. Default: 1 2 3 4 6 8 15.",
    )
    parser.add_argument("--num_samples", type=int, default=1000, help="Samples of each sampler. Default: %(default)s.")
    parser.add_argument("--batch_size", type=int, default=250, help="Samples at a time. Default: %(default)s.")
    parser.add_argument("--figure", type=Path, help="A figure to draw. Default: none.")
    add_run_arguments(parser, "learned_evaluations_digits.json", device=False)
    return parser.parse_args(arguments)


@torch.no_grad()
def invert_with_sweeps(
    pipeline: FlowBackPipeline, noise: torch.Tensor, class_labels: torch.Tensor | None, scale: float, num_sweeps: int
) -> torch.Tensor:
    """Give every block so many Jacobi sweeps, whether it has settled or not, and denoise."""
    flow, guidance = pipeline.transformer, Guidance(scale, pipeline.config.guidance_rule)
    tokens = flow.patchify(noise)
    settings = SolverSettings(tokens.shape[1] - 1, "latents", max_sweeps=num_sweeps)
    for block in reversed(flow.blocks):
        tokens = block(tokens, class_labels, inverse=True, guidance=guidance, settings=settings).tokens
    return pipeline.denoise(flow.unpatchify(tokens), class_labels)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    pipeline = FlowBackPipeline.from_pretrained(args.model)
    extractor = load_feature_extractor(str(args.data_dir / "judge"))
    images, _ = load_images(args.data_dir / "images" / "train")
    reference = ReferenceFeatures.from_batches([extractor(images).features], "training images", extractor.name)
    noise, class_labels = draw_noise(pipeline, args.num_samples)
    samplers = {"learned": None} | {f"{sweeps} sweeps": sweeps for sweeps in args.sweeps}
    cases = []
    for name, num_sweeps in tqdm(samplers.items(), desc="Sampling"):
        distance, num_overflowed = FrechetDistance(reference), 0
        for rows in torch.arange(args.num_samples).split(args.batch_size):
            inputs = noise[rows], None if class_labels is None else class_labels[rows], args.guidance_scale
            if num_sweeps is None:
                sample = pipeline.apply_reverse_transformer(*inputs)
            else:
                sample = invert_with_sweeps(pipeline, *inputs, num_sweeps)
            is_finite = sample.isfinite().flatten(1).all(dim=1)
            num_overflowed += int((~is_finite).sum())
            drawn = pipeline.decode(sample[is_finite], "pil")
            distance.add_batch(predictions=extractor(drawn).features)
        evaluations = 1 if num_sweeps is None else num_sweeps + 1
        case = {"sampler": name, "num_evaluations": evaluations, "num_overflowed": num_overflowed}
        cases.append(case | distance.compute())
    return cases


def draw(cases: list[dict[str, Any]], path: Path):
    learned, *exact = cases
    path.parent.mkdir(parents=True, exist_ok=True)
    with figure_file(path, figsize=(5, 3.2)) as (_, [[axis]]):
        axis.plot(
            [case["num_evaluations"] for case in exact],
            [case["frechet_distance"] for case in exact],
            "o-",
            label="exact sampler, stopped early",
        )
        axis.plot(learned["num_evaluations"], learned["frechet_distance"], "*", markersize=14, label="learned inverse")
        axis.set(
            xlabel="network evaluations, one after another", ylabel="Fréchet distance", xscale="log", yscale="log"
        )
        axis.set_xticks([1, 2, 4, 8, 16], [])
        axis.set_yticks([2, 5, 10, 20, 50, 100], [])
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("")
        axis.legend(frameon=False)


def main(args: argparse.Namespace, arguments: list[str] | None = None):
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    cases = measure(args)
    rows = [
        [case["sampler"], case["num_evaluations"], f"{case['frechet_distance']:.3f}", case["num_overflowed"]]
        for case in cases
    ]
    table = markdown_table(["sampler", "evaluations", "Fréchet distance", "overflowed"], rows)
    print(table)
    write_report(args.output, arguments, "cpu", {"guidance_scale": args.guidance_scale, "cases": cases}, table)
    if args.figure is not None:
        draw(cases, args.figure)


if __name__ == "__main__":
    main(parse_args())
