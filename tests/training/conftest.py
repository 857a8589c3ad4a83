import importlib
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model


REPOSITORY = Path(__file__).parents[2]


def import_script(name: str):
    """A training script as a module: starting a process for each case would take minutes."""
    sys.path.insert(0, str(REPOSITORY / "training"))  # where a script finds the others
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="session")
def train_rra():
    return import_script("train_rra")


def write_images(folder: Path, num_images: int, seed: int, size: int = 8):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(num_images):
        PIL.Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Two classes of noise, 10 training and 3 validation images each."""
    root = tmp_path_factory.mktemp("images")
    for seed, (split, num_images) in enumerate({"train": 10, "validation": 3}.items()):
        for label, name in enumerate(("cat", "dog")):
            write_images(root / split / name, num_images, seed=10 * seed + label)
    return root


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = Dinov2Config(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(images, teacher, tmp_path):
    """The command line of a tiny run, without --output_dir, as a function of what differs."""

    def build(**options) -> list[str]:
        options = {
            "train_data_dir": images,
            "teacher_model_name_or_path": teacher,
            "cache_dir": tmp_path / "cache",
            "resolution": 8,
            "patch_size": 2,
            "num_blocks": 2,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "projector_dim": 8,
            "train_batch_size": 4,
            "max_train_steps": 4,
            "lr_warmup_steps": 1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "validation_steps": 4,
            "checkpointing_steps": 2,
            **options,
        }
        line = []
        for name, value in options.items():
            if value is None or value is False:
                continue
            line.append(f"--{name}")
            if value is not True:
                line += [str(part) for part in (value if isinstance(value, list) else [value])]
        return line

    return build
