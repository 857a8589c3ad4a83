"""
How a flow that was trained on a demo data set samples: the share of samples that the data set's judge reads as their
class, by guidance scale, and how far they are from the training images, with real images as the baseline. And how long
the training took.

    python benchmarks/demo_samples.py --model outputs/icons --data_dir data/icons
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from nearest_images import distances_to_nearest
from PIL import Image
from reporting import add_run_arguments, write_report
from tqdm.auto import tqdm

from flowback_hf import FlowBackPipeline
from flowback_hf.files import read_metrics_log
from flowback_hf.metrics import load_feature_extractor
from flowback_hf.reporting import markdown_table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Output folder of training/train_rra.py.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Output folder of training/prepare_demo.py.")
    parser.add_argument(
        "--guidance_scales", type=float, nargs="+", default=[1, 1.5, 2, 3], help="Guidance scales. Default: 1 1.5 2 3."
    )
    parser.add_argument("--images_per_class", type=int, default=50, help="Samples of a class. Default: %(default)s.")
    parser.add_argument("--batch_size", type=int, default=100, help="Images sampled at once. Default: %(default)s.")
    add_run_arguments(parser, "demo_samples.json", device=False)
    return parser.parse_args(arguments)


def load_images(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """The images of a split and their classes."""
    files = sorted(folder.glob("*/*"))
    return [Image.open(file) for file in files], [file.parent.name for file in files]


def sample(pipeline: FlowBackPipeline, labels: list[str], guidance_scale: float, batch_size: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    batches = [labels[start : start + batch_size] for start in range(0, len(labels), batch_size)]
    options = {"guidance_scale": guidance_scale, "generator": generator}
    images = (pipeline(class_labels=batch, **options).images for batch in tqdm(batches, desc=f"{guidance_scale:g}"))
    return [image for batch in images for image in batch]


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """`(num_images, height * width * 3)`, from 0 to 1."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).flatten(1) / 255


def describe(judge, images: list[Image.Image], labels: list[str], train_pixels: torch.Tensor) -> dict:
    read = [judge.id2label[label] for label in judge(images).logits.argmax(dim=1).tolist()]
    distances = distances_to_nearest(to_pixels(images), train_pixels)
    # Root mean square differences of pixels.
    distances = (distances / train_pixels.shape[1] ** 0.5).tolist()
    return {
        "num_images": len(images),
        "judge_reads_label": statistics.mean(a == b for a, b in zip(read, labels)),
        "judge_reads_label_by_class": {
            name: statistics.mean(a == name for a, b in zip(read, labels) if b == name) for name in sorted(set(labels))
        },
        "distance_to_nearest_training_image": {"median": statistics.median(distances), "smallest": min(distances)},
    }


def describe_training(model: Path) -> dict:
    """The steps of the run, by its log, the seconds spent in them, and those of a typical one."""
    batch_size = json.loads((model / "training_args.json").read_text())["train_batch_size"]
    records = [record for record in read_metrics_log(model) if "images_per_second" in record]
    steps = [record["step"] for record in records]
    seconds = [batch_size / record["images_per_second"] for record in records]
    return {
        "num_steps": steps[-1],
        "batch_size": batch_size,
        "wall_seconds": sum((step - before) * each for step, before, each in zip(steps, [0, *steps], seconds)),
        "seconds_per_step": statistics.median(seconds),
    }


def make_table(results: dict) -> str:
    header = ["images", "read as their class", "nearest training image, median", "smallest"]
    rows = []
    for case in results["images"]:
        distance = case["distance_to_nearest_training_image"]
        cells = f"{distance['median']:.3f}", f"{distance['smallest']:.3f}"
        rows.append([case["name"], f"{100 * case['judge_reads_label']:.1f} %", *cells])
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipeline = FlowBackPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_feature_extractor(str(args.data_dir / "judge"))
    train_images, _ = load_images(args.data_dir / "images" / "train")
    train_pixels = to_pixels(train_images)

    real, real_labels = load_images(args.data_dir / "images" / "validation")
    cases = [{"name": "validation images"} | describe(judge, real, real_labels, train_pixels)]
    labels = [name for name in pipeline.labels for _ in range(args.images_per_class)]
    for scale in args.guidance_scales:
        images = sample(pipeline, labels, scale, args.batch_size)
        name = {"name": f"samples, guidance {scale:g}", "guidance_scale": scale}
        cases.append(name | describe(judge, images, labels, train_pixels))
    results = {"training": describe_training(args.model), "images": cases}
    table = make_table(results)
    print(table)
    write_report(args.output, arguments, "cpu", results, table)


if __name__ == "__main__":
    main()
