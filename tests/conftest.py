import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL

from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel

from .stand_in_hub import TOKEN, StandInHub


torch.set_num_threads(1)


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
