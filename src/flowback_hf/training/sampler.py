# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The order in which a run sees its images."""

from collections.abc import Iterator

import torch


class EpochSampler(torch.utils.data.Sampler):
    """
    The images of an epoch, shuffled again in each, however many processes share them.

    Args:
        num_images (`int`): In the data set.
        num_used (`int`): In an epoch: as many as fill whole steps.
        seed (`int`): Decides the order, with the epoch.
    """

    def __init__(self, num_images: int, num_used: int, seed: int):
        self.num_images = num_images
        self.num_used = num_used
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int):
        """Accelerate's data loader calls this with the epoch's number."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.num_images, generator=generator)[: self.num_used].tolist()

    def __len__(self) -> int:
        return self.num_used
