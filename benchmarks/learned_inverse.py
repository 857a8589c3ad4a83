"""
Compares learned inverses of a flow with its exact sampler: trains each variant for each seed, evaluates it at several
guidance scales, and keeps a record of each finished cell. The same command goes on where it was.

    python training/quickstart.py
    python benchmarks/learned_inverse.py

A record is `results/learned_inverse_<name>/<variant>-seed<seed>.json`; remove it to measure the cell again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from nearest_images import distances_to_nearest
from reporting import write_report

from flowback_hf.data.splits import DataSource, load_split
from flowback_hf.reporting import markdown_table


REPOSITORY = Path(__file__).resolve().parents[1]
# The exact sampler needs no training.
EXACT = "exact"
# What each variant adds to the command of training. The first learns from pairs of the exact sampler, and most others
# differ from it in one thing.
SAMPLED = ["--pairs", "sampler", "--num_sampled_pairs", "6000", "--sampled_guidance_scale", "{guidance_scale}"]
BOTH = ["--pairs", "both", "--num_sampled_pairs", "6000", "--sampled_guidance_scale", "{guidance_scale}"]
VARIANTS: dict[str, list[str]] = {
    "sampled_pairs": SAMPLED,
    "less_guidance": [*SAMPLED, "--sampled_guidance_scale", "1.25"],
    "final": [*SAMPLED, "--supervision", "final"],
    "data_space": [*SAMPLED, "--supervision", "data_space"],
    "no_denoising": [*SAMPLED, "--no_denoising"],
    "features": [*SAMPLED, "--teacher_model_name_or_path", "{data_dir}/teacher"],
    "more_pairs": [*SAMPLED, "--num_sampled_pairs", "24000"],
    "flow_width": [*SAMPLED, "--num_attention_heads", "4"],
    "data_pairs": [],
    "no_guidance": ["--max_guidance_scale", "1"],
    "both_pairs": BOTH,
    "both_pairs_longer": [*BOTH, "--num_sampled_pairs", "24000", "--max_train_steps", "8000"],
    "both_pairs_flow_width": [*BOTH, "--num_attention_heads", "4"],
}
TRAINING = ["--num_layers", "2", "--train_batch_size", "64", "--learning_rate", "2e-3", "--lr_warmup_steps", "50"]
TRAINING += ["--ema_decay", "0.99", "--eval_batch_size", "297", "--validation_steps", "500"]
TRAINING += ["--max_validation_samples", "1020"]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("outputs/quickstart/flow"),
        help="The saved pipeline of the flow. Default: %(default)s.",
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path("outputs/quickstart/digits"),
        help="The folder of the demo data, with images/ or parquet files in it, teacher/ and judge/. Default:"
        " %(default)s.",
    )
    parser.add_argument("--name", default="digits", help="What the records are called. Default: %(default)s.")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[EXACT, *VARIANTS],
        default=[EXACT, *VARIANTS],
        help="What is trained and evaluated. Default: all.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="Seeds of training. Default: 0 1.")
    parser.add_argument(
        "--max_train_steps", type=int, default=2000, help="Optimizer steps of a variant. Default: %(default)s."
    )
    parser.add_argument(
        "--num_attention_heads",
        type=int,
        default=6,
        help="Attention heads of the learned inverse, as wide as the flow's. Default: %(default)s.",
    )
    parser.add_argument(
        "--sampled_guidance_scale",
        type=float,
        default=1.5,
        help="Guidance scale of the exact sampler's pairs: the flow's best one. Default: %(default)s, that of the"
        " quickstart's digits.",
    )
    parser.add_argument(
        "--guidance_scales",
        type=float,
        nargs="+",
        default=[1.0, 1.25, 1.5, 2.0],
        help="Guidance scales to evaluate at, as far as a variant takes them. Default: 1 1.25 1.5 2.",
    )
    parser.add_argument(
        "--num_samples", type=int, default=1000, help="Samples at each guidance scale. Default: %(default)s."
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("outputs/learned_inverse"),
        help="The folder of the runs and evaluations. Default: %(default)s.",
    )
    parser.add_argument(
        "--results_dir",
        type=Path,
        default=REPOSITORY / "benchmarks" / "results",
        help="Where the folder of records is. Default: benchmarks/results.",
    )
    return parser.parse_args(arguments)


def train(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Train a variant, or go on with it. Returns its folder."""
    folder = args.work_dir / f"{args.name}-{variant}-seed{seed}"
    settings = {"data_dir": args.data_dir, "guidance_scale": args.sampled_guidance_scale}
    options = [option.format(**settings) for option in VARIANTS[variant]]
    run(
        "training/train_reverse.py",
        *["--model", args.model, *data_flag(args, "--train_data_dir"), "--output_dir", folder, *TRAINING],
        *["--num_attention_heads", args.num_attention_heads, "--max_train_steps", args.max_train_steps],
        *["--seed", seed, "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1, *options],
    )
    return folder


def evaluate(args: argparse.Namespace, variant: str, seed: int, model: Path) -> dict[str, Any]:
    """Evaluate a sampler at the guidance scales that it takes. Returns what `evaluation.json` holds, and distances."""
    folder, scales = args.work_dir / f"{args.name}-{variant}-seed{seed}-evaluation", args.guidance_scales
    if variant != EXACT:
        config = json.loads((model / "reverse_transformer" / "config.json").read_text())
        lowest, highest = config["min_guidance_scale"], config["max_guidance_scale"]
        scales = [scale for scale in scales if lowest <= scale <= highest]
    run(
        "pipelines/evaluate_flow.py",
        *["--model", model, *data_flag(args, "--data_dir"), "--features", args.data_dir / "judge"],
        *["--solver", "auto" if variant == EXACT else "learned", "--guidance_scales", *scales, "--methods"],
        *["--num_samples", args.num_samples, "--seed", seed, "--output_dir", folder],
    )
    results = json.loads((folder / "evaluation.json").read_text())
    _, name = data_flag(args, "--data_dir")
    rows = load_split(DataSource("--data_dir", str(name), not is_parquet(name)), "train", "image")
    config = json.loads((model / "transformer" / "config.json").read_text())
    real = to_rows((row["image"] for row in rows), config)
    for scale in scales:
        files = sorted((folder / "samples" / f"guidance_{scale}").glob("[0-9]*.png"))
        drawn = to_rows(map(PIL.Image.open, files), config)
        results[f"nearest_training_image/guidance_{scale}"] = distances_to_nearest(drawn, real).mean().item()
    return results | {"evaluated_guidance_scales": scales}


def run(script: str, *options: Any) -> None:
    """Run a script of this repository."""
    if subprocess.run([sys.executable, str(REPOSITORY / script), *map(str, options)]).returncode:
        raise SystemExit(f"{script} failed.")


def is_parquet(folder: Path) -> bool:
    return any(folder.glob("*.parquet"))


def data_flag(args: argparse.Namespace, folder_flag: str) -> list[Any]:
    """The flag that names the images to a script."""
    images = args.data_dir / "images"
    return ["--dataset_name" if is_parquet(images) else folder_flag, images]


def to_rows(images: Iterable[PIL.Image.Image], config: dict[str, Any]) -> torch.Tensor:
    """Images of a flow's size and channels in [-1, 1] as rows."""
    size, mode = config["sample_size"], "L" if config["in_channels"] == 1 else "RGB"
    arrays = (np.asarray(image.convert(mode).resize((size, size)), dtype=np.float32) for image in images)
    return torch.from_numpy(np.stack([array.ravel() / 127.5 - 1 for array in arrays]))


def describe(results: dict[str, Any]) -> str:
    """A table of one cell, a row for each guidance scale."""
    columns = ("frechet_distance", "precision", "recall", "classifier_reads_label", "nearest_training_image")
    rows = [
        [scale, *(f"{results.get(f'{name}/guidance_{scale}', float('nan')):.4g}" for name in columns)]
        for scale in results["evaluated_guidance_scales"]
    ]
    return markdown_table(["guidance", *(name.replace("_", " ") for name in columns)], rows)


def main(args: argparse.Namespace, arguments: list[str] | None = None):
    for seed in args.seeds:
        for variant in args.variants:
            record = args.results_dir / f"learned_inverse_{args.name}" / f"{variant}-seed{seed}.json"
            if record.exists():
                continue
            model = args.model if variant == EXACT else train(args, variant, seed)
            results = evaluate(args, variant, seed, model)
            write_report(record, arguments, "cpu", results, describe(results))
            print(f"== {record}\n{describe(results)}", flush=True)


if __name__ == "__main__":
    main(parse_args())
