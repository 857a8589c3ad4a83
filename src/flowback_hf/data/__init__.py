"""Data for training and evaluation: splits, images, VAE latents, stored teacher features, and sources of batches."""

from flowback_hf.data.classes import match_class_names
from flowback_hf.data.images import ImageDataset, collate
from flowback_hf.data.latents import LatentDataset, load_latents
from flowback_hf.data.noise import RowGenerator, add_noise, make_generator
from flowback_hf.data.sources import ImageSource, LatentSource
from flowback_hf.data.splits import DataSource, HoldOut, Splits, load_split, load_splits
from flowback_hf.data.streams import Stream
from flowback_hf.data.teacher_features import load_teacher, load_teacher_features


__all__ = [
    "DataSource",
    "HoldOut",
    "ImageDataset",
    "ImageSource",
    "LatentDataset",
    "LatentSource",
    "RowGenerator",
    "Splits",
    "Stream",
    "add_noise",
    "collate",
    "load_latents",
    "load_split",
    "load_splits",
    "load_teacher",
    "load_teacher_features",
    "make_generator",
    "match_class_names",
]
