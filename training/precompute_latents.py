#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Encode a data set once with a VAE, so that training a latent flow reads moments instead of running the encoder.

    accelerate launch training/precompute_latents.py --dataset_name imagenet-1k --resolution 256 \\
        --vae_model_name_or_path stabilityai/sd-vae-ft-ema --store image --output_dir path/to/latents

The data are streamed: neither they nor what is written need fit memory, and nothing is cached. Every row holds the
moments of the VAE's posterior (not one draw from it) for the image and its mirror image, the label, and what the
alignment needs: the image at the teacher's size (`--store image`), the teacher's features of both flips (`features`,
which are large), or nothing. A run that was killed goes on with the first shard that is missing. Several processes
share the files of the source or, where it has fewer files, the shards; `--dataloader_num_workers` threads decode.
"""

import argparse
import datetime
import errno
import functools
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm
from train_rra import check_at_least_one, load_teacher

from flowback_hf import RepresentationTeacher
from flowback_hf.latents import SETTINGS_FILE, hash_weights, load_vae, missing_shards, shard_name
from flowback_hf.pipelines.pipeline_flowback import vae_scale_factor
from flowback_hf.utils import UNREADABLE, write_atomically


logger = get_logger(__name__, log_level="INFO")

STORES = ("image", "features", "none")
DEFAULT_IMAGE_SIZE = 224


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="Of the Hub, a folder that `datasets` loads, or a parquet file.")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--train_data_dir", help="An image folder, one folder a class.")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--unconditional", action="store_true", help="Store no labels.")
    parser.add_argument("--cache_dir", help="Of models.")
    parser.add_argument("--vae_model_name_or_path", default="stabilityai/sd-vae-ft-ema")
    parser.add_argument("--vae_subfolder", help="Where the VAE is part of a pipeline: vae.")
    parser.add_argument("--resolution", type=int, default=256, help="Images are resized and center-cropped to it.")
    parser.add_argument("--store", choices=STORES, default="image", help="For the alignment, beside the moments.")
    parser.add_argument(
        "--image_size", type=int, help=f"Of stored images. Default: the resolution, {DEFAULT_IMAGE_SIZE} at most."
    )
    parser.add_argument("--teacher_model_name_or_path", help="Of stored features. Default: facebook/dinov2-base.")
    parser.add_argument("--grid_size", type=int, help="Of stored features: the flow's, sample_size // patch_size.")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Of the VAE's and teacher's passes.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dataloader_num_workers", type=int, default=4, help="Threads that decode images.")
    parser.add_argument("--images_per_shard", type=int, default=1024)
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args(arguments)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give one of --dataset_name and --train_data_dir.")
    positive = ["resolution", "image_size", "grid_size", "batch_size", "dataloader_num_workers", "images_per_shard"]
    check_at_least_one(parser, args, positive)
    if (args.store == "features") != (args.grid_size is not None):
        parser.error("--grid_size belongs to --store features: give both, or neither.")
    if args.store != "image" and args.image_size is not None:
        parser.error("--image_size belongs to --store image.")
    if args.store != "features" and args.teacher_model_name_or_path is not None:
        parser.error("--teacher_model_name_or_path belongs to --store features.")
    return args


# The source


def load_streams(args: argparse.Namespace) -> dict[str, datasets.IterableDataset]:
    """The training split and, where there is one, the held-out split: undecoded images and labels."""
    source = args.train_data_dir or args.dataset_name
    builder = {"path": source, "name": args.dataset_config_name}
    if args.train_data_dir is not None:
        builder = {"path": "imagefolder", "data_dir": source}
    elif source.endswith(".parquet"):
        builder = {"path": "parquet", "data_files": source}
    try:
        streams = datasets.load_dataset(**builder, streaming=True)
    except (FileNotFoundError, ValueError) as error:
        option = "--train_data_dir" if args.train_data_dir is not None else "--dataset_name"
        raise ValueError(f"`{option}` {source!r} holds no images that can be loaded: {error}") from error
    if "train" not in streams:
        raise ValueError(f"The data set must have a split named 'train', but has {list(streams)}.")
    held_out = next((name for name in ("validation", "val", "test") if name in streams), None)
    splits = {"train": streams["train"]} | ({} if held_out is None else {"validation": streams[held_out]})
    features = splits["train"].features or {}
    for option in ["image_column"] if args.unconditional else ["image_column", "label_column"]:
        column = getattr(args, option)
        if column not in features:
            raise ValueError(
                f"`--{option}` must be a column of the data set, one of {list(features)}, but is {column!r}."
            )
    if not args.unconditional and not isinstance(features[args.label_column], datasets.ClassLabel):
        raise ValueError(
            f"`--label_column` {args.label_column!r} must hold class labels with names (datasets.ClassLabel), but"
            f" holds {features[args.label_column]}: a stream cannot be searched for its classes. Cast it, or give"
            " --unconditional."
        )
    columns = [args.image_column] + ([] if args.unconditional else [args.label_column])
    return {
        name: rows.select_columns(columns).cast_column(args.image_column, datasets.Image(decode=False))
        for name, rows in splits.items()
    }


def in_shards(rows: datasets.IterableDataset, size: int) -> Iterator[list[dict[str, Any]]]:
    shard = []
    for row in rows:
        shard.append(row)
        if len(shard) == size:
            yield shard
            shard = []
    if shard:
        yield shard


def decode(row: dict[str, Any], image_column: str, resolution: int, mode: str) -> PIL.Image.Image | None:
    """Resized and center-cropped to a square; `None` for what is no image."""
    try:
        image = datasets.Image().decode_example(row[image_column]).convert(mode)
    except UNREADABLE:
        return None
    return PIL.ImageOps.fit(image, (resolution, resolution), PIL.Image.Resampling.BICUBIC)


# The shards


def make_settings(
    args: argparse.Namespace,
    vae: torch.nn.Module,
    teacher: RepresentationTeacher | None,
    streams: dict[str, datasets.IterableDataset],
) -> dict[str, Any]:
    """What tells these latents from others. Raises ValueError if the VAE does not take the images."""
    factor = vae_scale_factor(vae)
    if args.resolution % factor != 0:
        raise ValueError(f"`--resolution` must be a multiple of the VAE's factor {factor}, but is {args.resolution}.")
    if vae.config.in_channels not in (1, 3):
        raise ValueError(f"The VAE must take images of 1 or 3 channels, but takes {vae.config.in_channels}.")
    settings = {
        "data": args.dataset_name or str(Path(args.train_data_dir).resolve()),
        "vae": args.vae_model_name_or_path,
        "vae_subfolder": args.vae_subfolder,
        "vae_hash": hash_weights(vae),
        "resolution": args.resolution,
        "latent_channels": vae.config.latent_channels,
        "latent_size": args.resolution // factor,
        "store": args.store,
        "images_per_shard": args.images_per_shard,
        "num_sources": {name: rows.num_shards for name, rows in streams.items()},
    }
    if args.store == "image":
        settings["image_size"] = args.image_size or min(args.resolution, DEFAULT_IMAGE_SIZE)
    if teacher is not None:
        settings["teacher"] = args.teacher_model_name_or_path or "facebook/dinov2-base"
        settings["grid_size"] = args.grid_size
        settings["feature_dim"] = teacher.feature_dim
    return settings


def check_output_dir(output_dir: Path, settings: dict[str, Any]):
    """Raises ValueError if the folder holds other latents or something else."""
    path = output_dir / SETTINGS_FILE
    if not path.exists():
        if output_dir.exists() and any(output_dir.iterdir()):
            raise ValueError(f"`--output_dir` {output_dir} must be empty or hold latents, but holds something else.")
        return
    earlier = json.loads(path.read_text())
    different = [
        f"{name} ({earlier.get(name)!r} then, {settings.get(name)!r} now)"
        for name in sorted(earlier.keys() | settings.keys())
        if earlier.get(name) != settings.get(name)
    ]
    if different:
        raise ValueError(f"`--output_dir` {output_dir} holds other latents; they differ in {', '.join(different)}.")


def columns_of(settings: dict[str, Any], label: datasets.ClassLabel | None) -> datasets.Features:
    size = settings["latent_size"]
    columns = {"moments": datasets.Array4D((2, 2 * settings["latent_channels"], size, size), "float16")}
    if label is not None:
        columns["label"] = label
    if settings["store"] == "image":
        columns["image"] = datasets.Image()
    if settings["store"] == "features":
        columns["teacher_features"] = datasets.Array3D(
            (2, settings["grid_size"] ** 2, settings["feature_dim"]), "float16"
        )
    return datasets.Features(columns)


def is_whole(path: Path) -> bool:
    """Whether a shard can be read to its end, which is where a parquet file says what it holds."""
    try:
        return pyarrow.parquet.read_metadata(path).num_rows > 0
    except (OSError, pyarrow.ArrowInvalid):
        return False


def write_shard(path: Path, values: dict[str, Any], columns: datasets.Features):
    """Under a temporary name first, so that a shard is whole or absent. Raises OSError if the disk is full."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        datasets.Dataset.from_dict(values, columns).to_parquet(str(partial))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"The disk is full: {path.name} was not written, and what is before it is whole. Free some space and"
                " run the same command again, which goes on there",
                str(path.parent),
            ) from error
        raise


