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

from flowback_hf.alignment.teacher import ENCODER_KINDS, refuse_unreadable
from flowback_hf.files import write_whole


@dataclass
class ImageFeatures:
    """
    Hold what a feature extractor returns for a batch of images.

    Args:
        features (`torch.Tensor` of shape `(num_images, feature_dim)`): The features, in float32.
        logits (`torch.Tensor` of shape `(num_images, num_labels)`, *optional*): A classifier's logits, in float32.
    """

    features: torch.Tensor
    logits: torch.Tensor | None = None


class ImageFeatureExtractor(nn.Module):
    """
    Compute features of whole images with a vision encoder from transformers.

    The features are the encoder's pooled output or, if it has none, the mean of its tokens. A classifier also returns
    its logits, which [`InceptionScore`] needs. Images go through the encoder's own image processor. DINOv2's features
    give what the literature calls FD-DINOv2 (Stein et al., Exposing flaws of generative model evaluation metrics,
    https://arxiv.org/abs/2306.04675).

    Args:
        model ([`~transformers.PreTrainedModel`]): The encoder, or a classifier. It is put into eval mode and frozen.
        processor: The encoder's image processor.
        name (`str`): The name of the features in reports.

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
        if getattr(model.config, "model_type", None) == "vit_mae":
            model.config.mask_ratio = 0.0  # by default it hides three random patches of four
        self.processor = processor
        self.name = name

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "ImageFeatureExtractor":
        """
        Load an encoder or a classifier with its image processor.

        Args:
            pretrained_model_name_or_path (`str`): A Hub id such as `"facebook/dinov2-base"`, or a folder.
            kwargs: Arguments of transformers' `from_pretrained`: `cache_dir`, `revision`, `token`, ... `dtype` is
                float32 by default.
        Returns:
            [`ImageFeatureExtractor`]: the extractor, on the CPU.
        Raises:
            OSError: if the encoder cannot be found. The message says which file is missing.
            ValueError: if it is damaged, or brings its own code, which is never run.
        """
        with refuse_unreadable(pretrained_model_name_or_path):
            # Distances must not depend on the precision that an encoder was saved in.
            kwargs = {"dtype": torch.float32, **kwargs, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
            if any(name.endswith("ForImageClassification") for name in config.architectures or []):
                model_class = AutoModelForImageClassification
            elif config.model_type in ENCODER_KINDS:
                # For a two-tower model, this is the class of the vision tower. The whole model would require text.
                model_class = getattr(transformers, ENCODER_KINDS[config.model_type].model_class)
            else:
                model_class = AutoModel
            model = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
            processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # The last two parts of a path identify the folder without naming anything else of the machine.
        path = Path(pretrained_model_name_or_path)
        name = "/".join(path.resolve().parts[-2:]) if path.is_dir() else str(pretrained_model_name_or_path)
        return cls(model, processor, name)

    @property
    def id2label(self) -> dict[int, str] | None:
        """The class names of a classifier's logits; `None` for an encoder."""
        is_classifier = self.model.base_model is not self.model
        return self.model.config.id2label if is_classifier else None

    def train(self, mode: bool = True) -> "ImageFeatureExtractor":
        """Stay in eval mode, so that measurements do not change."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: list[PIL.Image.Image]) -> ImageFeatures:
        """
        Compute the features of images.

        Args:
            images (`list[PIL.Image.Image]`): Images of any size and mode.
        Returns:
            [`ImageFeatures`]: the features, on the CPU.
        """
        pixel_values = self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        outputs = []
        # A classifier's features are its encoder's output. A hook catches them, so that they are not computed twice.
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
    Compute features with the Inception network that "FID", "KID" and "IS" in the literature refer to.

    It is torch-fidelity's network with the TensorFlow weights of 2015. It resizes images as TensorFlow 1 did, without
    antialiasing. torchmetrics uses the same network with `antialias=False`.

    It needs the extra `fid`, which installs torchvision. The weights are downloaded at the first use.

    Args:
        weights_path (`str`, *optional*): The weights' file, if it was downloaded before.

    Raises:
        ImportError: if torch-fidelity or torchvision is missing. The message says what to install.
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
        """
        Compute the features and logits of images.

        Args:
            images (`list[PIL.Image.Image]`): Images of any mode, all of the same size.
        Returns:
            [`ImageFeatures`]: 2048 features and 1008 logits of each image, on the CPU.
        """
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        device = next(self.model.parameters()).device
        features, logits = self.model(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))
        return ImageFeatures(features.flatten(1).float().cpu(), logits.float().cpu())


def load_feature_extractor(name: str, **kwargs) -> ImageFeatureExtractor | InceptionFeatureExtractor:
    """
    Load a feature extractor by name.

    Args:
        name (`str`): `"inception"`, or the Hub id or folder of a vision encoder or classifier from transformers.
        kwargs: Arguments of transformers' `from_pretrained`.
    Returns:
        [`ImageFeatureExtractor`] or [`InceptionFeatureExtractor`]: the extractor, on the CPU.
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
    Hold the features of real images, with which generated images are compared.

    Args:
        name (`str`): The name of the images in reports, such as `"imagenet, train"`.
        feature_name (`str`): The name of the features, which is the extractor's `name`.
        num_images (`int`): The number of images behind the mean and the covariance.
        mean (`numpy.ndarray` of shape `(feature_dim,)`), covariance (`numpy.ndarray` of shape `(feature_dim,
            feature_dim)`): Both in float64. The covariance is divided by `num_images - 1`.
        features (`numpy.ndarray` of shape `(num_kept, feature_dim)`):
            The first images' features in float32. [`KernelDistance`] and [`PrecisionRecall`] need them.
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
        Compute a reference from batches of features.

        Args:
            batches (iterable of `torch.Tensor` of shape `(batch_size, feature_dim)`):
                The features. They are read once. Memory grows with `max_kept`, not with the number of images.
            name, feature_name: As in [`ReferenceFeatures`].
            max_kept (`int`, defaults to 10_000): The number of images whose features are kept.
        Returns:
            [`ReferenceFeatures`]: the reference.
        Raises:
            ValueError: if there are fewer than two images.
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
        """
        Save the reference to an `.npz` file.

        Args:
            path (`str`): The file. Other tools find the mean and the covariance in it as `mu` and `sigma`.
        """
        with write_whole(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                mu=self.mean,
                sigma=self.covariance,
                features=self.features,
                num_images=self.num_images,
                name=self.name,
                feature_name=self.feature_name,
            )

    @classmethod
    def load(cls, path: str | os.PathLike, feature_name: str) -> "ReferenceFeatures":
        """
        Load a reference from a file.

        Args:
            path (`str`): A file that [`~ReferenceFeatures.save`] wrote.
            feature_name (`str`): The name of the features that the reference must have.
        Returns:
            [`ReferenceFeatures`]: the reference.
        Raises:
            ValueError: if the file is not a saved reference, or holds other features.
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
            raise ValueError(f"{str(path)!r} is not a reference saved by flowback_hf: {error}.") from error
        if reference.feature_name != feature_name:
            raise ValueError(
                f"The reference {str(path)!r} holds features of {reference.feature_name!r}, but the samples' are of"
                f" {feature_name!r}. Use the same features, or compute the reference again."
            )
        return reference
