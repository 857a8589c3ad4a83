"""What a flow costs, counted with no memory for it: parameters, and floating-point operations of a forward pass."""

import json
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowback_hf import TarFlowTransformer2DModel


CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"


def load_config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def count_parameters(config: dict) -> int:
    with torch.device("meta"):
        model = TarFlowTransformer2DModel.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(config: dict) -> int:
    """Of the forward pass of one image. A multiplication and an addition are two; attention counts in full, though it
    is causal and a good kernel leaves half of it out."""
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    # Only plain matrix products are counted: the fused attention kernels would be missed.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        TarFlowTransformer2DModel.from_config(config)(torch.zeros(shape))
    return counter.get_total_flops()
