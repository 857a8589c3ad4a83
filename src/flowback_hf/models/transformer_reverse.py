# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
The learned inverse of a flow, which maps noise to data in one evaluation: its layers, its stages and the model.

This file is uploaded together with the weights of a model that loads without the package. It needs torch and diffusers
only.
"""

import functools
import hashlib
import math
import numbers
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.hub_utils import _add_variant, _get_model_file
from safetensors.torch import load_file, save_file


HEADS_FILE = "heads.safetensors"
ROTARY_BASE = 10_000.0


# Copied from flowback_hf_cli.numbers.check_number
def check_number(
    name: str,
    value: Any,
    kind: type,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
):
    """Raise ValueError unless a value is a number of a kind, `int` or (finite) `float`, within these bounds."""
    is_kind = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if (
        is_kind
        and -math.inf < value < math.inf  # NaN is refused, too
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    ):
        return
    bounds = {" of at least": at_least, " above": above, " at most": at_most, " below": below}
    expected = " and".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    raise ValueError(f"`{name}` must be a {'whole' if kind is int else 'finite'} number{expected}, but is {value!r}.")


# Copied from flowback_hf.models.transformer_tarflow.check_class_labels
def check_class_labels(class_labels: torch.Tensor | None, batch_size: int, num_classes: int | None):
    """Raise ValueError unless class labels, or class weights, fit a batch and a model."""
    if class_labels is None:
        return
    if num_classes is None:
        raise ValueError("`class_labels` must be None: this model is unconditional (`num_classes` is None).")
    if not isinstance(class_labels, torch.Tensor):
        raise ValueError(f"`class_labels` must be a tensor, but are {class_labels!r}.")
    expected = (batch_size, num_classes) if class_labels.is_floating_point() else (batch_size,)
    if tuple(class_labels.shape) != expected or class_labels.dtype == torch.bool:
        raise ValueError(
            f"`class_labels` must be integers of shape ({batch_size},) or floating-point class weights of shape"
            f" ({batch_size}, {num_classes}), but are {class_labels.dtype} of shape {tuple(class_labels.shape)}."
        )
    # One graph cannot depend on values. Fake tensors (a subclass) have none, and a GPU would be waited for.
    is_readable = type(class_labels) is torch.Tensor and class_labels.device.type == "cpu"
    if class_labels.is_floating_point() or not is_readable or torch.compiler.is_compiling():
        return
    label_ids = class_labels.long()  # without a sign, -1 would be the largest
    if ((label_ids < -1) | (label_ids >= num_classes)).any():
        raise ValueError(
            f"`class_labels` must lie between 0 and {num_classes - 1}, or be -1 for no class, but are"
            f" {class_labels.tolist()}."
        )


# Layers


# Copied from flowback_hf.models.transformer_tarflow.rotary_embedding
def rotary_embedding(grid_size: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    r"""
    Compute the cosines and sines of the angles by which each token rotates the pairs of values in a head.

    The first half of a head is rotated by the token's row, the second half by its column, both counted from 0. Each
    half has `head_dim / 4` pairs. Pair `k` is rotated by `position * theta^(-4 k / head_dim)` radians, theta = 10^4.

    Args:
        grid_size (`int`): Height and width of the token grid.
        head_dim (`int`): Values in a head, a multiple of 4.
        device (`torch.device`), dtype (`torch.dtype`): Of the result.
    Returns:
        `torch.Tensor` of shape `(2, grid_size^2, head_dim / 2)`: cosines, then sines, of all tokens in raster order.

    Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding,
    https://arxiv.org/abs/2104.09864
    """
    exponents = torch.arange(0, head_dim, 4, device=device, dtype=dtype) / head_dim
    positions = torch.arange(grid_size, device=device, dtype=dtype)
    angles = torch.outer(positions, ROTARY_BASE**-exponents)  # (grid_size, head_dim / 4)
    angles = torch.cat([angles.repeat_interleave(grid_size, dim=0), angles.repeat(grid_size, 1)], dim=1)
    return torch.stack([angles.cos(), angles.sin()])


# Copied from flowback_hf.models.transformer_tarflow.rotate
def rotate(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of values of queries and keys, `(batch_size, num_tokens, 2, heads, head_dim)`."""
    cosine, sine = rotary[..., None, None, :]
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return rotated.flatten(-2).to(states.dtype)


