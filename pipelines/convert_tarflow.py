#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Turn a published TARFlow checkpoint (https://github.com/apple/ml-tarflow) into a pipeline.

    python pipelines/convert_tarflow.py --checkpoint afhq256.pth --sample_size 256 --noise_std 0.07 \\
        --output_dir outputs/afhq256

The architecture is read off the checkpoint's tensors; flags that contradict them are refused. With three classes the
names are AFHQ's and with a thousand ImageNet's, unless `--id2label` gives others.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from flowback_hf import FlowBackPipeline
from flowback_hf.conversion import convert_tarflow_checkpoint, labels_of_known_data, load_tarflow_checkpoint


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="The .pth file. No code in it is run.")
    parser.add_argument("--output_dir", type=Path, required=True, help="A new or an empty folder.")
    parser.add_argument("--sample_size", type=int, required=True, help="Height and width of the images.")
    parser.add_argument("--in_channels", type=int, default=3)
    parser.add_argument(
        "--noise_std",
        type=float,
        required=True,
        help="Of the Gaussian noise that it was trained with, for images in [-1, 1]: samples are denoised with it.",
    )
    parser.add_argument("--id2label", type=Path, help='A JSON file of class names: {"0": "cat", ...}.')
    return parser.parse_args(arguments)


def read_id2label(path: Path, num_classes: int | None) -> dict[int, str]:
    try:
        id2label = {int(label): str(name) for label, name in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`--id2label` must be a JSON file of class names by number, but {path} is not: {error}"
        ) from error
    if sorted(id2label) != list(range(num_classes or 0)):
        raise ValueError(
            f"`--id2label` must name the checkpoint's {num_classes or 0} classes, numbered from 0, but names"
            f" {len(id2label)}."
        )
    return id2label


def main(args: argparse.Namespace):
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise ValueError(f"`--output_dir` must be a new or an empty folder, but {args.output_dir} is not.")
    checkpoint = load_tarflow_checkpoint(args.checkpoint)
    transformer = convert_tarflow_checkpoint(checkpoint, args.sample_size, args.noise_std, args.in_channels)
    num_classes = transformer.config.num_classes
    id2label = labels_of_known_data(num_classes)
    if args.id2label is not None:
        id2label = read_id2label(args.id2label, num_classes)

    partial = args.output_dir.with_name(f".{args.output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    FlowBackPipeline(transformer, id2label=id2label).save_pretrained(partial)
    os.replace(partial, args.output_dir)
    config = transformer.config
    print(
        f"{args.output_dir}: {transformer.num_parameters() / 1e6:.1f} M parameters, {config.num_blocks} blocks of"
        f" {config.num_layers} layers, width {config.num_attention_heads * config.attention_head_dim}, patch"
        f" {config.patch_size}, {'unconditional' if num_classes is None else f'{num_classes} classes'}"
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"convert_tarflow.py: error: {error}")
