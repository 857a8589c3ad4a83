# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Converting original TARFlow checkpoints (https://github.com/apple/ml-tarflow) to this package's model."""

import math
import os
import pickle
import re
from importlib import resources

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download

from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel


HEAD_DIM = 64  # in every original checkpoint
# A file on the Hub: the repository's id, a colon, and the file's path in it.
FILE_ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+):(.+)")
# What trainers put around the weights: a dict with other things, and prefixes of the names.
WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
AFHQ_LABELS = ("cat", "dog", "wild")
# Parts of this model's parameter names, and the original's names for them.
ORIGINAL_NAMES = {
    ".layers.": ".attn_blocks.",
    ".norm1.": ".attention.norm.",
    ".attn.to_qkv.": ".attention.qkv.",
    ".attn.to_out.0.": ".attention.proj.",
    ".norm2.": ".mlp.norm.",
    ".ff.net.0.proj.": ".mlp.main.0.",
    ".ff.net.2.": ".mlp.main.2.",
}


def load_tarflow_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Load the tensors of an original checkpoint. No code in it is run.

    Args:
        path (`str`):
            The file: safetensors if it ends in `.safetensors`, else what `torch.save` wrote, which is read with
            `weights_only=True`. `"user/repository:file"` is a file on the Hub; a local file of that name wins. The
            state dict may be in a dict under `"state_dict"` or `"model"`, and all its names may begin with
            `"module."` or `"_orig_mod."`, as distributed and compiled models save them.
    Returns:
        `dict` of `str` to `torch.Tensor`: the tensors by their original names, on the CPU.
    Raises:
        ValueError: if the file is missing or damaged, or holds anything but named tensors.
    """
    file = find_checkpoint_file(path)
    checkpoint = strip_prefixes(unwrap(read_checkpoint_file(file, path)))
    if not isinstance(checkpoint, dict) or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(
            f"`checkpoint` {str(path)!r} must hold the state dict of an original TARFlow, tensors by name, but holds"
            f" {describe(checkpoint)}."
        )
    return checkpoint


def find_checkpoint_file(path: str | os.PathLike) -> str:
    """Return the local file that a path or `"user/repository:file"` names, downloading it from the Hub if need be."""
    path = os.fspath(path)
    on_the_hub = FILE_ON_THE_HUB.fullmatch(path)
    if os.path.isfile(path):
        return path
    if on_the_hub is None:
        raise ValueError(
            f"`checkpoint` must be an existing file, or 'user/repository:file' on the Hub, but is {path!r}."
        )
    try:
        return hf_hub_download(*on_the_hub.groups())
    except (OSError, ValueError) as error:
        raise ValueError(f"`checkpoint` {path!r} was not found on the Hub: {str(error).splitlines()[0]}") from error


def read_checkpoint_file(file: str, path: str | os.PathLike) -> object:
    """Read what a file holds. Raises ValueError, which calls the file `path`, if it is damaged or not safe to read."""
    if file.endswith(".safetensors"):
        try:
            return safetensors.torch.load_file(file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"`checkpoint` {str(path)!r} was not loaded: {error}.") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`checkpoint` {str(path)!r} was not loaded: it is damaged, or holds objects that may run code when they"
            " are read. A checkpoint may hold tensors only."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"`checkpoint` {str(path)!r} was not loaded: it is truncated, or not a PyTorch file."
        ) from error


def unwrap(checkpoint: object) -> object:
    """Return the state dict that a trainer's checkpoint holds beside other things, or the checkpoint as it is."""
    wrappers = [name for name in WRAPPERS if isinstance(checkpoint, dict) and isinstance(checkpoint.get(name), dict)]
    return unwrap(checkpoint[wrappers[0]]) if wrappers else checkpoint


def strip_prefixes(checkpoint: object) -> object:
    """Remove the prefixes that all names of a state dict begin with."""
    for prefix in PREFIXES:
        if isinstance(checkpoint, dict) and checkpoint and all(str(name).startswith(prefix) for name in checkpoint):
            return strip_prefixes({name.removeprefix(prefix): value for name, value in checkpoint.items()})
    return checkpoint


