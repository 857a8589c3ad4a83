# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The noise of training, and generators that depend on what they are for and on nothing else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flowback_hf.pipelines.pipeline_flowback import apply_noise


def make_generator(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """
    Make a generator that is a function of some numbers: a seed and a batch, say, or a seed and an image.

    Whoever knows the numbers repeats the noise: resuming needs no random state.

    Args:
        entropy (`int`): Any non-negative numbers. Zeros at the end make no difference.
        device (`torch.device`, defaults to the CPU): Where it draws.
    """
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


class RowGenerator:
    """
    Draws random numbers for some rows of a batch: those that one generator would give them if it drew the whole batch.

    Processes that share a batch, or that go through it in parts, then get the same noise for each image, however the
    batch is divided.

    Args:
        generator (`torch.Generator`): Draws the batch. It must be in the same state for each part of a batch.
        num_rows (`int`): How many rows the batch has.
        first_row (`int`, defaults to 0): Where the part begins.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf.data.noise import RowGenerator, make_generator

        >>> whole = RowGenerator(make_generator(0), num_rows=4).randn((4, 3))
        >>> half = RowGenerator(make_generator(0), num_rows=4, first_row=2).randn((2, 3))
        >>> torch.equal(whole[2:], half)
        True
        ```
    """

    def __init__(self, generator: torch.Generator, num_rows: int, first_row: int = 0):
        self.generator = generator
        self.num_rows = num_rows
        self.first_row = first_row

    def randn(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers of a shape that begins with the number of rows of this part, on the generator's device."""
        return self._draw(torch.randn, shape, dtype)

    def rand(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uniform numbers from 0 to 1, as [`randn`]."""
        return self._draw(torch.rand, shape, dtype)

    def _draw(self, function: Callable, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        num_rows, *rest = shape
        batch = function((self.num_rows, *rest), generator=self.generator, device=self.generator.device, dtype=dtype)
        return batch[self.first_row : self.first_row + num_rows]


def add_noise(sample: torch.Tensor, config: Any, generator: RowGenerator) -> torch.Tensor:
    """
    Add the noise that a flow is trained with to a batch.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): Clean data.
        config: Of the flow: its `noise_type` and `noise_std`.
        generator ([`RowGenerator`]): Draws the noise, on the device of `sample`.
    Returns:
        `torch.Tensor` like `sample`: with Gaussian noise of `noise_std`, or 8-bit pixels dequantized uniformly.
    """
    draw = generator.randn if config.noise_type == "gaussian" else generator.rand
    noise = draw(tuple(sample.shape), sample.dtype)
    return apply_noise(sample, noise, config.noise_type, config.noise_std)
