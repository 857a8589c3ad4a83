# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
A folder of VAE latents, which `training/precompute_latents.py` writes and `training/train_rra.py --latents` reads:

    folder/latents.json             what was encoded, with which VAE and teacher
    folder/<split>/00000-00000.parquet ...
                                    shards, named by the number of the source's file and of the shard in it
    folder/<split>/00000.json ...   how many shards a file of the source makes, written when all of it has been read

A row holds the moments of the posterior for an image and for its mirror image, the label, and either the image or the
teacher's features of both.
"""

import glob
import hashlib
import os
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers.models import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from flowback_hf.data.images import image_to_tensor
from flowback_hf.data.noise import RowGenerator
from flowback_hf.files import read_json
from flowback_hf.pipelines.pipeline_flowback import scale_latents


SETTINGS_FILE = "latents.json"


def hash_weights(module: torch.nn.Module) -> str:
    """The SHA-256 of a module's weights in float32, by name. Latents recognise their VAE by it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_vae(name: str, subfolder: str | None, cache_dir: str | None = None) -> AutoencoderKL:
    """Load a frozen VAE in float32. Raises ValueError if there is none."""
    try:
        vae = AutoencoderKL.from_pretrained(name, subfolder=subfolder, cache_dir=cache_dir)
        return vae.eval().requires_grad_(False)
    except OSError as error:
        raise ValueError(f"`--vae_model_name_or_path` {name!r} cannot be loaded: {error}") from error


def read_latents_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """
    Read what a folder of latents holds: the values of its `latents.json`.

    Raises:
        ValueError: if the folder holds no latents, or not all of them yet.
    """
    settings = read_json(Path(folder) / SETTINGS_FILE)
    if settings is None:
        raise ValueError(
            f"`--latents` must be a folder of training/precompute_latents.py, but {str(folder)!r} has no"
            f" {SETTINGS_FILE}."
        )
    for split, num_sources in settings["num_sources"].items():
        for source in range(num_sources):
            missing = missing_shards(Path(folder) / split, source)
            if missing is None or missing:
                raise ValueError(
                    f"`--latents` {str(folder)!r} is not complete: file {source} of the split {split!r} is not encoded"
                    " to its end. Run training/precompute_latents.py again, which goes on where it was."
                )
    return settings


def shard_name(source: int, shard: int) -> str:
    return f"{source:05d}-{shard:05d}.parquet"


def missing_shards(folder: Path, source: int) -> list[int] | None:
    """The numbers of a source file's shards that are missing; `None` if it is not known how many there will be."""
    record = read_json(folder / f"{source:05d}.json")
    if record is None:
        return None
    return [shard for shard in range(record["num_shards"]) if not (folder / shard_name(source, shard)).exists()]


def load_latents(
    folder: str | os.PathLike, cache_dir: str | None = None, streaming: bool = False
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """
    Load the rows of a complete folder, by split: memory-mapped, or streamed.

    To map them, `datasets` first makes Arrow files of the shards in its cache.
    """
    settings = read_latents_settings(folder)
    # `datasets` reads names as patterns.
    files = {
        split: [glob.escape(str(path)) for path in sorted((Path(folder) / split).glob("*.parquet"))]
        for split in settings["num_sources"]
    }
    return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir, streaming=streaming)


class LatentReader:
    """
    Turns a row of [`load_latents`] into an item of [`LatentDataset`].

    Args:
        label_column, label_ids: As in [`LatentDataset`].
    """

    def __init__(self, label_column: str | None, label_ids: list[int]):
        self.label_column = label_column
        self.label_ids = label_ids

    def prepare(
        self, rows: datasets.Dataset | datasets.IterableDataset
    ) -> datasets.Dataset | datasets.IterableDataset:
        """The rows as this reads them, as arrays."""
        return rows.with_format("numpy")

    def __call__(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """Read a row of what [`prepare`] returned. `name` is not used: there is nothing to complain about."""
        item = {"moments": torch.from_numpy(row["moments"]), "class_labels": self._class_label(row)}
        if "teacher_features" in row:
            item["teacher_features"] = torch.from_numpy(row["teacher_features"])
        if "image" in row:
            item["images"] = image_to_tensor(row["image"])
        return item

    def _class_label(self, row: dict[str, Any]) -> int:
        label = None if self.label_column is None else row[self.label_column]
        # A column of numbers holds NaN, as an array, where a label is missing.
        is_class = label is not None and label >= 0
        return self.label_ids[int(label)] if is_class else -1


class LatentDataset(torch.utils.data.Dataset):
    """
    Items to train a latent flow on, from rows of [`load_latents`].

    An item holds `moments` `(2, 2 * latent_channels, latent_size, latent_size)` in float16, those of the image and of
    its mirror image; `class_labels`, an `int`; `skipped`, which is empty; and, if they are stored, `images` in [-1, 1]
    or `teacher_features` `(2, num_tokens, feature_dim)`, again of both.

    Args:
        rows (`datasets.Dataset`): Rows of one split.
        label_column (`str`, *optional*): The column of class ids. `None` gives every image the label -1.
        label_ids (`list[int]`): The flow's class id of each class id of the data set.
    """

    def __init__(self, rows: datasets.Dataset, label_column: str | None, label_ids: list[int]):
        self.reader = LatentReader(label_column, label_ids)
        self.rows = self.reader.prepare(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.reader(self.rows[index], f"row {index}") | {"skipped": []}


def draw_latents(moments: torch.Tensor, vae_config: Any, generator: RowGenerator) -> torch.Tensor:
    """
    Draw the data of a latent flow from a VAE's posterior, and scale them.

    Args:
        moments (`torch.Tensor` of shape `(batch_size, 2 * latent_channels, height, width)`):
            Means, then logarithms of the variances.
        vae_config: The VAE's config, for its `scaling_factor` and `shift_factor`.
        generator ([`RowGenerator`]): Decides the draw, on the device of `moments`.
    Returns:
        `torch.Tensor` of shape `(batch_size, latent_channels, height, width)` in float32.
    """
    posterior = DiagonalGaussianDistribution(moments.float())
    latents = posterior.mean + posterior.std * generator.randn(tuple(posterior.mean.shape))
    return scale_latents(latents, vae_config)
