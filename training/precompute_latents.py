#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Encode a data set once with a VAE, so that training a latent flow reads moments instead of running the encoder.

    accelerate launch training/precompute_latents.py --dataset_name ILSVRC/imagenet-1k --resolution 256 \\
        --vae_model_name_or_path stabilityai/sd-vae-ft-ema --store image --output_dir path/to/latents

The data are streamed: neither they nor what is written need fit into memory, and nothing is cached. Every row holds
the moments of the VAE's posterior (not one draw from it) for the image and its mirror image, the label, and what the
alignment needs: the image at the teacher's size (`--store image`), the teacher's features of both flips (`features`,
which are large), or nothing. A run that was killed goes on with the first shard that is missing. Several processes
share the files of the source or, if it has fewer files, the shards.
"""

import argparse
import logging
import time
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.data import add_source_arguments, check_one_source
from flowback_hf_cli.numbers import COUNT


STORES = ("image", "features", "none")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser.add_argument_group("data"))
    parser.add_argument("--unconditional", action="store_true", help="Store no labels.")
    parser.add_argument(
        "--cache_dir", help="The folder where models of the Hub are kept. Default: the libraries' own."
    )
    parser.add_argument(
        "--vae_model_name_or_path",
        default="stabilityai/sd-vae-ft-ema",
        help="The VAE: its id on the Hub or a folder. Default: %(default)s.",
    )
    parser.add_argument("--vae_subfolder", help="The folder of the VAE inside a pipeline, usually vae.")
    parser.add_argument(
        "--resolution",
        type=COUNT,
        default=256,
        help="Resize and center-crop images to this height and width, in pixels. Default: %(default)s.",
    )
    parser.add_argument(
        "--store",
        choices=STORES,
        default="image",
        help="What to store for the alignment beside the moments. Default: %(default)s.",
    )
    parser.add_argument(
        "--image_size",
        type=COUNT,
        help="Height and width of stored images, in pixels. Default: the resolution, at most 224.",
    )
    parser.add_argument(
        "--teacher_model_name_or_path",
        help="The vision encoder whose features are stored: its id on the Hub or a folder. Default:"
        " facebook/dinov2-base.",
    )
    parser.add_argument(
        "--grid_size",
        type=COUNT,
        help="Height and width of the flow's token grid, sample_size // patch_size, on which stored features lie.",
    )
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="The precision of the VAE and the teacher. Default: as configured in Accelerate.",
    )
    parser.add_argument(
        "--batch_size", type=COUNT, default=32, help="Images per process and batch. Default: %(default)s."
    )
    parser.add_argument(
        "--dataloader_num_workers", type=COUNT, default=4, help="Threads that decode images. Default: %(default)s."
    )
    parser.add_argument(
        "--images_per_shard", type=COUNT, default=1024, help="Images in a shard. Default: %(default)s."
    )
    parser.add_argument("--output_dir", required=True, help="The folder to write the latents to.")
    add_debug_argument(parser)
    args = parser.parse_args(arguments)
    check_one_source(parser, args, "dataset_name", "train_data_dir")
    if (args.store == "features") != (args.grid_size is not None):
        parser.error("--grid_size belongs to --store features: give both, or neither.")
    if args.store != "image" and args.image_size is not None:
        parser.error("--image_size belongs to --store image.")
    if args.store != "features" and args.teacher_model_name_or_path is not None:
        parser.error("--teacher_model_name_or_path belongs to --store features.")
    return args


def main(args: argparse.Namespace):
    # Imported after the flags are parsed: it takes seconds.
    import datetime

    import datasets
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from tqdm.auto import tqdm

    from flowback_hf.data import DataSource, load_teacher
    from flowback_hf.data.latent_encoding import (
        LatentEncoder,
        columns_of,
        describe_latents,
        encode_split,
        open_latents_folder,
        open_streams,
    )
    from flowback_hf.data.latents import load_vae

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # When a run is resumed, one process may have hours of work while the others only wait.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    output_dir = Path(args.output_dir)
    label_column = None if args.unconditional else args.label_column
    streams = open_streams(DataSource.from_args(args), args.image_column, label_column)
    vae = load_vae(args.vae_model_name_or_path, args.vae_subfolder, args.cache_dir)
    teacher = None
    if args.store == "features":
        teacher = load_teacher(args.teacher_model_name_or_path, args.grid_size, accelerator, args.cache_dir)
    settings = describe_latents(
        args.dataset_name or str(Path(args.train_data_dir).resolve()),
        vae,
        args.vae_model_name_or_path,
        args.vae_subfolder,
        args.resolution,
        args.store,
        args.images_per_shard,
        streams,
        args.image_size,
        teacher,
        args.teacher_model_name_or_path,
    )
    open_latents_folder(output_dir, settings, accelerator)

    columns = columns_of(settings, None if args.unconditional else streams["train"].features[label_column])
    encoder = LatentEncoder(
        settings,
        vae.to(accelerator.device),
        teacher,
        accelerator,
        args.image_column,
        label_column,
        args.batch_size,
        args.dataloader_num_workers,
    )
    start = time.perf_counter()
    num_encoded = torch.zeros((), dtype=torch.long, device=accelerator.device)
    with tqdm(desc="Latents", unit="image", disable=not accelerator.is_local_main_process) as progress_bar:
        for name, rows in streams.items():
            processes = (accelerator.process_index, accelerator.num_processes)
            num_encoded += encode_split(rows, output_dir / name, columns, encoder, progress_bar, *processes)
    num_encoded = accelerator.reduce(num_encoded).item()
    if accelerator.is_main_process:
        print_summary(output_dir, settings["data"], num_encoded / (time.perf_counter() - start))
    accelerator.end_training()


def print_summary(output_dir: Path, data: str, images_per_second: float):
    import pyarrow.parquet

    shards = sorted(output_dir.glob("*/*.parquet"))
    if not shards:
        raise ValueError(f"{data!r} holds no images.")
    num_images = sum(pyarrow.parquet.read_metadata(shard).num_rows for shard in shards)
    num_bytes = sum(shard.stat().st_size for shard in shards)
    print(
        f"{num_images} images, {num_bytes / num_images / 1000:.1f} kB an image, {num_bytes / 1e6:.1f} MB in all,"
        f" {images_per_second:.1f} images/s. Train with --latents {output_dir}"
    )


if __name__ == "__main__":
    run_command(main, parse_args())
