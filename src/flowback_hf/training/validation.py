# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What a run looks at while it trains: likelihood and accuracy on held-out images, and a grid of samples."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.data import ImageSource, LatentSource, RowGenerator, add_noise, make_generator
from flowback_hf.files import write_whole


IMAGES_PER_CLASS = 4


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    classifier: FlowBackClassificationPipeline,
    dataloader: torch.utils.data.DataLoader,
    source: ImageSource | LatentSource,
) -> dict[str, float]:
    """
    Measure a flow on validation batches, with one draw of noise that is the same every time.

    Args:
        accelerator (`accelerate.Accelerator`): Gathers the results of all processes.
        classifier ([`FlowBackClassificationPipeline`]): Holds the flow.
        dataloader (`torch.utils.data.DataLoader`): Batches of the source's validation items.
        source ([`ImageSource`] or [`LatentSource`]): Knows what a batch is.
    Returns:
        `dict`: `validation_nll` in nats per dimension; of a flow trained with uniform noise also
        `validation_bits_per_dim`; of a flow with classes also `validation_accuracy` in [0, 1], by one gradient.
    """
    flow = classifier.transformer
    log_probs, hits = [], []
    for number, batch in enumerate(dataloader):
        num_rows = len(batch["class_labels"])
        generator = RowGenerator(
            make_generator(0, number, device=accelerator.device),
            num_rows * accelerator.num_processes,
            first_row=num_rows * accelerator.process_index,
        )
        batch = source.mirror(batch, torch.zeros_like(batch["class_labels"], dtype=torch.bool))
        noisy_sample = add_noise(source.clean_sample(batch, generator), flow.config, generator)
        class_labels = None if flow.config.num_classes is None else batch["class_labels"]
        log_probs.append(accelerator.gather_for_metrics(flow.log_prob(noisy_sample, class_labels)))
        if class_labels is not None:
            _, gradient = classifier.log_prob_and_class_gradient(noisy_sample[None])
            predictions, class_labels = accelerator.gather_for_metrics((gradient.argmax(dim=1), class_labels))
            hits.append((predictions == class_labels)[class_labels >= 0])
    num_dimensions = flow.config.in_channels * flow.config.sample_size**2
    nll = -torch.cat(log_probs).mean().item() / num_dimensions
    metrics = {"validation_nll": nll}
    if flow.config.noise_type == "uniform":
        metrics["validation_bits_per_dim"] = (nll + math.log(128)) / math.log(2)
    if sum(map(len, hits)):
        metrics["validation_accuracy"] = torch.cat(hits).float().mean().item()
    return metrics


def draw_samples(
    pipeline: FlowBackPipeline, class_labels: list[int] | None, guidance_scale: float, seed: int, path: Path
):
    """
    Draw a grid of samples with one row for each class. Small images are enlarged so that a person can see them.

    Args:
        pipeline ([`FlowBackPipeline`]): Holds the flow.
        class_labels (`list[int]`, *optional*): Default: the first ten classes.
        guidance_scale (`float`): 1.0 is off, as it always is for a flow without classes.
        seed (`int`): Decides the noise.
        path (`pathlib.Path`): The picture to write.
    """
    num_classes = pipeline.transformer.config.num_classes
    if class_labels is None and num_classes is not None:
        class_labels = list(range(min(10, num_classes)))
    images = pipeline(
        class_labels=class_labels,
        num_images_per_prompt=IMAGES_PER_CLASS,
        guidance_scale=1.0 if num_classes is None else guidance_scale,
        generator=torch.Generator().manual_seed(seed),
    ).images
    path.parent.mkdir(exist_ok=True)
    size = max(64, images[0].width)
    grid = make_image_grid(images, len(images) // IMAGES_PER_CLASS, IMAGES_PER_CLASS, resize=size)
    with write_whole(path) as partial:
        grid.save(partial)
