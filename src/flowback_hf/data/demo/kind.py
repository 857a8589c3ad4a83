# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What the kinds of demo data have in common."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image


SPLITS = ("train", "validation")

# The images and labels of each split.
Splits = dict[str, tuple[list[Image.Image], list[int]]]


@dataclass(frozen=True)
class DemoKind:
    """
    A kind of demo images.

    Args:
        class_names (`list[str]`): In alphabetical order, which is the order in which an image folder numbers them.
        make_splits (`Callable`): Takes the seed, the resolution in pixels and the number of images of each split.
        teacher_grid_size (`int`): Patches of the teacher along each side of an image.
        quarter_turns (`bool`): Whether an image turned by 90 degrees could be one of its class as well.
    """

    class_names: list[str]
    make_splits: Callable[[int, int, dict[str, int]], Splits]
    teacher_grid_size: int
    quarter_turns: bool
