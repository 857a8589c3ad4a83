import datasets
import PIL.Image
import pytest
import torch

from flowback_hf import TarFlowTransformer2DModel
from flowback_hf.data import ImageDataset, RowGenerator, add_noise, make_generator
from flowback_hf.training import reverse


def test_an_item_is_in_range_cropped_and_replaces_a_broken_one():
    image = PIL.Image.new("RGB", (8, 4))
    image.paste((255, 0, 0), (2, 0, 6, 4))
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"broken", "path": "bad.png"}, image], "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    dataset = ImageDataset(rows, "image", "label", [5, 7], sample_size=4, in_channels=3)
    item = dataset[0]
    assert item["skipped"] == ["bad.png cannot be read: it is not an image"] and item["class_labels"] == 7
    assert torch.equal(item["images"], torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 4, 4))


def test_a_row_without_an_image_is_replaced_by_the_next():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [None, PIL.Image.new("RGB", (4, 4))], "label": [0, 1]}, features)
    item = ImageDataset(rows, "image", "label", [5, 7], sample_size=4, in_channels=3)[0]
    assert item["skipped"] == ["row 0 cannot be read: there is no image in this row"] and item["class_labels"] == 7


def test_only_broken_images_raise():
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"broken", "path": "bad.png"}] * 2, "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    dataset = ImageDataset(rows, "image", "label", [0, 1], sample_size=4, in_channels=3)
    with pytest.raises(
        ValueError,
        match="None of the 2 images of the data set can be used. The first: bad.png cannot be",
    ):
        dataset[1]


def test_noise():
    images = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)  # every 8-bit value
    config = TarFlowTransformer2DModel(8, 4, num_blocks=1, num_layers=1, noise_std=0.3).config
    noise = add_noise(images.expand(200, 1, 16, 16), config, RowGenerator(make_generator(0), 200)) - images
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    config = {**config, "noise_type": "uniform"}
    config = type("Config", (), config)
    dequantized = add_noise(images.double(), config, RowGenerator(make_generator(0), 200))
    cells = (dequantized + 1) * 128
    assert torch.equal(cells.floor().flatten(), torch.arange(256.0, dtype=torch.float64))


def test_a_generator_is_a_function_of_its_numbers():
    def draw(*entropy):
        return torch.rand(4, generator=make_generator(*entropy))

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(2, 1)) and not torch.equal(draw(1, 2), draw(1, 3))
    assert torch.equal(draw(1, 2), draw(1, 2, 0))  # so that a purpose must not be the number of a step
    assert min(reverse.STATISTICS, reverse.PAIRS) > 1e9 and reverse.STATISTICS != reverse.PAIRS
