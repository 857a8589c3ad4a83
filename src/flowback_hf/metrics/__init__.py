"""Metrics of a flow: classification accuracy, bits per dimension, and the quality of its samples."""

from flowback_hf.metrics.accuracy import Accuracy
from flowback_hf.metrics.bits_per_dim import BitsPerDim
from flowback_hf.metrics.features import (
    ImageFeatureExtractor,
    ImageFeatures,
    InceptionFeatureExtractor,
    ReferenceFeatures,
    load_feature_extractor,
)
from flowback_hf.metrics.linear_probe import linear_probe, pooled_hidden_states
from flowback_hf.metrics.sample_quality import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall


__all__ = [
    "Accuracy",
    "BitsPerDim",
    "FrechetDistance",
    "ImageFeatureExtractor",
    "ImageFeatures",
    "InceptionFeatureExtractor",
    "InceptionScore",
    "KernelDistance",
    "PrecisionRecall",
    "ReferenceFeatures",
    "linear_probe",
    "load_feature_extractor",
    "pooled_hidden_states",
]
