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
    """Stand in for the network in a torchmetrics metric when the features are computed already."""

    def __init__(self, feature_dim: int):
        super().__init__()
        self.num_features = feature_dim

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class FeatureMetric(evaluate.Metric):
    """
    Collect features of images and compute a metric from them. It is the base class of all metrics of samples.

    Features of shape `(num_images, feature_dim)` are summed up or kept in memory as they arrive; `evaluate.Metric`
    would write them to a file as nested lists. `merge` combines metrics that each saw a part of the images. Reports
    name the features, the number of images, and the reference.

    Args:
        feature_name (`str`): The name of the features in reports.

    Raises:
        ImportError: if torchmetrics is missing. The message says what to install.
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
            inputs_description=f"predictions: {self.name_of_inputs}, one row an image.",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _build(self, feature_dim: int) -> Any:
        """Create the torchmetrics metric for features of this size."""
        raise NotImplementedError

    def _update(self, features: torch.Tensor):
        self.metric.update(features)

    def _results(self) -> dict[str, Any]:
        raise NotImplementedError

    def add(self, *, prediction: torch.Tensor):
        """
        Add one image.

        Args:
            prediction (`torch.Tensor` of shape `(feature_dim,)`): The image's features.
        """
        self.add_batch(predictions=torch.as_tensor(prediction)[None])

    def add_batch(self, *, predictions: torch.Tensor):
        """
        Add images.

        Args:
            predictions (`torch.Tensor` of shape `(num_images, feature_dim)`): The images' features.
        Raises:
            ValueError: if the features have another shape.
        """
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
        """
        Add the images that another metric collected, in another process for example.

        Args:
            other ([`FeatureMetric`]): A metric of the same class and the same features.
        Raises:
            ValueError: if it is of another class or of other features.
        """
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
        """
        Compute the results, and forget the collected images.

        Args:
            predictions (`torch.Tensor` of shape `(num_images, feature_dim)`, *optional*): More images, added first.
        Returns:
            `dict`: the results; the class's docstring names them.
        Raises:
            ValueError: if there are fewer than two images.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions)
        if self.num_images < 2:
            raise ValueError(f"{type(self).__name__} needs at least two images, but was given {self.num_images}.")
        # torchmetrics draws subsets with the global generator. Its state must neither matter nor change.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed GPUs, too
            results = self._results()
        results |= {"num_images": self.num_images, "features": self.feature_name}
        self.metric, self.num_images = None, 0
        return results


class ReferenceMetric(FeatureMetric):
    """
    Compare generated images with real ones. It is the base class of the metrics that need a reference.

    Args:
        reference ([`ReferenceFeatures`]): The real images' features.
    """

    def __init__(self, reference: ReferenceFeatures):
        self.reference = reference
        super().__init__(reference.feature_name)

    def add_batch(self, *, predictions: torch.Tensor):
        """
        Add generated images.

        Args:
            predictions (`torch.Tensor` of shape `(num_images, feature_dim)`): The images' features.
        Raises:
            ValueError: if the features have another shape, or another size than the reference's.
        """
        feature_dim = torch.as_tensor(predictions).shape[-1]
        if feature_dim != len(self.reference.mean):
            raise ValueError(
                f"`predictions` have {feature_dim} features an image, but the reference, of {self.feature_name!r}, has"
                f" {len(self.reference.mean)}."
            )
        super().add_batch(predictions=predictions)

    def compute(self, *, predictions: torch.Tensor | None = None) -> dict[str, Any]:
        """Compute the results, as [`FeatureMetric`] does, and add the reference's name and number of images."""
        results = super().compute(predictions=predictions)
        return results | {"reference": self.reference.name, "num_reference_images": self.reference.num_images}


class FrechetDistance(ReferenceMetric):
    """
    Compute the Fréchet distance between Gaussians fitted to the features of generated and of real images.

    It is `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`, in float64. With Inception's features it is the FID (Heusel et
    al., GANs Trained by a Two Time-Scale Update Rule, https://arxiv.org/abs/1706.08500), with DINOv2's the FD-DINOv2.

    The distance falls as the number of images grows. Only compare distances of equally many images.

    Args:
        reference ([`ReferenceFeatures`]): The real images' features.
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
                f" but has {self.num_images} generated and {reference.num_images} real ones. The covariance is"
                " singular, and the distance mostly reflects the number of images."
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
    Compute the squared maximum mean discrepancy of generated and real images' features.

    It is the unbiased estimate with the kernel `(x.y / feature_dim + 1)^3`, as the mean over 100 random subsets of
    1000 images, or of all images if there are fewer. With Inception's features it is the KID (Bińkowski et al.,
    Demystifying MMD GANs, https://arxiv.org/abs/1801.01401).

    Args:
        reference ([`ReferenceFeatures`]): The real images' features.
    Args of `compute` and `add_batch`:
        predictions (`torch.Tensor` of shape `(num_images, feature_dim)`): Features of generated images. All are kept.
    Returns (`compute`):
        `dict`: `kernel_distance`, lower is better, 0 on average for equal distributions and possibly a little below;
        `kernel_distance_std`, its standard deviation over the subsets; `num_images`, `features`, `reference`,
        `num_reference_images`.
    """

    def _build(self, feature_dim: int) -> Any:
        from torchmetrics.image.kid import KernelInceptionDistance

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that features are kept in memory
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
    Compute the Inception Score of generated images from a classifier's logits.

    It is `exp(E KL(p(y | x) || p(y)))`, as the mean over ten splits of the images, or over fewer, of about ten images
    each. With Inception's logits it is the IS (Salimans et al., Improved Techniques for Training GANs,
    https://arxiv.org/abs/1606.03498). Scores of different classifiers are not comparable.

    Args:
        feature_name (`str`): The name of the classifier in reports.
    Args of `compute` and `add_batch`:
        predictions (`torch.Tensor` of shape `(num_images, num_classes)`): Logits. All are kept.
    Returns (`compute`):
        `dict`: `inception_score`, in [1, num_classes], higher is better; `inception_score_std`, its standard deviation
        over the splits; `num_images`, `features`.
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
        self.metric.splits = max(1, min(10, self.num_images // 10))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a single split has no standard deviation
            mean, std = self.metric.compute()
        std = std.item() if self.metric.splits > 1 else 0.0
        return {"inception_score": mean.item(), "inception_score_std": std}


class PrecisionRecall(ReferenceMetric):
    """
    Compute how many generated images lie among real ones (precision), and how many real among generated (recall).

    An image lies among others if it is closer to one of them than that one is to its third nearest neighbor of its own
    kind, or equally close. (Kynkäänniemi et al., Improved Precision and Recall Metric for Assessing Generative Models,
    https://arxiv.org/abs/1904.06991)

    Args:
        reference ([`ReferenceFeatures`]): The real images' features.
        num_neighbors (`int`, defaults to 3): The neighbor whose distance is used.
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
        """Compute the share of points that lie within the radius of a center, its `num_neighbors`-th neighbor."""
        # Each center's nearest neighbor is itself.
        radii = torch.cat(
            [
                torch.cdist(chunk, centers).kthvalue(self.num_neighbors + 1, dim=1).values
                for chunk in centers.split(chunk_size)
            ]
        )
        within = [(torch.cdist(chunk, centers) <= radii).any(dim=1) for chunk in points.split(chunk_size)]
        return torch.cat(within).double().mean()
