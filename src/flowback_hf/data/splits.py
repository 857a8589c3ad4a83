# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Data sets and their splits: opened, checked and held out in one way by training, precomputing and evaluation.
"""

import argparse
import glob
import numbers
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from flowback_hf.data.images import decode_image, name_of_file
from flowback_hf.data.latents import load_latents, read_latents_settings
from flowback_hf.data.streams import Stream
from flowback_hf.files import read_json, write_json


# The splits that hold validation images, by preference.
HELD_OUT_SPLITS = ("validation", "val", "test")
HOLD_OUT_FILE = "held_out.json"


@dataclass(frozen=True)
class DataSource:
    """
    Where a data set is: a data set of the Hub, a folder that `datasets` loads, an image folder or a parquet file.

    Args:
        option (`str`): The flag that named it, for messages, such as `"--train_data_dir"`.
        name (`str`): A Hub id, a folder, or a file that ends in `.parquet`.
        is_image_folder (`bool`): Whether it is a folder with one folder of images for each class.
        config_name (`str`, *optional*): Which configuration of a data set with several.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it prepares.
    """

    option: str
    name: str
    is_image_folder: bool
    config_name: str | None = None
    cache_dir: str | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "DataSource":
        """The source that `--train_data_dir` (`--data_dir` for evaluation) or `--dataset_name` names."""
        for option in ("train_data_dir", "data_dir"):
            folder = getattr(args, option, None)
            if folder is not None:
                return cls(f"--{option}", folder, True, cache_dir=args.cache_dir)
        return cls("--dataset_name", args.dataset_name, False, args.dataset_config_name, args.cache_dir)

    def open(self, streaming: bool = False) -> datasets.DatasetDict | datasets.IterableDatasetDict:
        """
        All splits of the data set.

        Args:
            streaming (`bool`, defaults to `False`): Read rows one after another instead of preparing a cache of them.
        Raises:
            ValueError: if there is no such folder, or nothing in it that can be loaded.
        """
        # `datasets` reads names of files as patterns: brackets in the name of one that exists are escaped.
        name = glob.escape(self.name) if Path(self.name).exists() else self.name
        builder = {"path": self.name, "name": self.config_name}
        if self.is_image_folder:
            if not Path(self.name).is_dir():
                raise ValueError(f"`{self.option}` must be an existing folder, but is {self.name!r}.")
            builder = {"path": "imagefolder", "data_dir": name}
        elif self.name.endswith(".parquet"):
            builder = {"path": "parquet", "data_files": name}
        try:
            return datasets.load_dataset(**builder, cache_dir=self.cache_dir, streaming=streaming)
        except (OSError, ValueError) as error:
            raise ValueError(f"`{self.option}` {self.name!r} holds no images that can be loaded: {error}") from error


def check_column(features: datasets.Features | None, option: str, column: str):
    """Raise ValueError unless `column`, the value of the flag `option`, is a column."""
    if column not in (features or {}):
        cure = " A flow without classes needs none: give --unconditional." if option == "--label_column" else ""
        raise ValueError(
            f"`{option}` must be a column of the data set, one of {list(features or {})}, but is {column!r}.{cure}"
        )


def check_image_column(features: datasets.Features | None, column: str):
    """Raise ValueError unless `column`, the value of `--image_column`, is a column that may hold images or paths."""
    check_column(features, "--image_column", column)
    feature = features[column]
    may_be_paths = isinstance(feature, datasets.Value) and feature.dtype.endswith(("string", "binary"))
    if not (isinstance(feature, datasets.Image | dict) or may_be_paths):
        raise ValueError(f"`--image_column` must be a column of images, but {column!r} holds {feature}.")


def held_out_split(splits: datasets.DatasetDict | datasets.IterableDatasetDict) -> str | None:
    """The name of the split that holds validation images; `None` if there is none."""
    return next((name for name in HELD_OUT_SPLITS if name in splits), None)


def encode_labels(splits: datasets.DatasetDict, label_column: str) -> datasets.DatasetDict:
    """
    Number labels that are text or anything else, in their order. Missing and negative labels are no class.

    All splits are numbered together, so that one that lacks a class numbers the others alike.

    Raises:
        ValueError: if labels are lists or the like.
    """
    features = splits["train"].features
    if not isinstance(features[label_column], datasets.Value):
        raise ValueError(
            f"`--label_column` must hold one class per row, but {label_column!r} holds {features[label_column]}."
        )
    values = {value for rows in splits.values() for value in rows.unique(label_column)} - {None}
    values = sorted(value for value in values if not isinstance(value, numbers.Real) or value >= 0)
    label_ids = {value: number for number, value in enumerate(values)}
    encoded = features.copy()
    encoded[label_column] = datasets.ClassLabel(names=[str(value) for value in values])
    return splits.map(
        lambda labels: {label_column: [label_ids.get(label) for label in labels]},
        input_columns=[label_column],
        batched=True,
        features=encoded,
    )


@dataclass(frozen=True)
class HoldOut:
    """
    The share of a training split that a run held out, because its data set has no validation split.

    Args:
        share (`float`): Of the rows, between 0 and 1.
        seed (`int`): Decides which ones.
        num_images (`int`, *optional*): Rows before the share was taken. `None` is not known.
        checksum (`int`, *optional*): Of the contents of the images that were held out. `None` is not known.
    """

    share: float
    seed: int
    num_images: int | None = None
    checksum: int | None = None

    def split(self, rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
        """The rows to train on and those held out."""
        halves = rows.train_test_split(test_size=self.share, seed=self.seed)
        return halves["train"], halves["test"]

    def identify(self, rows: datasets.Dataset, held_out: datasets.Dataset, image_column: str) -> "HoldOut":
        """The same with what tells these images from others."""
        return replace(self, num_images=len(rows), checksum=checksum_of_files(held_out, image_column))

    def write(self, folder: Path):
        """Write what a later evaluation needs into a run's folder."""
        write_json(folder / HOLD_OUT_FILE, asdict(self))

    @classmethod
    def read(cls, folder: str | Path, data: str) -> "HoldOut | None":
        """
        Read what the run in a folder held out of a data set; `None` if nothing is known of it.

        A run on latents, and any of version 0.1.0, left no such file. If its arguments name these data, they say what
        it held out.

        Args:
            folder (`str`): The output folder of the run.
            data (`str`): The name of a [`DataSource`], or the folder of latents.
        """
        record = read_json(Path(folder) / HOLD_OUT_FILE)
        if record is not None:
            return cls(**record)
        arguments = read_json(Path(folder) / "training_args.json") or {}
        named = (arguments.get(name) for name in ("latents", "train_data_dir", "dataset_name"))
        trained_on = next((name for name in named if name is not None), None)
        if trained_on is None or Path(trained_on).resolve() != Path(data).resolve():
            return None
        return cls(arguments["train_val_split"], arguments["seed"])

    def check(self, rows: datasets.Dataset, held_out: datasets.Dataset, image_column: str):
        """Raise ValueError unless `held_out`, a share of `rows`, are the images that the run held out."""
        known = self.num_images is not None
        if known and (self.num_images, self.checksum) != (len(rows), checksum_of_files(held_out, image_column)):
            raise ValueError(
                "The images that training held out cannot be told from the others: this data set is not the one that"
                f" the flow was trained on, which had {self.num_images} images, or it has changed since. It has"
                f" {len(rows)} images. --split all evaluates on all of them, those that it was trained on included."
            )


