"""
The accuracy of training-free classification by each method, over draws of the training noise, for several flows of one
data set.

    python benchmarks/classification_accuracy.py --flows runs/digits_none runs/digits_reverse \\
        --images runs/digits/images/validation --output benchmarks/results/classification_accuracy_digits.json
"""

import argparse
import time
from pathlib import Path

import torch
from reporting import add_run_arguments, write_report
from tqdm.auto import tqdm

from flowback_hf import FlowBackClassificationPipeline
from flowback_hf.reporting import markdown_table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", type=Path, nargs="+", required=True, help="Saved pipelines to compare.")
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="A folder with one folder of images for each class, named as the flows name it.",
    )
    parser.add_argument(
        "--max_images", type=int, help="Use at most this many images, the first of each class in turn. Default: all."
    )
    parser.add_argument(
        "--num_noise_draws",
        type=int,
        nargs="+",
        default=[0, 1, 8],
        help="Draws of noise to average over, one table row each. Default: 0 1 8.",
    )
    parser.add_argument(
        "--shortlist_size", type=int, default=5, help="Classes in the shortlist. Default: %(default)s."
    )
    parser.add_argument("--num_steps", type=int, default=10, help="Steps of the ascent. Default: %(default)s.")
    parser.add_argument(
        "--batch_size", type=int, default=100, help="Images that are classified together. Default: %(default)s."
    )
    add_run_arguments(parser, "classification_accuracy.json", device=False)
    return parser.parse_args(arguments)


def list_images(folder: Path, max_images: int | None) -> tuple[list[Path], list[str]]:
    """Files and their classes, the classes in turn."""
    files = [(rank, file) for kind in sorted(folder.iterdir()) for rank, file in enumerate(sorted(kind.iterdir()))]
    files = [file for _, file in sorted(files, key=lambda entry: entry[0])][:max_images]
    return files, [file.parent.name for file in files]


def measure(flow: Path, files: list[Path], names: list[str], args: argparse.Namespace) -> list[dict]:
    pipeline = FlowBackClassificationPipeline.from_pretrained(flow)
    pipeline.set_progress_bar_config(disable=True)
    label_ids = {name: int(label) for label, name in pipeline.config.id2label.items()}
    labels = torch.tensor([label_ids[name] for name in names])
    results = []
    for num_noise_draws in tqdm(args.num_noise_draws, desc=flow.name):
        predicted, seconds = {}, {}
        for method in ("bayes", "gradient", "shortlist", "ascent"):
            started_at = time.process_time()
            scores = pipeline.class_scores(
                files,
                method,
                num_noise_draws=num_noise_draws,
                batch_size=args.batch_size,
                shortlist_size=args.shortlist_size,
                num_steps=args.num_steps,
            )
            seconds[method] = time.process_time() - started_at
            predicted[method] = scores.argmax(dim=1)
        for method, classes in predicted.items():
            results.append(
                {
                    "flow": flow.name,
                    "num_noise_draws": num_noise_draws,
                    "method": method,
                    "accuracy": (classes == labels).double().mean().item(),
                    "agreement_with_bayes": (classes == predicted["bayes"]).double().mean().item(),
                    "cpu_ms_per_image": 1000 * seconds[method] / len(labels),
                }
            )
    return results


def make_table(results: list[dict]) -> str:
    header = ["flow", "noise draws", "method", "accuracy", "agrees with Bayes", "CPU ms/image"]
    rows = [
        [
            result["flow"],
            str(result["num_noise_draws"]),
            result["method"],
            f"{100 * result['accuracy']:.1f} %",
            f"{100 * result['agreement_with_bayes']:.1f} %",
            f"{result['cpu_ms_per_image']:.2f}",
        ]
        for result in results
    ]
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    files, names = list_images(args.images, args.max_images)
    results = [result for flow in args.flows for result in measure(flow, files, names, args)]
    table = make_table(results)
    print(table)
    settings = {"num_images": len(files), "shortlist_size": args.shortlist_size, "num_steps": args.num_steps}
    about = (
        f"{len(files)} images, the same noise for all; a shortlist of {args.shortlist_size} classes, {args.num_steps}"
    )
    about += " steps of ascent."
    write_report(args.output, arguments, "cpu", {**settings, "methods": results}, f"{table}\n\n{about}")


if __name__ == "__main__":
    main()
