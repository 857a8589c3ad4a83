# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What the kinds of demo data have in common."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

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
