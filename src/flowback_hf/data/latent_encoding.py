# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Encoding a data set with a VAE, streaming and resumable: what `training/precompute_latents.py` does."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.models import AutoencoderKL
from tqdm.auto import tqdm

from flowback_hf.alignment.teacher import DEFAULT_TEACHER, RepresentationTeacher
from flowback_hf.data.images import decode_image, image_mode, image_to_tensor, name_of_file
from flowback_hf.data.latents import SETTINGS_FILE, hash_weights, missing_shards, shard_name
from flowback_hf.data.splits import (
    DataSource,
    check_image_column,
    check_streamed_labels,
    check_train_split,
    check_usable,
    held_out_split,
)
from flowback_hf.files import compare_settings, read_json, write_json, write_whole
from flowback_hf.pipelines.pipeline_flowback import fit_image, vae_scale_factor


logger = get_logger(__name__, log_level="INFO")

DEFAULT_IMAGE_SIZE = 224


def open_streams(
    source: DataSource, image_column: str, label_column: str | None
) -> dict[str, datasets.IterableDataset]:
    """
    Open the training split and, if there is one, the held-out split, as streams of undecoded images and labels.

    Args:
        source ([`DataSource`]): The data set.
        image_column (`str`): The column of images.
        label_column (`str`, *optional*): The column of labels; `None` leaves them out.
    Returns:
        `dict`: `"train"` and possibly `"validation"`.
    Raises:
        ValueError: if a column is missing, if no image can be used, or if labels have no names: a stream cannot be
            searched for its classes.
    """
    streams = source.open(streaming=True)
    check_train_split(streams)
    features = streams["train"].features
    check_image_column(features, image_column)
    columns = [image_column]
    if label_column is not None:
        check_streamed_labels(features, label_column)
        columns.append(label_column)
    names = {"train": "train", "validation": held_out_split(streams)}
    chosen = {
        name: streams[split].select_columns(columns).cast_column(image_column, datasets.Image(decode=False))
        for name, split in names.items()
        if split is not None
    }
    for name, rows in chosen.items():
        check_usable(name, rows, image_column)
    return chosen


def describe_latents(
    data: str,
    vae: AutoencoderKL,
    vae_name: str,
    vae_subfolder: str | None,
    resolution: int,
    store: str,
    images_per_shard: int,
    streams: dict[str, datasets.IterableDataset],
    image_size: int | None = None,
    teacher: RepresentationTeacher | None = None,
    teacher_name: str | None = None,
) -> dict[str, Any]:
    """
    What `latents.json` says, which tells these latents from others.

    Args:
        data (`str`): The data set's id or folder.
        vae ([`~diffusers.AutoencoderKL`]), vae_name (`str`), vae_subfolder (`str`, *optional*): The VAE.
        resolution (`int`): Height and width of the encoded images, in pixels.
        store (`str`): What is stored for the alignment: `"image"`, `"features"` or `"none"`.
        images_per_shard (`int`): Images in a shard.
        streams (`dict`): What [`open_streams`] returned.
        image_size (`int`, *optional*): Height and width of stored images. Default: the resolution, at most 224.
        teacher ([`RepresentationTeacher`], *optional*), teacher_name (`str`, *optional*): Whose features are stored.
    Raises:
        ValueError: if the VAE does not take the images.
    """
    factor = vae_scale_factor(vae)
    if resolution % factor != 0:
        raise ValueError(f"`--resolution` must be a multiple of the VAE's factor {factor}, but is {resolution}.")
    if vae.config.in_channels not in (1, 3):
        raise ValueError(f"The VAE must take images of 1 or 3 channels, but takes {vae.config.in_channels}.")
    settings = {
        "data": data,
        "vae": vae_name,
        "vae_subfolder": vae_subfolder,
        "vae_hash": hash_weights(vae),
        "resolution": resolution,
        "latent_channels": vae.config.latent_channels,
        "latent_size": resolution // factor,
        "store": store,
        "images_per_shard": images_per_shard,
        "num_sources": {name: rows.num_shards for name, rows in streams.items()},
    }
    if store == "image":
        settings["image_size"] = image_size or min(resolution, DEFAULT_IMAGE_SIZE)
    if teacher is not None:
        settings["teacher"] = teacher_name or DEFAULT_TEACHER
        settings["grid_size"] = teacher.grid_size
        settings["feature_dim"] = teacher.feature_dim
    return settings


