"""
The accuracy of training-free classification by each method, over draws of the training noise, for several flows of one
data set.

    python benchmarks/classification_accuracy.py --flows runs/digits_none runs/digits_reverse \\
        --images runs/digits/images/validation --output benchmarks/results/classification_accuracy_digits.json
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from reporting import add_run_arguments, write_report
from tqdm.auto import tqdm

from flowback_hf import FlowBackClassificationPipeline
from flowback_hf.reporting import markdown_table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", type=Path, nargs="+", required=True, help="Saved pipelines to compare.")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument(
        "--images",
        type=Path,
        help="A folder with one folder of images for each class, named as the flows name it.",
    )
    images.add_argument(
        "--dataset_name", help="A data set of images with the flows' class names: its id on the Hub, or a folder."
    )
    parser.add_argument("--split", default="validation", help="The split of --dataset_name. Default: %(default)s.")
    parser.add_argument(
        "--max_images",
        type=int,
        help="Use at most this many images: of a folder, the first of each class in turn. Default: all.",
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


def load_images(args: argparse.Namespace) -> tuple[Sequence[Any], list[str]]:
    """Images, as the classifier takes them, and the names of their classes."""
    if args.images is not None:
        return list_images(args.images, args.max_images)
    rows = datasets.load_dataset(args.dataset_name, split=args.split)
    rows = rows.select(range(min(len(rows), args.max_images or len(rows))))
    return rows.select_columns(["image"]), rows.features["label"].int2str(rows["label"][:])


def list_images(folder: Path, max_images: int | None) -> tuple[list[Path], list[str]]:
    """Files and their classes, the classes in turn."""
    files = [(rank, file) for kind in sorted(folder.iterdir()) for rank, file in enumerate(sorted(kind.iterdir()))]
    files = [file for _, file in sorted(files, key=lambda entry: entry[0])][:max_images]
    return files, [file.parent.name for file in files]


def short_names(folders: list[Path]) -> list[str]:
    """What tells folders apart: their paths without the parts that all have at the start and at the end."""
    if len(folders) == 1:
        return [folders[0].name]
    paths = [list(folder.parts) for folder in folders]
    for end in (0, -1):
        while all(len(path) > 1 for path in paths) and len({path[end] for path in paths}) == 1:
            for path in paths:
                path.pop(end)
    return ["/".join(path) for path in paths]


def measure(flow: Path, name: str, images: Sequence[Any], names: list[str], args: argparse.Namespace) -> list[dict]:
    pipeline = FlowBackClassificationPipeline.from_pretrained(flow)
    pipeline.set_progress_bar_config(disable=True)
    label_ids = {name: int(label) for label, name in pipeline.config.id2label.items()}
    labels = torch.tensor([label_ids[name] for name in names])
    results = []
    for num_noise_draws in tqdm(args.num_noise_draws, desc=name):
        predicted, seconds = {}, {}
        for method in ("bayes", "gradient", "shortlist", "ascent"):
            started_at = time.process_time()
            scores = pipeline.class_scores(
                images,
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
                    "flow": name,
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
    images, names = load_images(args)
    flow_names = short_names(args.flows)
    results = [
        result for flow, name in zip(args.flows, flow_names) for result in measure(flow, name, images, names, args)
    ]
    table = make_table(results)
    print(table)
    settings = {"num_images": len(names), "shortlist_size": args.shortlist_size, "num_steps": args.num_steps}
    about = (
        f"{len(names)} images, the same noise for all; a shortlist of {args.shortlist_size} classes, {args.num_steps}"
    )
    about += " steps of ascent."
    write_report(args.output, arguments, "cpu", {**settings, "methods": results}, f"{table}\n\n{about}")


if __name__ == "__main__":
    main()
