# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Teachers: frozen vision encoders from transformers, whose patch features a flow is aligned with."""

import contextlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from flowback_hf_cli.numbers import check_number


# The teacher where none is named, a model on the Hub: DINOv2-B/14, with features of dimension 768.
DEFAULT_TEACHER = "facebook/dinov2-base"


@dataclass(frozen=True)
class EncoderKind:
    """
    How to load one kind of vision encoder and where to find its patch tokens.

    Args:
        name (`str`): Its usual name, for messages.
        model_class (`str`): The class of transformers that loads it. For a two-tower model, only the vision tower.
        num_prefix_tokens (`int`): Tokens before the patches, not counting registers.
        any_size (`bool`): Whether it interpolates its positions to take images of any size.
    """

    name: str
    model_class: str
    num_prefix_tokens: int
    any_size: bool = False


# By the `model_type` of the config. A two-tower model and its vision tower have different types.
ENCODER_KINDS = {
    "dinov2": EncoderKind("DINOv2", "Dinov2Model", num_prefix_tokens=1, any_size=True),
    "dinov2_with_registers": EncoderKind(
        "DINOv2 with registers", "Dinov2WithRegistersModel", num_prefix_tokens=1, any_size=True
    ),
    "clip": EncoderKind("CLIP", "CLIPVisionModel", num_prefix_tokens=1),
    "clip_vision_model": EncoderKind("CLIP", "CLIPVisionModel", num_prefix_tokens=1),
    "siglip": EncoderKind("SigLIP", "SiglipVisionModel", num_prefix_tokens=0),
    "siglip_vision_model": EncoderKind("SigLIP", "SiglipVisionModel", num_prefix_tokens=0),
    "vit_mae": EncoderKind("ViT-MAE", "ViTMAEModel", num_prefix_tokens=1),
    "convnextv2": EncoderKind("ConvNeXt V2", "ConvNextV2Model", num_prefix_tokens=0),
}