def open_latents_folder(folder: Path, settings: dict[str, Any], accelerator: Accelerator):
    """
    Make a folder for latents, or find the one that was begun. Called by every process.

    Raises:
        ValueError: if the folder holds other latents or something else.
    """
    earlier = read_json(folder / SETTINGS_FILE)
    if earlier is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`--output_dir` {folder} must be empty or hold latents, but holds something else.")
    different = [] if earlier is None else compare_settings(earlier, settings)
    if different:
        raise ValueError(f"`--output_dir` {folder} holds other latents; they differ in {', '.join(different)}.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS_FILE, settings)
    accelerator.wait_for_everyone()


def columns_of(settings: dict[str, Any], label: datasets.ClassLabel | None) -> datasets.Features:
    """The columns of a shard."""
    size = settings["latent_size"]
    columns = {"moments": datasets.Array4D((2, 2 * settings["latent_channels"], size, size), "float16")}
    if label is not None:
        columns["label"] = label
    if settings["store"] == "image":
        columns["image"] = datasets.Image()
    if settings["store"] == "features":
        shape = (2, settings["grid_size"] ** 2, settings["feature_dim"])
        columns["teacher_features"] = datasets.Array3D(shape, "float16")
    return datasets.Features(columns)


def is_whole(path: Path) -> bool:
    """Whether a shard can be read to its end, which is where a parquet file says what it holds."""
    try:
        return pyarrow.parquet.read_metadata(path).num_rows > 0
    except (OSError, pyarrow.ArrowInvalid):
        return False


def write_shard(path: Path, values: dict[str, Any], columns: datasets.Features):
    """Write a shard, whole or not at all."""
    with write_whole(path) as partial:
        datasets.Dataset.from_dict(values, columns).to_parquet(str(partial))


class LatentEncoder:
    """
    Turns rows of images into the values of a shard's columns.

    Args:
        settings (`dict`): What [`describe_latents`] returned.
        vae ([`~diffusers.AutoencoderKL`]): On the accelerator's device.
        teacher ([`RepresentationTeacher`], *optional*): For `"features"` in `store`.
        accelerator (`accelerate.Accelerator`): Its device and precision.
        image_column (`str`), label_column (`str`, *optional*): Columns of the rows.
        batch_size (`int`): Images that are encoded together.
        num_threads (`int`): Threads that decode images.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        vae: AutoencoderKL,
        teacher: RepresentationTeacher | None,
        accelerator: Accelerator,
        image_column: str,
        label_column: str | None,
        batch_size: int,
        num_threads: int,
    ):
        self.settings, self.accelerator = settings, accelerator
        self.vae, self.teacher = vae, teacher
        self.image_column, self.label_column = image_column, label_column
        self.batch_size = batch_size
        self.mode = image_mode(vae.config.in_channels)
        self.executor = ThreadPoolExecutor(num_threads)

    def __call__(self, rows: list[dict[str, Any]], progress_bar: tqdm) -> dict[str, Any]:
        """
        Encode rows. One whose image cannot be used is left out, with a warning.

        Raises:
            ValueError: if no image can be used.
        """
        kept, values = [], {}
        batch = []
        # decoded ahead of what is encoded
        for number, image in enumerate(self.executor.map(self._decode, rows)):
            if isinstance(image, ValueError):
                name = name_of_file(rows[number][self.image_column], f"row {number} of a shard")
                logger.warning(f"Skipped an image: {name} {image}.", main_process_only=False)
            else:
                kept.append(rows[number])
                batch.append(image)
            if batch and (len(batch) == self.batch_size or number == len(rows) - 1):
                for name, value in self._encode(batch).items():
                    values.setdefault(name, []).extend(value)
                batch = []
            progress_bar.update()
        if not kept:
            raise ValueError(f"None of {len(rows)} images that follow one another can be used: is this image data?")
        if self.label_column is not None:
            values["label"] = [row[self.label_column] for row in kept]
        return values

    def _decode(self, row: dict[str, Any]) -> PIL.Image.Image | ValueError:
        """The image, resized and center-cropped; if it cannot be used, the reason."""
        try:
            image = decode_image(row[self.image_column], self.mode)
        except ValueError as error:
            return error
        return fit_image(image, self.settings["resolution"])

    @torch.no_grad()
    def _encode(self, batch: list[PIL.Image.Image]) -> dict[str, Any]:
        images = torch.stack([image_to_tensor(image) for image in batch]).to(self.accelerator.device)
        both = (images, images.flip(-1))
        with self.accelerator.autocast():
            moments = [self.vae.encode(flip).latent_dist.parameters for flip in both]
        values = {"moments": to_float16(moments)}
        if self.settings["store"] == "image":
            values["image"] = [fit_image(image, self.settings["image_size"]) for image in batch]
        if self.teacher is not None:
            values["teacher_features"] = to_float16([self.teacher(flip) for flip in both])
        return values


def to_float16(both: list[torch.Tensor]) -> np.ndarray:
    """What was computed for images and for their mirror images, side by side: `(batch_size, 2, ...)`."""
    return torch.stack(both, dim=1).half().cpu().numpy()


def in_shards(rows: datasets.IterableDataset, size: int) -> Iterator[list[dict[str, Any]]]:
    shard = []
    for row in rows:
        shard.append(row)
        if len(shard) == size:
            yield shard
            shard = []
    if shard:
        yield shard


def encode_split(
    rows: datasets.IterableDataset,
    folder: Path,
    columns: datasets.Features,
    encoder: LatentEncoder,
    progress_bar: tqdm,
    process_index: int = 0,
    num_processes: int = 1,
) -> int:
    """
    Write this process's missing shards of a split.

    Processes share the files of the source or, if it has fewer files than there are processes, the shards.

    Returns:
        `int`: how many images were gone through.
    """
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
        for number, shard in enumerate(in_shards(rows_of_source, encoder.settings["images_per_shard"])):
            num_shards += 1
            path = folder / shard_name(source, number)
            if (shares_files or number % num_processes == process_index) and not path.exists():
                write_shard(path, encoder(shard, progress_bar), columns)
                num_images += len(shard)
        if shares_files or process_index == 0:
            write_json(folder / f"{source:05d}.json", {"num_shards": num_shards})
    return num_images
