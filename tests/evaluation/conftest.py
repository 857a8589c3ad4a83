import numpy as np
import PIL.Image
import pytest
import torch
from transformers import BitImageProcessorPil, ResNetConfig, ResNetForImageClassification

from flowback_hf import FlowBackPipeline


CLASS_NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="session")
def pipeline(randomised_model):
    """A flow of three classes; its images have 4x4 pixels."""
    model = randomised_model(num_classes=3, noise_std=0.1).float()
    return FlowBackPipeline(model, id2label=dict(enumerate(CLASS_NAMES)))


@pytest.fixture
def model_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """A classifier of the three classes, with four features."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 4],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(CLASS_NAMES)),
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    BitImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False).save_pretrained(folder)
    return folder


def random_image(rng: np.random.Generator) -> PIL.Image.Image:
    return PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