def checksum_of_files(rows: datasets.Dataset, image_column: str) -> int:
    """
    A checksum of the contents of images, of which `datasets` holds the bytes or the path.

    Of images in an archive it is a checksum of their names in the archive.
    """
    checksum = 0
    for row in rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False)):
        file = row[image_column] or {}
        content = file.get("bytes")
        if content is None:
            path = file.get("path") or ""
            content = Path(path).read_bytes() if Path(path).is_file() else path.partition("::")[0].encode()
        checksum = zlib.crc32(content, checksum)
    return checksum


class Splits(NamedTuple):
    """
    What a flow is trained on and validated with.

    Args:
        train (`datasets.Dataset` or `datasets.IterableDataset`), validation (`datasets.Dataset`): Their rows.
        class_names (`list[str]`, *optional*): By class id; `None` without classes.
        hold_out ([`HoldOut`], *optional*): How validation rows were taken from the training split, if they were.
        latents (`dict`, *optional*): The settings of a folder of latents; `None` for images.
    """

    train: datasets.Dataset | datasets.IterableDataset
    validation: datasets.Dataset
    class_names: list[str] | None
    hold_out: HoldOut | None = None
    latents: dict[str, Any] | None = None

    @property
    def flow_sizes(self) -> dict[str, int]:
        """Arguments of the flow that the data decide: none for images, which are resized."""
        if self.latents is None:
            return {}
        return {"in_channels": self.latents["latent_channels"], "sample_size": self.latents["latent_size"]}