class Encoder:
    """Rows of the source to the values of a shard's columns."""

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any], vae, teacher, accelerator: Accelerator):
        self.args, self.settings, self.accelerator = args, settings, accelerator
        self.vae, self.teacher = vae, teacher
        mode = {1: "L", 3: "RGB"}[vae.config.in_channels]
        self.decode = functools.partial(decode, image_column=args.image_column, resolution=args.resolution, mode=mode)
        self.executor = ThreadPoolExecutor(args.dataloader_num_workers)

    def __call__(self, rows: list[dict[str, Any]], progress_bar: tqdm) -> dict[str, Any]:
        kept, values = [], {}
        batch = []
        # decoded ahead of what is encoded
        for number, image in enumerate(self.executor.map(self.decode, rows)):
            if image is None:
                name = (rows[number][self.args.image_column] or {}).get("path") or f"row {number} of a shard"
                logger.warning(f"Skipped {name}: it cannot be decoded.", main_process_only=False)
            else:
                kept.append(rows[number])
                batch.append(image)
            if batch and (len(batch) == self.args.batch_size or number == len(rows) - 1):
                for name, value in self.encode(batch).items():
                    values.setdefault(name, []).extend(value)
                batch = []
            progress_bar.update()
        if not kept:
            raise ValueError(f"None of {len(rows)} images that follow one another can be decoded: is this image data?")
        if not self.args.unconditional:
            values["label"] = [row[self.args.label_column] for row in kept]
        return values

    @torch.no_grad()
    def encode(self, batch: list[PIL.Image.Image]) -> dict[str, Any]:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in batch])).to(self.accelerator.device)
        images = pixels.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2) / 127.5 - 1
        with self.accelerator.autocast():
            moments = [self.vae.encode(flip).latent_dist.parameters for flip in (images, images.flip(-1))]
        values = {"moments": torch.stack(moments, dim=1).half().cpu().numpy()}
        if self.settings["store"] == "image":
            size = self.settings["image_size"]
            values["image"] = [PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.BICUBIC) for image in batch]
        if self.teacher is not None:
            features = [self.teacher(flip) for flip in (images, images.flip(-1))]
            values["teacher_features"] = torch.stack(features, dim=1).half().cpu().numpy()
        return values


