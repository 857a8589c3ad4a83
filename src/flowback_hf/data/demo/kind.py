# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What the kinds of demo data have in common."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from flowback_hf.data.demo.networks import make_teacher


SPLITS = ("train", "validation")
# A kind may draw images for the judge only. They are not saved, so that no flow sees them.
JUDGE_SPLIT = "judge"

# The images and labels of each split.
Splits = dict[str, tuple[list[Image.Image], list[int]]]


@dataclass(frozen=True)
class DemoKind:
    """
    A kind of demo images.

    Args:
        class_names (`list[str]`): In alphabetical order, which is the order in which an image folder numbers them.
        make_splits (`Callable`): Takes the seed, the resolution in pixels and the numbers of training and validation
            images. It may return more splits, such as [`JUDGE_SPLIT`].
        teacher_grid_size (`int`): Patches of the teacher along each side of an image.
        quarter_turns (`bool`): Whether an image turned by 90 degrees could be one of its class as well.
        make_teacher (`Callable`): Takes the resolution, the teacher's patch size, the class names and the seed.
        is_parquet (`bool`): Whether each split is saved as a parquet file instead of a folder of images.
    """

    class_names: list[str]
    make_splits: Callable[[int, int, dict[str, int]], Splits]
    teacher_grid_size: int
    quarter_turns: bool
    make_teacher: Callable[[int, int, list[str], int], torch.nn.Module] = make_teacher
    is_parquet: bool = False


def draw_splits(
    draw: Callable[[np.random.Generator, int, int], Image.Image],
    num_classes: int,
    seed: int,
    resolution: int,
    num_images: dict[str, int],
) -> Splits:
    """
    Draw the images of both splits. The classes take turns, so they are balanced.

    An image depends only on the seed, its split, its number and the resolution, never on how many images are made.

    Args:
        draw (`Callable`): Takes a random generator, a label and the resolution in pixels, and returns an image.
        num_classes (`int`): How many labels there are.
        seed (`int`), resolution (`int`), num_images (`dict`): As `DemoKind.make_splits` takes them.
    """
    splits = {}
    for split_number, split in enumerate(SPLITS):
        indices = range(num_images[split])
        labels = [index % num_classes for index in indices]
        images = []
        for index, label in zip(tqdm(indices, desc=f"{split} images"), labels):
            rng = np.random.default_rng(np.random.SeedSequence([seed, split_number, index]))
            images.append(draw(rng, label, resolution))
        splits[split] = images, labels
    return splits
