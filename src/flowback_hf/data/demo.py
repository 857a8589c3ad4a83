# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Demo data that need no download: the digits of scikit-learn or drawn shapes, a small teacher and an independent judge.
"""

import colorsys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    get_cosine_schedule_with_warmup,
)


SPLITS = ("train", "validation")

DIGITS_NUM_VALIDATION_IMAGES = 297
DIGITS_MAX_VALUE = 16
SUPERSAMPLING = 4

# Patches of the teacher along each side of an image.
TEACHER_GRID_SIZE = {"digits": 4, "shapes": 8}

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARMUP_FRACTION = 0.1


def arc(start: float, stop: float, radius: float = 1.0, center: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    angles = np.linspace(start, stop, 64)
    return np.stack([center[0] + radius * np.cos(angles), center[1] + radius * np.sin(angles)], axis=1)


def arrow_outline() -> np.ndarray:
    return np.array([(1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28), (-1, -0.28), (0.1, -0.28), (0.1, -0.8)])


def crescent_outline() -> np.ndarray:
    """A circle less a smaller one whose center lies to its right; the two arcs meet at the tips."""
    cut_center, cut_radius = 0.5, 0.8
    tip_x = (1 + cut_center**2 - cut_radius**2) / (2 * cut_center)
    tip_y = np.sqrt(1 - tip_x**2)
    outer_angle = np.arctan2(tip_y, tip_x)
    inner_angle = np.arctan2(tip_y, tip_x - cut_center)
    outer_arc = arc(outer_angle, 2 * np.pi - outer_angle)
    inner_arc = arc(2 * np.pi - inner_angle, inner_angle, cut_radius, (cut_center, 0.0))
    return np.concatenate([outer_arc, inner_arc])


def cross_outline() -> np.ndarray:
    half_width = 0.32
    arm = np.array([(half_width, half_width), (half_width, 1), (-half_width, 1)])
    quarter_turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, turns) for turns in range(4)])


def heart_outline() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, y + 2.5], axis=1)


def star_outline() -> np.ndarray:
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def regular_polygon_outline(num_corners: int) -> np.ndarray:
    angles = np.arange(num_corners) * 2 * np.pi / num_corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


# In alphabetical order, which is the order in which an image folder numbers its classes. No class becomes another one
# by rotation. A second outline is a hole.
SHAPE_OUTLINES = {
    "arrow": [arrow_outline()],
    "circle": [arc(0, 2 * np.pi)],
    "crescent": [crescent_outline()],
    "cross": [cross_outline()],
    "ellipse": [arc(0, 2 * np.pi) * (1.0, 0.5)],
    "heart": [heart_outline()],
    "ring": [arc(0, 2 * np.pi), arc(0, 2 * np.pi, radius=0.55)],
    "square": [regular_polygon_outline(4)],
    "star": [star_outline()],
    "triangle": [regular_polygon_outline(3)],
}


def random_color(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> tuple:
    """An RGB color of any hue, with its HSV saturation and value drawn from the two ranges."""
    color = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))
    return tuple(round(255 * channel) for channel in color)


def draw_gradient(rng: np.random.Generator, size: int) -> Image.Image:
    start_color, end_color = (np.array(random_color(rng, (0.0, 1.0), (0.1, 0.45))) for _ in range(2))
    angle = rng.uniform(0, 2 * np.pi)
    positions = np.linspace(-1, 1, size)
    ramp = np.cos(angle) * positions[None, :] + np.sin(angle) * positions[:, None]
    ramp = ((ramp - ramp.min()) / (ramp.max() - ramp.min()))[..., None]
    return Image.fromarray(np.round(start_color * (1 - ramp) + end_color * ramp).astype(np.uint8))


def draw_background(rng: np.random.Generator, size: int) -> Image.Image:
    """A dark color gradient with soft blobs and thin lines: pixels that cost likelihood and mean nothing."""
    image = draw_gradient(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 7)):
        center, radii = rng.uniform(0, size, 2), rng.uniform(0.04, 0.12, 2) * size
        draw.ellipse([*(center - radii), *(center + radii)], fill=random_color(rng, (0.0, 1.0), (0.1, 0.75)))
    image = image.filter(ImageFilter.GaussianBlur(0.03 * size))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 6)):
        draw.line(list(rng.uniform(0, size, 4)), fill=random_color(rng, (0.0, 1.0), (0.1, 0.75)), width=size // 32)
    return image


def draw_mask(rng: np.random.Generator, outlines: list[np.ndarray], size: int) -> Image.Image:
    """A shape scaled, rotated and placed at random, the whole of it in the image."""
    radius = rng.uniform(0.28, 0.46) * size
    center = rng.uniform(radius, size - radius, 2)
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    scale = radius / np.linalg.norm(outlines[0], axis=1).max()
    mask = Image.new("1", (size, size), 0)
    for outline, fill in zip(outlines, (1, 0)):
        corners = scale * outline @ rotation + center
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners], fill=fill)
    return mask


def draw_shape_image(seed: int, split: str, index: int, resolution: int) -> Image.Image:
    """Draw image `index` of a split: it depends only on these arguments, never on how many images are made.

    The shape is light and the background is dark. With both of any brightness a person still sees every shape, but the
    teacher would need many times as long to learn to.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    canvas_size = resolution * SUPERSAMPLING
    outlines = list(SHAPE_OUTLINES.values())[index % len(SHAPE_OUTLINES)]
    image = draw_background(rng, canvas_size)
    mask = draw_mask(rng, outlines, canvas_size)
    image.paste(random_color(rng, (0.0, 0.7), (1.0, 1.0)), mask=mask)
    return image.reduce(SUPERSAMPLING)


