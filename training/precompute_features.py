#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Compute a teacher's features of every training image and its mirror image once, so that training reads them instead of
running the teacher at every step.

    accelerate launch training/precompute_features.py --train_data_dir path/to/images --resolution 64 --patch_size 4 \\
        --teacher_model_name_or_path facebook/dinov2-base --output_dir path/to/features

Give it the data flags and the seed of the run, and give the run `--teacher_features path/to/features`. It pays for
small data sets that are seen many times: an image takes `2 * grid_size^2 * feature_dim` float16 numbers, 786 kB with
DINOv2-B on a grid of 16. A run that was killed goes on with the first shard that is missing. Several processes share
the shards.

With --shuffle, an image gets the features of another image, always the same one: a control that keeps the teacher's
statistics and takes away what it knows of each image.
"""

import argparse
import datetime
import time
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.data import add_data_arguments, check_data_arguments
from flowback_hf_cli.numbers import COUNT, SEED, Number


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser.add_argument_group("data"))
    group = parser.add_argument_group("features")
    group.add_argument(
        "--seed",
        type=SEED,
        default=0,
        help="The seed of the training run, which decides which images are held out, and of --shuffle. Default:"
        " %(default)s.",
    )
    group.add_argument(
        "--teacher_model_name_or_path",
        help="The vision encoder: its id on the Hub or a folder. Default: facebook/dinov2-base.",
    )
    group.add_argument(
        "--resolution",
        type=COUNT,
        default=64,
        help="Height and width of the flow's images, in pixels. Default: %(default)s.",
    )
    group.add_argument(
        "--patch_size",
        type=COUNT,
        default=4,
        help="Height and width of the flow's tokens, in pixels. Default: %(default)s.",
    )
    group.add_argument(
        "--in_channels",
        type=int,
        choices=[1, 3],
        default=3,
        help="Channels of the flow's images: 1 for grey, 3 for RGB. Default: %(default)s.",
    )
    group.add_argument(
        "--shuffle",
        choices=["class", "all"],
        help="Store with each image the features of another image: one of the same class, or any. Default: its own.",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="The precision of the teacher's weights. Default: as configured in Accelerate.",
    )
    group.add_argument(
        "--batch_size", type=COUNT, default=64, help="Images per process and batch. Default: %(default)s."
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=Number(int, at_least=0),
        default=0,
        help="Processes that load images, beside each process. Default: %(default)s.",
    )
    group.add_argument("--images_per_shard", type=COUNT, default=2048, help="Images in a shard. Default: %(default)s.")
    group.add_argument("--output_dir", required=True, help="The folder to write the features to.")
    add_debug_argument(group)
    args = parser.parse_args(arguments)
    check_data_arguments(parser, args)
    if args.resolution % args.patch_size != 0:
        parser.error(
            f"--resolution must be divisible by --patch_size, but they are {args.resolution} and {args.patch_size}."
        )
    if args.shuffle == "class" and args.unconditional:
        parser.error("--shuffle class needs labels: leave --unconditional out, or give --shuffle all.")
    return args


def main(args: argparse.Namespace):
    # Imported after the flags are parsed: it takes seconds.
    import datasets
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from flowback_hf.data import ImageDataset, load_splits, load_teacher
    from flowback_hf.data.teacher_features import (
        ShuffledImages,
        describe_features,
        open_features_folder,
        shuffle_within,
        write_missing_shards,
    )

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # Processes may have different numbers of shards, and those without work wait for the others.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    args.unconditional = args.shuffle != "class"  # else labels play no part
    rows = load_splits(args).train
    dataset = ImageDataset(rows, args.image_column, None, [], args.resolution, args.in_channels)
    dataset[0]  # raises if none of its images can be used
    teacher_name = args.teacher_model_name_or_path
    teacher = load_teacher(teacher_name, args.resolution // args.patch_size, accelerator, args.cache_dir)
    settings = describe_features(teacher_name, teacher, dataset, args.images_per_shard, args.shuffle, args.seed)
    if args.shuffle is not None:
        labels = rows[args.label_column] if args.shuffle == "class" else [None] * len(rows)
        partners = shuffle_within(labels, args.seed)
        if partners == list(range(len(rows))):
            raise ValueError(f"`--shuffle {args.shuffle}` must have images to exchange, but each is the only one.")
        dataset = ShuffledImages(dataset, partners)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        open_features_folder(output_dir, settings)
    accelerator.wait_for_everyone()

    start = time.perf_counter()
    num_images = write_missing_shards(
        dataset,
        teacher,
        output_dir,
        accelerator,
        args.images_per_shard,
        args.batch_size,
        args.dataloader_num_workers,
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        speed = num_images * accelerator.num_processes / (time.perf_counter() - start)
        print(
            f"{len(dataset)} images, {settings['bytes_per_image'] / 1000:.1f} kB an image,"
            f" {settings['bytes_per_image'] * len(dataset) / 1e6:.1f} MB in all, {speed:.1f} images/s. Train with"
            f" --teacher_features {output_dir}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main, parse_args())
