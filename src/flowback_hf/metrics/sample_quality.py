# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import copy
import warnings
from typing import Any

import datasets
import evaluate
import torch
import torch.nn as nn

from flowback_hf.metrics.features import ReferenceFeatures


class PrecomputedFeatures(nn.Module):
    """What torchmetrics takes for a network, where the features have been computed already."""

    def __init__(self, feature_dim: int):
        super().__init__()
        self.num_features = feature_dim

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class FeatureMetric(evaluate.Metric):
    """
    A metric of features, `(num_images, feature_dim)`, that are added up or kept as they come; `evaluate` would write
    them to a file as nested lists. A metric that was given a part of the images takes in others' with `merge`.

    What it reports says which features, how many images, and which reference.
    """

    name_of_inputs = "features of generated images"

    def __init__(self, feature_name: str):
        try:
            import torchmetrics  # noqa: F401
        except ImportError as error:
            raise ImportError(f'{type(self).__name__} needs torchmetrics: pip install "flowback_hf[eval]".') from error
        self.feature_name = feature_name
        self.metric = None
        self.num_images = 0
        super().__init__()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=(self.__doc__ or "").strip().partition("\n\n")[0],
            citation="",
            inputs_description=f"predictions: {self.name_of_inputs}, a row for each.",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _build(self, feature_dim: int) -> Any:
        """The torchmetrics metric for features of this size."""
        raise NotImplementedError

    def _update(self, features: torch.Tensor):
        self.metric.update(features)

    def _results(self) -> dict[str, Any]:
        raise NotImplementedError

    def add(self, *, prediction: torch.Tensor):
        """Adds one image."""
        self.add_batch(predictions=torch.as_tensor(prediction)[None])

    def add_batch(self, *, predictions: torch.Tensor):
        """Adds images."""
        features = torch.as_tensor(predictions)
        if features.ndim != 2:
            raise ValueError(
                f"`predictions` must have shape (num_images, feature_dim), but have shape {tuple(features.shape)}."
            )
        if self.metric is None:
            self.metric = self._build(features.shape[1])
        self._update(features)
        self.num_images += len(features)

    def merge(self, other: "FeatureMetric"):
        """Takes in what another metric of the same kind has been given: of another process, say."""
        if type(other) is not type(self) or other.feature_name != self.feature_name:
            raise ValueError(
                f"Only a {type(self).__name__} of {self.feature_name!r} can be merged into one, but this is a"
                f" {type(other).__name__} of {getattr(other, 'feature_name', None)!r}."
            )
        if self.metric is None:
            self.metric = copy.deepcopy(other.metric)
        elif other.metric is not None:
            self._merge(other)
        self.num_images += other.num_images

    def _merge(self, other: "FeatureMetric"):
        self.metric.merge_state(other.metric)

    def compute(self, *, predictions: torch.Tensor | None = None) -> dict[str, Any]:
        """The results, as a flat dict; images that were added are forgotten."""
        if predictions is not None:
            self.add_batch(predictions=predictions)
        if self.num_images < 2:
            raise ValueError(f"{type(self).__name__} needs at least two images, but was given {self.num_images}.")
        # Subsets are drawn from the global generator, which must neither decide nor notice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            results = self._results()
        results |= {"num_images": self.num_images, "features": self.feature_name}
        self.metric, self.num_images = None, 0
        return results


class ReferenceMetric(FeatureMetric):
    """A metric that compares generated images with real ones."""

    def __init__(self, reference: ReferenceFeatures):
        self.reference = reference
        super().__init__(reference.feature_name)

    def add_batch(self, *, predictions: torch.Tensor):
        """Adds images."""
        feature_dim = torch.as_tensor(predictions).shape[-1]
        if feature_dim != len(self.reference.mean):
            raise ValueError(
                f"`predictions` have {feature_dim} features, but the reference's, of {self.feature_name!r}, are"
                f" {len(self.reference.mean)}."
            )
        super().add_batch(predictions=predictions)

    def compute(self, *, predictions: torch.Tensor | None = None) -> dict[str, Any]:
        """The results, as a flat dict; images that were added are forgotten."""
        results = super().compute(predictions=predictions)
        return results | {"reference": self.reference.name, "num_reference_images": self.reference.num_images}


