"""
Counts the parameters of every size in `training/configs` and the floating-point operations of its forward pass, with
no memory for either, and prints the table of docs/scale.md.

    python benchmarks/model_sizes.py
"""

import json
from pathlib import Path

import torch
from reporting import markdown_table
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


def row(name: str) -> list[str]:
    config = load_config(name)
    layers = config["num_layers"]
    size = f"{config['sample_size']}×{config['sample_size']}×{config['in_channels']}"
    return [
        f"`{name}`",
        size,
        str((config["sample_size"] // config["patch_size"]) ** 2),
        f"{config['num_blocks']} × {layers}" if isinstance(layers, int) else ", ".join(map(str, layers)),
        str(config["num_attention_heads"] * config["attention_head_dim"]),
        f"{count_parameters(config) / 1e6:,.1f} M",
        f"{count_flops(config) / 1e9:,.3f} G",
    ]


def table() -> str:
    header = ["config", "sample", "tokens", "layers in the blocks", "width", "parameters", "FLOPs per image"]
    return markdown_table(header, [row(path.stem) for path in sorted(CONFIGS.glob("*.json"))])


if __name__ == "__main__":
    print(table())
