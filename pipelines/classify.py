#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Classify the images of a folder with a trained flow, and print a table.

    python pipelines/classify.py --model outputs/flow --images path/to/folder
    python pipelines/classify.py --model outputs/flow --images path/to/folder --output predictions.csv

Folders are searched recursively. The table has one row an image, `file,label_1,score_1,label_2,...`. Files that cannot
be used as images are skipped, and named at the end on stderr.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.numbers import COUNT, SEED, Number


if TYPE_CHECKING:
    import PIL.Image
    import torch


METHODS = ("gradient", "ascent", "bayes", "shortlist")  # the package's, which is too slow to import for parsing


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder of a saved pipeline, or its id on the Hub.")
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, help="Images to classify: files, and folders of them."
    )
    parser.add_argument(
        "--output", type=Path, help="CSV file to write the table to. Default: none, and the table is printed."
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="shortlist",
        help="How to classify. shortlist: Bayes' rule among the five classes that one gradient ranks first; bayes:"
        " among all classes; gradient: by that gradient itself; ascent: several steps along it. Default: %(default)s.",
    )
    parser.add_argument(
        "--top_k", type=COUNT, default=5, help="Classes to write for each image. Default: %(default)s."
    )
    parser.add_argument(
        "--num_noise_draws",
        type=Number(int, at_least=0),
        default=1,
        help="Draws of the training noise to average over for each image; 0 adds no noise. Default: %(default)s.",
    )
    parser.add_argument("--batch_size", type=COUNT, default=32, help="Images per batch. Default: %(default)s.")
    parser.add_argument("--seed", type=SEED, default=0, help="Seed of the noise. Default: %(default)s.")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="Refuse images of another size or mode than the flow's. Default: crop, resize and convert them.",
    )
    parser.add_argument("--device", help="Device to compute on, such as cpu or cuda:1. Default: cuda, or cpu without.")
    add_debug_argument(parser)
    return parser.parse_args(arguments)


def find_files(paths: list[Path]) -> list[Path]:
    """
    Find all files in folders and their subfolders, hidden ones excepted.

    Raises:
        ValueError: if a path does not exist, or there are no files.
    """
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


def choose_device(name: str | None) -> torch.device:
    """Return the device of a name, by default the best one. Raises ValueError if there is none."""
    import torch

    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def read_images(files: list[Path], read: list[Path], skipped: list[str]) -> Iterator[PIL.Image.Image]:
    """Yield the images one by one. Their files are added to `read`, and those that cannot be used to `skipped`."""
    from tqdm.auto import tqdm

    from flowback_hf.pipelines.pipeline_flowback import open_image, to_eight_bits

    for file in tqdm(files, desc="Classifying"):
        try:
            image = open_image(file)
            to_eight_bits(image, "RGB")
        except ValueError as error:
            skipped.append(f"{file} {error}")
            continue
        read.append(file)
        yield image


def write_table(file: TextIO, files: list[Path], classes: list[list[dict[str, str | float]]]):
    """Write a CSV table with a row for each image: its file, then the label and the score of each class."""
    from flowback_hf.reporting import spreadsheet_text

    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["file"] + [f"{name}_{rank + 1}" for rank in range(len(classes[0])) for name in classes[0][0]])
    for path, entries in zip(files, classes):
        # A relative path stays one that can be opened.
        name = f"./{path}" if str(path)[0] in "=+-@" else str(path)
        values = [value for entry in entries for value in (spreadsheet_text(entry["label"]), entry["score"])]
        writer.writerow([spreadsheet_text(name), *values])


def check_output(path: Path):
    """Raise ValueError if a table cannot be written there. Nothing is written yet."""
    if path.is_dir():
        raise ValueError(f"`--output` must be a file, but {str(path)!r} is a folder.")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"`--output` {str(path)!r} cannot be written: {str(existing)!r} is no folder to write to.")


def main(args: argparse.Namespace):
    files = find_files(args.images)
    if args.output is not None:
        check_output(args.output)

    # Imports that take seconds stand below the checks: `--help` and wrong arguments are answered at once.
    import torch

    from flowback_hf import FlowBackClassificationPipeline
    from flowback_hf.files import write_whole
    from flowback_hf.hub import load_pipeline

    device = choose_device(args.device)
    pipeline = load_pipeline(FlowBackClassificationPipeline, args.model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)  # saves memory in the backward to the classes
    read, skipped = [], []
    images = read_images(files, read, skipped)
    first = next(images, None)
    if first is None:
        raise ValueError(f"None of the {len(files)} files is an image that can be used. The first: {skipped[0]}.")

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
    if args.output is None:
        write_table(sys.stdout, read, classes)
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(args.output) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            write_table(file, read, classes)
    where = "" if args.output is None else f": {args.output}"
    print(f"{len(read)} images classified by {args.method!r}{where}", file=sys.stderr)
    if skipped:
        names = ", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        print(f"{len(skipped)} files cannot be used and were skipped: {names}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parse_args())
