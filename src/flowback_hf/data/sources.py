# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Sources of training batches, which know what a batch is: images, or the moments of a VAE's latents."""

from typing import Any

import datasets
import torch
from diffusers.models import AutoencoderKL

from flowback_hf.data.images import ImageDataset, ImageReader
from flowback_hf.data.latents import LatentDataset, LatentReader, draw_latents
from flowback_hf.data.noise import RowGenerator
from flowback_hf.data.splits import Splits
from flowback_hf.data.streams import Stream


Batch = dict[str, Any]


class ImageSource:
    """
    Batches of images, for a flow of pixels.

    Args:
        splits ([`Splits`]): Training and validation rows.
        config: Of the flow: its `sample_size` and `in_channels`.
        label_ids (`list[int]`): The flow's class id of each class id of the data set.
        image_column (`str`, defaults to `"image"`): The column of images.
        label_column (`str`, *optional*, defaults to `"label"`): The column of class ids; `None` without classes.
        teacher_features (`datasets.Dataset`, *optional*): Stored features of the training rows.
        teacher_dim (`int`, *optional*): Their dimension.
    Attributes:
        train_dataset, validation_dataset ([`ImageDataset`]): Items of [`collate`]'s batches. Training rows that are a
            `datasets.IterableDataset` make a [`~flowback_hf.data.streams.Stream`].
        vae: `None`: images are modelled as they are.
        teacher_dim (`int`, *optional*): Dimension of stored features; `None` if a teacher has to run.
    Raises:
        ValueError: if the flow's samples are not images, or stored features are given with a stream.

    Example:
        ```py
        >>> import datasets
        >>> import PIL.Image
        >>> import torch
        >>> from flowback_hf import TarFlowTransformer2DModel
        >>> from flowback_hf.data import ImageSource, RowGenerator, Splits, collate, make_generator

        >>> features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
        >>> rows = datasets.Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))] * 2, "label": [0, 0]}, features)
        >>> flow = TarFlowTransformer2DModel(8, 4, 1, num_blocks=1, num_layers=1, num_classes=1)
        >>> source = ImageSource(Splits(rows, rows, ["cat"]), flow.config, label_ids=[0])
        >>> batch = collate([source.train_dataset[0], source.train_dataset[1]])
        >>> source.clean_sample(batch, RowGenerator(make_generator(0), 2)).shape
        torch.Size([2, 1, 8, 8])
        ```
    """

    vae = None

    def __init__(
        self,
        splits: Splits,
        config: Any,
        label_ids: list[int],
        image_column: str = "image",
        label_column: str | None = "label",
        teacher_features: datasets.Dataset | None = None,
        teacher_dim: int | None = None,
    ):
        if config.in_channels not in (1, 3):
            raise ValueError(f"`in_channels` must be 1 or 3 to train on images, but is {config.in_channels}.")
        is_stream = isinstance(splits.train, datasets.IterableDataset)
        if is_stream and teacher_features is not None:
            raise ValueError(
                "`teacher_features` belong to rows that have numbers, but the training rows are a stream."
            )
        columns = (image_column, label_column, label_ids, config.sample_size, config.in_channels)
        if is_stream:
            reader = ImageReader(*columns)
            self.train_dataset = Stream(reader.prepare(splits.train), reader)
        else:
            self.train_dataset = ImageDataset(splits.train, *columns, teacher_features=teacher_features)
        self.validation_dataset = ImageDataset(splits.validation, *columns)
        self.hold_out = splits.hold_out
        self.teacher_dim = teacher_dim

    def mirror(self, batch: Batch, mirrored: torch.Tensor) -> Batch:
        """
        Mirror some of the images, and choose the stored features of each image or its mirror image.

        Args:
            batch (`dict`): What [`collate`] makes of items.
            mirrored (`torch.BoolTensor` of shape `(batch_size,)`): Which ones.
        """
        return batch | mirror_images(batch, mirrored) | choose_stored(batch, mirrored, ["teacher_features"])

    def clean_sample(self, batch: Batch, generator: RowGenerator) -> torch.Tensor:
        """What the flow models, before noise: the images of a batch. `generator` is not used."""
        return batch["images"]