def load_splits(args: argparse.Namespace, earlier: HoldOut | None = None) -> Splits:
    """
    Load the training and validation rows that the data flags of `training/train_rra.py` name.

    Without a split named validation, val or test, `train_val_split` of the training rows are held out, or those that
    an earlier run on the same data held out.

    Args:
        args (`argparse.Namespace`): `dataset_name`, `dataset_config_name`, `train_data_dir` or `latents`;
            `image_column`, `label_column`, `unconditional`, `cache_dir`, `train_val_split`, `seed`,
            `max_train_samples` and `max_validation_samples`; `streaming`, if the command has it.
        earlier ([`HoldOut`], *optional*): What the earlier run held out, as [`HoldOut.read`] returns it.
    Returns:
        [`Splits`].
    Raises:
        ValueError: if the data cannot be loaded, lack a column, or hold nothing to train on or to validate with.
    """
    latents = None
    if getattr(args, "streaming", None):
        return load_streams(args)
    if getattr(args, "latents", None) is not None:
        latents = read_latents_settings(args.latents)
        splits = load_latents(args.latents, args.cache_dir)
    else:
        splits = DataSource.from_args(args).open()
    check_train_split(splits)
    if latents is None:
        check_image_column(splits["train"].features, args.image_column)
    if not args.unconditional:
        check_column(splits["train"].features, "--label_column", args.label_column)
    if not args.unconditional and not isinstance(splits["train"].features[args.label_column], datasets.ClassLabel):
        splits = encode_labels(splits, args.label_column)

    train_rows, hold_out = splits["train"], None
    name = held_out_split(splits)
    held_out = None if name is None else splits[name]
    if held_out is None and len(train_rows) > 1:
        rows = train_rows
        is_same = earlier is not None and earlier.num_images in (None, len(rows))
        hold_out = earlier if is_same else HoldOut(args.train_val_split, args.seed)
        train_rows, held_out = hold_out.split(rows)
        # The rows of latents are not those of the images: unreadable ones are left out.
        hold_out = None if latents else hold_out.identify(rows, held_out, args.image_column)
    if args.max_train_samples is not None:
        train_rows = train_rows.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(train_rows))))
    num_held_out = 0 if held_out is None else len(held_out)
    if len(train_rows) == 0 or num_held_out == 0:
        raise ValueError(
            f"The data set must hold images to train on and to validate with, but has {len(train_rows)} and"
            f" {num_held_out} rows."
        )
    class_names = None if args.unconditional else train_rows.features[args.label_column].names
    return Splits(train_rows, first_rows(held_out, args.max_validation_samples), class_names, hold_out, latents)


def load_streams(args: argparse.Namespace) -> Splits:
    """
    Open the training rows that the data flags name as a stream, and load some validation rows from another.

    Args:
        args (`argparse.Namespace`): As for [`load_splits`]; `train_val_split` and `max_train_samples` play no part.
    Raises:
        ValueError: as [`load_splits`]; also if there is no validation split, or labels have no names.
    """
    latents = None
    if args.latents is not None:
        latents = read_latents_settings(args.latents)
        streams = load_latents(args.latents, streaming=True)
    else:
        streams = DataSource.from_args(args).open(streaming=True)
    check_train_split(streams)
    features = streams["train"].features
    label_column = None if args.unconditional else args.label_column
    if latents is None:
        check_image_column(features, args.image_column)
    if label_column is not None:
        check_streamed_labels(features, label_column)
    name = held_out_split(streams)
    if name is None:
        raise ValueError(
            f"`--streaming` needs a split to validate with, one of {', '.join(HELD_OUT_SPLITS)}, but the data set has"
            f" {list(streams)}: none can be held out of a stream. Leave --streaming out, or add one."
        )
    train, held_out = streams["train"], streams[name]
    if latents is None:
        columns = [args.image_column] if label_column is None else [args.image_column, label_column]
        as_files = datasets.Image(decode=False)
        train, held_out = (
            rows.select_columns(columns).cast_column(args.image_column, as_files) for rows in (train, held_out)
        )
        check_usable("train", train, args.image_column)
        check_usable(name, held_out, args.image_column)
    else:
        held_out = held_out.select_columns(["moments"] if label_column is None else ["moments", label_column])
    validation = datasets.Dataset.from_list(
        Stream(held_out.with_format("numpy"), read=None).first_rows(args.max_validation_samples), held_out.features
    )
    class_names = None if label_column is None else features[label_column].names
    return Splits(train, validation, class_names, None, latents)