@contextlib.contextmanager
def refuse_unreadable(name: str | os.PathLike) -> Iterator[None]:
    """
    A context in which transformers loads a model. Pass it `trust_remote_code=False`, or it asks on the command line.

    Raises:
        ValueError: if a file is damaged, or if reading the model would run code that it brings along. Names the model.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(name)!r} was not loaded: its weights are damaged, or hold objects that may run code when they are"
            " read. Weights may hold tensors only."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{str(name)!r} was not loaded: its weights are truncated or damaged"
            f" ({str(error).splitlines()[0].split('. ')[0]}). Save or download them again."
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{str(name)!r} was not loaded: it brings code of its own, which is not run. Name a model that"
            " transformers itself knows."
        ) from error


class RepresentationTeacher(nn.Module):
    """
    A frozen vision encoder that computes patch features on a flow's token grid.

    The encoder is DINOv2 (with or without registers), the vision tower of CLIP or SigLIP, ViT-MAE, or ConvNeXt V2,
    whose patches are the cells of its last feature map. Images are resized to what it takes. DINOv2 takes any size, so
    its images are chosen to have one patch per token: a grid of 16 and DINOv2-B/14 give 224 pixels. The others take
    the size in their config. If their patches form another grid, the features are resampled bilinearly to the flow's
    (`align_corners=False`).

    Args:
        encoder ([`~transformers.PreTrainedModel`]): The encoder. It is frozen and put into eval mode.
        grid_size (`int`): Height and width of the flow's token grid, `sample_size // patch_size`.
        image_mean, image_std (`tuple[float, float, float]`):
            Mean and standard deviation for normalizing images in [0, 1]. Default: those of ImageNet.

    Raises:
        ValueError: if the encoder is not one of these kinds, or a number is out of its range.

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

    References: DINOv2, https://arxiv.org/abs/2304.07193, and registers, https://arxiv.org/abs/2309.16588;
    CLIP, https://arxiv.org/abs/2103.00020; SigLIP, https://arxiv.org/abs/2303.15343;
    MAE, https://arxiv.org/abs/2111.06377; ConvNeXt V2, https://arxiv.org/abs/2301.00808
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        grid_size: int,
        image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        image_std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        config = encoder.config
        kind = check_encoder_kind(config.model_type, type(encoder).__name__)
        check_number("grid_size", grid_size, int, at_least=1)
        for mean, deviation in zip(image_mean, image_std, strict=True):
            check_number("image_mean", mean, float)
            check_number("image_std", deviation, float, above=0.0)
        self.encoder = encoder.eval().requires_grad_(False)
        self.grid_size = grid_size
        self.image_size = grid_size * config.patch_size if kind.any_size else config.image_size
        self.num_prefix_tokens = kind.num_prefix_tokens + getattr(config, "num_register_tokens", 0)
        if config.model_type == "vit_mae":
            # By default it masks three patches of four. Even if it masks none, it sorts the patches by this noise.
            config.mask_ratio = 0.0
            num_patches = (config.image_size // config.patch_size) ** 2
            self.register_buffer("patch_order", torch.arange(num_patches).unsqueeze(0), persistent=False)
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
        Load an encoder and the normalization of its images.

        Args:
            pretrained_model_name_or_path (`str`):
                A Hub id such as [`DEFAULT_TEACHER`] or `"openai/clip-vit-base-patch16"`, or a folder. The kind of
                encoder is read from its config.
            grid_size (`int`): Height and width of the flow's token grid.
            dtype (`torch.dtype`): Dtype of the encoder's weights and of the features. Default: float32.
            kwargs: For transformers' `from_pretrained`: `cache_dir`, `revision`, `token`, ...
        Returns:
            [`RepresentationTeacher`].
        Raises:
            ValueError: if the model is not a known kind of encoder, or brings its own code, which is never run; if
                weights are missing, damaged, or hold more than tensors.
            FileNotFoundError: if a file is missing. The message names the files and where they were looked for.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise FileNotFoundError(not_found_message(name, None))
        try:
            with refuse_unreadable(name):
                config = AutoConfig.from_pretrained(name, trust_remote_code=False, **kwargs)
                kind = check_encoder_kind(config.model_type, name)
                processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **kwargs)
                # transformers would warn about every weight of a text tower. Only missing weights matter.
                verbosity = transformers.logging.get_verbosity()
                transformers.logging.set_verbosity_error()
                try:
                    encoder, info = getattr(transformers, kind.model_class).from_pretrained(
                        name, dtype=dtype, output_loading_info=True, **kwargs
                    )
                finally:
                    transformers.logging.set_verbosity(verbosity)
        except OSError as error:
            raise FileNotFoundError(not_found_message(name, kwargs.get("cache_dir"))) from error
        if info["missing_keys"]:
            raise ValueError(
                f"The teacher {name!r} must hold every weight of its encoder, but {len(info['missing_keys'])} are"
                f" missing, such as {min(info['missing_keys'])!r}: it was saved by another architecture."
            )
        return cls(encoder, grid_size, processor.image_mean, processor.image_std)

    @property
    def feature_dim(self) -> int:
        """The dimension of the features, which [`AlignedFlowObjective`] takes as `teacher_dim`."""
        config = self.encoder.config
        return config.hidden_sizes[-1] if config.model_type == "convnextv2" else config.hidden_size

    @property
    def _encoder_grid_size(self) -> int:
        """Height and width of the encoder's grid of patches."""
        config = self.encoder.config
        # Each of ConvNeXt's later stages halves the feature map.
        halvings = len(config.hidden_sizes) - 1 if config.model_type == "convnextv2" else 0
        return self.image_size // (config.patch_size * 2**halvings)

    def train(self, mode: bool = True) -> "RepresentationTeacher":
        """Stay in eval mode, whatever `mode` is: a teacher is frozen."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Compute the patch features of images. Gradients flow to images that require them, never to the encoder.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 1 or 3, height, width)`):
                Clean images in [-1, 1], of any size. Grey images are repeated over three channels.
        Returns:
            `torch.Tensor` of shape `(batch_size, grid_size^2, feature_dim)`: the last layer's patch tokens in raster
            order, in the dtype of the encoder's weights.
        Raises:
            ValueError: if the images have another shape, or no pixels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
            raise ValueError(
                "`images` must have shape (batch_size, 1 or 3, height, width) and pixels, but have shape"
                f" {tuple(images.shape)}."
            )
        images = F.interpolate(
            images.float().expand(-1, 3, -1, -1), size=self.image_size, mode="bicubic", antialias=True
        )
        pixel_values = ((images + 1) / 2 - self.image_mean) / self.image_std
        arguments = {}
        if self.encoder.config.model_type == "vit_mae":
            arguments["noise"] = self.patch_order.expand(len(images), -1)
        hidden_states = self.encoder(pixel_values.to(self.encoder.dtype), **arguments).last_hidden_state
        if hidden_states.ndim == 4:  # a feature map
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        return self._resample(hidden_states[:, self.num_prefix_tokens :])

    def _resample(self, features: torch.Tensor) -> torch.Tensor:
        """Resample features from the encoder's grid of patches to the flow's grid of tokens."""
        if self._encoder_grid_size == self.grid_size:
            return features
        grid = features.transpose(1, 2).unflatten(2, (self._encoder_grid_size, self._encoder_grid_size))
        grid = F.interpolate(grid.float(), size=self.grid_size, mode="bilinear", align_corners=False)
        return grid.flatten(2).transpose(1, 2).to(features.dtype)


def check_encoder_kind(model_type: str, name: str) -> EncoderKind:
    """Return the kind of an encoder. Raise ValueError if it is not one of [`ENCODER_KINDS`]."""
    if model_type not in ENCODER_KINDS:
        known = ", ".join(dict.fromkeys(kind.name for kind in ENCODER_KINDS.values()))
        raise ValueError(
            f"The teacher {name!r} must be a vision encoder whose patch tokens lie on a grid, one of {known}, but its"
            f" model type is {model_type!r}."
        )
    return ENCODER_KINDS[model_type]


def not_found_message(name: str, cache_dir: str | os.PathLike | None) -> str:
    """Say which files a teacher needs and where they were looked for."""
    files = ["config.json", "preprocessor_config.json", "model.safetensors"]
    if Path(name).is_dir():
        missing = [file for file in files if not (Path(name) / file).exists()]
        return (
            f"The teacher's folder {name!r} must hold {', '.join(files)}, but {' and '.join(missing) or 'one of them'}"
            " cannot be read. Save the encoder and its image processor there."
        )
    folder = Path(cache_dir or HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return (
        f"The teacher {name!r} is not an existing folder, and {', '.join(files)} were found neither on the Hub nor in"
        f" its cache, {folder}. Check the name, or download it on a machine with a network (hf download {name})."
    )
