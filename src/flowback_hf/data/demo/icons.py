# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The demo's icons: ten classes of one-colored silhouettes on a soft background of another color, drawn by Pillow."""

import numpy as np
from PIL import Image, ImageDraw

from flowback_hf.data.demo.kind import DemoKind, Splits, draw_splits
from flowback_hf.data.demo.shapes import arc, heart_outline, star_outline


SUPERSAMPLING = 8

# From Oklab to linear sRGB. Source: https://bottosson.github.io/posts/oklab/
OKLAB_TO_CUBE_ROOTS = np.array(
    [(1, 0.3963377774, 0.2158037573), (1, -0.1055613458, -0.0638541728), (1, -0.0894841775, -1.2914855480)]
)
CONES_TO_LINEAR_RGB = np.array(
    [
        (4.0767416621, -3.3077115913, 0.2309699292),
        (-1.2684380046, 2.6097574011, -0.3413193965),
        (-0.0041960863, -0.7034186147, 1.7076147010),
    ]
)


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def disk(x: float, y: float, radius: float, stretch: float = 1.0) -> np.ndarray:
    """A circle around (x, y), `stretch` times as wide as it is high."""
    return arc(0, 2 * np.pi, radius) * (stretch, 1) + (x, y)


def petals() -> list[np.ndarray]:
    angles = np.arange(6) * np.pi / 3 + np.pi / 2
    return [disk(0.6 * np.cos(angle), 0.6 * np.sin(angle), 0.38) for angle in angles]


# (filled, cut out): polygons in a square from -1 to 1, y pointing down.
ICON_OUTLINES = {
    "boat": (
        [
            np.array([(-1, 0.35), (1, 0.35), (0.6, 0.95), (-0.6, 0.95)]),
            np.array([(0.0, -1), (0.0, 0.15), (-0.85, 0.15)]),
            np.array([(0.18, -0.7), (0.18, 0.15), (0.8, 0.15)]),
        ],
        [],
    ),
    "cat": (
        [
            disk(0, 0.2, 0.78, 1.15),
            np.array([(-0.9, -1), (-0.05, -0.5), (-0.85, 0.2)]),
            np.array([(0.9, -1), (0.05, -0.5), (0.85, 0.2)]),
        ],
        [disk(-0.36, 0.12, 0.17), disk(0.36, 0.12, 0.17)],
    ),
    "fish": (
        [disk(-0.25, 0, 0.58, 1.3), np.array([(0.2, 0), (1, -0.65), (1, 0.65)])],
        [disk(-0.6, -0.12, 0.15)],
    ),
    "flower": (petals(), [disk(0, 0, 0.3)]),
    "heart": ([heart_outline() * (1, -1) / 16], []),
    "house": (
        [np.array([(0, -0.95), (1, 0.0), (-1, 0.0)]), box(-0.72, -0.02, 0.72, 0.9)],
        [box(-0.2, 0.32, 0.2, 0.92)],
    ),
    "moon": ([disk(0, 0, 0.98)], [disk(0.45, -0.18, 0.78)]),
    "mushroom": ([arc(np.pi, 2 * np.pi, center=(0, 0.15)), box(-0.32, 0.1, 0.32, 0.95)], []),
    "star": ([1.08 * star_outline() @ np.array([(0, -1), (1, 0)]) + (0, 0.08)], []),
    "tree": (
        [
            np.array([(0, -1), (0.6, -0.1), (-0.6, -0.1)]),
            np.array([(0, -0.6), (0.85, 0.6), (-0.85, 0.6)]),
            box(-0.18, 0.55, 0.18, 1),
        ],
        [],
    ),
}


def oklch_color(lightness: float, chroma: float, hue: float) -> np.ndarray:
    """
    A color from its perceived lightness in [0, 1], its chroma and its hue in radians, as RGB values in [0, 255].

    Colors of the same lightness look equally light whatever their hue, so that every pair of hues goes together.
    """
    oklab = np.array([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])
    linear = (CONES_TO_LINEAR_RGB @ (OKLAB_TO_CUBE_ROOTS @ oklab) ** 3).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * srgb


def draw_silhouette(
    rng: np.random.Generator, filled: list[np.ndarray], cut_out: list[np.ndarray], size: int
) -> Image.Image:
    """A silhouette in white on black, scaled and placed at random, the whole of it in the image."""
    radius = rng.uniform(0.34, 0.42) * size
    center = rng.uniform(1.1 * radius, size - 1.1 * radius, 2)
    image = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(image)
    for polygons, value in ((filled, 255), (cut_out, 0)):
        for polygon in polygons:
            draw.polygon([tuple(corner) for corner in radius * polygon + center], fill=value)
    return image


def draw_icon(rng: np.random.Generator, label: int, resolution: int) -> Image.Image:
    """Draw an image of a class."""
    hue, background_hue = rng.uniform(0, 2 * np.pi, 2)
    icon_color = oklch_color(0.62, 0.17, hue)
    top, bottom = (oklch_color(lightness, 0.06, background_hue) for lightness in (0.95, 0.86))
    silhouette = draw_silhouette(rng, *list(ICON_OUTLINES.values())[label], resolution * SUPERSAMPLING)
    coverage = np.asarray(silhouette.reduce(SUPERSAMPLING))[..., None] / 255
    height = np.linspace(0, 1, resolution)[:, None, None]
    background = (1 - height) * top + height * bottom
    return Image.fromarray(np.round((1 - coverage) * background + coverage * icon_color).astype(np.uint8))


def make_icons(seed: int, resolution: int, num_images: dict[str, int]) -> Splits:
    """The images and labels of both splits."""
    return draw_splits(draw_icon, len(ICON_OUTLINES), seed, resolution, num_images)


# A turned icon is not what its class looks like.
ICONS = DemoKind(list(ICON_OUTLINES), make_icons, teacher_grid_size=8, quarter_turns=False)
