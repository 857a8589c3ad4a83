# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
What `training/precompute_latents.py` writes and `training/train_rra.py --latents` reads:

    folder/latents.json             what was encoded, with which VAE and teacher
    folder/<split>/00000-00000.parquet ...
                                    shards: number of the source's file, number of the shard in it
    folder/<split>/00000.json ...   how many shards a file of the source makes, once all of it has been read

A row holds the posterior's moments of an image and of its mirror image, the label, and the image or the teacher's
features of both.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers.models import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from flowback_hf.pipelines.pipeline_flowback import scale_latents


SETTINGS_FILE = "latents.json"


def hash_weights(module: torch.nn.Module) -> str:
    """By which latents know the VAE that they are of: the SHA-256 of its weights in float32, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_vae(name: str, subfolder: str | None, cache_dir: str | None = None) -> AutoencoderKL:
    """In float32. Raises ValueError if there is none."""
    try:
        return (
            AutoencoderKL.from_pretrained(name, subfolder=subfolder, cache_dir=cache_dir).eval().requires_grad_(False)
        )
    except OSError as error:
        raise ValueError(f"`--vae_model_name_or_path` {name!r} cannot be loaded: {error}") from error


def read_latents_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """
    What is in a folder of latents.

    Raises:
        ValueError: if it is none, or not complete.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.exists():
        raise ValueError(
            f"`--latents` must be a folder of training/precompute_latents.py, but {str(folder)!r} has no"
            f" {SETTINGS_FILE}."
        )
    settings = json.loads(path.read_text())
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
    """Shards of a file of the source that are not there yet; `None` if their number is not known yet."""
    path = folder / f"{source:05d}.json"
    if not path.exists():
        return None
    num_shards = json.loads(path.read_text())["num_shards"]
    return [shard for shard in range(num_shards) if not (folder / shard_name(source, shard)).exists()]


def load_latents(folder: str | os.PathLike, cache_dir: str | None = None) -> datasets.DatasetDict:
    """The rows of a complete folder, memory-mapped; `datasets` makes Arrow files of the shards in its cache first."""
    settings = read_latents_settings(folder)
    files = {split: sorted(map(str, (Path(folder) / split).glob("*.parquet"))) for split in settings["num_sources"]}
    return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir)


class LatentDataset(torch.utils.data.Dataset):
    """
    Items for training a latent flow, from rows of [`load_latents`].

    An item holds `moments` `(2, 2 * latent_channels, latent_size, latent_size)` in float16, those of the image and of
    its mirror image; `class_labels`; and, as far as they are stored, `images` in [-1, 1] and `teacher_features`
    `(2, num_tokens, feature_dim)`, again of both.
    """

    def __init__(self, rows: datasets.Dataset, label_column: str | None, label_ids: list[int]):
        self.rows = rows.with_format("numpy")
        self.label_column = label_column
        self.label_ids = label_ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        label = -1 if self.label_column is None else int(row[self.label_column])
        item = {
            "moments": torch.from_numpy(row["moments"]),
            "class_labels": -1 if label < 0 else self.label_ids[label],
            "skipped": [],
        }
        if "teacher_features" in row:
            item["teacher_features"] = torch.from_numpy(row["teacher_features"])
        if "image" in row:
            pixels = torch.tensor(row["image"])
            item["images"] = pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1) / 127.5 - 1
        return item


def draw_latents(moments: torch.Tensor, vae_config: Any, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    The data of a latent flow: a draw from a VAE's posterior, scaled.

    Args:
        moments (`torch.Tensor` of shape `(batch_size, 2 * latent_channels, height, width)`):
            Means, then logarithms of variances.
        vae_config: Of the VAE: its `scaling_factor` and `shift_factor`.
        generator (`torch.Generator`, *optional*): Decides the draw.
    Returns:
        `torch.Tensor` of shape `(batch_size, latent_channels, height, width)` in float32.
    """
    return scale_latents(DiagonalGaussianDistribution(moments.float()).sample(generator), vae_config)
