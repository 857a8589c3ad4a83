#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Sample from a flow trained on a demo data set and let the data set's independent judge read the samples.

    python pipelines/report_demo.py --model outputs/quickstart/flow --data_dir outputs/quickstart/digits \\
        --output_dir outputs/quickstart

Writes `samples.png`, a guided grid with one row a class, and `report.json`: validation nll (nats per dimension) before
and after training, and the share of samples that the judge reads as their label.
"""

import argparse
import json
import math
import os
from pathlib import Path

import matplotlib
import PIL.Image
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from flowback_hf import FlowBackPipeline


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="The output folder of training/train_rra.py.")
    parser.add_argument("--data_dir", type=Path, required=True, help="The output folder of training/prepare_demo.py.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--images_per_class", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, help="Default: the pipeline's.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.inference_mode()
def read_labels(images: list[PIL.Image.Image], judge_dir: Path) -> list[str]:
    """What the judge takes the images for."""
    processor = AutoImageProcessor.from_pretrained(judge_dir)
    judge = AutoModelForImageClassification.from_pretrained(judge_dir).eval()
    pixel_values = processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    return [judge.config.id2label[label] for label in judge(pixel_values).logits.argmax(dim=-1).tolist()]


def draw_grid(images: list[PIL.Image.Image], labels: list[str], read: list[str], columns: int, path: Path):
    """One row a class, misread samples framed in red with what the judge read."""
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.9 * columns + 0.8, 0.95 * rows), squeeze=False)
    for axis, image, label, reading in zip(axes.flat, images, labels, read):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        axis.set(xticks=[], yticks=[])
        if reading != label:
            axis.spines[:].set(color="red", linewidth=3)
            axis.set_title(f"read as {reading}", color="red", fontsize=7, pad=2)
    for axis, label in zip(axes[:, 0], labels[::columns]):
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=14)
    figure.tight_layout(pad=0.4)
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=120)
    os.replace(partial, path)


def main(args: argparse.Namespace):
    pipeline = FlowBackPipeline.from_pretrained(args.model)
    label_ids = list(range(pipeline.transformer.config.num_classes))
    names = [pipeline.config.id2label[label] for label in label_ids]
    images = pipeline(
        class_labels=label_ids,
        num_images_per_prompt=args.images_per_class,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    labels = [name for name in names for _ in range(args.images_per_class)]
    read = read_labels(images, args.data_dir / "judge")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw_grid(images, labels, read, args.images_per_class, args.output_dir / "samples.png")

    records = [json.loads(line) for line in (args.model / "metrics.jsonl").read_text().splitlines()]
    validation_nll = [record["validation_nll"] for record in records if "validation_nll" in record]
    report = {
        "validation_nll_before": validation_nll[0],
        "validation_nll_after": validation_nll[-1],
        "num_samples": len(images),
        "guidance_scale": pipeline.guidance_scale,
        "judge_reads_label": sum(reading == label for reading, label in zip(read, labels)) / len(images),
        "judge_validation_accuracy": json.loads((args.data_dir / "demo.json").read_text())[
            "judge_validation_accuracy"
        ],
    }
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(parse_args())
