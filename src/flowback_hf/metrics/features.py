# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn as nn
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from flowback_hf.alignment.teacher import ENCODER_KINDS


@dataclass
class ImageFeatures:
    """
    What a feature extractor makes of images.

    Args:
        features (`torch.Tensor` of shape `(num_images, feature_dim)`): float32.
        logits (`torch.Tensor` of shape `(num_images, num_labels)`, *optional*): Where the extractor is a classifier.
    """

    features: torch.Tensor
    logits: torch.Tensor | None = None


class ImageFeatureExtractor(nn.Module):
    """
    Image-level features of a vision encoder of transformers: its pooled output, or without one the mean of its tokens.
    A classifier also gives its logits, from which [`InceptionScore`] is computed.

    Images go through the encoder's own image processor, as its authors meant. DINOv2 gives what the literature calls
    FD-DINOv2 (Stein et al., Exposing flaws of generative model evaluation metrics, https://arxiv.org/abs/2306.04675).

    Args:
        model ([`~transformers.PreTrainedModel`]): The encoder, or a classifier. It is put into eval mode.
        processor: Its image processor.
        name (`str`): What reports call the features.

    Example:
        ```py
        >>> import PIL.Image
        >>> from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model
        >>> from flowback_hf.metrics import ImageFeatureExtractor

        >>> encoder = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2))
        >>> extractor = ImageFeatureExtractor(encoder, BitImageProcessorPil(), name="tiny")
        >>> extractor([PIL.Image.new("RGB", (32, 32))]).features.shape
        torch.Size([1, 24])
        ```
    """

    def __init__(self, model: nn.Module, processor, name: str):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "ImageFeatureExtractor":
        """
        Args:
            pretrained_model_name_or_path (`str`): A Hub id such as `"facebook/dinov2-base"`, or a folder.
            kwargs: For transformers' `from_pretrained`: `cache_dir`, `revision`, `token`, ...
        Raises:
            OSError: if it cannot be found; says which file was looked for.
        """
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if any(name.endswith("ForImageClassification") for name in config.architectures or []):
            model_class = AutoModelForImageClassification
        elif config.model_type in ENCODER_KINDS:
            # of a two-tower model, the vision tower: the whole would want text
            model_class = getattr(transformers, ENCODER_KINDS[config.model_type].model_class)
        else:
            model_class = AutoModel
        model = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config.model_type == "vit_mae":
            model.config.mask_ratio = 0.0  # it would hide three patches of four, others each time
        processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # The last parts of a folder tell it from others and do not name the machine.
        path = Path(pretrained_model_name_or_path)
        name = "/".join(path.resolve().parts[-2:]) if path.is_dir() else str(pretrained_model_name_or_path)
        return cls(model, processor, name)

    @property
    def id2label(self) -> dict[int, str] | None:
        """The class names of a classifier's logits; `None` for an encoder."""
        is_classifier = self.model.base_model is not self.model
        return self.model.config.id2label if is_classifier else None

    def train(self, mode: bool = True) -> "ImageFeatureExtractor":
        """Stays in eval mode: what it measures with must not change."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: list[PIL.Image.Image]) -> ImageFeatures:
        """
        Args:
            images (`list[PIL.Image.Image]`): Of any size and mode.
        Returns:
            [`ImageFeatures`], on the CPU.
        """
        pixel_values = self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        outputs = []
        # A classifier's features are what its own encoder hands to its head: looked at on the way, not computed twice.
        hook = self.model.base_model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            logits = getattr(self.model(pixel_values=pixel_values), "logits", None)
        finally:
            hook.remove()
        (output,) = outputs
        pooled = getattr(output, "pooler_output", None)
        features = output.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)
        return ImageFeatures(features.float().cpu(), None if logits is None else logits.float().cpu())


class InceptionFeatureExtractor(nn.Module):
    """
    The literature's Inception network (the TensorFlow weights of 2015) from torch-fidelity, which resizes images as
    TensorFlow 1 did, without antialiasing: what "FID", "KID" and "IS" mean without further words. It is the network
    that torchmetrics uses with `antialias=False`.

    Needs the extra `fid`, which brings torchvision, and downloads the weights at its first use.

    Args:
        weights_path (`str`, *optional*): The file with the weights, where it has been downloaded already.

    Raises:
        ImportError: if torch-fidelity or torchvision is missing; says what to install.
    """

    name = "inception-v3-2015-12-05"
    id2label = None

    def __init__(self, weights_path: str | None = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                'Inception features need torch-fidelity and torchvision: pip install "flowback_hf[fid]", or name a'
                ' vision encoder of transformers instead of "inception".'
            ) from error
        self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights_path)

    @torch.no_grad()
    def forward(self, images: list[PIL.Image.Image]) -> ImageFeatures:
        """As of [`ImageFeatureExtractor`], for images of one size."""
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        device = next(self.model.parameters()).device
        features, logits = self.model(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))
        return ImageFeatures(features.flatten(1).float().cpu(), logits.float().cpu())


def load_feature_extractor(name: str, **kwargs) -> ImageFeatureExtractor | InceptionFeatureExtractor:
    """
    Args:
        name (`str`): `"inception"`, or a vision encoder or classifier of transformers: a Hub id or a folder.
        kwargs: For transformers' `from_pretrained`.
    Raises:
        ImportError: for `"inception"` without the extra `fid`.
        OSError: if the encoder cannot be found.
    """
    return (
        InceptionFeatureExtractor() if name == "inception" else ImageFeatureExtractor.from_pretrained(name, **kwargs)
    )


@dataclass
class ReferenceFeatures:
    """
    The features of real images that samples are compared with.

    Args:
        name (`str`): Which images, for the report: `"imagenet, train"`.
        feature_name (`str`): Which features: the extractor's `name`.
        num_images (`int`): How many images the mean and the covariance are of.
        mean (`numpy.ndarray` of shape `(feature_dim,)`), covariance (`numpy.ndarray` of shape `(feature_dim,
            feature_dim)`): float64, the covariance divided by `num_images - 1`.
        features (`numpy.ndarray` of shape `(num_kept, feature_dim)`):
            float32, of the first images: what [`KernelDistance`] and [`PrecisionRecall`] need.
    """

    name: str
    feature_name: str
    num_images: int
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray

    @classmethod
    def from_batches(
        cls, batches: Iterable[torch.Tensor], name: str, feature_name: str, max_kept: int = 10_000
    ) -> "ReferenceFeatures":
        """
        Args:
            batches (iterable of `torch.Tensor` of shape `(batch_size, feature_dim)`):
                Features, met once; memory grows with `max_kept`, not with their number.
            name, feature_name: See above.
            max_kept (`int`, defaults to 10_000): How many images' features are kept themselves.
        Raises:
            ValueError: for less than two images.
        """
        num_images, total, outer, kept = 0, 0.0, 0.0, []
        for batch in batches:
            if num_images < max_kept:
                kept.append(np.asarray(batch[: max_kept - num_images], dtype=np.float32))
            batch = np.asarray(batch, dtype=np.float64)
            num_images, total, outer = num_images + len(batch), total + batch.sum(axis=0), outer + batch.T @ batch
        if num_images < 2:
            raise ValueError(f"A reference needs at least two images, but {name!r} has {num_images}.")
        mean = total / num_images
        covariance = (outer - num_images * np.outer(mean, mean)) / (num_images - 1)
        return cls(name, feature_name, num_images, mean, covariance, np.concatenate(kept))

    def save(self, path: str | os.PathLike):
        """Writes an `.npz` file; `mu` and `sigma` are named as other tools name them."""
        partial = Path(path).with_name(f".partial-{Path(path).name}")
        with partial.open("wb") as file:
            np.savez(
                file,
                mu=self.mean,
                sigma=self.covariance,
                features=self.features,
                num_images=self.num_images,
                name=self.name,
                feature_name=self.feature_name,
            )
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike, feature_name: str) -> "ReferenceFeatures":
        """
        Args:
            path (`str`): What [`~ReferenceFeatures.save`] wrote.
            feature_name (`str`): The features that the samples will have.
        Raises:
            ValueError: if the file is no such reference, or one of other features.
        """
        try:
            with np.load(path) as file:
                values = {name: file[name] for name in file.files}
            reference = cls(
                name=str(values["name"]),
                feature_name=str(values["feature_name"]),
                num_images=int(values["num_images"]),
                mean=values["mu"],
                covariance=values["sigma"],
                features=values["features"],
            )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{str(path)!r} is no reference that flowback_hf has saved: {error}.") from error
        if reference.feature_name != feature_name:
            raise ValueError(
                f"The reference {str(path)!r} holds features of {reference.feature_name!r}, but the samples' are of"
                f" {feature_name!r}: name the same features, or make the reference anew."
            )
        return reference