class LatentSource:
    """
    Batches of a VAE's moments, for a latent flow.

    Args:
        splits ([`Splits`]): Rows of a folder of latents.
        config: Of the flow.
        label_ids (`list[int]`): The flow's class id of each class id of the data set.
        vae ([`~diffusers.AutoencoderKL`]): The VAE that made the latents.
        label_column (`str`, *optional*, defaults to `"label"`): The column of class ids; `None` without classes.
        aligned (`bool`, defaults to `True`): Whether the alignment needs what is stored for it; not read otherwise.
    Attributes:
        train_dataset, validation_dataset ([`LatentDataset`]), vae: As those of [`ImageSource`].
        teacher_dim (`int`, *optional*): Dimension of stored features; `None` if a teacher has to run.
    Raises:
        ValueError: if the latents do not fit the flow, or hold nothing that it could be aligned with.
    """

    def __init__(
        self,
        splits: Splits,
        config: Any,
        label_ids: list[int],
        vae: AutoencoderKL,
        label_column: str | None = "label",
        aligned: bool = True,
    ):
        check_latents(splits.latents, config, aligned)
        self.vae = vae
        self.hold_out = None
        self.teacher_dim = splits.latents.get("feature_dim") if aligned else None
        for_alignment = [name for name in ("image", "teacher_features") if name in splits.train.column_names]
        train_rows = splits.train if aligned else splits.train.remove_columns(for_alignment)
        if isinstance(train_rows, datasets.IterableDataset):
            reader = LatentReader(label_column, label_ids)
            self.train_dataset = Stream(reader.prepare(train_rows), reader)
        else:
            self.train_dataset = LatentDataset(train_rows, label_column, label_ids)
        needed = ["moments"] if label_column is None else ["moments", label_column]
        self.validation_dataset = LatentDataset(splits.validation.select_columns(needed), label_column, label_ids)

    def mirror(self, batch: Batch, mirrored: torch.Tensor) -> Batch:
        """As [`ImageSource.mirror`]: the moments of some images are replaced by those of their mirror images."""
        images = mirror_images(batch, mirrored) if "images" in batch else {}
        stored = [name for name in ("moments", "teacher_features") if name in batch]
        return batch | images | choose_stored(batch, mirrored, stored)

    def clean_sample(self, batch: Batch, generator: RowGenerator) -> torch.Tensor:
        """What the flow models, before noise: a draw from the VAE's posterior, scaled."""
        return draw_latents(batch["moments"], self.vae.config, generator)


def mirror_images(batch: Batch, mirrored: torch.Tensor) -> Batch:
    """The images of a batch, some of them mirrored."""
    images = batch["images"]
    return {"images": torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)}


def choose_stored(batch: Batch, mirrored: torch.Tensor, names: list[str]) -> Batch:
    """Of what is stored for an image and for its mirror image, `(batch_size, 2, ...)`, the one or the other."""
    rows = torch.arange(len(mirrored), device=mirrored.device)
    return {name: batch[name][rows, mirrored.long()] for name in names if name in batch}


def check_latents(settings: dict[str, Any], config: Any, aligned: bool):
    """Raise ValueError if latents do not fit a flow, or hold nothing that it could be aligned with."""
    grid_size = config.sample_size // config.patch_size
    if (config.in_channels, config.sample_size) != (settings["latent_channels"], settings["latent_size"]):
        raise ValueError(
            f"The flow must take samples like the latents, {settings['latent_channels']} channels of"
            f" {settings['latent_size']}x{settings['latent_size']}, but takes {config.in_channels} of"
            f" {config.sample_size}x{config.sample_size} (`in_channels`, `sample_size`)."
        )
    if config.noise_type != "gaussian":
        raise ValueError("`--noise_type` must be gaussian for latents: the uniform noise dequantizes 8-bit pixels.")
    if aligned and settings["store"] == "none":
        raise ValueError(
            "`--latents` were stored without images and features: give --alignment none, or make them with --store."
        )
    if aligned and settings["store"] == "features" and settings["grid_size"] != grid_size:
        raise ValueError(
            f"The features in `--latents` must lie on the flow's grid of {grid_size}x{grid_size} tokens, but lie on"
            f" {settings['grid_size']}x{settings['grid_size']}."
        )