class FrechetDistance(ReferenceMetric):
    """
    The Fréchet distance between Gaussians fitted to the features of generated and of real images: `|m1 - m2|^2 +
    tr(S1 + S2 - 2 (S1 S2)^(1/2))`, in float64. With Inception's features it is the FID (Heusel et al., GANs Trained by
    a Two Time-Scale Update Rule, https://arxiv.org/abs/1706.08500), with DINOv2's the FD-DINOv2.

    It falls with the number of images: compare numbers of equally many alone.

    Args:
        reference ([`ReferenceFeatures`]): Of the real images.
    Args of `compute` and `add_batch`:
        predictions (`torch.Tensor` of shape `(num_images, feature_dim)`): Features of generated images. Memory does
            not grow with their number.
    Returns (`compute`):
        `dict`: `frechet_distance`, at least 0, lower is better; `num_images`, `features`, `reference`,
        `num_reference_images`.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf.metrics import FrechetDistance, ReferenceFeatures

        >>> real = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> reference = ReferenceFeatures.from_batches([real], name="noise", feature_name="itself")
        >>> round(FrechetDistance(reference).compute(predictions=real + 1)["frechet_distance"], 4)
        4.0
        ```
    """

    def _build(self, feature_dim: int) -> Any:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(PrecomputedFeatures(feature_dim), sync_on_compute=False)

    def _update(self, features: torch.Tensor):
        self.metric.update(features.double(), real=False)

    def _results(self) -> dict[str, Any]:
        reference, num_features = self.reference, len(self.reference.mean)
        fewest = min(self.num_images, reference.num_images)
        if fewest <= num_features:
            warnings.warn(
                f"The Fréchet distance of {num_features} features needs more than {num_features} images on each side,"
                f" but has {self.num_images} generated and {reference.num_images} real ones: the covariance is"
                " singular, and the distance says more of the number of images than of the images."
            )
        mean, covariance = torch.from_numpy(reference.mean), torch.from_numpy(reference.covariance)
        self.metric.real_features_num_samples += reference.num_images
        self.metric.real_features_sum += reference.num_images * mean
        self.metric.real_features_cov_sum += (reference.num_images - 1) * covariance
        self.metric.real_features_cov_sum += reference.num_images * torch.outer(mean, mean)
        self.metric.orig_dtype = torch.float64
        return {"frechet_distance": self.metric.compute().item()}


class KernelDistance(ReferenceMetric):
    """
    The squared maximum mean discrepancy with the kernel `(x.y / feature_dim + 1)^3`, unbiased, the mean of 100 random
    subsets of 1000 images, or of all where there are less. With Inception's features it is the KID (Bińkowski et al.,
    Demystifying MMD GANs, https://arxiv.org/abs/1801.01401).

    Args:
        reference ([`ReferenceFeatures`]): Of the real images.
    Args of `compute` and `add_batch`:
        predictions (`torch.Tensor` of shape `(num_images, feature_dim)`): Features of generated images. All are kept.
    Returns (`compute`):
        `dict`: `kernel_distance`, 0 for equal distributions and possibly a little below, lower is better;
        `kernel_distance_std` over the subsets; `num_images`, `features`, `reference`, `num_reference_images`.
    """

    def _build(self, feature_dim: int) -> Any:
        from torchmetrics.image.kid import KernelInceptionDistance

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that features are kept, as does the docstring
            return KernelInceptionDistance(PrecomputedFeatures(feature_dim), sync_on_compute=False)

    def _update(self, features: torch.Tensor):
        self.metric.update(features.double(), real=False)

    def _merge(self, other: "KernelDistance"):
        self.metric.fake_features.extend(other.metric.fake_features)

    def _results(self) -> dict[str, Any]:
        self.metric.subset_size = min(1000, self.num_images, len(self.reference.features))
        self.metric.update(torch.from_numpy(self.reference.features).double(), real=True)
        mean, std = self.metric.compute()
        return {"kernel_distance": mean.item(), "kernel_distance_std": std.item()}


