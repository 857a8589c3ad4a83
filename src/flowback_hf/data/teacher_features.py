# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
A teacher's features, computed once: a folder that `training/precompute_features.py` writes and
`training/train_rra.py --teacher_features` reads.

    folder/features.json            which teacher, grid and images
    folder/shard-00000/ ...         rows of `features` (2, num_tokens, feature_dim) and the image's `checksum`
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from flowback_hf.alignment.teacher import DEFAULT_TEACHER, RepresentationTeacher
from flowback_hf.data.images import ImageDataset, checksum, collate
from flowback_hf.files import compare_settings, read_json, write_json, write_whole


SETTINGS_FILE = "features.json"
BYTES_PER_NUMBER = 2


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
        raise ValueError(
            f"`--teacher_model_name_or_path` cannot be loaded. {error} To train without a teacher, leave it out;"
            " training/train_rra.py then needs --alignment none."
        ) from error
    return teacher.to(accelerator.device)


class ShuffledImages(torch.utils.data.Dataset):
    """
    Images of a data set, each with the image whose features it gets, `seen`.

    Args:
        dataset ([`ImageDataset`]): The images.
        partners (`Sequence[int]`): For each row, that of the image whose features it gets.
    """

    def __init__(self, dataset: ImageDataset, partners: Sequence[int]):
        self.dataset = dataset
        self.partners = partners

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index] | {"seen": self.dataset[self.partners[index]]["images"]}


def shuffle_within(labels: Sequence[Any], seed: int) -> list[int]:
    """
    Give each row another row with the same label, each once. A row that is alone with its label keeps itself.

    Args:
        labels (`Sequence`): The label of each row.
        seed (`int`): Decides which row.
    Returns:
        `list[int]`: The other row of each row.

    Example:
        ```py
        >>> from flowback_hf.data.teacher_features import shuffle_within

        >>> shuffle_within(["cat", "dog", "cat", "bird"], seed=0)
        [2, 1, 0, 3]
        ```
    """
    rows_of_label: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of_label.setdefault(label, []).append(row)
    rng = np.random.default_rng(seed)
    partners = np.empty(len(labels), dtype=int)
    for rows in rows_of_label.values():
        # A cycle through all rows in a random order leaves none in its place.
        cycle = rng.permutation(rows)
        partners[cycle] = np.roll(cycle, 1)
    return partners.tolist()


def describe_features(
    teacher_name: str | None,
    teacher: RepresentationTeacher,
    dataset: ImageDataset,
    images_per_shard: int,
    shuffle: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """
    What `features.json` says: the teacher, the grid, how many images of which size there are in each shard, and how
    their features are shuffled.
    """
    return {
        "teacher": teacher_name or DEFAULT_TEACHER,
        "feature_dim": teacher.feature_dim,
        "grid_size": teacher.grid_size,
        "resolution": dataset.sample_size,
        "in_channels": dataset.in_channels,
        "num_images": len(dataset),
        "images_per_shard": images_per_shard,
        "num_shards": -(-len(dataset) // images_per_shard),
        "bytes_per_image": 2 * teacher.grid_size**2 * teacher.feature_dim * BYTES_PER_NUMBER,
        "shuffle": shuffle,
        "shuffle_seed": None if shuffle is None else seed,
    }


def open_features_folder(folder: Path, settings: dict[str, Any]):
    """
    Make a folder for features, or find the one that was begun. Called by the main process.

    Args:
        folder (`pathlib.Path`): Where the shards go.
        settings (`dict`): What [`describe_features`] returned.
    Raises:
        ValueError: if the folder holds other features or something else.
        OSError: if the features do not fit on the disk.
    """
    earlier = read_json(folder / SETTINGS_FILE)
    if earlier is not None:
        different = compare_settings(earlier, settings)
        if different:
            raise ValueError(f"`--output_dir` {folder} holds other features; they differ in {', '.join(different)}.")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`--output_dir` {folder} must be empty or hold features, but holds something else.")
    folder.mkdir(parents=True, exist_ok=True)
    done = len(list(folder.glob("shard-*"))) / settings["num_shards"]
    needed = (1 - done) * settings["num_images"] * settings["bytes_per_image"]
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The features need {needed / 2**30:.1f} GiB, but {folder} has {free / 2**30:.1f} GiB left. Free some"
            " or choose another --output_dir: what is done is kept."
        )
    write_json(folder / SETTINGS_FILE, settings)


def write_missing_shards(
    dataset: ImageDataset | ShuffledImages,
    teacher: RepresentationTeacher,
    folder: Path,
    accelerator: Accelerator,
    images_per_shard: int,
    batch_size: int,
    num_workers: int = 0,
) -> int:
    """
    Compute the features of every image and its mirror image, shard by shard, where a shard is missing.

    Args:
        dataset ([`ImageDataset`] or [`ShuffledImages`]): The training images.
        teacher ([`RepresentationTeacher`]): The encoder.
        folder (`pathlib.Path`): Where the shards go.
        accelerator (`accelerate.Accelerator`): Its processes take turns.
        images_per_shard (`int`), batch_size (`int`), num_workers (`int`): Images at a time, and processes that load.
    Returns:
        `int`: how many images this process has seen.
    """
    starts = range(0, len(dataset), images_per_shard)
    mine = list(enumerate(starts))[accelerator.process_index :: accelerator.num_processes]
    missing = {number: start for number, start in mine if not shard_path(folder, number).exists()}
    indices = {number: range(len(dataset))[start : start + images_per_shard] for number, start in missing.items()}
    total = sum(map(len, indices.values()))
    is_quiet = not accelerator.is_local_main_process
    with tqdm(total=total, desc="Features", unit="image", disable=is_quiet) as progress_bar:
        for number, own in indices.items():
            loader = torch.utils.data.DataLoader(
                torch.utils.data.Subset(dataset, own), batch_size, num_workers=num_workers, collate_fn=collate
            )
            features, checksums = [], []
            for batch in loader:
                images = batch.get("seen", batch["images"]).to(accelerator.device)
                both = torch.stack([teacher(images), teacher(images.flip(-1))], dim=1)
                features.append(both.half().cpu().numpy())
                checksums += [checksum(image) for image in batch["images"]]
                progress_bar.update(len(images))
            write_shard(shard_path(folder, number), np.concatenate(features), checksums)
    return total


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