# Copied from flowback_hf.models.transformer_tarflow.embed_classes
def embed_classes(class_embed: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
    """Return `(1 or batch_size, width)`: rows of a class table, weighted rows, or the table's mean for no class."""
    no_class = class_embed.mean(dim=0, keepdim=True)
    if class_labels is None:
        return no_class
    if class_labels.is_floating_point():
        # In full precision: one-hot weights must give the very rows of the table.
        dtype = torch.promote_types(torch.promote_types(class_labels.dtype, class_embed.dtype), torch.float32)
        with torch.autocast(class_labels.device.type, enabled=False):
            return class_labels.to(dtype) @ class_embed.to(dtype)
    has_class = (class_labels >= 0).unsqueeze(-1)
    return torch.where(has_class, class_embed[class_labels.clamp(min=0).long()], no_class)


class TarFlowReverseAttnProcessor:
    """Computes self-attention of all tokens to all tokens."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "TarFlowReverseAttention", hidden_states: torch.Tensor, rotary: torch.Tensor
    ) -> torch.Tensor:
        # (batch_size, num_tokens, 3, heads, head_dim)
        states = attn.to_qkv(hidden_states).view(*hidden_states.shape[:2], 3, attn.heads, -1)
        query, key = rotate(states[:, :, :2], rotary).unbind(dim=2)
        attended = dispatch_attention_fn(
            query, key, states[:, :, 2], backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](attended.flatten(2, 3).to(query.dtype))


class TarFlowReverseAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention. The rows of `to_qkv` give queries, then keys, then values, in one product."""

    _default_processor_cls = TarFlowReverseAttnProcessor
    _available_processors = [TarFlowReverseAttnProcessor]
    _supports_qkv_fusion = False  # they are always fused
    fused_projections = True

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        width = heads * head_dim
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary)