class InceptionScore(FeatureMetric):
    """
    `exp(E KL(p(y | x) || p(y)))` of a classifier's predictions for generated images, the mean of ten splits. With
    Inception's it is the IS (Salimans et al., Improved Techniques for Training GANs,
    https://arxiv.org/abs/1606.03498); with another classifier it can be compared between flows that this one judges.

    Args:
        feature_name (`str`): Whose predictions they are, for the report.
    Args of `compute` and `add_batch`:
        predictions (`torch.Tensor` of shape `(num_images, num_classes)`): Logits. All are kept.
    Returns (`compute`):
        `dict`: `inception_score`, in [1, num_classes], higher is better; `inception_score_std` over the splits;
        `num_images`, `features`.
    """

    name_of_inputs = "logits of generated images"

    def _build(self, feature_dim: int) -> Any:
        from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TorchmetricsInceptionScore(PrecomputedFeatures(feature_dim), sync_on_compute=False)

    def _update(self, features: torch.Tensor):
        self.metric.update(features.double())

    def _merge(self, other: "InceptionScore"):
        self.metric.features.extend(other.metric.features)

    def _results(self) -> dict[str, Any]:
        mean, std = self.metric.compute()
        return {"inception_score": mean.item(), "inception_score_std": std.item()}


class PrecisionRecall(ReferenceMetric):
    """
    Precision: the share of generated images that lie among real ones, that is within the distance from some real image
    to its third nearest real neighbour. Recall: the same with the two exchanged. (Kynkäänniemi et al., Improved
    Precision and Recall Metric for Assessing Generative Models, https://arxiv.org/abs/1904.06991)

    Args:
        reference ([`ReferenceFeatures`]): Of the real images.
        num_neighbors (`int`, defaults to 3): Which neighbour's distance is the radius.
    Args of `compute` and `add_batch`:
        predictions (`torch.Tensor` of shape `(num_images, feature_dim)`): Features of generated images. All are kept;
            distances are computed in chunks.
    Returns (`compute`):
        `dict`: `precision` and `recall`, in [0, 1], higher is better; `num_images`, `features`, `reference`,
        `num_reference_images`.
    """

    def __init__(self, reference: ReferenceFeatures, num_neighbors: int = 3):
        self.num_neighbors = num_neighbors
        super().__init__(reference)

    def _build(self, feature_dim: int) -> Any:
        from torchmetrics import CatMetric

        return CatMetric(nan_strategy="error", sync_on_compute=False)

    def _results(self) -> dict[str, Any]:
        generated = self.metric.compute().double()
        real = torch.from_numpy(self.reference.features).double()
        for name, features in {"generated": generated, "real": real}.items():
            if len(features) <= self.num_neighbors:
                raise ValueError(
                    f"`num_neighbors` is {self.num_neighbors}, which needs more images than that, but there are"
                    f" {len(features)} {name} ones."
                )
        return {
            "precision": self._share_within(generated, real).item(),
            "recall": self._share_within(real, generated).item(),
        }

    def _share_within(self, points: torch.Tensor, centers: torch.Tensor, chunk_size: int = 1024) -> torch.Tensor:
        """The share of points within the radius of any center: the distance to its `num_neighbors`-th neighbour."""
        # the first neighbour of a center is itself
        radii = torch.cat(
            [
                torch.cdist(chunk, centers).kthvalue(self.num_neighbors + 1, dim=1).values
                for chunk in centers.split(chunk_size)
            ]
        )
        within = [(torch.cdist(chunk, centers) <= radii).any(dim=1) for chunk in points.split(chunk_size)]
        return torch.cat(within).double().mean()
