# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
A teacher's features, computed once: a folder that `training/precompute_features.py` writes and
`training/train_rra.py --teacher_features` reads.

    folder/features.json            which teacher, grid and images
    folder/shard-00000/ ...         rows of `features` (2, num_tokens, feature_dim) and the image's `checksum`
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator

from flowback_hf.alignment.teacher import DEFAULT_TEACHER, RepresentationTeacher
from flowback_hf.files import read_json, write_whole


SETTINGS_FILE = "features.json"


def load_teacher(
    name: str | None, grid_size: int, accelerator: Accelerator, cache_dir: str | None = None
) -> RepresentationTeacher:
    """
    Load a teacher in the precision and on the device of an accelerator.

    Args:
        name (`str`, *optional*): A Hub id or a folder. Default: DINOv2-B.
        grid_size (`int`): Height and width of the flow's token grid.
        accelerator (`accelerate.Accelerator`): Decides device and dtype.
        cache_dir (`str`, *optional*): Where models of the Hub are kept.
    Raises:
        ValueError: if it cannot be loaded.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    try:
        teacher = RepresentationTeacher.from_pretrained(
            name or DEFAULT_TEACHER, grid_size=grid_size, dtype=dtype, cache_dir=cache_dir
        )
    except OSError as error:
        raise ValueError(f"`--teacher_model_name_or_path` cannot be loaded. {error}") from error
    return teacher.to(accelerator.device)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard of features is, numbered from 0."""
    return folder / f"shard-{number:05d}"


def write_shard(path: Path, features: np.ndarray, checksums: list[int]):
    """
    Write a shard of features, whole or not at all.

    Args:
        path (`pathlib.Path`): As [`shard_path`] gives it.
        features (`np.ndarray` of shape `(num_images, 2, num_tokens, feature_dim)`):
            The features of each image and of its mirror image.
        checksums (`list[int]`): [`checksum`] of each image.
    """
    columns = datasets.Features(
        {"features": datasets.Array3D(features.shape[1:], "float16"), "checksum": datasets.Value("uint32")}
    )
    with write_whole(path) as partial:
        datasets.Dataset.from_dict({"features": features, "checksum": checksums}, columns).save_to_disk(str(partial))


def load_teacher_features(folder: str, config: Any, num_images: int) -> tuple[datasets.Dataset, int]:
    """
    Load stored features, memory-mapped.

    Args:
        folder (`str`): What `training/precompute_features.py` wrote.
        config: Of the flow: its `sample_size`, `in_channels` and `patch_size`.
        num_images (`int`): Rows of the training split.
    Returns:
        `tuple`: the rows, in the order of the training split, and the dimension of the features.
    Raises:
        ValueError: if they are incomplete or of other images or another grid than this run's.
    """
    settings = read_json(Path(folder) / SETTINGS_FILE)
    if settings is None:
        raise ValueError(
            f"`--teacher_features` must be a folder of training/precompute_features.py, but {folder!r} has no"
            f" {SETTINGS_FILE}."
        )
    expected = {
        "num_images": num_images,
        "resolution": config.sample_size,
        "in_channels": config.in_channels,
        "grid_size": config.sample_size // config.patch_size,
    }
    for name, value in expected.items():
        if settings[name] != value:
            raise ValueError(
                f"`--teacher_features` must have `{name}` {value}, as this run, but have {settings[name]}."
            )
    shards = sorted(Path(folder).glob("shard-*"))
    if len(shards) != settings["num_shards"]:
        raise ValueError(
            f"`--teacher_features` must be complete, but {folder!r} holds {len(shards)} of {settings['num_shards']}"
            " shards: run training/precompute_features.py again, which goes on where it was."
        )
    rows = datasets.concatenate_datasets([datasets.load_from_disk(str(shard)) for shard in shards])
    return rows.with_format("numpy"), settings["feature_dim"]
