# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The demo's shapes: ten classes of light shapes on dark, cluttered backgrounds, drawn by Pillow."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from flowback_hf.data.demo.kind import DemoKind, Splits, draw_splits


SUPERSAMPLING = 4


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


def draw_shape_image(rng: np.random.Generator, label: int, resolution: int) -> Image.Image:
    """Draw an image of a class.

    The shape is light and the background is dark. With both of any brightness a person still sees every shape, but the
    teacher would need many times as long to learn to.
    """
    canvas_size = resolution * SUPERSAMPLING
    image = draw_background(rng, canvas_size)
    mask = draw_mask(rng, list(SHAPE_OUTLINES.values())[label], canvas_size)
    image.paste(random_color(rng, (0.0, 0.7), (1.0, 1.0)), mask=mask)
    return image.reduce(SUPERSAMPLING)


def make_shapes(seed: int, resolution: int, num_images: dict[str, int]) -> Splits:
    """The images and labels of both splits."""
    return draw_splits(draw_shape_image, len(SHAPE_OUTLINES), seed, resolution, num_images)


# The shapes come at any angle anyway.
SHAPES = DemoKind(list(SHAPE_OUTLINES), make_shapes, teacher_grid_size=8, quarter_turns=True)