def check_streamed_labels(features: datasets.Features, label_column: str):
    """Raise ValueError unless a column holds labels with names: a stream cannot be searched for its classes."""
    check_column(features, "--label_column", label_column)
    if not isinstance(features[label_column], datasets.ClassLabel):
        raise ValueError(
            f"`--label_column` {label_column!r} must hold class labels with names (datasets.ClassLabel), but"
            f" holds {features[label_column]}: a stream cannot be searched for its classes. Cast it, or give"
            " --unconditional."
        )


def check_usable(name: str, rows: datasets.IterableDataset, image_column: str):
    """Raise ValueError if no image of a split can be used. It looks no further than the first that can."""
    reason = "there are none"
    for number, row in enumerate(rows):
        try:
            decode_image(row[image_column], "RGB")
            return
        except ValueError as error:
            reason = f"{name_of_file(row[image_column], f'row {number}')} {error}"
    raise ValueError(f"None of the images of the split {name!r} can be used. The last: {reason}.")


def check_train_split(splits: datasets.DatasetDict | datasets.IterableDatasetDict):
    """Raise ValueError if there is nothing to train on."""
    if "train" not in splits:
        raise ValueError(f"The data set must have a split named 'train', but has {list(splits)}.")


def first_rows(rows: datasets.Dataset, max_rows: int | None) -> datasets.Dataset:
    """
    At most `max_rows` rows, in an order that is always the same.

    They are shuffled: class folders lie side by side, and the first rows would be of few classes.
    """
    return rows.shuffle(seed=0).select(range(min(len(rows) if max_rows is None else max_rows, len(rows))))


def load_split(source: DataSource, split: str, image_column: str, hold_out: HoldOut | None = None) -> datasets.Dataset:
    """
    Load one split for evaluation, as training made it.

    Args:
        source ([`DataSource`]): The data set.
        split (`str`):
            The name of a split, or one of three words. `"validation"` is what training validates with: the split
            validation, val or test or, if the data set has none of them, the share that training held out. `"train"`
            is then the rest. `"all"` joins all splits.
        image_column (`str`): The column of images.
        hold_out ([`HoldOut`], *optional*): What the flow's training held out, as [`HoldOut.read`] returns it.
    Returns:
        `datasets.Dataset`: the rows.
    Raises:
        ValueError: if there is no such split; if it was held out, and the model does not say how or the data set is
            not the one that it was taken from.
    """
    splits = source.open()
    check_image_column(next(iter(splits.values())).features, image_column)
    held_out_name = held_out_split(splits)
    if split == "all":
        return datasets.concatenate_datasets(list(splits.values()))
    if split == "validation" and held_out_name is not None:
        return splits[held_out_name]
    if split in splits and (split != "train" or held_out_name is not None or hold_out is None):
        return splits[split]
    if split not in ("train", "validation") or "train" not in splits:
        raise ValueError(f"The data set has no split {split!r}, but {list(splits)}: choose one with --split.")
    if hold_out is None:
        raise ValueError(
            f"The data set has no split {split!r}, and --model has no record of images that its training held out of"
            f" this data set ({HOLD_OUT_FILE} in the output folder of training/train_rra.py; a flow trained on latents"
            " has none). --split all evaluates on all images, those that it was trained on included."
        )
    train_rows, held_out = hold_out.split(splits["train"])
    hold_out.check(splits["train"], held_out, image_column)
    return held_out if split == "validation" else train_rows
