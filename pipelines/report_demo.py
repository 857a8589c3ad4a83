#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Sample from a flow that was trained on a demo data set, and let the data set's judge classify the samples.

    python pipelines/report_demo.py --model outputs/quickstart/flow --data_dir outputs/quickstart/digits \\
        --output_dir outputs/quickstart

The judge is a classifier that was trained on the data set independently of the flow. The script writes `samples.png`,
a grid with one row per class, and `report.json`: the validation nll in nats per dimension before and after training,
and the share of samples that the judge recognizes as their class.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.numbers import COUNT, SEED, Number


if TYPE_CHECKING:
    import PIL.Image


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Output folder of training/train_rra.py.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Output folder of training/prepare_demo.py.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for samples.png and report.json.")
    parser.add_argument(
        "--images_per_class", type=COUNT, default=10, help="Images to sample of each class. Default: %(default)s."
    )
    parser.add_argument(
        "--guidance_scale",
        type=Number(float, at_least=1),
        help="Guidance scale of the samples; 1.0 is off. Default: the pipeline's.",
    )
    parser.add_argument(
        "--seed", type=SEED, default=0, help="Seed of the noise that becomes the samples. Default: %(default)s."
    )
    add_debug_argument(parser)
    return parser.parse_args(arguments)


def classify_with_judge(images: list[PIL.Image.Image], judge_dir: Path) -> list[str]:
    """Return the class names that the judge assigns to the images."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from flowback_hf.alignment.teacher import refuse_unreadable

    with refuse_unreadable(judge_dir):
        processor = AutoImageProcessor.from_pretrained(judge_dir, trust_remote_code=False)
        judge = AutoModelForImageClassification.from_pretrained(judge_dir, trust_remote_code=False).eval()
    pixel_values = processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    with torch.inference_mode():
        label_ids = judge(pixel_values).logits.argmax(dim=-1).tolist()
    return [judge.config.id2label[label] for label in label_ids]


def draw_grid(images: list[PIL.Image.Image], labels: list[str], judged: list[str], columns: int, path: Path):
    """Draw one row of images a class. Images that the judge takes for another class get a red frame and its name."""
    from flowback_hf.reporting import figure_file

    rows = math.ceil(len(images) / columns)
    size = (0.9 * columns + 0.8, 0.95 * rows)
    with figure_file(path, rows, columns, dpi=120, bbox_inches=None, figsize=size) as (figure, axes):
        for axis, image, label, judged_label in zip(axes.flat, images, labels, judged):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
            axis.spines[:].set_visible(True)
            axis.set(xticks=[], yticks=[])
            if judged_label != label:
                axis.spines[:].set(color="red", linewidth=3)
                axis.set_title(f"read as {judged_label}", color="red", fontsize=7, pad=2)
        for axis, label in zip(axes[:, 0], labels[::columns]):
            axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=14)
        figure.tight_layout(pad=0.4)


def main(args: argparse.Namespace):
    # Imported after the flags are parsed: it takes seconds.
    import torch

    from flowback_hf import FlowBackPipeline
    from flowback_hf.files import read_json, read_metrics_log, write_json
    from flowback_hf.hub import load_pipeline

    demo = read_json(args.data_dir / "demo.json")
    if demo is None:
        raise ValueError(
            f"`--data_dir` must be an output folder of training/prepare_demo.py, but {args.data_dir} has no demo.json."
        )
    records = read_metrics_log(args.model)
    validation_nll = [record["validation_nll"] for record in records if "validation_nll" in record]
    if not validation_nll:
        raise ValueError(
            f"`--model` must be an output folder of training/train_rra.py, but {args.model} has no metrics.jsonl with"
            " a validation."
        )
    pipeline = load_pipeline(FlowBackPipeline, args.model)
    label_ids = list(range(pipeline.transformer.config.num_classes))
    names = [pipeline.config.id2label[label] for label in label_ids]
    images = pipeline(
        class_labels=label_ids,
        num_images_per_prompt=args.images_per_class,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    labels = [name for name in names for _ in range(args.images_per_class)]
    judged = classify_with_judge(images, args.data_dir / "judge")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw_grid(images, labels, judged, args.images_per_class, args.output_dir / "samples.png")
    report = {
        "validation_nll_before": validation_nll[0],
        "validation_nll_after": validation_nll[-1],
        "num_samples": len(images),
        "guidance_scale": pipeline.guidance_scale,
        "judge_reads_label": sum(judged_label == label for judged_label, label in zip(judged, labels)) / len(images),
        "judge_validation_accuracy": demo["judge_validation_accuracy"],
    }
    write_json(args.output_dir / "report.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_command(main, parse_args())
