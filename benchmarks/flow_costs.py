"""What a flow costs, counted with no memory for it: parameters, floating-point operations, and activations."""

import json
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Dinov2Config, Dinov2Model

from flowback_hf import AlignedFlowObjective, RepresentationTeacher, TarFlowTransformer2DModel


CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"


def load_config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def make_objective(config: dict, **alignment) -> AlignedFlowObjective:
    """The objective of a flow. Without arguments of [`AlignedFlowObjective`] it is the likelihood."""
    return AlignedFlowObjective(
        TarFlowTransformer2DModel.from_config(config), **(alignment or {"strategy": "none"})
    ).train()


def make_batch(config: dict, batch_size: int, device: str, teacher_dim: int | None = None) -> list[torch.Tensor]:
    """Images, labels and, if their dimension is given, features of a teacher."""
    size, num_tokens = config["sample_size"], (config["sample_size"] // config["patch_size"]) ** 2
    images = torch.randn(batch_size, config["in_channels"], size, size, device=device)
    batch = [images, torch.zeros(batch_size, dtype=torch.long, device=device)]
    return batch if teacher_dim is None else [*batch, torch.randn(batch_size, num_tokens, teacher_dim, device=device)]


def count_parameters(config: dict) -> int:
    with torch.device("meta"):
        model = TarFlowTransformer2DModel.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


class FlopCounter(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, which fails where a forward pass takes gradients."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


def count_flops(config: dict) -> int:
    """Of the forward pass of one image. A multiplication and an addition are two; attention counts in full, though it
    is causal and a good kernel leaves half of it out."""
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    # Only plain matrix products are counted: the fused attention kernels would be missed.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter, torch.no_grad():
        TarFlowTransformer2DModel.from_config(config)(torch.zeros(shape))
    return counter.total


def count_step_flops(config: dict, gradient_checkpointing: bool = False, **alignment) -> int:
    """Of the forward and the backward pass of one image, counted as by [`count_flops`], the teacher apart."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        objective = make_objective(config, **alignment)
        if gradient_checkpointing:
            objective.flow.enable_gradient_checkpointing()
        objective(*make_batch(config, 1, "cpu", alignment.get("teacher_dim"))).loss.backward()
    return counter.total


def count_teacher(config: dict) -> dict[str, int]:
    """Parameters of DINOv2-B/14, and operations for one image of as many patches as the flow has tokens."""
    encoder_config = Dinov2Config(image_size=518, patch_size=14)  # the other sizes are those of B
    size = config["sample_size"]
    with torch.device("meta"):
        teacher = RepresentationTeacher(Dinov2Model(encoder_config), grid_size=size // config["patch_size"])
        with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
            teacher(torch.zeros(1, 3, size, size))
    return {"parameters": sum(weight.numel() for weight in teacher.parameters()), "flops": counter.total}


def saved_bytes(config: dict, batch_size: int, **alignment) -> int:
    """Bytes of the tensors that one forward pass keeps for its backward, weights of the objective apart."""
    storages = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        kept.append(tensor)  # alive, so that no storage's address is used twice
        return tensor

    kept = []
    with FakeTensorMode():
        objective = make_objective(config, **alignment)
        batch = make_batch(config, batch_size, "cpu", alignment.get("teacher_dim"))
        hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
            objective(*batch)
    return sum(storages.values())


def activation_bytes(config: dict, gradient_checkpointing: bool, **alignment) -> tuple[int, int]:
    """
    Bytes that a step under bfloat16 autocast keeps for its backward.

    With gradient checkpointing autograd keeps the input of every layer and, while it goes back, what one layer saves.

    Returns:
        `tuple`: those of each image, and those of the weights in half precision, which all images share.
    """
    one, two = saved_bytes(config, 1, **alignment), saved_bytes(config, 2, **alignment)
    per_image, shared = two - one, 2 * one - two
    if gradient_checkpointing:
        layers = config["num_layers"]
        num_layers = config["num_blocks"] * layers if isinstance(layers, int) else sum(layers)
        num_tokens = (config["sample_size"] // config["patch_size"]) ** 2
        width = config["num_attention_heads"] * config["attention_head_dim"]
        # float32 between the layers
        per_image = 4 * num_layers * num_tokens * width + per_image // num_layers
    return per_image, shared
