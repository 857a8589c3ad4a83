# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
The demo's glyphs: letters in twenty typefaces over cluttered backgrounds, grey.

The typefaces come with matplotlib: DejaVu (Bitstream Vera license), STIX (STIX Font License) and Computer Modern
(BaKoMa Fonts Licence), all of which allow drawing with them freely.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowback_hf.data.demo.kind import JUDGE_SPLIT, DemoKind, Splits, draw_splits
from flowback_hf.data.demo.networks import make_patch_teacher


SUPERSAMPLING = 4

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Files that matplotlib ships.
TYPEFACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)


def find_typefaces() -> dict[str, Path]:
    """
    The files of the typefaces, by name.

    Raises:
        ImportError: if matplotlib is missing; says what to install.
        FileNotFoundError: if it lacks a typeface; names it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('The typefaces come with matplotlib: pip install "flowback_hf[demo]".') from error
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = {name: folder / f"{name}.ttf" for name in TYPEFACES}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"The glyphs are drawn with typefaces of matplotlib, but {', '.join(missing)} are not in {folder}: install"
            " matplotlib again, with its fonts."
        )
    return files


@lru_cache(maxsize=None)
def load_typeface(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(find_typefaces()[name], size)


def draw_background(rng: np.random.Generator, size: int, level: float) -> np.ndarray:
    """Smooth shades around a level with a few straight lines: pixels that cost likelihood and mean nothing."""
    shades = rng.uniform(-1, 1, (4, 4)) * rng.uniform(0.05, 0.25)
    smooth = Image.fromarray(np.float32(level + shades)).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(smooth)
    for _ in range(rng.integers(1, 4)):
        shade = level + rng.uniform(-0.4, 0.4)
        draw.line(list(rng.uniform(0, size, 4)), fill=float(shade), width=int(rng.integers(1, 1 + size // 16)))
    return np.asarray(smooth)


def draw_mask(rng: np.random.Generator, letter: str, size: int) -> np.ndarray:
    """A letter in a random typeface, size, rotation and place, the whole of it in the image: 1 where its ink is."""
    font = load_typeface(str(rng.choice(TYPEFACES)), round(rng.uniform(0.8, 1.0) * size))
    # Drawn on a canvas that holds it at any angle, then cut to its ink.
    canvas = Image.new("L", (2 * size, 2 * size), 0)
    ImageDraw.Draw(canvas).text((size, size), letter, fill=255, font=font, anchor="mm")
    canvas = canvas.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    ink = canvas.crop(canvas.getbbox())
    ink.thumbnail((size, size))
    mask = Image.new("L", (size, size), 0)
    room = np.array([size - ink.width, size - ink.height])
    shift = rng.uniform(-0.09, 0.09, 2) * size
    left, top = np.clip(np.round(room / 2 + shift), 0, room).astype(int).tolist()
    mask.paste(ink, (left, top))
    return np.asarray(mask) / 255


def draw_glyph(rng: np.random.Generator, label: int, resolution: int) -> Image.Image:
    """Draw an image of a class. The glyph is lighter or darker than the background."""
    size = resolution * SUPERSAMPLING
    level = rng.uniform(0.2, 0.8)
    background = draw_background(rng, size, level)
    contrast = rng.uniform(0.4, 0.8) * (1 if level < 0.5 else -1)
    mask = draw_mask(rng, LETTERS[label], size)
    pixels = background * (1 - mask) + (level + contrast) * mask
    return Image.fromarray(np.uint8(np.round(255 * pixels.clip(0, 1)))).reduce(SUPERSAMPLING)


def make_glyphs(seed: int, resolution: int, num_images: dict[str, int]) -> Splits:
    """
    The images and labels of all splits.

    There are as many images in the test split as in the validation split, and a third as many for the judge as in the
    training split.

    Raises:
        ImportError, FileNotFoundError: as [`find_typefaces`], before anything is drawn.
    """
    find_typefaces()
    num_images = num_images | {"test": num_images["validation"], JUDGE_SPLIT: -(-num_images["train"] // 3)}
    return draw_splits(draw_glyph, len(LETTERS), seed, resolution, num_images)


# A turned Z is an N.
GLYPHS = DemoKind(
    list(LETTERS),
    make_glyphs,
    teacher_grid_size=4,
    quarter_turns=False,
    make_teacher=make_patch_teacher,
    is_parquet=True,
)
