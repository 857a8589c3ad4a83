# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The demo's digits: the 1,797 handwritten ones of scikit-learn."""

import numpy as np
from PIL import Image

from flowback_hf.data.demo.kind import SPLITS, DemoKind, Splits


NUM_VALIDATION_IMAGES = 297
MAX_VALUE = 16


def make_digits(seed: int, resolution: int, num_images: dict[str, int]) -> Splits:
    """
    The images and labels of both splits, with the same share of every digit in both.

    Their resolution and number are fixed.

    Raises:
        ImportError: if scikit-learn is missing; says what to install.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('The digits come with scikit-learn: pip install "flowback_hf[demo]".') from error
    digits = load_digits()
    split_indices = train_test_split(
        np.arange(len(digits.target)),
        test_size=NUM_VALIDATION_IMAGES,
        stratify=digits.target,
        random_state=seed,
    )
    pixels = np.round(digits.images / MAX_VALUE * 255).astype(np.uint8)
    return {
        split: ([Image.fromarray(pixels[i]) for i in indices], [int(digits.target[i]) for i in indices])
        for split, indices in zip(SPLITS, split_indices)
    }


# A turned digit is another digit or none.
DIGITS = DemoKind([str(digit) for digit in range(10)], make_digits, teacher_grid_size=4, quarter_turns=False)
