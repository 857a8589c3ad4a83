# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The demo's networks: a small teacher, an independent judge, and their training."""

from collections.abc import Callable

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from tqdm.auto import tqdm
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    get_cosine_schedule_with_warmup,
)
from transformers.modeling_outputs import ImageClassifierOutput

from flowback_hf.alignment.teacher import RepresentationTeacher
from flowback_hf.metrics.linear_probe import linear_probe


BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARMUP_FRACTION = 0.1


def make_image_processor(resolution: int) -> BitImageProcessorPil:
    """The image processor of both networks: three channels in [-1, 1]; images of another size are resized."""
    return BitImageProcessorPil(
        size={"height": resolution, "width": resolution},
        # Not used, but saved all the same: the default of 224 would mislead who reads the file.
        crop_size={"height": resolution, "width": resolution},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


class PatchClassifier(torch.nn.Module):
    """
    A DINOv2 with a classification head on the mean of its patch tokens only, which must then carry the meaning.

    Args:
        dinov2 (`Dinov2Model`): The encoder.
        num_classes (`int`): How many classes the head tells apart.
    """

    def __init__(self, dinov2: Dinov2Model, num_classes: int):
        super().__init__()
        self.dinov2 = dinov2
        self.classifier = torch.nn.Linear(dinov2.config.hidden_size, num_classes)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        patch_tokens = self.dinov2(pixel_values).last_hidden_state[:, 1:]
        return ImageClassifierOutput(logits=self.classifier(patch_tokens.mean(dim=1)))


def make_patch_teacher(resolution: int, patch_size: int, class_names: list[str], seed: int) -> PatchClassifier:
    """The DINOv2 of [`make_teacher`] with a classification head on the mean of its patch tokens only."""
    dinov2 = make_teacher(resolution, patch_size, class_names, seed).dinov2
    return PatchClassifier(dinov2, len(class_names))


def make_teacher(resolution: int, patch_size: int, class_names: list[str], seed: int) -> Dinov2ForImageClassification:
    """A small DINOv2 with a classification head on its class token and the mean of its patch tokens."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        image_size=resolution,
        patch_size=patch_size,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2,
        # The usual 0.02 suits networks ten times as wide; this narrow one would hardly start to learn.
        initializer_range=0.1,
        id2label=dict(enumerate(class_names)),
        label2id={class_name: label for label, class_name in enumerate(class_names)},
    )
    teacher = Dinov2ForImageClassification(config)
    # Random position embeddings would first have to learn which patches are neighbours, which takes most of the time.
    position_embeddings = get_2d_sincos_pos_embed(
        config.hidden_size, resolution // patch_size, cls_token=True, extra_tokens=1, output_type="pt"
    )
    with torch.no_grad():
        teacher.dinov2.embeddings.position_embeddings.copy_(position_embeddings[None])
    return teacher


def make_masked_autoencoder(resolution: int, patch_size: int, seed: int) -> ViTMAEForPreTraining:
    """A masked autoencoder, whose encoder is as large as the teacher of [`make_teacher`] and needs no labels."""
    torch.manual_seed(seed)
    config = ViTMAEConfig(
        image_size=resolution,
        patch_size=patch_size,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        initializer_range=0.1,  # as the teacher's
        norm_pix_loss=True,
    )
    return ViTMAEForPreTraining(config)


def make_judge(class_names: list[str], seed: int) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[2, 2],
        layer_type="basic",
        id2label=dict(enumerate(class_names)),
        label2id={class_name: label for label, class_name in enumerate(class_names)},
    )
    return ResNetForImageClassification(config)


def augment(pixel_values: torch.Tensor, quarter_turns: bool, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to one pixel; with `quarter_turns`, also turn the batch by 0, 90, 180 or 270 degrees."""
    batch_size, _, height, width = pixel_values.shape
    padded = torch.nn.functional.pad(pixel_values, (1, 1, 1, 1), mode="replicate")
    vertical_shifts, horizontal_shifts = torch.randint(3, (2, batch_size, 1), generator=generator)
    rows = (torch.arange(height) + vertical_shifts)[:, :, None]
    columns = (torch.arange(width) + horizontal_shifts)[:, None, :]
    shifted = padded[torch.arange(batch_size)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    if quarter_turns:
        shifted = torch.rot90(shifted, int(torch.randint(4, (1,), generator=generator)), dims=(2, 3))
    return shifted.contiguous()


def train_network(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    compute_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    num_epochs: int,
    quarter_turns: bool,
    generator: torch.Generator,
    description: str,
) -> None:
    """
    Train a network in place.

    Args:
        model (`torch.nn.Module`): The network.
        pixel_values (`torch.Tensor` of shape `(num_images, 3, resolution, resolution)`): The training images.
        compute_loss (`Callable`): The loss of a batch of augmented images, and of their numbers.
        num_epochs (`int`), quarter_turns (`bool`): Passes over the images, and how they are augmented.
        generator (`torch.Generator`): Decides the order and the augmentation.
        description (`str`): What the progress bar says.
    """
    batch_size = min(BATCH_SIZE, len(pixel_values))
    steps_per_epoch = len(pixel_values) // batch_size
    num_steps = num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(WARMUP_FRACTION * num_steps), num_steps)
    model.train()
    with tqdm(total=num_steps, desc=description) as progress:
        for _ in range(num_epochs):
            shuffled = torch.randperm(len(pixel_values), generator=generator)
            for batch in shuffled[: steps_per_epoch * batch_size].split(batch_size):
                loss = compute_loss(augment(pixel_values[batch], quarter_turns, generator), batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update()


@torch.inference_mode()
def measure_accuracy(model: torch.nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    predictions = torch.cat([model(pixel_values=batch).logits.argmax(dim=1) for batch in pixel_values.split(500)])
    return (predictions == labels).float().mean().item()


def fit_and_measure(
    model: torch.nn.Module,
    pixel_values: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    quarter_turns: bool,
    num_epochs: int,
    seed: int,
    description: str,
) -> float:
    """Train a classifier on the training split. Returns its accuracy on the validation split, in [0, 1]."""

    def cross_entropy(images: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(pixel_values=images).logits, labels["train"][batch])

    generator = torch.Generator().manual_seed(seed)
    train_network(model, pixel_values["train"], cross_entropy, num_epochs, quarter_turns, generator, description)
    return measure_accuracy(model, pixel_values["validation"], labels["validation"])


def train_masked_autoencoder(
    model: ViTMAEForPreTraining, pixel_values: torch.Tensor, num_epochs: int, quarter_turns: bool, seed: int
) -> None:
    """Train a masked autoencoder in place. Its loss is the error of the patches that it does not see."""
    generator = torch.Generator().manual_seed(seed)
    num_patches = model.vit.embeddings.patch_embeddings.num_patches

    def reconstruction_error(images: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return model(images, noise=torch.rand(len(images), num_patches, generator=generator)).loss

    description = "masked autoencoder"
    train_network(model, pixel_values, reconstruction_error, num_epochs, quarter_turns, generator, description)


def probe_teacher(
    teacher: RepresentationTeacher, pixel_values: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]
) -> float:
    """
    The accuracy of a linear classifier on the mean of a teacher's patch tokens.

    It is fitted to the training split and measured on the validation split, in [0, 1].
    """
    splits = []
    for split in ("train", "validation"):
        with torch.inference_mode():
            tokens = [teacher(images).mean(dim=1) for images in pixel_values[split].split(500)]
        splits += [torch.cat(tokens).numpy(), labels[split].numpy()]
    return linear_probe(*splits)
