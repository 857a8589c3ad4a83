"""The noise and the classes that the samplers of a benchmark have in common."""

import torch

from flowback_hf import FlowBackPipeline


def draw_noise(pipeline: FlowBackPipeline, num_samples: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents, and labels of all classes in turn."""
    noise = pipeline.prepare_latents(num_samples, torch.Generator().manual_seed(0))
    num_classes = pipeline.transformer.config.num_classes
    return noise, None if num_classes is None else torch.arange(num_samples) % num_classes
