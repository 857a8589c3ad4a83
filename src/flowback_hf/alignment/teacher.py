# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoConfig, AutoImageProcessor, Dinov2Model


class RepresentationTeacher(nn.Module):
    """
    A frozen DINOv2 encoder whose patch features lie on a flow's token grid.

    Images are resized so that the encoder's patches form that grid: DINOv2-B/14 and a grid of 16 make 224 pixels.

    Args:
        encoder ([`~transformers.Dinov2Model`]): The encoder. It is frozen and put into eval mode.
        grid_size (`int`): Height and width of the flow's token grid, `sample_size // patch_size`.
        image_mean, image_std (`list[float]`): What the encoder's images are normalized with, for images in [0, 1].

    Example:
        ```py
        >>> import torch
        >>> from transformers import Dinov2Config, Dinov2Model
        >>> from flowback_hf import RepresentationTeacher

        >>> encoder = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2))
        >>> teacher = RepresentationTeacher(encoder, grid_size=4)
        >>> teacher(torch.rand(2, 3, 16, 16) * 2 - 1).shape
        torch.Size([2, 16, 24])
        ```

    Reference: Oquab et al., DINOv2: Learning Robust Visual Features without Supervision,
    https://arxiv.org/abs/2304.07193
    """

    def __init__(
        self,
        encoder: Dinov2Model,
        grid_size: int,
        image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        image_std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.image_size = grid_size * encoder.config.patch_size
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        grid_size: int,
        dtype: torch.dtype = torch.float32,
        **kwargs,
    ) -> "RepresentationTeacher":
        """
        Args:
            pretrained_model_name_or_path (`str`): A Hub id such as `"facebook/dinov2-base"`, or a folder.
            grid_size (`int`): Height and width of the flow's token grid.
            dtype (`torch.dtype`): Of the encoder's weights.
            kwargs: For transformers' `from_pretrained`: `cache_dir`, `revision`, `token`, ...
        Raises:
            ValueError: if the model is not a DINOv2 encoder.
            OSError: if it cannot be found; says which file was looked for.
        """
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config.model_type != "dinov2":
            raise ValueError(
                f"The teacher {str(pretrained_model_name_or_path)!r} must be a DINOv2 encoder (model type 'dinov2'),"
                f" but has the model type {config.model_type!r}."
            )
        processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        encoder = Dinov2Model.from_pretrained(pretrained_model_name_or_path, dtype=dtype, **kwargs)
        return cls(encoder, grid_size, processor.image_mean, processor.image_std)

    @property
    def feature_dim(self) -> int:
        """Dimension of the features: what [`AlignedFlowObjective`] calls `teacher_dim`."""
        return self.encoder.config.hidden_size

    def train(self, mode: bool = True) -> "RepresentationTeacher":
        """Stays in eval mode: a teacher is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch_size, 1 or 3, height, width)`):
                Clean images in [-1, 1], of any size. Grey ones are repeated over the three channels.
        Returns:
            `torch.Tensor` of shape `(batch_size, grid_size^2, feature_dim)`: patch features in raster order, without
            the class token.
        """
        images = F.interpolate(
            images.float().expand(-1, 3, -1, -1), size=self.image_size, mode="bicubic", antialias=True
        )
        pixel_values = ((images + 1) / 2 - self.image_mean) / self.image_std
        hidden_states = self.encoder(pixel_values=pixel_values.to(self.encoder.dtype)).last_hidden_state
        return hidden_states[:, 1:]
