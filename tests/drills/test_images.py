"""Hostile and unusual images: read rightly in every place that reads images, or refused with their names."""

import io
import random
import warnings

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.data import ImageDataset
from flowback_hf.evaluation import LabelledImages


SIZE = 8
ROUNDS = [pytest.param(8, id="short"), pytest.param(300, id="long", marks=pytest.mark.drill)]  # of each format


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def pipe(request):
    flow = TarFlowTransformer2DModel(
        SIZE, 4, request.param, num_blocks=1, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
    )
    return FlowBackPipeline(flow)


def read_everywhere(path, pipe) -> dict[str, torch.Tensor | str]:
    """Pixels in [-1, 1], or the refusal, from each place that reads a file."""

    def training():
        rows = datasets.Dataset.from_dict({"image": [str(path)]}, datasets.Features({"image": datasets.Image()}))
        return ImageDataset(rows, "image", None, [], SIZE, pipe.num_channels)[0]["images"]

    def evaluation():
        rows = datasets.Dataset.from_dict({"image": [str(path)]}, datasets.Features({"image": datasets.Image()}))
        batch = LabelledImages(rows, "image", [0], pipe.num_channels, SIZE).load(range(1))
        if not batch.images:
            raise ValueError(batch.report["skipped"].item())
        return pipe.encode(batch.images)[0]

    def opened():
        try:
            image = PIL.Image.open(path)
        except Exception as error:  # not ours: a user's own call
            raise ValueError(f"{path} cannot be read: it is not an image, or {error}") from error
        return pipe.encode(image)[0]

    classifier = FlowBackClassificationPipeline(pipe.transformer)
    classifier.set_progress_bar_config(disable=True)
    readers = {
        "training": training,
        "evaluation": evaluation,
        "encode a path": lambda: pipe.encode(str(path))[0],
        "encode a picture": opened,
        "classification": lambda: classifier.add_noise([str(path)], num_noise_draws=0)[0, 0],
    }
    answers = {}
    for name, reader in readers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answers[name] = reader()
        except ValueError as error:
            answers[name] = str(error)
    return answers


def assert_same(answers: dict[str, torch.Tensor | str], expected: np.ndarray | None = None):
    """All places read the same picture; grey values of `expected` (height, width), from 0 to 255."""
    refused = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    assert not refused
    first, *others = answers.values() or [None]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-6)
    if expected is not None:
        pixels = ((first + 1) * 127.5).numpy()
        assert np.abs(pixels - expected).max() < 1e-3


GREY = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_by_their_depth(pipe, tmp_path, ending):
    path = tmp_path / f"deep.{ending}"
    PIL.Image.fromarray((GREY * 257).astype(np.uint16)).save(path)
    assert_same(read_everywhere(path, pipe), GREY)


def test_sixteen_bits_are_rounded(pipe, tmp_path):
    values = np.full((SIZE, SIZE), 128, np.uint16)
    values[0, 0], values[0, 1] = 129, 65535  # the first above half a step of 8 bits
    path = tmp_path / "deep.png"
    PIL.Image.fromarray(values).save(path)
    expected = np.zeros((SIZE, SIZE))
    expected[0, 0], expected[0, 1] = 1, 255
    assert_same(read_everywhere(path, pipe), expected)


def test_floats_from_0_to_1_are_scaled(pipe, tmp_path):
    path = tmp_path / "float.tif"
    PIL.Image.fromarray((GREY / 255).astype(np.float32)).save(path)
    assert_same(read_everywhere(path, pipe), GREY)


def odd_files(folder) -> dict[str, str]:
    """Files of an unknown range, by name, and what is said about them."""
    PIL.Image.fromarray((GREY / 100).astype(np.float32)).save(folder / "bright.tif")
    PIL.Image.fromarray(np.where(GREY > 9, GREY / 255, np.nan).astype(np.float32)).save(folder / "nan.tif")
    PIL.Image.fromarray(GREY.astype(np.int32)).save(folder / "whole.tif")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    buffer = io.BytesIO()
    PIL.Image.fromarray(GREY.astype(np.uint8)).save(buffer, "png")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:50])
    return {
        "bright.tif": "must hold values from 0 to 1, but they are",
        "nan.tif": "must hold values from 0 to 1, but they are",
        "whole.tif": "must have 8 or 16 bits, or floats in [0, 1], but has 32-bit integers of an unknown range",
        "text.png": "cannot be read: it is not an image",
        "empty.png": "cannot be read: it is not an image",
        "cut.png": "cannot be read: ",
    }