class TarFlowReverseLayer(nn.Module):
    """
    A pre-norm bidirectional transformer layer with RMSNorm and SwiGLU. An untrained one returns its input.

    Args:
        heads (`int`), head_dim (`int`): Attention heads, and values in each. Their product is the width.
        mlp_ratio (`float`): As in [`TarFlowReverseTransformer2DModel`].
    """

    def __init__(self, heads: int, head_dim: int, mlp_ratio: float):
        super().__init__()
        width = heads * head_dim
        # Two thirds, because the gate is a third matrix. Multiples of 64 suit the kernels.
        inner_dim = 64 * math.ceil(2 * mlp_ratio * width / (3 * 64))
        # diffusers' RMSNorm computes in float32, even for a float64 model.
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = TarFlowReverseAttention(heads, head_dim)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.ff = FeedForward(width, inner_dim=inner_dim, activation_fn="swiglu", bias=False)
        nn.init.zeros_(self.attn.to_out[0].weight)
        nn.init.zeros_(self.ff.net[2].weight)

    def forward(self, hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """
        Compute the layer's hidden states.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, width)`): Of all tokens.
            rotary (`torch.Tensor` of shape `(2, num_tokens, head_dim / 2)`): Their [`rotary_embedding`].
        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), rotary)
        return hidden_states + self.ff(self.norm2(hidden_states))


# Stages


class TarFlowReverseStage(nn.Module):
    r"""
    One stage of a learned inverse: the class and the guidance, and then transformer layers.

    With `e_c` the class's row of the stage's own table, `e_0` the mean of the table, which is no class, and `w` the
    guidance weight, every token gets

        e_c + w (M(e_c, w) - M(e_0, w))

    where `M` is an MLP. Guidance of weight 0 and guidance of no class are therefore exactly nothing.

    Args:
        num_attention_heads, attention_head_dim, num_layers, mlp_ratio, num_classes:
            As in [`TarFlowReverseTransformer2DModel`].
        guided (`bool`): Whether guidance is an input.
        in_dim (`int`, *optional*), out_dim (`int`, *optional*):
            Values in a token that the stage takes and returns, if they are no hidden states.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        num_layers: int,
        mlp_ratio: float,
        num_classes: int | None,
        guided: bool,
        in_dim: int | None = None,
        out_dim: int | None = None,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.proj_in = nn.Identity() if in_dim is None else nn.Linear(in_dim, width)
        self.class_embed = self.guidance_embed = None
        if num_classes is not None:
            self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, width))
        if num_classes is not None and guided:
            # A bias of the last layer would cancel out.
            output = nn.Linear(width, width, bias=False)
            self.guidance_embed = nn.Sequential(nn.Linear(width + 1, width), nn.SiLU(), output)
            nn.init.zeros_(self.guidance_embed[2].weight)
        self.layers = nn.ModuleList(
            TarFlowReverseLayer(num_attention_heads, attention_head_dim, mlp_ratio) for _ in range(num_layers)
        )
        self.proj_out = nn.Identity() if out_dim is None else nn.Linear(width, out_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states: quantization and layerwise casting change the weights of products only."""
        return self.layers[0].norm1.weight.dtype

    def forward(
        self,
        states: torch.Tensor,
        class_labels: torch.Tensor | None,
        guidance_weight: torch.Tensor | None,
        rotary: torch.Tensor,
    ) -> torch.Tensor:
        """
        Go one step from noise to data.

        Args:
            states (`torch.Tensor` of shape `(batch_size, num_tokens, width or in_dim)`):
                What the stage before returned, or the noise.
            class_labels: As in [`TarFlowReverseTransformer2DModel.forward`].
            guidance_weight (`torch.Tensor` of shape `(batch_size,)`, *optional*): `w`; `None` is 0.
            rotary (`torch.Tensor` of shape `(2, num_tokens, head_dim / 2)`): The tokens' [`rotary_embedding`].
        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, width or out_dim)`.
        """
        hidden_states = self.proj_in(states.to(self.dtype))
        if self.class_embed is not None:
            hidden_states = hidden_states + self._embed(class_labels, guidance_weight).unsqueeze(1)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, rotary)
            else:
                hidden_states = layer(hidden_states, rotary)
        return self.proj_out(hidden_states)

    def _embed(self, class_labels: torch.Tensor | None, guidance_weight: torch.Tensor | None) -> torch.Tensor:
        """Return what is added to every token, `(1 or batch_size, width)`."""
        embedding = embed_classes(self.class_embed, class_labels).to(self.dtype)
        if class_labels is None or guidance_weight is None or self.guidance_embed is None:
            return embedding
        weight = guidance_weight.to(self.dtype).unsqueeze(1)
        no_class = embed_classes(self.class_embed, None).to(self.dtype).expand_as(embedding)
        guided, unguided = (self.guidance_embed(torch.cat([each, weight], dim=1)) for each in (embedding, no_class))
        return embedding + weight * (guided - unguided)


class TarFlowReverseHeads(nn.Module):
    r"""
    Read from a stage's tokens what the flow's blocks exchange: `x^i`, the output of flow block `i`; `x^0` is the noisy
    data. The model is trained through them. Plain sampling does not need them.

    Args:
        num_blocks (`int`): Flow blocks.
        width (`int`, *optional*): Of the stages' tokens. `None` if these are the flow's values already.
        token_dim (`int`): Values in a token.

    Attributes:
        mean, std (`torch.Tensor` of shape `(num_blocks,)`):
            Statistics of the values of `x^0`, `x^1`, ..., by which they are standardized.
    """

    def __init__(self, num_blocks: int, width: int | None, token_dim: int):
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Identity()
            if width is None
            else nn.Sequential(
                nn.RMSNorm(width, eps=1e-6), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, token_dim)
            )
            for _ in range(num_blocks)
        )
        self.register_buffer("mean", torch.zeros(num_blocks))
        self.register_buffer("std", torch.ones(num_blocks))

    def forward(self, states: torch.Tensor, number: int) -> torch.Tensor:
        """
        Estimate `x^i`, standardized.

        Args:
            states (`torch.Tensor` of shape `(batch_size, num_tokens, width)`): Of the stage that ends at `x^i`.
            number (`int`): `i`, from 0.
        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`.
        """
        return self.projections[number](states)


# Model


@dataclass
class TarFlowReverseOutput(BaseOutput):
    """
    The output of [`TarFlowReverseTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
            Data. float32, or float64 for a float64 model or noise.
        hidden_states (`dict` of `int` to `torch.Tensor` of shape `(batch_size, num_tokens, width)`):
            By `i`, the tokens of the stage that ends at `x^i`, the output of flow block `i`. `None` unless asked for.
        trajectory (`dict` of `int` to `torch.Tensor` of the shape of `sample`):
            By `i`, the estimate of `x^i`; `x^0` is the noisy data. `None` unless asked for.
    """

    # Accelerate rebuilds outputs under mixed precision and needs defaults for that.
    sample: torch.Tensor | None = None
    hidden_states: dict[int, torch.Tensor] | None = None
    trajectory: dict[int, torch.Tensor] | None = None


@torch.no_grad()
def hash_flow(flow: nn.Module) -> str | None:
    """
    Compute a hash by which a learned inverse recognizes its flow.

    It covers the shapes of all weights and the first 64 values of each, rounded to bfloat16: it takes no time for a
    large flow, and a flow that was loaded in bfloat16 has the hash of the original.

    Args:
        flow ([`TarFlowTransformer2DModel`]): The flow, without adapters.
    Returns:
        `str` or `None`: a SHA-256; `None` if the weights are rounded otherwise, quantized, or not in memory.
    """
    parameters = list(flow.parameters())
    comparable = (torch.bfloat16, torch.float32, torch.float64)
    if any(parameter.is_meta or parameter.dtype not in comparable for parameter in parameters):
        return None
    # They are gathered on one device first: each copy to the CPU waits for a GPU.
    device = parameters[0].device
    values = torch.cat([parameter.flatten()[:64].bfloat16().to(device) for parameter in parameters]).cpu()
    digest = hashlib.sha256(str([tuple(parameter.shape) for parameter in parameters]).encode())
    digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


class TarFlowReverseTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    r"""
    The learned inverse of a TARFlow: it maps the flow's noise to clean data in one evaluation.

    A bidirectional transformer with one stage for each flow block, in the order of generation, and a last stage that
    removes the noise of training. What guidance does and the denoising are learned, too. The result is not the exact
    inverse, which the flow computes.

    Args:
        sample_size (`int`, defaults to 64), in_channels (`int`, defaults to 3), num_blocks (`int`, defaults to 8),
        num_classes (`int`, *optional*, defaults to 1000):
            Those of the flow.
        patch_size (`int`, defaults to 4): Height and width of this model's tokens. It must divide `sample_size`.
        num_layers (`int`, defaults to 7): Transformer layers in each of the `num_blocks + 1` stages.
        num_attention_heads (`int`, defaults to 16), attention_head_dim (`int`, defaults to 64):
            Their product is the width. The latter must be a multiple of 4, for rotary positions.
        mlp_ratio (`float`, defaults to 4.0):
            The hidden width of the feed-forward layers is `2/3 * mlp_ratio` times the width, rounded up to a multiple
            of 64.
        min_guidance_scale (`float`, defaults to 1.0), max_guidance_scale (`float`, defaults to 1.0):
            The range of guidance scales that it was trained for; 1.0 is off.
        denoises (`bool`, defaults to `True`): Whether it was trained to return clean data. If not, its samples are as
            noisy as the flow's.
        through_data_space (`bool`, defaults to `False`):
            Let each stage pass on an estimate of what the flow's block passes on, instead of its hidden states. This
            is worse, and there for comparison.
        flow_hash (`str`, *optional*): [`hash_flow`] of the flow.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf import TarFlowReverseTransformer2DModel

        >>> model = TarFlowReverseTransformer2DModel(
        ...     sample_size=8, patch_size=2, in_channels=1, num_blocks=2, num_layers=1, num_attention_heads=2,
        ...     attention_head_dim=16, num_classes=10, max_guidance_scale=3.0,
        ... )
        >>> noise = torch.randn(4, 1, 8, 8)
        >>> model(noise, torch.tensor([3, 1, 4, -1]), guidance_scale=2.0).sample.shape
        torch.Size([4, 1, 8, 8])
        ```

    Reference: Lu et al., Bidirectional Normalizing Flow: From Data to Noise and Back, 2025,
    https://arxiv.org/abs/2512.10953
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["TarFlowReverseLayer"]
    _no_split_modules = ["TarFlowReverseStage"]
    _skip_layerwise_casting_patterns = ["proj_in", "proj_out", "class_embed", "guidance_embed", "norm", "heads"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        patch_size: int = 4,
        in_channels: int = 3,
        num_blocks: int = 8,
        num_layers: int = 7,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float = 1.0,
        denoises: bool = True,
        through_data_space: bool = False,
        flow_hash: str | None = None,
    ):
        super().__init__()
        self._check_config()
        token_dim = in_channels * patch_size**2
        inner_dim = token_dim if through_data_space else None
        self.stages = nn.ModuleList(
            TarFlowReverseStage(
                num_attention_heads,
                attention_head_dim,
                num_layers,
                mlp_ratio,
                num_classes,
                guided=max_guidance_scale > 1.0,
                in_dim=token_dim if number == num_blocks else inner_dim,
                out_dim=token_dim if number == 0 else inner_dim,
            )
            for number in range(num_blocks, -1, -1)
        )
        # With streams, diffusers' group offloading of blocks waits for copies only if there is a module beside them.
        self.beside_stages = nn.Identity()
        nn.init.zeros_(self.stages[-1].proj_out.weight)
        nn.init.zeros_(self.stages[-1].proj_out.bias)
        self.heads: TarFlowReverseHeads | None = None
        self.gradient_checkpointing = False

    @classmethod
    def for_flow(cls, flow: ModelMixin, **config: Any) -> "TarFlowReverseTransformer2DModel":
        """
        Make an untrained inverse of a flow, about as large as the flow.

        Args:
            flow ([`TarFlowTransformer2DModel`]): The flow.
            config: Arguments of [`TarFlowReverseTransformer2DModel`]. By default, the flow's patch size, heads and
                `mlp_ratio`, and as many layers in each stage, at least one, as make no more layers than the flow has.
        Returns:
            [`TarFlowReverseTransformer2DModel`].
        Raises:
            ValueError: as [`TarFlowReverseTransformer2DModel`], or if `config` contradicts the flow.
        """
        of_flow = {name: flow.config[name] for name in ("sample_size", "in_channels", "num_blocks", "num_classes")}
        different = [name for name in of_flow if name in config and config[name] != of_flow[name]]
        if different:
            raise ValueError(
                f"`{different[0]}` must be {of_flow[different[0]]!r}, as in the flow, but is {config[different[0]]!r}."
            )
        sizes = ("patch_size", "num_attention_heads", "attention_head_dim", "mlp_ratio")
        num_layers = sum(len(block.layers) for block in flow.blocks) // (flow.config.num_blocks + 1)
        defaults = {name: flow.config[name] for name in sizes} | {"num_layers": max(1, num_layers)}
        return cls(**defaults | of_flow | {"flow_hash": hash_flow(flow)} | config)

    def patchify(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Cut samples into tokens of this model's patch size.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): Data or noise.
        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, in_channels * patch_size^2)`: tokens in raster order,
            float32, or float64 for a float64 model or sample.
        Raises:
            ValueError: if `sample` has another shape.
        """
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if sample.ndim != 4 or tuple(sample.shape[1:]) != expected:
            raise ValueError(
                f"`sample` must have shape (batch_size, {expected[0]}, {expected[1]}, {expected[2]}), as in this"
                f" model's config, but has shape {tuple(sample.shape)}."
            )
        dtype = torch.promote_types(torch.promote_types(sample.dtype, self.stages[0].dtype), torch.float32)
        return F.pixel_unshuffle(sample.to(dtype), config.patch_size).flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Join tokens into samples: the inverse of [`~TarFlowReverseTransformer2DModel.patchify`]."""
        grid_size = self.config.sample_size // self.config.patch_size
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (grid_size, grid_size)), self.config.patch_size)

    def rotary(self, device: torch.device) -> torch.Tensor:
        """Return the [`rotary_embedding`] of the tokens, which every stage takes."""
        grid_size = self.config.sample_size // self.config.patch_size
        dtype = torch.promote_types(self.stages[0].dtype, torch.float32)
        return rotary_embedding(grid_size, self.config.attention_head_dim, device, dtype)

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance_scale: float | torch.Tensor = 1.0,
        output_hidden_states: bool = False,
        output_trajectory: bool = False,
        return_dict: bool = True,
    ) -> TarFlowReverseOutput | tuple:
        r"""
        Map the flow's noise to data.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                Noise: the flow's latents.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Class indices. -1 is no class, as is `None` for the whole batch. A float tensor of shape
                `(batch_size, num_classes)` holds class weights instead.
            guidance_scale (`float` or `torch.Tensor` of shape `(batch_size,)`, defaults to 1.0):
                Classifier-free guidance as in diffusers: 1.0 is off. It does not change samples without a class.
            output_hidden_states (`bool`, defaults to `False`): Return the tokens of all stages but the last.
            output_trajectory (`bool`, defaults to `False`):
                Return estimates of what the flow's blocks exchange. It needs heads: see
                [`~TarFlowReverseTransformer2DModel.load_heads`].
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`TarFlowReverseOutput`] instead of a tuple `(sample[, hidden_states][,
                trajectory])`.
        Returns:
            [`TarFlowReverseOutput`] or `tuple`.
        Raises:
            ValueError: if a shape, a number or a label does not fit the model, or heads are missing. Numbers in
                tensors are not checked.
        """
        check_class_labels(class_labels, len(sample), self.config.num_classes)
        guidance_weight = self._guidance_weight(guidance_scale, class_labels, sample)
        if output_trajectory:
            self.check_heads("`output_trajectory`")
        states = self.patchify(sample)
        dtype, rotary = states.dtype, self.rotary(states.device)
        hidden_states, trajectory = {}, {}
        for number, stage in enumerate(self.stages, start=1):
            states = stage(states, class_labels, guidance_weight, rotary)
            block = self.config.num_blocks - number
            if block < 0:
                break
            if output_hidden_states:
                hidden_states[block] = states
            if output_trajectory:
                tokens = self.heads(states, block).to(dtype) * self.heads.std[block] + self.heads.mean[block]
                trajectory[block] = self.unpatchify(tokens)
        output = TarFlowReverseOutput(self.unpatchify(states.to(dtype)), hidden_states or None, trajectory or None)
        return output if return_dict else output.to_tuple()

    def _guidance_weight(
        self, guidance_scale: float | torch.Tensor, class_labels: torch.Tensor | None, sample: torch.Tensor
    ) -> torch.Tensor | None:
        """Return `w` of each sample, `(batch_size,)`; `None` if there is nothing to guide."""
        if isinstance(guidance_scale, torch.Tensor):
            if tuple(guidance_scale.shape) != (len(sample),):
                raise ValueError(
                    f"`guidance_scale` must be a number or have shape ({len(sample)},), but has shape"
                    f" {tuple(guidance_scale.shape)}."
                )
            return None if class_labels is None else guidance_scale.to(sample.device) - 1.0
        self.check_guidance_scale(guidance_scale)
        if class_labels is None or guidance_scale <= 1.0:
            return None
        return torch.full((len(sample),), guidance_scale - 1.0, device=sample.device, dtype=self.stages[0].dtype)

    # Checks, which a pipeline makes before it draws noise

    def check_guidance_scale(self, guidance_scale: float, name: str = "guidance_scale"):
        """Raise ValueError unless this model was trained for a guidance scale, the value of the argument `name`."""
        check_number(name, guidance_scale, float, at_least=0.0)
        guidance_scale = max(guidance_scale, 1.0)  # as in diffusers, less is off, too
        lowest, highest = self.config.min_guidance_scale, self.config.max_guidance_scale
        if self.config.num_classes is None and guidance_scale != 1.0:
            raise ValueError(f"`{name}` must be 1.0 for a learned inverse without classes, but is {guidance_scale}.")
        if not lowest <= guidance_scale <= highest:
            expected = f"{lowest}" if lowest == highest else f"between {lowest} and {highest}"
            raise ValueError(
                f"`{name}` must be {expected}, for which this learned inverse was trained, but is {guidance_scale}."
            )

    def check_heads(self, name: str):
        """Raise ValueError unless the heads are loaded, which the argument `name` needs."""
        if self.heads is None:
            raise ValueError(
                f"{name} needs the learned inverse's heads, which plain sampling does without. Load them with"
                f" `load_heads(folder)`, from the folder or repository whose `reverse_transformer` holds {HEADS_FILE}."
                " A learned inverse that was trained with the supervision 'final' has none."
            )

    def check_flow(self, flow: ModelMixin):
        """
        Check that this is the learned inverse of a flow.

        Args:
            flow ([`TarFlowTransformer2DModel`]): The flow.
        Raises:
            ValueError: if the flow has other sizes, classes or weights, or has adapters.
        """
        for name in ("sample_size", "in_channels", "num_blocks", "num_classes"):
            if flow.config[name] != self.config[name]:
                raise ValueError(
                    f"The learned inverse must have the flow's `{name}`, {flow.config[name]}, but has"
                    f" {self.config[name]}."
                )
        if flow.attached_adapters:
            raise ValueError(
                f"The learned inverse is that of the flow without adapters, but {flow.attached_adapters} are attached."
                " Detach them with `unload_lora`, or use another solver."
            )
        hashes = self.config.flow_hash, hash_flow(flow)
        if None not in hashes and hashes[0] != hashes[1]:
            raise ValueError(
                "The learned inverse is that of a flow with other weights. Train one for this flow with"
                " training/train_reverse.py, or use another solver."
            )

    # Heads

    def add_heads(self):
        """Add untrained [`TarFlowReverseHeads`], to train the model with."""
        self.heads = self._make_heads()

    def _make_heads(self) -> TarFlowReverseHeads:
        config = self.config
        width = None if config.through_data_space else config.num_attention_heads * config.attention_head_dim
        heads = TarFlowReverseHeads(config.num_blocks, width, config.in_channels * config.patch_size**2)
        return heads.to(self.device, self.dtype)

    def load_heads(self, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Load the heads, which lie in a file of their own beside the model's weights.

        Args:
            pretrained_model_name_or_path (`str`):
                A folder or a repository on the Hub: that of the pipeline, or that of this model.
            kwargs: As in diffusers: `subfolder`, by default `"reverse_transformer"`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `variant`.
        Raises:
            OSError: if there is no such file.
            ValueError: if the file holds the heads of a model of other sizes. The model is then left as it was.
        """
        options = {"subfolder": "reverse_transformer", **kwargs}
        weights_name = _add_variant(HEADS_FILE, options.pop("variant", None))
        path = _get_model_file(pretrained_model_name_or_path, weights_name=weights_name, **options)
        heads, state_dict = self._make_heads(), load_file(path)
        shapes = {name: tensor.shape for name, tensor in heads.state_dict().items()}
        if {name: tensor.shape for name, tensor in state_dict.items()} != shapes:
            raise ValueError(
                f"The heads must be those of this learned inverse, but {path} holds those of one with other sizes."
            )
        heads.load_state_dict(state_dict)
        self.heads = heads.eval()

    # Pipelines look up in the signature which arguments they may pass on.
    @functools.wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        """
        Save the model to a folder, as every diffusers model does, and its heads, if it has them, to a file beside it,
        of the same variant. Takes the arguments of diffusers' `save_pretrained`.
        """
        heads, self.heads = self.heads, None
        try:
            # First, because what is pushed to the Hub afterwards is the whole folder.
            if heads is not None and is_main_process:
                os.makedirs(save_directory, exist_ok=True)
                state_dict = {name: tensor.contiguous() for name, tensor in heads.state_dict().items()}
                save_file(state_dict, os.path.join(save_directory, _add_variant(HEADS_FILE, kwargs.get("variant"))))
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        finally:
            self.heads = heads

    def _check_config(self):
        """Raise ValueError if an argument is out of its range."""
        config = self.config
        counts = ["sample_size", "patch_size", "in_channels", "num_blocks", "num_layers", "num_attention_heads"]
        counts += ["attention_head_dim"] + (["num_classes"] if config.num_classes is not None else [])
        for name in counts:
            check_number(name, config[name], int, at_least=1)
        check_number("mlp_ratio", config.mlp_ratio, float, above=0.0)
        check_number("min_guidance_scale", config.min_guidance_scale, float, at_least=1.0)
        check_number("max_guidance_scale", config.max_guidance_scale, float, at_least=config.min_guidance_scale)
        flow_hash = config.flow_hash
        if flow_hash is not None and not (isinstance(flow_hash, str) and re.fullmatch("[0-9a-f]{64}", flow_hash)):
            raise ValueError(f"`flow_hash` must be 64 hexadecimal digits or None, but is {flow_hash!r}.")
        if config.sample_size % config.patch_size != 0:
            raise ValueError(
                f"`sample_size` must be divisible by `patch_size`, but they are {config.sample_size} and"
                f" {config.patch_size}."
            )
        if config.attention_head_dim % 4 != 0:
            raise ValueError(
                "`attention_head_dim` must be a multiple of 4, because each half of a head is rotated in pairs, but is"
                f" {config.attention_head_dim}."
            )
