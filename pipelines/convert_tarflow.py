#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Convert a published TARFlow checkpoint (https://github.com/apple/ml-tarflow) to a pipeline.

    python pipelines/convert_tarflow.py --checkpoint afhq256.pth --sample_size 256 --noise_std 0.07 \\
        --output_dir outputs/afhq256

The checkpoint is a .pth or .safetensors file, or one on the Hub, written user/repository:file. It may be inside what a
trainer saved, under state_dict or model, and its names may have the prefixes of distributed and compiled models.
The architecture is inferred from the shapes of the checkpoint's tensors. Flags that contradict them are refused. A
checkpoint with three classes gets AFHQ's class names, and one with a thousand gets ImageNet's, unless `--id2label`
gives others.
"""

import argparse
import json
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.numbers import COUNT, Number


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="The original file, .pth or .safetensors, or user/repository:file on the Hub. No code in it is run.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="New or empty folder for the pipeline.")
    parser.add_argument("--sample_size", type=COUNT, required=True, help="Height and width of the images, in pixels.")
    parser.add_argument("--in_channels", type=COUNT, default=3, help="Channels of the images. Default: %(default)s.")
    parser.add_argument(
        "--noise_std",
        type=Number(float, at_least=0),
        required=True,
        help="Standard deviation of the Gaussian training noise, for images in [-1, 1]. Samples are denoised with it.",
    )
    parser.add_argument(
        "--id2label",
        type=Path,
        help='JSON file of class names, {"0": "cat", ...}. Default: AFHQ\'s or ImageNet\'s names, by the number of'
        " classes.",
    )
    add_debug_argument(parser)
    return parser.parse_args(arguments)


def read_id2label(path: Path, num_classes: int | None) -> dict[int, str]:
    """
    Read class names from a JSON file.

    Raises:
        ValueError: if the file is not such a file, or does not name exactly the classes from 0 to `num_classes - 1`.
    """
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

    # Imports that take seconds stand below the checks: `--help` and wrong arguments are answered at once.
    from flowback_hf import FlowBackPipeline
    from flowback_hf.conversion import convert_tarflow_checkpoint, labels_of_known_data, load_tarflow_checkpoint
    from flowback_hf.files import write_whole

    checkpoint = load_tarflow_checkpoint(args.checkpoint)
    transformer = convert_tarflow_checkpoint(checkpoint, args.sample_size, args.noise_std, args.in_channels)
    num_classes = transformer.config.num_classes
    id2label = labels_of_known_data(num_classes)
    if args.id2label is not None:
        id2label = read_id2label(args.id2label, num_classes)

    with write_whole(args.output_dir) as partial:
        FlowBackPipeline(transformer, id2label=id2label).save_pretrained(partial)
    config = transformer.config
    print(
        f"{args.output_dir}: {transformer.num_parameters() / 1e6:.1f} M parameters, {config.num_blocks} blocks of"
        f" {config.num_layers} layers, width {config.num_attention_heads * config.attention_head_dim}, patch"
        f" {config.patch_size}, {'unconditional' if num_classes is None else f'{num_classes} classes'}"
    )


if __name__ == "__main__":
    run_command(main, parse_args())