def describe(checkpoint: object) -> str:
    """Say what a file holds instead of named tensors."""
    if not isinstance(checkpoint, dict):
        return f"a {type(checkpoint).__name__}"
    others = [name for name, value in checkpoint.items() if not isinstance(value, torch.Tensor)]
    return f"other things under {others[:5]}"


def convert_tarflow_checkpoint(
    checkpoint: dict[str, torch.Tensor], sample_size: int, noise_std: float, in_channels: int = 3
) -> TarFlowTransformer2DModel:
    """
    Convert an original TARFlow. The result gives the same latents, log-determinants and samples.

    The architecture is inferred from the tensors' names and shapes. The arguments supply what these leave open. Tokens
    of 12 values, for example, may be 2x2 pixels with 3 channels or single pixels with 12, and the training noise
    leaves no trace in a checkpoint.

    Args:
        checkpoint (`dict` of `str` to `torch.Tensor`): What [`load_tarflow_checkpoint`] returns.
        sample_size (`int`): Height and width of the images, in pixels.
        noise_std (`float`): Standard deviation of the Gaussian training noise, for images in [-1, 1].
        in_channels (`int`, defaults to 3): Channels of the images.
    Returns:
        [`TarFlowTransformer2DModel`]: the flow, in float32 and evaluation mode.
    Raises:
        ValueError: if tensors are missing, unexpected or misshapen (the message lists them); if `sample_size` or
            `in_channels` contradicts them; or if the flow is volume-preserving.

    Example:
        ```py
        >>> from flowback_hf.conversion import convert_tarflow_checkpoint, load_tarflow_checkpoint

        >>> checkpoint = load_tarflow_checkpoint("afhq256.pth")  # doctest: +SKIP
        >>> flow = convert_tarflow_checkpoint(checkpoint, sample_size=256, noise_std=0.07)  # doctest: +SKIP
        ```

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, 2024, https://arxiv.org/abs/2412.06329
    """
    config = infer_config(checkpoint, sample_size, in_channels)
    with torch.device("meta"):
        expected = TarFlowTransformer2DModel(**config, noise_std=noise_std).state_dict()
    check_names(checkpoint, {original_name(name) for name in expected} | {"var"})
    state_dict, misshapen = {}, []
    for name, tensor in expected.items():
        original = checkpoint[original_name(name)]
        # The original's class table has another axis, which broadcasts over the tokens.
        shape = (tensor.shape[0], 1, tensor.shape[1]) if name.endswith("class_embed") else tuple(tensor.shape)
        if tuple(original.shape) != shape:
            misshapen.append(f"{original_name(name)} {tuple(original.shape)} for {shape}")
        state_dict[name] = original.reshape(-1).float().clone()
    num_tokens, token_dim = (sample_size // config["patch_size"]) ** 2, in_channels * config["patch_size"] ** 2
    if tuple(checkpoint["var"].shape) != (num_tokens, token_dim):
        misshapen.append(f"var {tuple(checkpoint['var'].shape)} for {(num_tokens, token_dim)}")
    if misshapen:
        raise ValueError(f"The shapes of the checkpoint's tensors contradict each other: {', '.join(misshapen)}.")
    if not bool((checkpoint["var"] == 1).all()):
        raise ValueError(
            "The checkpoint's `var`, the variances of the latents, must be ones, as in every flow with log-scales, but"
            f" lies between {checkpoint['var'].min().item():.4g} and {checkpoint['var'].max().item():.4g}."
        )
    model = TarFlowTransformer2DModel(**config, noise_std=noise_std)
    model.load_state_dict({name: flat.view_as(expected[name]) for name, flat in state_dict.items()})
    return model.eval()


def infer_config(checkpoint: dict[str, torch.Tensor], sample_size: int, in_channels: int) -> dict:
    """
    Infer the model's arguments from the shapes in the first block and the numbers in the tensors' names.

    Args:
        checkpoint, sample_size, in_channels: As in [`convert_tarflow_checkpoint`].
    Returns:
        `dict`: arguments of [`TarFlowTransformer2DModel`], without the noise.
    Raises:
        ValueError: if the first block's matrices are missing, or `sample_size` or `in_channels` contradicts them.
    """
    first_block = {
        name: checkpoint.get(f"blocks.0.{name}")
        for name in ("proj_in.weight", "proj_out.weight", "pos_embed", "attn_blocks.0.mlp.main.0.weight")
    }
    lacking = [f"blocks.0.{name}" for name, tensor in first_block.items() if tensor is None or tensor.ndim != 2]
    if lacking:
        raise ValueError(f"The checkpoint is not an original TARFlow: it has no matrices named {', '.join(lacking)}.")
    proj_in, proj_out, pos_embed, mlp = first_block.values()
    width, token_dim = proj_in.shape
    if len(proj_out) == token_dim:
        raise ValueError(
            f"The checkpoint is a volume-preserving flow, whose output has {token_dim} shifts and no log-scales. This"
            " model does not support that kind."
        )
    num_tokens = len(pos_embed)
    grid_size = math.isqrt(num_tokens)
    if grid_size**2 != num_tokens or sample_size < grid_size or sample_size % grid_size != 0:
        raise ValueError(
            f"`sample_size` must be a multiple of the side of a square grid of the checkpoint's {num_tokens} tokens,"
            f" but is {sample_size}."
        )
    patch_size = sample_size // grid_size
    if in_channels * patch_size**2 != token_dim:
        raise ValueError(
            f"`in_channels` {in_channels} contradicts the checkpoint: at `sample_size` {sample_size}, its {num_tokens}"
            f" tokens are {patch_size}x{patch_size}, which makes {in_channels * patch_size**2} values each, but they"
            f" have {token_dim}."
        )
    if width % HEAD_DIM != 0:
        raise ValueError(f"The checkpoint's width {width} must be a multiple of {HEAD_DIM}, the size of its heads.")
    numbers = [re.match(r"blocks\.(\d+)\.(?:attn_blocks\.(\d+)\.)?", name) for name in checkpoint]
    layers_of = {}
    for match in filter(None, numbers):
        layers_of.setdefault(int(match[1]), set()).add(match[2])
    num_layers = [max(1, len(layers_of[block] - {None})) for block in sorted(layers_of)]
    table = checkpoint.get("blocks.0.class_embed")
    return {
        "sample_size": sample_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_blocks": len(num_layers),
        "num_layers": num_layers[0] if len(set(num_layers)) == 1 else num_layers,
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "mlp_ratio": len(mlp) / width,
        "num_classes": None if table is None else len(table),
    }


def original_name(name: str) -> str:
    """Return the original's name of one of this model's parameters."""
    for part, original in ORIGINAL_NAMES.items():
        name = name.replace(part, original)
    return name


def check_names(checkpoint: dict[str, torch.Tensor], expected: set[str]):
    """Raise ValueError if a checkpoint's names are not the expected ones."""
    # The original saves its causal masks as buffers. This model needs none.
    given = {name for name in checkpoint if not re.fullmatch(r"blocks\.\d+\.attn_mask", name)}
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint must hold exactly the tensors of an original TARFlow, but {', '.join(missing) or 'none'}"
            f" are missing and {', '.join(unexpected) or 'none'} are unexpected."
        )


def labels_of_known_data(num_classes: int | None) -> dict[int, str] | None:
    """
    Guess the class names of a published flow from its number of classes.

    Args:
        num_classes (`int`, *optional*): The number of classes; `None` for an unconditional flow.
    Returns:
        `dict[int, str]` or `None`: AFHQ's names for 3 classes, ImageNet's for 1000, with commas between synonyms
        (WordNet's lemmas), and `None` for other numbers.

    Example:
        ```py
        >>> from flowback_hf.conversion import labels_of_known_data

        >>> labels_of_known_data(3)
        {0: 'cat', 1: 'dog', 2: 'wild'}
        ```
    """
    if num_classes == len(AFHQ_LABELS):
        return dict(enumerate(AFHQ_LABELS))
    if num_classes == 1000:
        names = resources.files("flowback_hf").joinpath("imagenet_labels.txt").read_text(encoding="utf-8")
        return dict(enumerate(names.splitlines()))
    return None