def make_shapes(
    seed: int, resolution: int, num_images: dict[str, int]
) -> dict[str, tuple[list[Image.Image], list[int]]]:
    """The images and labels of both splits; the classes take turns, so they are balanced."""
    splits = {}
    for split in SPLITS:
        indices = range(num_images[split])
        progress = tqdm(indices, desc=f"{split} images")
        images = [draw_shape_image(seed, split, index, resolution) for index in progress]
        splits[split] = images, [index % len(SHAPE_OUTLINES) for index in indices]
    return splits


def make_digits(seed: int) -> dict[str, tuple[list[Image.Image], list[int]]]:
    """
    The images and labels of both splits, with the same share of every digit in both.

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
        test_size=DIGITS_NUM_VALIDATION_IMAGES,
        stratify=digits.target,
        random_state=seed,
    )
    pixels = np.round(digits.images / DIGITS_MAX_VALUE * 255).astype(np.uint8)
    return {
        split: ([Image.fromarray(pixels[i]) for i in indices], [int(digits.target[i]) for i in indices])
        for split, indices in zip(SPLITS, split_indices)
    }


def save_image_folder(folder: Path, images: list[Image.Image], labels: list[int], class_names: list[str]) -> None:
    for class_name in class_names:
        (folder / class_name).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels)):
        image.save(folder / class_names[label] / f"{index:05d}.png")


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


def train_classifier(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    num_epochs: int,
    quarter_turns: bool,
    seed: int,
    description: str,
) -> None:
    """Train either network in place, with cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(BATCH_SIZE, len(labels))
    steps_per_epoch = len(labels) // batch_size
    num_steps = num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(WARMUP_FRACTION * num_steps), num_steps)
    model.train()
    with tqdm(total=num_steps, desc=description) as progress:
        for _ in range(num_epochs):
            shuffled = torch.randperm(len(labels), generator=generator)
            for batch in shuffled[: steps_per_epoch * batch_size].split(batch_size):
                logits = model(pixel_values=augment(pixel_values[batch], quarter_turns, generator)).logits
                loss = torch.nn.functional.cross_entropy(logits, labels[batch])
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


def make_demo(
    folder: Path,
    kind: str,
    seed: int,
    resolution: int,
    num_images: dict[str, int],
    teacher_epochs: int,
    judge_epochs: int,
) -> dict[str, Any]:
    """
    Write images, a teacher and a judge into a folder.

    The same arguments give the same images and, on the same machine, the same weights, to the bit.

    Args:
        folder (`pathlib.Path`): An empty folder.
        kind (`str`): `"digits"` or `"shapes"`.
        seed (`int`): Decides images, split and weights.
        resolution (`int`): Height and width of the images, in pixels: 8 for digits, a multiple of 8 for shapes.
        num_images (`dict`): Of shapes, for `"train"` and `"validation"`.
        teacher_epochs (`int`), judge_epochs (`int`): How long the two networks are trained.
    Returns:
        `dict`: what was made, the networks' accuracies in [0, 1], and the seconds that each stage took.
    """
    start = time.perf_counter()
    if kind == "digits":
        class_names = [str(digit) for digit in range(10)]
        splits = make_digits(seed)
    else:
        class_names = list(SHAPE_OUTLINES)
        splits = make_shapes(seed, resolution, num_images)
    image_processor = make_image_processor(resolution)
    pixel_values, labels = {}, {}
    for split, (images, split_labels) in splits.items():
        save_image_folder(folder / "images" / split, images, split_labels, class_names)
        pixel_values[split] = image_processor(images, return_tensors="pt").pixel_values
        labels[split] = torch.tensor(split_labels)
    images_done = time.perf_counter()

    # A turned digit is another digit or none; the shapes come at any angle anyway.
    data = {"pixel_values": pixel_values, "labels": labels, "quarter_turns": kind == "shapes"}
    teacher = make_teacher(resolution, resolution // TEACHER_GRID_SIZE[kind], class_names, seed)
    teacher_accuracy = fit_and_measure(teacher, **data, num_epochs=teacher_epochs, seed=seed, description="teacher")
    teacher.dinov2.save_pretrained(folder / "teacher")
    image_processor.save_pretrained(folder / "teacher")
    teacher_done = time.perf_counter()

    # The judge shares neither architecture nor seed with the teacher, so that it does not repeat its mistakes.
    judge = make_judge(class_names, seed + 1)
    judge_accuracy = fit_and_measure(judge, **data, num_epochs=judge_epochs, seed=seed + 1, description="judge")
    judge.save_pretrained(folder / "judge")
    image_processor.save_pretrained(folder / "judge")
    judge_done = time.perf_counter()

    return {
        "kind": kind,
        "class_names": class_names,
        "num_train_images": len(labels["train"]),
        "num_validation_images": len(labels["validation"]),
        "resolution": resolution,
        "seed": seed,
        "teacher_epochs": teacher_epochs,
        "judge_epochs": judge_epochs,
        "teacher_validation_accuracy": teacher_accuracy,
        "judge_validation_accuracy": judge_accuracy,
        "seconds": {
            "images": round(images_done - start, 1),
            "teacher": round(teacher_done - images_done, 1),
            "judge": round(judge_done - teacher_done, 1),
        },
    }


def fit_and_measure(
    model: torch.nn.Module,
    pixel_values: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    quarter_turns: bool,
    num_epochs: int,
    seed: int,
    description: str,
) -> float:
    """Train a network on the training split. Returns its accuracy on the validation split, in [0, 1]."""
    train_classifier(model, pixel_values["train"], labels["train"], num_epochs, quarter_turns, seed, description)
    return measure_accuracy(model, pixel_values["validation"], labels["validation"])
