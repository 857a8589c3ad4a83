# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Labelled images of a split, at a flow's size and with a flow's classes."""

import itertools
from typing import NamedTuple

import datasets
import numpy as np
import PIL.Image

from flowback_hf.data.classes import match_class_names
from flowback_hf.data.images import decode_image, image_mode, name_of_file
from flowback_hf.data.splits import check_column
from flowback_hf.evaluation.parts import Arrays
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline, fit_image
from flowback_hf.pipelines.pipeline_flowback_classification import FlowBackClassificationPipeline


class ImageBatch(NamedTuple):
    """
    Images that can be used.

    Args:
        images (`list[PIL.Image.Image]`): At the flow's size.
        class_labels (`list[int]`): The flow's class ids; -1 for an unconditional flow.
        report (`dict` of `np.ndarray`): `skipped`, the names of what cannot be used, and why; and `num_resized`.
    """

    images: list[PIL.Image.Image]
    class_labels: list[int]
    report: Arrays


class LabelledImages:
    """
    Images of a split at a flow's size, with the flow's class ids. Images that cannot be used are left out.

    Args:
        rows (`datasets.Dataset`): Rows with an image column.
        image_column (`str`): Its name.
        label_ids (`list[int]`): The flow's class id of each row, as [`match_labels`] returns them.
        num_channels (`int`): 1 for grey images, 3 for RGB.
        image_size (`int`): Height and width, in pixels.
        strict (`bool`, defaults to `False`): Raise ValueError for an image of another size instead of resizing it.
        split (`str`, defaults to `""`): The name of the split, for messages.

    Example:
        ```py
        >>> import datasets
        >>> import PIL.Image
        >>> from flowback_hf.evaluation import LabelledImages

        >>> features = datasets.Features({"image": datasets.Image()})
        >>> files = [PIL.Image.new("L", (9, 8)), {"bytes": b"no image", "path": None}]
        >>> rows = datasets.Dataset.from_dict({"image": files}, features)
        >>> batch = LabelledImages(rows, "image", [2, 2], num_channels=3, image_size=4).load(range(2))
        >>> batch.images[0].size, batch.class_labels, batch.report["skipped"].tolist()
        ((4, 4), [2], ['row 1 cannot be read: it is not an image'])
        ```
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_ids: list[int],
        num_channels: int,
        image_size: int,
        strict: bool = False,
        split: str = "",
    ):
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.label_ids = label_ids
        self.mode = image_mode(num_channels)
        self.image_size = image_size
        self.strict = strict
        self.split = split

    @classmethod
    def for_flow(
        cls,
        classifier: FlowBackClassificationPipeline,
        rows: datasets.Dataset,
        image_column: str,
        label_ids: list[int],
        strict: bool = False,
        split: str = "",
    ) -> "LabelledImages":
        """Images of the size and the number of channels that a flow, or its VAE, takes."""
        return cls(rows, image_column, label_ids, classifier.num_channels, classifier.image_size, strict, split)

    def __len__(self) -> int:
        return len(self.rows)

    def check_usable(self, at_least: int = 2):
        """Raise ValueError unless at least so many images can be used. It looks no further than the last of these."""
        usable = (index for index in range(len(self)) if self.load(range(index, index + 1)).images)
        num_usable = len(list(itertools.islice(usable, at_least)))
        if num_usable < at_least:
            raise ValueError(
                f"An evaluation needs at least {at_least} images, but {num_usable} of the {len(self)} of the split"
                f" {self.split!r} can be used."
            )

    def load(self, indices: range) -> ImageBatch:
        """Decode and fit the images of some rows."""
        images, labels, skipped, num_resized = [], [], [], 0
        for index in indices:
            file = self.rows[index][self.image_column]
            name = name_of_file(file, f"row {index}")
            try:
                image = decode_image(file, self.mode)
            except ValueError as error:
                skipped.append(f"{name} {error}")
                continue
            if image.size != (self.image_size, self.image_size):
                if self.strict:
                    raise ValueError(
                        f"{name} has {image.width}x{image.height} pixels, but the flow's images have {self.image_size}"
                        f"x{self.image_size}: resize it, or leave out --strict."
                    )
                image = fit_image(image, self.image_size)
                num_resized += 1
            images.append(image)
            labels.append(self.label_ids[index])
        report = {"skipped": np.array(skipped, dtype=str), "num_resized": np.array([num_resized])}
        return ImageBatch(images, labels, report)


def match_labels(rows: datasets.Dataset, label_column: str, pipeline: FlowBackPipeline) -> list[int]:
    """
    The flow's class id of each row.

    Classes are matched by name where both sides have names, and by number otherwise. Numbers are names, too, if the
    flow's classes are called by all of them: training calls classes by their numbers if a data set has nothing else.

    Args:
        rows (`datasets.Dataset`): Rows with a column of classes.
        label_column (`str`): Its name.
        pipeline ([`FlowBackPipeline`]): The flow and the names of its classes.
    Returns:
        `list[int]`: class ids; -1 in every row for an unconditional flow.
    Raises:
        ValueError: if there is no such column, if a row has no label, or if the classes are not the flow's.
    """
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        return [-1] * len(rows)
    check_column(rows.features, "--label_column", label_column)
    numbers, feature = rows[label_column][:], rows.features[label_column]
    is_numbered = isinstance(feature, datasets.ClassLabel)
    labels = [None if isinstance(label, int) and label < 0 else label for label in numbers]
    if is_numbered:
        labels = [None if label is None else feature.names[label] for label in labels]
    if None in labels:
        raise ValueError(f"The data set's column {label_column!r} has rows without a label: choose another --split.")
    if pipeline.config.id2label:
        rows_names = [str(label) for label in labels]
        names = feature.names if is_numbered else list(dict.fromkeys(rows_names))
        label_ids = dict(zip(names, match_class_names(names, pipeline.config.id2label, in_order=is_numbered)))
        unknown = sorted({name for name in rows_names if label_ids[name] is None})
        if not unknown:
            return [label_ids[name] for name in rows_names]
        if isinstance(labels[0], str):
            known = list(pipeline.config.id2label.values())
            raise ValueError(
                f"The data set's classes {unknown[:5]} are not among this flow's, which are"
                f" {', '.join(map(repr, known[:5]))}{', ...' if len(known) > 5 else ''}: evaluate it on the"
                " classes that it was trained on."
            )
    if is_numbered and feature.num_classes != num_classes:
        raise ValueError(
            f"The data set has {feature.num_classes} classes, but the flow has {num_classes} without names"
            " (`id2label`): they cannot be matched."
        )
    if not all(isinstance(label, int) and 0 <= label < num_classes for label in numbers):
        raise ValueError(f"The data set's labels must be numbers from 0 to {num_classes - 1}, as the flow's are.")
    return numbers
