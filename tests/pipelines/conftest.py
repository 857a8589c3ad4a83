from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import BitImageProcessorPil, ResNetConfig, ResNetForImageClassification

from flowback_hf import FlowBackPipeline

from ..conftest import REPOSITORY, load_script


CLASS_NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="session")
def script():
    """A function that gives a script of the pipelines' folder as a module."""
    return lambda name: load_script(REPOSITORY / "pipelines" / f"{name}.py")


@pytest.fixture(scope="session")
def model_folder(randomised_model, tmp_path_factory):
    """A saved pipeline of three classes; its images have 4x4 pixels."""
    folder = tmp_path_factory.mktemp("models") / "flow"
    model = randomised_model(num_classes=3, noise_std=0.1, num_layers=[1, 2, 1]).float()
    FlowBackPipeline(model, id2label=dict(enumerate(CLASS_NAMES)), guidance_scale=1.5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unconditional_folder(randomised_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "unconditional"
    FlowBackPipeline(randomised_model(num_classes=None, noise_type="uniform").float()).save_pretrained(folder)
    return folder


def write_images(folder: Path, num_images: int, seed: int, size: tuple[int, int] = (4, 4)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(num_images):
        array = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        PIL.Image.fromarray(array).save(folder / f"{number}.png")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes of noise: 12 training and 4 validation images each."""
    root = tmp_path_factory.mktemp("data") / "insects" / "images"
    for split, num_images in {"train": 12, "validation": 4}.items():
        for label, name in enumerate(CLASS_NAMES):
            write_images(root / split / name, num_images, seed=10 * label + num_images)
    return root


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """A classifier of the three classes, with four features."""
    folder = tmp_path_factory.mktemp("data") / "judge"
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 4],
        depths=[1, 1],
        layer_type="basic",
        id2label={0: "bee", 1: "cat", 2: "ant"},  # another order than the flow's
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    BitImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False).save_pretrained(folder)
    return folder
