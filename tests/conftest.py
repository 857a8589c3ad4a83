import contextlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import datasets
import diffusers
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from flowback_hf import ablation
from flowback_hf.models.transformer_reverse import TarFlowReverseTransformer2DModel
from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel

from .stand_in_hub import TOKEN, StandInHub


REPOSITORY = Path(__file__).parents[1]

torch.set_num_threads(1)


def load_script(path: Path) -> ModuleType:
    """A script as a module: starting a process for each case would take minutes."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def end_of_command(path: Path, line: list[str], monkeypatch) -> str:
    """What a script prints last when its user made a mistake, run in this process: starting one takes ten seconds."""
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, line)])
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(io.StringIO()) as stderr:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 2
    return stderr.getvalue().rstrip().splitlines()[-1]


def command_line(**options) -> list[str]:
    """Options as flags and values, as an ablation gives them to its scripts."""
    return ablation.command_line(options)


def start_two_processes(script: Path, arguments: list[str], **options) -> subprocess.Popen:
    """A script in two processes on the CPU. `accelerate launch --cpu` starts one, whatever `--num_processes` says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, *arguments], env=environment, start_new_session=True, text=True, **options)


# Smallest model that has several heads, several classes, both token orders and a first block after a reversed one.
TINY_CONFIG = {
    "sample_size": 4,
    "patch_size": 2,
    "in_channels": 3,
    "num_blocks": 3,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "mlp_ratio": 2.0,
    "num_classes": 5,
}


# A learned inverse of such a flow
TINY_REVERSE_CONFIG = TINY_CONFIG | {"max_guidance_scale": 3.0}


def randomise_weights(model: torch.nn.Module, seed: int):
    """Weights of the size a trained model has, everywhere: what starts at zero or one hides most mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if parameter.ndim == 1:
            noise = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif name.endswith("embed"):
            noise = 0.5 * noise
        else:
            # The output layer's log-scales are exponentiated once for every block.
            noise = noise * (0.15 if "proj_out" in name else 1.0) / parameter.shape[1] ** 0.5
        parameter.data.copy_(noise)


@pytest.fixture(scope="session")
def randomised_model():
    """A function of the config's values: a float64 model in evaluation mode with random weights everywhere."""

    def build(seed: int = 0, **config) -> TarFlowTransformer2DModel:
        model = TarFlowTransformer2DModel(**{**TINY_CONFIG, **config}).to(torch.float64).eval()
        randomise_weights(model, seed)
        return model

    return build


@pytest.fixture(scope="session")
def random_reverse_transformer():
    """A function of the config's values: a float64 learned inverse with random weights everywhere."""

    def build(seed: int = 0, **config) -> TarFlowReverseTransformer2DModel:
        model = TarFlowReverseTransformer2DModel(**{**TINY_REVERSE_CONFIG, **config}).to(torch.float64).eval()
        randomise_weights(model, seed)
        return model

    return build


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    """The class of Stable Diffusion's VAE with random weights: factor 2, four latent channels, a scale and a shift."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate's state is one a process: a test that makes an Accelerator would decide for all that follow."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def library_log(caplog):
    """The log with what diffusers and transformers say: their loggers do not propagate, so `caplog` misses it."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    for library in libraries:
        library.add_handler(caplog.handler)
    yield caplog
    for library in libraries:
        library.remove_handler(caplog.handler)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def stand_in():
    with StandInHub() as server:
        yield server


@pytest.fixture
def the_hub(stand_in, monkeypatch, tmp_path):
    """The stand-in, empty, as the Hub of this process."""
    stand_in.repositories.clear()
    stand_in.requests.clear()
    stand_in.tokens.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
    template = f"{stand_in.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return stand_in


# Tiny runs of training


def write_images(folder: Path, num_images: int, seed: int, size: int = 8):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(num_images):
        PIL.Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def image_rows(num_images: int, size: int = 8) -> datasets.Dataset:
    """Rows of plain images of one class."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
    pictures = [PIL.Image.new("RGB", (size, size), (9 * number, 0, 0)) for number in range(num_images)]
    return datasets.Dataset.from_dict({"image": pictures, "label": [0] * num_images}, features)


def write_parquet_files(folder: Path, sizes: dict[str, list[int]]) -> list[PIL.Image.Image]:
    """Two classes of noise in parquet files of so many rows, by split. Returns the images of the training split."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rng, training_images = np.random.default_rng(0), []
    for split, of_files in sizes.items():
        for number, size in enumerate(of_files):
            pixels = rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
            pictures = [PIL.Image.fromarray(each) for each in pixels]
            training_images += pictures if split == "train" else []
            rows = datasets.Dataset.from_dict({"image": pictures, "label": [n % 2 for n in range(size)]}, features)
            rows.to_parquet(folder / f"{split}-{number:05d}-of-{len(of_files):05d}.parquet")
    return training_images


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
        tiny = {
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
        }
        return command_line(**(tiny | options))

    return build