def test_what_has_no_known_range_is_refused_by_name(pipe, tmp_path):
    for name, sentence in odd_files(tmp_path).items():
        for place, answer in read_everywhere(tmp_path / name, pipe).items():
            assert isinstance(answer, str) and sentence in answer and name in answer, (name, place, answer)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_everywhere(pipe, tmp_path, orientation):
    path = tmp_path / "turned.png"
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    image = PIL.Image.fromarray(GREY.astype(np.uint8))
    image.save(path, exif=exif)
    answers = read_everywhere(path, pipe)
    assert_same(answers, np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(path))))
    as_it_lies = np.array_equal(image, ((answers["training"][0] + 1) * 127.5).round())
    assert as_it_lies == (orientation == 1)


def test_modes_that_pillow_converts(pipe, tmp_path):
    colour = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    for mode, ending in {"1": "png", "P": "png", "LA": "png", "RGBA": "png", "CMYK": "tif"}.items():
        path = tmp_path / f"{mode}.{ending}"
        colour.convert(mode).save(path)
        assert_same(read_everywhere(path, pipe))


def test_an_animation_is_its_first_frame(pipe, tmp_path):
    frames = [PIL.Image.new("L", (SIZE, SIZE), shade) for shade in (0, 255)]
    for ending in ("gif", "png", "tif", "webp"):
        path = tmp_path / f"frames.{ending}"
        options = {"lossless": True} if ending == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert_same(read_everywhere(path, pipe), np.zeros((SIZE, SIZE)))


def test_bombs_are_refused_by_number_and_name(pipe, tmp_path, monkeypatch):
    good, bomb = tmp_path / "good.png", tmp_path / "bomb.png"
    PIL.Image.new("L", (SIZE, SIZE)).save(good)
    PIL.Image.new("L", (90, 90)).save(bomb)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match=r"Image 1, '.*bomb.png', cannot be read: Image size \(8100 pixels\) exceeds"):
        pipe.encode([good, bomb])
    assert "bomb.png cannot be read: Image size" in read_everywhere(bomb, pipe)["training"]


def test_images_without_pixels_are_refused_by_number(pipe):
    with pytest.raises(ValueError, match="Image 0 must have pixels, but has a size of 0x5"):
        pipe.encode(PIL.Image.new("L", (0, 5)))
    with pytest.raises(ValueError, match=r"Image 0 must have pixels, but its shape is \(1, 0, 8\)"):
        pipe.encode(torch.rand(1, 0, 8))


def test_strict_refuses_other_depths_and_modes_of_files(pipe, tmp_path):
    path = tmp_path / "deep.png"
    PIL.Image.fromarray((GREY * 257).astype(np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"Image 0, '.*deep.png', must be 8x8 pixels of mode .*, but is .* mode I;16"):
        pipe.encode(path, strict=True)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_damaged_files_are_read_or_refused(pipe, tmp_path, rounds, drill):
    """Random bytes of files of every format are changed, or their ends are cut off."""
    generator = random.Random(0)
    image = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    for ending in ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm", "ico"):
        buffer = io.BytesIO()
        options = {"exif": exif} if ending in ("png", "jpg", "tif", "webp") else {}
        image.save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending), **options)
        for number in range(rounds):
            data = bytearray(buffer.getvalue())
            for _ in range(generator.randint(1, 6)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            path = tmp_path / f"{number}.{ending}"
            path.write_bytes(data[: generator.randrange(1, len(data))] if generator.random() < 0.2 else data)
            answers = read_everywhere(path, pipe)
            for place, answer in answers.items():
                assert not isinstance(answer, str) or path.name in answer, (place, answer)
            pixels = {place: answer for place, answer in answers.items() if not isinstance(answer, str)}
            assert_same(pixels)
            drill("Damaged images", files=1, refused_by_name=int(not pixels), read_alike=int(bool(pixels)))
