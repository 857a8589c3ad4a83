# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What a run looks at while it trains: likelihood and accuracy on held-out images, and a grid of samples."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.alignment.reverse_objective import squared_error, trajectory_of
from flowback_hf.data import ImageSource, LatentSource, RowGenerator, add_noise, make_generator
from flowback_hf.files import write_whole
from flowback_hf.models.transformer_tarflow import Guidance


IMAGES_PER_CLASS = 4


def generator_of_batch(accelerator: Accelerator, number: int, batch_size: int) -> RowGenerator:
    """What draws the noise of a validation batch: always the same, whichever process has which part of it."""
    return RowGenerator(
        make_generator(0, number, device=accelerator.device),
        batch_size * accelerator.num_processes,
        first_row=batch_size * accelerator.process_index,
    )


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
        generator = generator_of_batch(accelerator, number, len(batch["class_labels"]))
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


@torch.no_grad()
def validate_learned_inverse(
    accelerator: Accelerator,
    pipeline: FlowBackPipeline,
    dataloader: torch.utils.data.DataLoader,
    source: ImageSource | LatentSource,
) -> dict[str, float]:
    """
    Measure how well a learned inverse restores validation data from their latents, with one draw of noise that is the
    same every time.

    Args:
        accelerator, dataloader, source: As in [`validate`].
        pipeline ([`FlowBackPipeline`]): Holds the flow and the learned inverse.
    Returns:
        `dict`: `validation_reconstruction`, the mean squared error at the smallest guidance scale that it was trained
        for, which is 1.0 unless it learns from pairs of the sampler alone.
    """
    flow, reverse_transformer, errors = pipeline.transformer, pipeline.reverse_transformer, []
    scale = reverse_transformer.config.min_guidance_scale
    guidance = Guidance(scale, pipeline.config.guidance_rule)
    for number, batch in enumerate(dataloader):
        generator = generator_of_batch(accelerator, number, len(batch["class_labels"]))
        batch = source.mirror(batch, torch.zeros_like(batch["class_labels"], dtype=torch.bool))
        clean_sample = source.clean_sample(batch, generator)
        noisy_sample = add_noise(clean_sample, flow.config, generator)
        class_labels = None if flow.config.num_classes is None else batch["class_labels"]
        latents = trajectory_of(flow, noisy_sample, class_labels, guidance)[-1]
        sample = reverse_transformer(latents, class_labels, scale).sample
        target = clean_sample if reverse_transformer.config.denoises else noisy_sample
        errors.append(accelerator.gather_for_metrics(squared_error(sample, target)))
    return {"validation_reconstruction": torch.cat(errors).mean().item()}


def draw_samples(
    pipeline: FlowBackPipeline,
    class_labels: list[int] | None,
    guidance_scale: float,
    seed: int,
    path: Path,
    solvers: tuple[str, ...] = ("auto",),
):
    """
    Draw a grid of samples with one row for each class. Small images are enlarged so that a person can see them.

    Args:
        pipeline ([`FlowBackPipeline`]): Holds the flow.
        class_labels (`list[int]`, *optional*): Default: the first ten classes.
        guidance_scale (`float`): 1.0 is off, as it always is for a flow without classes.
        seed (`int`): Decides the noise.
        path (`pathlib.Path`): The picture to write.
        solvers (`tuple[str]`, defaults to `("auto",)`): Each draws its images of the same noise, side by side.
    """
    num_classes = pipeline.transformer.config.num_classes
    if class_labels is None and num_classes is not None:
        class_labels = list(range(min(10, num_classes)))
    drawn = [
        pipeline(
            class_labels=class_labels,
            num_images_per_prompt=IMAGES_PER_CLASS,
            guidance_scale=1.0 if num_classes is None else guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            solver=solver,
        ).images
        for solver in solvers
    ]
    num_rows = len(drawn[0]) // IMAGES_PER_CLASS
    rows = [slice(IMAGES_PER_CLASS * row, IMAGES_PER_CLASS * (row + 1)) for row in range(num_rows)]
    images = [image for row in rows for of_solver in drawn for image in of_solver[row]]
    path.parent.mkdir(exist_ok=True)
    size = max(64, images[0].width)
    grid = make_image_grid(images, num_rows, IMAGES_PER_CLASS * len(solvers), resize=size)
    with write_whole(path) as partial:
        grid.save(partial)