def encode_split(
    rows: datasets.IterableDataset,
    folder: Path,
    columns: datasets.Features,
    encoder: Encoder,
    progress_bar: tqdm,
    process_index: int = 0,
    num_processes: int = 1,
) -> int:
    """Writes this process's missing shards of a split and returns the number of images that it went through."""
    num_images = 0
    folder.mkdir(parents=True, exist_ok=True)
    shares_files = rows.num_shards >= num_processes
    sources = range(process_index, rows.num_shards, num_processes) if shares_files else range(rows.num_shards)
    for source in sources:
        for path in folder.glob(f"{source:05d}-*.parquet"):
            if not is_whole(path):
                path.unlink()
        if missing_shards(folder, source) == []:
            continue
        num_shards = 0
        rows_of_source = rows.shard(num_shards=rows.num_shards, index=source)
        for number, shard in enumerate(in_shards(rows_of_source, encoder.args.images_per_shard)):
            num_shards += 1
            path = folder / shard_name(source, number)
            if (shares_files or number % num_processes == process_index) and not path.exists():
                write_shard(path, encoder(shard, progress_bar), columns)
                num_images += len(shard)
        if shares_files or process_index == 0:
            write_atomically(folder / f"{source:05d}.json", json.dumps({"num_shards": num_shards}))
    return num_images


def main(args: argparse.Namespace):
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # Of a run that is resumed, one process may have hours to do and the others nothing but wait.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    output_dir = Path(args.output_dir)
    streams = load_streams(args)
    vae = load_vae(args.vae_model_name_or_path, args.vae_subfolder, args.cache_dir)
    teacher = load_teacher(args, args.grid_size, accelerator) if args.store == "features" else None
    settings = make_settings(args, vae, teacher, streams)
    check_output_dir(output_dir, settings)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / SETTINGS_FILE, json.dumps(settings, indent=2))
    accelerator.wait_for_everyone()

    label = None if args.unconditional else streams["train"].features[args.label_column]
    encoder = Encoder(args, settings, vae.to(accelerator.device), teacher, accelerator)
    progress_bar = tqdm(desc="Latents", unit="image", disable=not accelerator.is_local_main_process)
    start = time.perf_counter()
    num_encoded = torch.zeros((), dtype=torch.long, device=accelerator.device)
    for name, rows in streams.items():
        num_encoded += encode_split(
            rows,
            output_dir / name,
            columns_of(settings, label),
            encoder,
            progress_bar,
            accelerator.process_index,
            accelerator.num_processes,
        )
    progress_bar.close()
    num_encoded = accelerator.reduce(num_encoded).item()
    seconds = time.perf_counter() - start
    if accelerator.is_main_process:
        shards = sorted(output_dir.glob("*/*.parquet"))
        if not shards:
            raise ValueError(f"{settings['data']!r} holds no images.")
        num_images = sum(pyarrow.parquet.read_metadata(shard).num_rows for shard in shards)
        num_bytes = sum(shard.stat().st_size for shard in shards)
        print(
            f"{num_images} images, {num_bytes / num_images / 1000:.1f} kB an image, {num_bytes / 1e6:.1f} MB in all,"
            f" {num_encoded / seconds:.1f} images/s. Train with --latents {output_dir}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
