# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Images of a data set: decoded, fitted to a flow's square and turned into tensors in [-1, 1], in one way for all."""

import zlib
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch

from flowback_hf.pipelines.pipeline_flowback import fit_image, reading_image, to_eight_bits
from flowback_hf_cli.numbers import check_number


def image_mode(num_channels: int) -> str:
    """PIL's mode of images with 1 or 3 channels. Raises ValueError for other numbers."""
    modes = {1: "L", 3: "RGB"}
    if num_channels not in modes:
        raise ValueError(f"Images must have 1 or 3 channels, but {num_channels} are asked for.")
    return modes[num_channels]


def decode_image(file: dict[str, Any] | None, mode: str) -> PIL.Image.Image:
    """
    Decode one image of a data set, upright and with 8 bits per channel, as [`to_eight_bits`] converts them.

    Args:
        file (`dict`): What `datasets.Image(decode=False)` gives: `bytes` or a `path`.
        mode (`str`): `"L"` or `"RGB"`.
    Returns:
        `PIL.Image.Image`: at its own size.
    Raises:
        ValueError: if there is no file, if it is not an image, is damaged or is too large to be safe to read, or if
            its values have no known range.
    """
    if file is None:
        raise ValueError("cannot be read: there is no image in this row")
    with reading_image():
        image = datasets.Image().decode_example(file)  # turns it upright
    return to_eight_bits(image, mode)


def name_of_file(file: dict[str, Any] | None, otherwise: str) -> str:
    """The path of an image of a data set for a message; `otherwise` if it has none."""
    return (file or {}).get("path") or otherwise


def image_to_tensor(image: PIL.Image.Image | np.ndarray) -> torch.Tensor:
    """Turn an 8-bit image, or its array `(height, width[, channels])`, into float32 `(channels, height, width)` in
    [-1, 1]."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1) / 127.5 - 1


def checksum(images: torch.Tensor) -> int:
    """A checksum of a clean image, by which stored teacher features recognise it."""
    return zlib.crc32(images.contiguous().numpy())


class ImageReader:
    """
    Turns a row of a data set into a clean image in [-1, 1], resized and center-cropped to a square, and its class id.

    Grey, CMYK, palette, transparent and 16-bit images are converted.

    Args:
        image_column, label_column, label_ids, sample_size, in_channels: As in [`ImageDataset`].
    """

    def __init__(
        self, image_column: str, label_column: str | None, label_ids: list[int], sample_size: int, in_channels: int
    ):
        check_number("sample_size", sample_size, int, at_least=1)
        self.image_column = image_column
        self.label_column = label_column
        self.label_ids = label_ids
        self.sample_size = sample_size
        self.mode = image_mode(in_channels)

    def prepare(
        self, rows: datasets.Dataset | datasets.IterableDataset
    ) -> datasets.Dataset | datasets.IterableDataset:
        """The rows as this reads them, with files that are not decoded."""
        return rows.cast_column(self.image_column, datasets.Image(decode=False))

    def __call__(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """
        Read a row.

        Args:
            row (`dict`): A row of what [`prepare`] returned.
            name (`str`): What to call it in a message if its file has no name.
        Returns:
            `dict`: `images` `(channels, sample_size, sample_size)` and `class_labels`, an `int`, -1 for no class.
        Raises:
            ValueError: if the image cannot be used. Says which, and why.
        """
        file = row[self.image_column]
        try:
            image = decode_image(file, self.mode)
        except ValueError as error:
            raise ValueError(f"{name_of_file(file, name)} {error}") from error
        images = image_to_tensor(fit_image(image, self.sample_size))
        return {"images": images, "class_labels": self._class_label(row)}

    def _class_label(self, row: dict[str, Any]) -> int:
        label = -1 if self.label_column is None else row[self.label_column]
        return -1 if label is None or label < 0 else self.label_ids[label]


class ImageDataset(torch.utils.data.Dataset):
    """
    Clean images in [-1, 1] with their class ids, resized and center-cropped to a square.

    Grey, CMYK, palette, transparent and 16-bit images are converted. An image that cannot be used is replaced by the
    next one that can, and its name is reported with the item, so that a bad file never ends a run.

    An item holds `images` `(channels, sample_size, sample_size)`, `class_labels`, an `int` (-1 for no class), and
    `skipped`, the names of files that cannot be used, and why. With `teacher_features` it also holds those of the
    image and of its mirror image, `(2, num_tokens, feature_dim)`.

    Args:
        rows (`datasets.Dataset`): Rows with an image column.
        image_column (`str`): Its name.
        label_column (`str`, *optional*): The column of class ids. `None` gives every image the label -1.
        label_ids (`list[int]`): The flow's class id of each class id of the data set.
        sample_size (`int`): Height and width of the images.
        in_channels (`int`): 1 for grey images, 3 for RGB.
        teacher_features (`datasets.Dataset`, *optional*):
            Stored features of the same rows, as [`~flowback_hf.data.load_teacher_features`] returns them.
    Raises:
        ValueError: from an item, if no image of the data set can be used or stored features are of another image.

    Example:
        ```py
        >>> import datasets
        >>> import PIL.Image
        >>> from flowback_hf.data import ImageDataset

        >>> features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
        >>> rows = datasets.Dataset.from_dict({"image": [PIL.Image.new("RGB", (9, 8))], "label": [0]}, features)
        >>> item = ImageDataset(rows, "image", "label", [0], sample_size=4, in_channels=3)[0]
        >>> item["images"].shape, item["class_labels"]
        (torch.Size([3, 4, 4]), 0)
        ```
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_column: str | None,
        label_ids: list[int],
        sample_size: int,
        in_channels: int,
        teacher_features: datasets.Dataset | None = None,
    ):
        self.reader = ImageReader(image_column, label_column, label_ids, sample_size, in_channels)
        self.rows = self.reader.prepare(rows)
        self.sample_size = sample_size
        self.in_channels = in_channels
        self.teacher_features = teacher_features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped = []
        for offset in range(len(self)):
            number = (index + offset) % len(self)
            try:
                item = self.reader(self.rows[number], f"row {number}")
            except ValueError as error:
                skipped.append(str(error))
                continue
            item["skipped"] = skipped
            if self.teacher_features is not None:
                item["teacher_features"] = self._read_teacher_features(index, item["images"])
            return item
        raise ValueError(f"None of the {len(self)} images of the data set can be used. The first: {skipped[0]}.")

    def _read_teacher_features(self, index: int, images: torch.Tensor) -> torch.Tensor:
        row = self.teacher_features[index]
        if row["checksum"] != checksum(images):
            raise ValueError(
                f"`--teacher_features` must be of this training split, but row {index} is of another image: give"
                " training/precompute_features.py the data flags, --seed and --resolution of this run."
            )
        return torch.from_numpy(row["features"])


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Stack the tensors of items of [`ImageDataset`], [`LatentDataset`] or [`Stream`], and join their labels and skipped
    files. Of the itineraries of a stream, the last one says how far it is.
    """
    names = [name for name, value in items[0].items() if isinstance(value, torch.Tensor)]
    batch = {name: torch.stack([item[name] for item in items]) for name in names}
    batch["class_labels"] = torch.tensor([item["class_labels"] for item in items])
    batch["skipped"] = [name for item in items for name in item["skipped"]]
    if "itinerary" in items[-1]:
        batch["itinerary"] = items[-1]["itinerary"]
    return batch
