# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What the kinds of demo data have in common."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from flowback_hf.data.demo.networks import make_teacher


# A kind may draw images for the judge only. They are not saved, so that no flow sees them.
JUDGE_SPLIT = "judge"
# Every kind has the first two. An image's random numbers depend on the number of its split.
SPLITS = ("train", "validation", "test", JUDGE_SPLIT)

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


def image_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """Make the generator that draws one image of a split, whatever other images are drawn."""
    return np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))


def draw_splits(
    draw: Callable[[np.random.Generator, int, int], Image.Image],
    num_classes: int,
    seed: int,
    resolution: int,
    num_images: dict[str, int],
) -> Splits:
    """
    Draw the images of some splits. The classes take turns, so they are balanced.

    An image depends only on the seed, its split, its number and the resolution, never on how many images are made.

    Args:
        draw (`Callable`): Takes a random generator, a label and the resolution in pixels, and returns an image.
        num_classes (`int`): How many labels there are.
        seed (`int`), resolution (`int`): As `DemoKind.make_splits` takes them.
        num_images (`dict`): Of each split.
    """
    splits = {}
    for split, number in num_images.items():
        labels = [index % num_classes for index in range(number)]
        images = [
            draw(image_generator(seed, split, index), label, resolution)
            for index, label in enumerate(tqdm(labels, desc=f"{split} images"))
        ]
        splits[split] = images, labels
    return splits
