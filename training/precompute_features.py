#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Compute a teacher's features of every training image and its mirror image once, so that training reads them instead of
running the teacher at every step.

    accelerate launch training/precompute_features.py --train_data_dir path/to/images --resolution 64 --patch_size 4 \\
        --teacher_model_name_or_path facebook/dinov2-base --output_dir path/to/features

Give it the data flags and the seed of the run, and the run `--teacher_features path/to/features`. It pays for small
data sets that are seen many times: an image takes `2 * grid_size^2 * feature_dim` float16 numbers, 786 kB with
DINOv2-B on a grid of 16. A run that was killed goes on with the first shard that is missing; several processes share
the shards.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from train_rra import (
    ImageDataset,
    add_data_arguments,
    check_at_least_one,
    check_data_arguments,
    checksum,
    collate,
    load_splits,
    load_teacher,
)

from flowback_hf.utils import write_atomically


BYTES_PER_NUMBER = 2


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="Of the run: it decides what is held out.")
    parser.add_argument("--teacher_model_name_or_path", help="Default: facebook/dinov2-base.")
    parser.add_argument("--resolution", type=int, default=64, help="Of the flow's images, which the teacher sees.")
    parser.add_argument("--patch_size", type=int, default=4, help="Of the flow.")
    parser.add_argument("--in_channels", type=int, choices=[1, 3], default=3)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Of the teacher's weights.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--images_per_shard", type=int, default=2048)
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args(arguments)
    check_data_arguments(parser, args)
    check_at_least_one(parser, args, ["batch_size", "images_per_shard", "resolution", "patch_size"])
    if args.resolution % args.patch_size != 0:
        parser.error(
            f"--resolution must be divisible by --patch_size, but they are {args.resolution} and {args.patch_size}."
        )
    return args


def check_output_dir(output_dir: Path, settings: dict):
    """Raises ValueError if the folder holds other features, OSError if these will not fit beside it."""
    settings_file = output_dir / "features.json"
    if settings_file.exists():
        earlier = json.loads(settings_file.read_text())
        different = [
            f"{name} ({earlier.get(name)!r} then, {settings[name]!r} now)"
            for name in settings
            if earlier.get(name) != settings[name]
        ]
        if different:
            raise ValueError(
                f"`--output_dir` {output_dir} holds other features; they differ in {', '.join(different)}."
            )
    elif output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"`--output_dir` {output_dir} must be empty or hold features, but holds something else.")
    output_dir.mkdir(parents=True, exist_ok=True)
    done = len(list(output_dir.glob("shard-*"))) / settings["num_shards"]
    needed = (1 - done) * settings["num_images"] * settings["bytes_per_image"]
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise OSError(
            f"The features need {needed / 2**30:.1f} GiB, but {output_dir} has {free / 2**30:.1f} GiB left. Free some"
            " or choose another --output_dir: what is done is kept."
        )


def write_shard(shard: Path, features: np.ndarray, checksums: list[int]):
    """Under a temporary name first, so that a shard is whole or absent."""
    columns = datasets.Features(
        {"features": datasets.Array3D(features.shape[1:], "float16"), "checksum": datasets.Value("uint32")}
    )
    partial = shard.with_name(f".{shard.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    datasets.Dataset.from_dict({"features": features, "checksum": checksums}, columns).save_to_disk(str(partial))
    os.replace(partial, shard)


def main(args: argparse.Namespace):
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    # Labels play no part.
    args.unconditional = True
    train_rows, _ = load_splits(args)
    dataset = ImageDataset(train_rows, args.image_column, None, [], args.resolution, args.in_channels)
    teacher = load_teacher(args, args.resolution // args.patch_size, accelerator)
    settings = {
        "teacher": args.teacher_model_name_or_path or "facebook/dinov2-base",
        "feature_dim": teacher.feature_dim,
        "grid_size": teacher.grid_size,
        "resolution": args.resolution,
        "in_channels": args.in_channels,
        "num_images": len(dataset),
        "images_per_shard": args.images_per_shard,
        "num_shards": -(-len(dataset) // args.images_per_shard),
        "bytes_per_image": 2 * teacher.grid_size**2 * teacher.feature_dim * BYTES_PER_NUMBER,
    }
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        check_output_dir(output_dir, settings)
        write_atomically(output_dir / "features.json", json.dumps(settings, indent=2))
    accelerator.wait_for_everyone()

    mine = range(settings["num_shards"])[accelerator.process_index :: accelerator.num_processes]
    shards = {number: output_dir / f"shard-{number:05d}" for number in mine}
    missing = {number: shard for number, shard in shards.items() if not shard.exists()}
    indices = {
        number: range(len(dataset))[number * args.images_per_shard :][: args.images_per_shard] for number in missing
    }
    progress_bar = tqdm(
        total=sum(map(len, indices.values())),
        desc="Features",
        unit="image",
        disable=not accelerator.is_local_main_process,
    )
    start = time.perf_counter()
    for number, shard in missing.items():
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(dataset, indices[number]),
            args.batch_size,
            num_workers=args.dataloader_num_workers,
            collate_fn=collate,
        )
        features, checksums = [], []
        for batch in loader:
            images = batch["images"].to(accelerator.device)
            both = torch.stack([teacher(images), teacher(images.flip(-1))], dim=1)
            features.append(both.half().cpu().numpy())
            checksums += [checksum(image) for image in batch["images"]]
            progress_bar.update(len(images))
        write_shard(shard, np.concatenate(features), checksums)
    progress_bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        num_images = progress_bar.n * accelerator.num_processes
        print(
            f"{len(dataset)} images, {settings['bytes_per_image'] / 1000:.1f} kB an image,"
            f" {settings['bytes_per_image'] * len(dataset) / 1e6:.1f} MB in all,"
            f" {num_images / (time.perf_counter() - start):.1f} images/s. Train with --teacher_features {output_dir}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
