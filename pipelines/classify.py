#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Classify images with a trained flow: a folder in, a table out.

    python pipelines/classify.py --model outputs/flow --images path/to/folder --output predictions.csv

Folders are searched through. The table has a row for each image: `file`, `label_1`, `score_1`, `label_2`, ... Files
that are no images are skipped, counted and named.
"""

import argparse
import csv
import os
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import torch
from sample import load_pipeline
from tqdm.auto import tqdm

from flowback_hf import FlowBackClassificationPipeline
from flowback_hf.pipelines.pipeline_flowback_classification import METHODS
from flowback_hf.utils import UNREADABLE


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A saved or pushed pipeline.")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="Files and folders.")
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"))
    parser.add_argument("--method", choices=METHODS, default="gradient")
    parser.add_argument("--top_k", type=int, default=5)
    parser.add_argument("--num_noise_draws", type=int, default=1, help="Of the training noise; 0 adds none.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    parser.add_argument("--strict", action="store_true", help="Refuse images of another size or mode.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def find_files(paths: list[Path]) -> list[Path]:
    """All files, folders searched through. Raises ValueError if there are none."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"`--images` must be existing files or folders, but {str(path)!r} is neither.")
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise ValueError(f"`--images` must hold at least one image, but {', '.join(map(str, paths))} is empty.")
    return files


def read_images(files: list[Path], read: list[Path], skipped: list[Path]) -> Iterator[PIL.Image.Image]:
    """The images, one by one; their files are added to `read`, those of what is no image to `skipped`."""
    for file in tqdm(files, desc="Classifying"):
        try:
            with PIL.Image.open(file) as image:
                image.load()
        except UNREADABLE:
            skipped.append(file)
            continue
        read.append(file)
        yield image


def main(args: argparse.Namespace):
    files = find_files(args.images)
    pipeline = load_pipeline(FlowBackClassificationPipeline, args.model).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)  # a backward to the classes then keeps less
    read, skipped = [], []
    images = read_images(files, read, skipped)
    first = next(images, None)
    if first is None:
        raise ValueError(f"None of the {len(files)} files is an image; the first is {str(files[0])!r}.")

    def all_images() -> Iterator[PIL.Image.Image]:
        yield first
        yield from images

    classes = pipeline(
        all_images(),
        top_k=args.top_k,
        method=args.method,
        num_noise_draws=args.num_noise_draws,
        generator=torch.Generator().manual_seed(args.seed),
        batch_size=args.batch_size,
        strict=args.strict,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(f".partial-{args.output.name}")
    with partial.open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["file"] + [f"{name}_{rank + 1}" for rank in range(len(classes[0])) for name in classes[0][0]])
        for file, entries in zip(read, classes):
            writer.writerow([file] + [value for entry in entries for value in entry.values()])
    os.replace(partial, args.output)
    for file, entries in list(zip(read, classes))[:10]:
        print(f"{file}: {entries[0]['label']} ({entries[0]['score']:.3g})")
    print(f"{len(read)} images classified by {args.method!r}: {args.output}")
    if skipped:
        names = ", ".join(str(file) for file in skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        print(f"{len(skipped)} files are no images and were skipped: {names}")


if __name__ == "__main__":
    main(parse_args())
