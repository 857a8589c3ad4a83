# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The noise of training, and generators that depend on what they are for and on nothing else."""

from typing import Any

import numpy as np
import torch

from flowback_hf.pipelines.pipeline_flowback import apply_noise


def make_generator(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """
    Make a generator that is a function of some numbers: a seed and a batch, say, or a seed and an image.

    Whoever knows the numbers repeats the noise: resuming needs no random state.

    Args:
        entropy (`int`): Any non-negative numbers.
        device (`torch.device`, defaults to the CPU): Where it draws.
    """
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def add_noise(sample: torch.Tensor, config: Any, generator: torch.Generator) -> torch.Tensor:
    """
    Add the noise that a flow is trained with to a batch.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): Clean data.
        config: Of the flow: its `noise_type` and `noise_std`.
        generator (`torch.Generator`): Draws the noise, on the device of `sample`.
    Returns:
        `torch.Tensor` like `sample`: with Gaussian noise of `noise_std`, or 8-bit pixels dequantized uniformly.
    """
    draw = torch.randn if config.noise_type == "gaussian" else torch.rand
    noise = draw(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
    return apply_noise(sample, noise, config.noise_type, config.noise_std)
