# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
TARFlow, a normalizing flow of images: its layers, its inversion, its flow block and the model, in this order.

This file is uploaded together with the weights of a model that loads without the package. It needs torch and diffusers
only.
"""

import functools
import math
import numbers
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, logging


ACTIVATION_FNS = ("gelu", "swiglu")
POSITION_EMBEDDINGS = ("learned", "rope")
NOISE_TYPES = ("gaussian", "uniform")
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


class TarFlowLayerNorm(nn.LayerNorm):
    """Normalizes in float32, or in the input's dtype if that is wider, and returns the input's dtype."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(hidden_states.to(dtype), self.normalized_shape, weight, bias, self.eps).to(
            hidden_states.dtype
        )


# On other CPUs than Intel's, MKL takes several times as long for a product of two rows as reading the weights does.
MKL_SUITS_CPU = not torch.backends.mkl.is_available() or "Intel" in getattr(torch.cpu, "get_capabilities", dict)().get(
    "cpu_name", "Intel"
)


def linear(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `F.linear`, in a compiled step of one or two rows in operations that a compiler can fuse."""
    device_type = hidden_states.device.type
    if (
        MKL_SUITS_CPU
        or not torch.compiler.is_compiling()
        or device_type != "cpu"
        or torch.is_autocast_enabled(device_type)
        or type(weight) not in (torch.Tensor, nn.Parameter)  # a quantized weight has a product of its own
        or hidden_states.shape[:-1].numel() > 2
    ):
        return F.linear(hidden_states, weight, bias)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    rows = hidden_states.contiguous()
    # Inductor keeps the argument of `as_strided` in memory. It would otherwise compute the operations before the
    # product, such as an activation, again for each row of the weight.
    rows = rows.as_strided(rows.shape, rows.stride())
    product = (rows.unsqueeze(-2).to(dtype) * weight.to(dtype)).sum(dim=-1)
    if bias is not None:
        product = product + bias.to(dtype)
    return product.to(hidden_states.dtype)


class TarFlowLinear(nn.Linear):
    """An `nn.Linear` that is also fast for the few rows of a decoding step."""

    @classmethod
    def from_linear(cls, module: nn.Linear) -> "TarFlowLinear":
        """Return one with the parameters of `module`, without drawing any."""
        with torch.device("meta"):
            twin = cls(module.in_features, module.out_features, bias=module.bias is not None)
        twin.weight, twin.bias = module.weight, module.bias
        return twin

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(hidden_states, self.weight, self.bias)


class TarFlowOutputProjection(nn.Linear):
    """
    Projects hidden states to log-scales and shifts in float32, or in the input's dtype if that is wider.

    This holds under autocast too. Weight and bias start at zero, so an untrained flow is the identity.
    """

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return linear(hidden_states.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


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


def rotate(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of values of queries and keys, `(batch_size, num_tokens, 2, heads, head_dim)`."""
    cosine, sine = rotary[..., None, None, :]
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return rotated.flatten(-2).to(states.dtype)


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


class KeyValueCache(NamedTuple):
    """
    Holds one layer's keys and values, and says which tokens a window consists of.

    Args:
        states (`torch.Tensor` of shape `(num_rows, 2, heads, num_tokens, head_dim)`):
            Keys and values of all tokens; the layer writes those of the window. Entries that have not been written
            must be finite: the mask multiplies them by 0.
        positions (`torch.LongTensor` of shape `(num_rows or 1, window_size)`):
            Positions of the window's tokens in the sequence, counted from 0. A single token is at the same position in
            all rows.
        attention_mask (`torch.BoolTensor` of shape `(num_rows or 1, 1, window_size, length)`):
            True where a token of the window may attend to one of the first `length` tokens.
    """

    states: torch.Tensor
    positions: torch.Tensor
    attention_mask: torch.Tensor


def attend_from_one_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Compute `F.scaled_dot_product_attention` for a single query, in operations that a compiler can fuse.

    The fused code reads the cache twice. That takes less time than calling a kernel made for many queries.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(dtype) * keys.to(dtype)).sum(dim=-1) / math.sqrt(query.shape[-1])
    weights = torch.where(attention_mask.squeeze(2), logits, -math.inf).softmax(dim=-1)
    return (weights.unsqueeze(-1) * values.to(dtype)).sum(dim=2, keepdim=True).to(query.dtype)


class TarFlowAttnProcessor:
    """Computes causal self-attention over a whole sequence, or from a window of tokens to a key/value cache."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "TarFlowAttention",
        hidden_states: torch.Tensor,
        rotary: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        key_value_cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        # (batch_size, num_tokens, 3, heads, head_dim)
        states = attn.to_qkv(hidden_states).view(*hidden_states.shape[:2], 3, -1, attn.head_dim)
        if rotary is not None:
            states = torch.cat([rotate(states[:, :, :2], rotary), states[:, :, 2:]], dim=2)
        query, key, value = states.unbind(dim=2)
        if temperature is not None:
            query = query / temperature.to(query.dtype)

        if key_value_cache is None:
            attended = dispatch_attention_fn(
                query,
                key,
                value,
                is_causal=True,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        else:
            attended = self._attend_to_cache(query, states[:, :, 1:], key_value_cache)
        return attn.to_out[0](attended.flatten(2, 3).to(query.dtype))

    def _attend_to_cache(
        self, query: torch.Tensor, keys_and_values: torch.Tensor, key_value_cache: KeyValueCache
    ) -> torch.Tensor:
        cached, positions, attention_mask = key_value_cache
        # The overflow of a single token is final. A token of a window may overflow in one sweep and recover in the
        # next, so it must not reach the tokens before it: the mask multiplies it by 0, and 0 times infinity is NaN.
        in_window = positions.shape[1] > 1
        if in_window:
            is_finite = keys_and_values.isfinite().flatten(2).all(dim=2)[..., None, None]
            keys_and_values = torch.where(is_finite[..., None], keys_and_values, 0.0)
        keys_and_values = keys_and_values.to(cached.dtype)
        if in_window:
            rows = torch.arange(len(query), device=query.device).unsqueeze(1)
            cached[rows, :, :, positions] = keys_and_values
        else:
            cached.index_copy_(3, positions[0], keys_and_values.permute(0, 2, 3, 1, 4))
        # A causal kernel would align the window with the start of the cache, so this needs a mask. The backends of
        # `dispatch_attention_fn` do not help here: they are made for long sequences, and choosing one takes as long
        # as a small product.
        keys, values = cached[:, :, :, : attention_mask.shape[-1]].unbind(dim=1)
        is_compiled_step = torch.compiler.is_compiling() and not in_window
        attend = attend_from_one_token if is_compiled_step else F.scaled_dot_product_attention
        attended = attend(query.transpose(1, 2), keys, values, attention_mask).transpose(1, 2)
        return torch.where(is_finite, attended, math.nan) if in_window else attended


class TarFlowAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention. The rows of `to_qkv` give queries, then keys, then values, in one product."""

    _default_processor_cls = TarFlowAttnProcessor
    _available_processors = [TarFlowAttnProcessor]
    _supports_qkv_fusion = False  # they are always fused
    fused_projections = True

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        width = heads * head_dim
        self.to_qkv = TarFlowLinear(width, 3 * width)
        self.to_out = nn.ModuleList([TarFlowLinear(width, width)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        key_value_cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary, temperature, key_value_cache)


class TarFlowLayer(nn.Module):
    """
    A pre-norm causal transformer layer.

    Args:
        heads (`int`), head_dim (`int`): Attention heads, and values in each. Their product is the width.
        mlp_ratio (`float`): Hidden width of the feed-forward layers, relative to the width.
        activation_fn (`str`): `"gelu"` or `"swiglu"`, as in [`TarFlowTransformer2DModel`].
    """

    def __init__(self, heads: int, head_dim: int, mlp_ratio: float, activation_fn: str):
        super().__init__()
        width = heads * head_dim
        inner_dim = int(mlp_ratio * width)
        if activation_fn == "swiglu":
            # Two thirds, because the gate is a third matrix. Multiples of 64 suit the kernels.
            inner_dim = 64 * math.ceil(2 * mlp_ratio * width / (3 * 64))
        self.norm1 = TarFlowLayerNorm(width)
        self.attn = TarFlowAttention(heads, head_dim)
        self.norm2 = TarFlowLayerNorm(width)
        self.ff = FeedForward(width, inner_dim=inner_dim, activation_fn=activation_fn)
        for name in [name for name, module in self.ff.named_modules() if type(module) is nn.Linear]:
            self.ff.set_submodule(name, TarFlowLinear.from_linear(self.ff.get_submodule(name)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        key_value_cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """
        Compute the layer's hidden states.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, width)`):
                All tokens of the sequence or, with a `key_value_cache`, a window of them.
            rotary (`torch.Tensor` of shape `(2, num_tokens, head_dim / 2)`, *optional*):
                The [`rotary_embedding`] of these tokens, in their order. If samples have different windows, it has
                shape `(2, batch_size, num_tokens, head_dim / 2)`.
            temperature (`torch.Tensor` of shape `(batch_size, 1, 1, 1)`, *optional*):
                Divides the attention logits of each sample.
            key_value_cache ([`KeyValueCache`], *optional*):
                The cache of this layer. The window's keys and values are written to it.
        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        attended = self.attn(self.norm1(hidden_states), rotary, temperature, key_value_cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.ff(self.norm2(hidden_states))


# Inversion
#
# A flow block is inverted by finding the one `u` with `u = m(u) + exp(a(u)) z`. Token `i` depends on the tokens before
# it, so a solver either decodes one token after another ("sequential") or sweeps over a window of tokens until they no
# longer change ("jacobi"). Everything a solver remembers is in an `InverseState`, which is local to one call.


GUIDANCE_RULES = ("linear", "product")
GUIDANCE_SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class Guidance:
    """
    How a block is guided. The fields mean what the `guidance_*` arguments of [`TarFlowTransformer2DModel`] mean.

    Args:
        scale (`float`, defaults to 1.0): 1.0 and less is off.
        rule (`str`, defaults to `"linear"`): `"linear"` or `"product"`, see [`apply_guidance`].
        schedule (`str`, defaults to `"constant"`): `"constant"` or `"linear"`, see [`guidance_weights`].
        temperature (`float`, defaults to 1.0): Divides the attention logits of the weak branch.
    """

    scale: float = 1.0
    rule: str = "linear"
    schedule: str = "constant"
    temperature: float = 1.0

    @property
    def is_on(self) -> bool:
        return self.scale > 1.0

    @property
    def num_branches(self) -> int:
        """Network evaluations per sample: conditional and weak, or conditional only."""
        return 2 if self.is_on else 1


def check_guidance(guidance: Guidance, inverse: bool, is_conditional: bool):
    """Raise ValueError for values out of range, for guidance of the forward pass, and for guidance without effect."""
    check_number("guidance_scale", guidance.scale, float, at_least=0.0)
    check_number("guidance_temperature", guidance.temperature, float, above=0.0)
    if guidance.rule not in GUIDANCE_RULES:
        raise ValueError(f"`guidance_rule` must be one of {GUIDANCE_RULES}, but is {guidance.rule!r}.")
    if guidance.schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"`guidance_schedule` must be one of {GUIDANCE_SCHEDULES}, but is {guidance.schedule!r}.")
    if not inverse and guidance != Guidance():
        name, value = next(item for item in vars(guidance).items() if item not in vars(Guidance()).items())
        raise ValueError(
            f"`guidance_{name}` is for `inverse=True`, but is {value!r} with `inverse=False`: guidance changes"
            " how latents become data, not the density of the data."
        )
    if not guidance.is_on:
        return
    if not is_conditional and guidance.temperature == 1.0:
        raise ValueError(
            f"`guidance_scale` is {guidance.scale} and `guidance_temperature` 1.0, but this model is unconditional and"
            " guides itself: at the same temperature its branches are the same. Set another `guidance_temperature`."
        )


def guidance_weights(guidance: Guidance, tokens: torch.Tensor) -> torch.Tensor:
    """
    Return the guidance weight `w` of each token, `(num_tokens, 1)`, in the block's own order; 0 is off.

    It is `scale - 1` for every token, or with the schedule `"linear"` grows to that from 0 at the first token.
    """
    num_tokens = tokens.shape[1]
    weight = tokens.new_full((num_tokens, 1), guidance.scale - 1.0)
    if guidance.schedule == "linear":
        weight = weight * torch.arange(num_tokens, device=weight.device).unsqueeze(1) / max(num_tokens - 1, 1)
    return weight


def apply_guidance(
    log_scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Combine the predictions of the conditional branch (`c`) and the weak branch (`u`) with weight `w` (0 is off).

        linear:  a = a_c + w (a_c - a_u),  m = m_c + w (m_c - m_u)
        product: p_c^(1+w) / p_u^w of the Gaussians N(m, exp(a)^2), clipped at sigma_c = sigma_u so that it stays a
                 density: with s = min(sigma_c / sigma_u, 1)^2 and q = 1 + w - w s,
                 sigma = sigma_c / sqrt(q),  m = ((1 + w) m_c - w s m_u) / q

    Args:
        log_scale, shift (`torch.Tensor` of shape `(batch_size, 2, num_tokens, token_dim)`):
            `a` and `m` of the conditional branch, then of the weak branch.
        weight (`torch.Tensor` of shape `(num_tokens, 1)`):
            `w >= 0` of each token: diffusers' `guidance_scale` minus 1.
        rule (`str`):
            `"linear"` (TARFlow, https://arxiv.org/abs/2412.06329) or `"product"` (STARFlow,
            https://arxiv.org/abs/2506.06276).
    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`: guided log-scale and shift.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf.models.transformer_tarflow import apply_guidance

        >>> log_scale = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)
        >>> log_scale, shift = apply_guidance(log_scale, 2 * log_scale, torch.ones(1, 1), "linear")
        >>> log_scale.item(), shift.item()
        (0.75, 1.5)
        ```
    """
    log_scale_c, log_scale_u = log_scale.unbind(dim=1)
    shift_c, shift_u = shift.unbind(dim=1)
    if rule == "linear":
        return log_scale_c + weight * (log_scale_c - log_scale_u), shift_c + weight * (shift_c - shift_u)
    # The formulas above without differences of large numbers: expm1 gives 1 - s, and m is m_c plus a change.
    log_variance_ratio = 2 * (log_scale_c - log_scale_u).clamp(max=0)
    precision_ratio = 1 - weight * torch.expm1(log_variance_ratio)
    pull = weight * torch.exp(log_variance_ratio) / precision_ratio
    return log_scale_c - 0.5 * torch.log(precision_ratio), shift_c + pull * (shift_c - shift_u)


def guide_prediction(
    block: "TarFlowBlock", tokens: torch.Tensor, log_scale: torch.Tensor, shift: torch.Tensor, guidance: Guidance
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guide the conditional log-scale and shift of all `tokens` at once, which are in the block's own order."""
    temperature = None
    if guidance.temperature != 1.0:
        temperature = tokens.new_full((1, 1, 1, 1), guidance.temperature)
    weak_log_scale, weak_shift, _ = block.predict(tokens, None, (), temperature)
    return apply_guidance(
        torch.stack([log_scale, weak_log_scale], dim=1),
        torch.stack([shift, weak_shift], dim=1),
        guidance_weights(guidance, tokens),
        guidance.rule,
    )


class InverseState(NamedTuple):
    """
    What the solvers of one block read and write. Local to a call, and in the block's own token order.

    A guided sample has two branches, the conditional one and then the weak one; an unguided sample has one. The
    network evaluates rows: the branches of the first sample, then those of the second, and so on.

    Args:
        latents, tokens, log_scale, shift (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`):
            `z`, and what is known so far of `u`, `a` and `m`. They must be contiguous: Inductor (torch 2.13) computed
            wrong values for tokens in another memory order.
        class_embedding (`torch.Tensor` of shape `(batch_size, branches, 1, width)`):
            Of every sample and branch.
        position_embedding (`torch.Tensor` of shape `(num_tokens, width)`, *optional*): `None` for rotary positions.
        rotary (`torch.Tensor` of shape `(2, num_tokens, head_dim / 2)`, *optional*): `None` for learned positions.
        temperature (`torch.Tensor` of shape `(batch_size, branches, 1, 1, 1)`, *optional*): `None` is 1.
        guidance_weight (`torch.Tensor` of shape `(num_tokens, 1)`, *optional*): `w` of each token; `None` is off.
        guidance_rule (`str`): As in [`apply_guidance`].
        key_value_caches (`tuple` of `torch.Tensor` of shape
            `(batch_size, branches, 2, heads, num_tokens, head_dim)`): One for each layer.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    log_scale: torch.Tensor
    shift: torch.Tensor
    class_embedding: torch.Tensor
    position_embedding: torch.Tensor | None
    rotary: torch.Tensor | None
    temperature: torch.Tensor | None
    guidance_weight: torch.Tensor | None
    guidance_rule: str
    key_value_caches: tuple[torch.Tensor, ...]

    @property
    def branches(self) -> int:
        return 1 if self.guidance_weight is None else 2

    def select(self, samples: slice) -> "InverseState":
        """Return the state of some of the samples. It shares this state's memory."""
        return self._replace(
            latents=self.latents[samples],
            tokens=self.tokens[samples],
            log_scale=self.log_scale[samples],
            shift=self.shift[samples],
            class_embedding=self.class_embedding[samples],
            temperature=None if self.temperature is None else self.temperature[samples],
            key_value_caches=tuple(cache[samples] for cache in self.key_value_caches),
        )

    def mark_batch_dynamic(self, *others: torch.Tensor):
        """
        Let one graph of a compiled step serve every batch size above 1.

        On a CPU this also makes Inductor use oneDNN for the products. For a fixed batch size it uses MKL, which takes
        twice as long on CPUs that are not Intel's.
        """
        batched = (self.latents, self.tokens, self.log_scale, self.shift, self.class_embedding, self.temperature)
        for values in (*batched, *self.key_value_caches, *others):
            if values is not None and len(values) > 1:
                torch._dynamo.maybe_mark_dynamic(values, 0)

    def swap_out(self, finished: int, last_active: int):
        """
        Swap a finished sample with the last active one.

        The active sample keeps its class embedding and its caches. Those of the finished sample are overwritten: it
        no longer needs them.
        """
        if finished == last_active:
            return
        for values in (self.latents, self.tokens, self.log_scale, self.shift):
            values[[finished, last_active]] = values[[last_active, finished]]
        for values in (self.class_embedding, *self.key_value_caches):
            values[finished] = values[last_active]


INITIAL_GUESSES = ("latents", "zeros")


@dataclass(frozen=True)
class SolverSettings:
    """
    How a block is inverted.

    Args:
        window_size (`int`, defaults to 0): Tokens in a Jacobi sweep; 0 is the sequential solver.
        initial_guess (`str`, defaults to `"latents"`):
            What the tokens are before the first sweep: `"latents"` or `"zeros"`.
        tolerance (`float`, defaults to 0.0): As in [`TarFlowTransformer2DModel.forward`].
        min_tokens_per_sweep (`float`, defaults to 0.0):
            If the first [`TRIAL_SWEEPS`] sweeps settle fewer tokens than this on average, the block is finished
            token by token. 0 never switches.
        max_sweeps (`int`, *optional*):
            Give up after so many sweeps: what has not settled stays a guess, and its sample counts as 0 sweeps.
    """

    window_size: int = 0
    initial_guess: str = "latents"
    tolerance: float = 0.0
    min_tokens_per_sweep: float = 0.0
    max_sweeps: int | None = None


def allocate_state(
    block: "TarFlowBlock",
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    guidance: Guidance,
    settings: SolverSettings,
) -> InverseState:
    """Create the state from which a solver starts: the first token is known, all others are a guess."""
    batch_size, num_tokens, _ = latents.shape
    branches = [class_labels, None] if guidance.is_on else [class_labels]
    class_embedding = torch.stack(
        [block.embed_classes(each, latents.device).expand(batch_size, -1, -1) for each in branches], 1
    )
    temperature = guidance_weight = None
    if guidance.is_on:
        guidance_weight = guidance_weights(guidance, latents)
        if guidance.temperature != 1.0:
            temperature = class_embedding.new_ones(batch_size, 2, 1, 1, 1)
            temperature[:, 1] = guidance.temperature
    latents = latents.clone(memory_format=torch.contiguous_format)
    tokens = torch.zeros_like(latents)
    if settings.window_size > 0 and settings.initial_guess == "latents":
        tokens = latents.clone()
    tokens[:, 0] = latents[:, 0]
    return InverseState(
        latents=latents,
        tokens=tokens,
        log_scale=torch.zeros_like(latents),
        shift=torch.zeros_like(latents),
        class_embedding=class_embedding,
        # Detached, so that it is not a parameter: to a compiled step a parameter is another type.
        position_embedding=None if block.pos_embed is None else block.position_embedding().detach(),
        rotary=block.rotary(latents.device),
        temperature=temperature,
        guidance_weight=guidance_weight,
        guidance_rule=guidance.rule,
        key_value_caches=allocate_key_value_caches(block, class_embedding, num_tokens),
    )


def allocate_key_value_caches(
    block: "TarFlowBlock", class_embedding: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, ...]:
    """Create caches of zeros in the dtype in which the layers compute keys and values."""
    device_type, dtype = class_embedding.device.type, class_embedding.dtype
    if torch.is_autocast_enabled(device_type) and dtype == torch.float32:  # autocast does not change float64
        dtype = torch.get_autocast_dtype(device_type)
    branches = class_embedding.shape[:2]
    shapes = [(*branches, 2, each.attn.heads, num_tokens, each.attn.head_dim) for each in block.layers]
    return tuple(class_embedding.new_zeros(shape, dtype=dtype) for shape in shapes)


def evaluate_window(
    block: "TarFlowBlock", state: InverseState, positions: torch.Tensor, cached_positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Evaluate the block's network once, on a window of tokens.

    Args:
        block ([`TarFlowBlock`]): The block to invert.
        state ([`InverseState`]): Keys and values of the window are written to its caches.
        positions (`torch.LongTensor` of shape `(batch_size or 1, window_size)`): The tokens of the window.
        cached_positions (`torch.LongTensor` of shape `(length,)`):
            The first positions, from 0 on, at least up to the last of `positions`: the tokens of the cache to attend
            to. A tensor, and not its length, so that a compiled step takes any length in one graph.
    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size, window_size, token_dim)`: guided log-scale and shift of
        the tokens that follow those of the window.
    """
    samples = torch.arange(len(state.tokens), device=positions.device).unsqueeze(1)
    tokens = state.tokens[samples, positions].to(block.dtype)
    row_positions = positions
    if state.branches == 2:
        tokens = tokens.repeat_interleave(2, dim=0)
        row_positions = positions if len(positions) == 1 else positions.repeat_interleave(2, dim=0)
    temperature = None if state.temperature is None else state.temperature.flatten(0, 1)
    hidden_states = block.proj_in(tokens) + state.class_embedding.flatten(0, 1)
    if state.position_embedding is not None:
        hidden_states = hidden_states + state.position_embedding[row_positions]
    rotary = None if state.rotary is None else state.rotary[:, row_positions]
    attention_mask = cached_positions <= row_positions[:, None, :, None]
    for layer, cache in zip(block.layers, state.key_value_caches):
        key_value_cache = KeyValueCache(cache.flatten(0, 1), row_positions, attention_mask)
        hidden_states = layer(hidden_states, rotary, temperature, key_value_cache=key_value_cache)
    log_scale, shift = block.proj_out(hidden_states).to(state.tokens.dtype).chunk(2, dim=-1)
    if state.branches == 2:
        weight = state.guidance_weight[positions + 1]
        log_scale, shift = log_scale.unflatten(0, (-1, 2)), shift.unflatten(0, (-1, 2))
        log_scale, shift = apply_guidance(log_scale, shift, weight, state.guidance_rule)
    return log_scale, shift


def attended_positions(block: "TarFlowBlock", length: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """
    Return the positions of the cache that a step attends to: those before `length`, and more where that is faster.

    CUDA replays a graph for each length, so there compiled steps get one of at most eight lengths. Elsewhere one graph
    takes any length; a length of 1 would get a graph of its own.
    """
    if not block.steps_are_compiled:
        return torch.arange(length, device=device)
    if device.type == "cuda":
        multiple = max(32, math.ceil(num_tokens / 8))
        return torch.arange(min(num_tokens, multiple * math.ceil(length / multiple)), device=device)
    positions = torch.arange(max(length, 2), device=device)
    torch._dynamo.maybe_mark_dynamic(positions, 0)
    return positions


def decode_token(block: "TarFlowBlock", state: InverseState, position: torch.Tensor, cached_positions: torch.Tensor):
    """
    Decode the token after `position`: one step of the sequential solver.

    Addresses are the same for every token, and no value is read back. So the step compiles into one graph, which a
    CUDA graph can replay.

    Args:
        block, state, cached_positions: As in [`evaluate_window`].
        position (`torch.LongTensor` of shape `(1, 1)`): The last decoded token of all samples. Increased by 1.
    """
    log_scale, shift = evaluate_window(block, state, position, cached_positions)
    next_position = position[0] + 1
    latents = state.latents.index_select(1, next_position)
    state.log_scale.index_copy_(1, next_position, log_scale)
    state.shift.index_copy_(1, next_position, shift)
    state.tokens.index_copy_(1, next_position, shift + torch.exp(log_scale) * latents)
    position += 1


# `torch.compile(model)` would unroll the solvers' loops over tokens. Only what a step does is compiled.
@torch.compiler.disable(recursive=False)
def run_sequential_solver(block: "TarFlowBlock", state: InverseState, last: int):
    """Decode the tokens after position `last` one by one. Each is exact to rounding."""
    num_tokens, device = state.tokens.shape[1], state.tokens.device
    if block.steps_are_compiled:
        state.mark_batch_dynamic()
    position = torch.full((1, 1), last, device=device)
    for length in range(last + 1, num_tokens):
        block.decode_token(block, state, position, attended_positions(block, length, num_tokens, device))


# A sweep leaves a value unchanged if it changes it by at most this share of the tolerance. The share is small because
# later tokens and flow blocks amplify the remaining error.
UNCHANGED_SHARE_OF_TOLERANCE = 0.01
# Rounding alone changes a value by a few units in its last place, so smaller changes count as none.
UNCHANGED_EPSILONS = 8


def sweep_window(
    block: "TarFlowBlock",
    state: InverseState,
    last: torch.Tensor,
    window_size: int,
    cached_positions: torch.Tensor,
    tolerance: float,
) -> torch.Tensor:
    """
    Sweep once over a window of each sample, `u <- m(u) + exp(a(u)) z`: one step of the Jacobi solver.

    Args:
        block, state, cached_positions: As in [`evaluate_window`].
        last (`torch.LongTensor` of shape `(batch_size,)`): The last settled token of each sample.
        window_size (`int`): Tokens in the window, which follows the last settled token where there are that many.
        tolerance (`float`): As in [`TarFlowTransformer2DModel.forward`].
    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: the last token that is settled now, at least one more than before.
    """
    num_tokens = state.tokens.shape[1]
    start = last.clamp(max=num_tokens - 1 - window_size)
    positions = start.unsqueeze(1) + torch.arange(window_size, device=last.device)
    next_positions = positions + 1
    samples = torch.arange(len(last), device=last.device).unsqueeze(1)
    log_scale, shift = evaluate_window(block, state, positions, cached_positions)
    old_tokens = state.tokens[samples, next_positions]
    tokens = shift + torch.exp(log_scale) * state.latents[samples, next_positions]

    is_unsettled = next_positions > last.unsqueeze(1)
    # The first unsettled token was computed from settled ones, so it is exact now, finite or not. A later token that
    # is not finite keeps its last finite value for the next sweep.
    is_first = next_positions == last.unsqueeze(1) + 1
    is_new = (is_unsettled & (tokens.isfinite().all(dim=2) | is_first)).unsqueeze(2)
    state.tokens[samples, next_positions] = torch.where(is_new, tokens, old_tokens)
    state.log_scale[samples, next_positions] = torch.where(is_new, log_scale, state.log_scale[samples, next_positions])
    state.shift[samples, next_positions] = torch.where(is_new, shift, state.shift[samples, next_positions])

    # Tokens are settled up to and including the first that has changed: it was computed from tokens that have not.
    # Those after it were computed from its old value.
    change = ((tokens - old_tokens).abs() / tokens.abs().clamp(min=1)).amax(dim=2)
    largest_change = tolerance and max(
        UNCHANGED_SHARE_OF_TOLERANCE * tolerance, UNCHANGED_EPSILONS * torch.finfo(tokens.dtype).eps
    )
    has_changed = is_unsettled & ~(change <= largest_change)  # NaN counts as changed
    return torch.where(has_changed, next_positions, num_tokens).amin(dim=1).minimum(next_positions[:, -1])


# After this many sweeps "auto" decides whether a block without a profile goes on token by token.
TRIAL_SWEEPS = 6
# A sweep of no more rows than this takes too little memory to be worth dividing.
MAX_UNDIVIDED_ROWS = 512


def max_samples_per_sweep(block: "TarFlowBlock", state: InverseState, window_size: int) -> int:
    """
    Return how many samples a sweep takes at a time.

    A row of a sweep has activations of about 14 widths, and a token's keys and values are 2 widths per layer. The
    limit keeps the activations below a fifth of the cache.
    """
    batch_size, num_tokens, _ = state.tokens.shape
    undivided = MAX_UNDIVIDED_ROWS // (window_size * state.branches)
    return max(1, undivided, batch_size * num_tokens * len(block.layers) // (35 * window_size))


@torch.compiler.disable(recursive=False)
def run_jacobi_solver(
    block: "TarFlowBlock", state: InverseState, settings: SolverSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sweep over a window of each sample until all of its tokens are settled: Jacobi in a window, Gauss-Seidel between
    windows.

    The window of a sample moves past the tokens that a sweep has settled. Their keys and values stay in the cache. A
    sweep settles at least one token, so `num_tokens - 1` sweeps suffice.

    Returns:
        `tuple` of two `torch.LongTensor` of shape `(batch_size,)`: the row of `state` that holds each sample, and the
        sweeps of each sample, 0 for those that were given up.
    """
    batch_size, num_tokens, _ = state.tokens.shape
    device = state.tokens.device
    window_size = min(settings.window_size, num_tokens - 1)
    max_samples = max_samples_per_sweep(block, state, window_size)
    # Active samples are kept in the first rows, so that selecting them copies nothing.
    order = list(range(batch_size))  # the sample in each row
    settled = [0] * batch_size  # the last settled token of each row
    sweeps = [0] * batch_size  # of each sample
    num_active, num_sweeps = batch_size, 0
    while num_active > 0:
        length = min(max(settled[:num_active]) + window_size, num_tokens)
        cached_positions = attended_positions(block, length, num_tokens, device)
        for start in range(0, num_active, max_samples):
            rows = slice(start, min(start + max_samples, num_active))
            last = torch.tensor(settled[rows], device=device)
            selected = state.select(rows)
            if block.steps_are_compiled:
                selected.mark_batch_dynamic(last)
            last = block.sweep_window(block, selected, last, window_size, cached_positions, settings.tolerance)
            settled[rows] = last.tolist()
        num_sweeps += 1
        for row in reversed(range(num_active)):
            if settled[row] == num_tokens - 1:
                sweeps[order[row]] = num_sweeps
                num_active -= 1
                state.swap_out(row, num_active)
                for each in (order, settled):
                    each[row], each[num_active] = each[num_active], each[row]
        if num_sweeps == settings.max_sweeps:
            break
        tokens_per_sweep = sum(settled) / (num_sweeps * batch_size)
        if num_sweeps == TRIAL_SWEEPS and num_active > 0 and tokens_per_sweep < settings.min_tokens_per_sweep:
            slowest = min(settled[:num_active])
            run_sequential_solver(block, state.select(slice(num_active)), slowest)
            for sample in order[:num_active]:
                sweeps[sample] = num_sweeps + num_tokens - 1 - slowest
            break
    return torch.tensor(order, device=device).argsort(), torch.tensor(sweeps)


@torch.no_grad()
def invert_block(
    block: "TarFlowBlock",
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    guidance: Guidance,
    settings: SolverSettings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return data, log-scale and shift, each in the block's own order, and the sweeps of each sample."""
    batch_size, num_tokens, _ = latents.shape
    state = allocate_state(block, latents, class_labels, guidance, settings)
    if settings.window_size == 0 or num_tokens == 1:
        run_sequential_solver(block, state, 0)
        return state.tokens, state.log_scale, state.shift, torch.full((batch_size,), num_tokens - 1)
    rows, sweeps = run_jacobi_solver(block, state, settings)
    return state.tokens[rows], state.log_scale[rows], state.shift[rows], sweeps


SOLVERS = ("auto", "sequential", "jacobi")
DEFAULT_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


class StepCosts(NamedTuple):
    """
    The time that a solver's steps take. One unit is one more row in a sweep: a token of one branch of one sample.

    Args:
        token (`float`): Fixed time of decoding a token: reading the weights, launching kernels.
        token_row (`float`):
            Time of one more row when decoding a token. It exceeds 1 because a row reads the cache for itself, where
            the rows of a sweep's window share that.
        sweep (`float`): Fixed time of a sweep.
    """

    token: float
    token_row: float
    sweep: float


# By device type, and by whether the steps are compiled. The CPU's times are measured. CUDA's are estimated from how
# many operations it does in the time in which it reads a byte.
STEP_COSTS = {
    "cpu": {False: StepCosts(18, 2.2, 37), True: StepCosts(6, 2.2, 20)},
    "cuda": {False: StepCosts(2048, 10, 3072), True: StepCosts(512, 10, 768)},
}
# "auto" sweeps only if it expects to save a quarter of the time, because the costs are estimates.
MIN_JACOBI_SAVING = 0.25


def check_solver(
    solver: str,
    tolerance: float | None,
    window_size: int | None,
    output_report: bool,
    inverse: bool,
    num_tokens: int,
):
    """Raise ValueError for values out of range, and for solver arguments of the forward pass."""
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {SOLVERS}, but is {solver!r}.")
    if tolerance is not None:
        check_number("tolerance", tolerance, float, at_least=0.0)
    if window_size is not None:
        check_number("window_size", window_size, int, at_least=1, at_most=num_tokens)
    if window_size is not None and solver == "sequential":
        raise ValueError(
            "`window_size` needs `solver='jacobi'` or `'auto'`, but `solver` is 'sequential' and `window_size` is"
            f" {window_size}."
        )
    if not inverse and (solver, tolerance, window_size, output_report) != ("auto", None, None, False):
        raise ValueError(
            "`solver`, `tolerance`, `window_size` and `output_report` need `inverse=True`, but `inverse` is False."
        )


class BlockProfile(NamedTuple):
    """
    What was measured for one block.

    Args:
        initial_guess (`str`): The better one.
        sweeps (`dict` of `int` to `float`):
            Mean sweeps of a sample, by window size; infinite where they were too many to win.
    """

    initial_guess: str
    sweeps: dict[int, float]


def profile_of_block(profile: dict[str, Any] | None, number: int, device_type: str) -> BlockProfile | None:
    """
    Return what `inverse_profile` says of block `number`, counted from 1, to a device.

    It says nothing if no window size won on the device that measured and the flow is on a device of another type.
    """
    if profile is None:
        return None
    sweeps = {
        size: math.inf if sweeps is None else sweeps
        for size, sweeps in zip(profile["window_sizes"], profile["sweeps"][number - 1])
    }
    if min(sweeps.values()) == math.inf and profile.get("device_type", device_type) != device_type:
        return None
    return BlockProfile(profile["initial_guesses"][number - 1], sweeps)


def choose_settings(
    block: "TarFlowBlock",
    profile: BlockProfile | None,
    latents: torch.Tensor,
    guidance: Guidance,
    solver: str,
    tolerance: float | None,
    window_size: int | None,
) -> SolverSettings:
    """
    Choose how to invert a block.

    `"auto"` compares the expected times of both solvers. With a profile it knows how many sweeps a window size needs.
    Without one it starts with sweeps if that can pay, and sets `min_tokens_per_sweep`.

    Args:
        block ([`TarFlowBlock`]): The block to invert.
        profile ([`BlockProfile`], *optional*): Of this block.
        latents (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`): Their shape, dtype and device matter.
        guidance ([`Guidance`]): Whether it is on matters.
        solver, tolerance, window_size: As in [`TarFlowTransformer2DModel.forward`].
    """
    settings = SolverSettings(tolerance=DEFAULT_TOLERANCES[latents.dtype] if tolerance is None else tolerance)
    num_steps = latents.shape[1] - 1
    if solver == "sequential" or num_steps < 2:
        return settings
    rows = len(latents) * guidance.num_branches
    costs = STEP_COSTS.get(latents.device.type, STEP_COSTS["cpu"])[block.steps_are_compiled]
    token_cost = costs.token + rows * costs.token_row

    if profile is not None:
        settings = replace(settings, initial_guess=profile.initial_guess)
    if profile is not None and window_size is None:
        block_costs = {size: sweeps * (costs.sweep + size * rows) for size, sweeps in profile.sweeps.items()}
        best = min(block_costs, key=block_costs.get)
        pays = block_costs[best] <= (1 - MIN_JACOBI_SAVING) * num_steps * token_cost
        if pays or (solver == "jacobi" and block_costs[best] < math.inf):
            return replace(settings, window_size=best)
        if solver == "auto":
            return settings

    if window_size is None:
        window_size = max(4, 2 ** round(math.log2(max(costs.sweep / rows, 1))))
    settings = replace(settings, window_size=min(window_size, num_steps))
    if solver == "jacobi":
        return settings
    # A sweep has to settle as many tokens as are decoded in the time it takes. At best it settles half of its window:
    # if that is too few, there is nothing to try.
    min_tokens = (costs.sweep + settings.window_size * rows) / token_cost / (1 - MIN_JACOBI_SAVING)
    tries = min_tokens <= settings.window_size / 2
    return replace(settings, min_tokens_per_sweep=min_tokens) if tries else replace(settings, window_size=0)


@dataclass
class TarFlowInverseReport:
    """
    How an inverse was found, and how exact it is.

    Args:
        solvers (`dict` of block to `str`):
            The solver that each block started with, `"sequential"` or `"jacobi"`. Without a profile, `"auto"` may
            switch from Jacobi sweeps to single tokens within a block.
        sweeps (`dict` of block to `torch.LongTensor` of shape `(batch_size,)`):
            Network evaluations of each sample; the two branches of guidance count as one. The sequential solver takes
            `num_tokens - 1`.
        network_evaluations (`dict` of block to `int`): Network evaluations of the batch: the largest of `sweeps`.
        residual (`torch.Tensor` of shape `(batch_size,)`):
            The largest `|f(x) - z|` of each sample, where `x` is the returned data, `z` the given latents and `f` the
            flow with the same guidance. It is measured in one forward pass after the inversion. It is not finite for
            a sample that overflowed.
    """

    solvers: dict[int, str]
    sweeps: dict[int, torch.Tensor]
    network_evaluations: dict[int, int]
    residual: torch.Tensor


def invert_flow(
    blocks: dict[int, "TarFlowBlock"],
    settings: dict[int, SolverSettings],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    guidance: Guidance,
    output_report: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], TarFlowInverseReport | None]:
    """
    Invert flow blocks, from the last to the first.

    Args:
        blocks (`dict` of `int` to [`TarFlowBlock`]): The blocks by number, ascending.
        settings (`dict` of `int` to [`SolverSettings`]): Of each block.
        latents (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`): In raster order.
        class_labels, output_report: As in [`TarFlowTransformer2DModel.forward`].
        guidance ([`Guidance`]): Of all blocks.
    Returns:
        `tuple`: data, shaped as `latents`; for every block, each token's part of `log |det d data / d latents|`, of
        shape `(batch_size, num_tokens)`, in nats; and the report, if it was asked for.
    """
    tokens, token_log_abs_dets, sweeps = latents, [], {}
    for number, block in reversed(blocks.items()):
        output = block(tokens, class_labels, inverse=True, guidance=guidance, settings=settings[number])
        tokens, sweeps[number] = output.tokens, output.sweeps
        token_log_abs_dets.append(output.log_scale.sum(dim=2))
    if not output_report:
        return tokens, token_log_abs_dets, None
    report = TarFlowInverseReport(
        solvers={number: "jacobi" if settings[number].window_size else "sequential" for number in sweeps},
        sweeps=sweeps,
        network_evaluations={number: max(each.tolist(), default=0) for number, each in sweeps.items()},
        residual=measure_residual(blocks.values(), tokens, latents, class_labels, guidance),
    )
    return tokens, token_log_abs_dets, report


@torch.no_grad()
def measure_residual(
    blocks: Iterable["TarFlowBlock"],
    data: torch.Tensor,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    guidance: Guidance,
) -> torch.Tensor:
    """Return the largest `|f(data) - latents|` of each sample, `(batch_size,)`, where `f` is the guided flow."""
    tokens = data
    for block in blocks:
        tokens = block(tokens, class_labels, guidance=guidance).tokens
    return (tokens - latents).abs().amax(dim=(1, 2))


PROFILE_WINDOW_SIZES = (4, 16, 64, 256)


def max_sweeps_to_win(device_type: str, num_branches: int, num_steps: int, window_size: int) -> int:
    """
    Return how many sweeps `"auto"` may take for a block, at the batch size and in the mode that allow the most.

    It is at least 1, because a solver sweeps at least once.
    """
    sweeps_a_step = []
    for costs in STEP_COSTS.get(device_type, STEP_COSTS["cpu"]).values():
        # How much more a sweep costs than a token changes in one direction from one sample to infinitely many.
        token, sweep = costs.token + num_branches * costs.token_row, costs.sweep + num_branches * window_size
        sweeps_a_step += [token / sweep, costs.token_row / window_size]
    return max(1, min(math.floor((1 - MIN_JACOBI_SAVING) * num_steps * max(sweeps_a_step)), num_steps))


@torch.no_grad()
def measure_block_sweeps(
    block: "TarFlowBlock",
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    guidance: Guidance,
    settings: SolverSettings,
) -> float | None:
    """
    Return the mean sweeps of a sample, or `None` if one takes more than `settings.max_sweeps`.

    The first sample goes ahead: mostly it shows whether the others need to follow.
    """
    for samples in (slice(1), slice(None)):
        labels = None if class_labels is None else class_labels[samples]
        sweeps = block(latents[samples], labels, inverse=True, guidance=guidance, settings=settings).sweeps
        if not sweeps.all():
            return None
    return sweeps.float().mean().item()


def measure_sweeps(
    blocks: Iterable["TarFlowBlock"],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    guidance: Guidance,
    tolerance: float,
) -> dict[str, list]:
    """
    Invert each block with every window size and initial guess, and count the sweeps.

    Args:
        blocks (iterable of [`TarFlowBlock`]): All blocks, from the image side.
        latents (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`): In raster order.
        class_labels, tolerance: As in [`TarFlowTransformer2DModel.forward`].
        guidance ([`Guidance`]): Of all blocks.
    Returns:
        `dict`: `window_sizes`; and from block 1 on, `initial_guesses`, the better one of each block, and `sweeps`, its
        mean sweeps for each window size, or `None` where they cannot win on this device.
    """
    num_steps = max(latents.shape[1] - 1, 1)
    window_sizes = sorted({min(size, num_steps) for size in PROFILE_WINDOW_SIZES})
    limits = [max_sweeps_to_win(latents.device.type, guidance.num_branches, num_steps, size) for size in window_sizes]
    tokens, initial_guesses, all_sweeps = latents, [], []
    for block in logging.tqdm(list(reversed(list(blocks))), desc="Profiling the inverse"):
        sweeps = {
            initial_guess: [
                measure_block_sweeps(
                    block,
                    tokens,
                    class_labels,
                    guidance,
                    SolverSettings(size, initial_guess, tolerance, max_sweeps=limit),
                )
                for size, limit in zip(window_sizes, limits)
            ]
            for initial_guess in INITIAL_GUESSES
        }
        best = min(
            INITIAL_GUESSES, key=lambda guess: sum(num_steps if each is None else each for each in sweeps[guess])
        )
        initial_guesses.insert(0, best)
        all_sweeps.insert(0, sweeps[best])
        tokens = block(tokens, class_labels, inverse=True, guidance=guidance).tokens
    return {"window_sizes": window_sizes, "initial_guesses": initial_guesses, "sweeps": all_sweeps}


def check_inverse_profile(profile: dict[str, Any] | None, num_tokens: int, num_layers: list[int]):
    """Raise ValueError if a profile was measured on another architecture."""
    if profile is None:
        return
    found = (profile.get("num_tokens"), profile.get("num_layers"))
    if found != (num_tokens, num_layers):
        raise ValueError(
            f"`inverse_profile` must be of this architecture, {num_tokens} tokens and {num_layers} layers in the"
            f" blocks, but is of {found[0]} tokens and {found[1]} layers. Measure one with `profile_inverse`, or leave"
            " it out."
        )


# Block


class TarFlowBlockOutput(NamedTuple):
    """
    The output of [`TarFlowBlock`]. All tensors but `sweeps` are in raster order.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`): Latents, or with `inverse=True` data.
        log_scale, shift (`torch.Tensor` of the shape of `tokens`): `a` and `m`; zero at the first token.
        hidden_states (`dict` of layer to `torch.Tensor` of shape `(batch_size, num_tokens, width)`):
            The requested ones. Empty with `inverse=True`.
        sweeps (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Network evaluations of each sample, on the CPU. Only with `inverse=True`.
    """

    tokens: torch.Tensor
    log_scale: torch.Tensor
    shift: torch.Tensor
    hidden_states: dict[int, torch.Tensor]
    sweeps: torch.Tensor | None


class TarFlowBlock(nn.Module):
    r"""
    One flow step: an affine autoregressive map over the tokens of an image, invertible in closed form.

    With input `u` in the block's own token order, `a_i` and `m_i` functions of the tokens before `i`, `a_0 = m_0 = 0`:

        z_i = (u_i - m_i(u_<i)) exp(-a_i(u_<i))        log |det dz/du| = -sum a        (data to latents, parallel)
        u_i = m_i(u_<i) + exp(a_i(u_<i)) z_i                                           (latents to data, sequential)

    Inputs and outputs are in raster order, whatever the block's own order is.

    Args:
        grid_size (`int`): Height and width of the token grid.
        token_dim (`int`): Values in a token.
        num_layers, num_attention_heads, attention_head_dim, mlp_ratio, activation_fn, position_embedding, num_classes:
            As in [`TarFlowTransformer2DModel`].
        reverse_order (`bool`): Whether the block's own order is the reverse of the raster order.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf.models.transformer_tarflow import TarFlowBlock

        >>> block = TarFlowBlock(
        ...     grid_size=4, token_dim=3, num_layers=2, num_attention_heads=2, attention_head_dim=16, mlp_ratio=4.0,
        ...     activation_fn="gelu", position_embedding="learned", num_classes=10, reverse_order=False,
        ... )
        >>> output = block(torch.randn(2, 16, 3), torch.tensor([3, 1]), output_hidden_states=[2])
        >>> output.tokens.shape, output.hidden_states[2].shape
        (torch.Size([2, 16, 3]), torch.Size([2, 16, 32]))
        ```

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, 2024, https://arxiv.org/abs/2412.06329
    """

    gradient_checkpointing = False

    def __init__(
        self,
        grid_size: int,
        token_dim: int,
        num_layers: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        activation_fn: str,
        position_embedding: str,
        num_classes: int | None,
        reverse_order: bool,
    ):
        super().__init__()
        self.grid_size = grid_size
        self.attention_head_dim = attention_head_dim
        self.reverse_order = reverse_order
        self.width = width = num_attention_heads * attention_head_dim
        self.proj_in = TarFlowLinear(token_dim, width)
        self.pos_embed = None
        if position_embedding == "learned":
            self.pos_embed = nn.Parameter(0.01 * torch.randn(grid_size**2, width))  # in raster order
        self.class_embed = None if num_classes is None else nn.Parameter(0.01 * torch.randn(num_classes, width))
        self.layers = nn.ModuleList(
            TarFlowLayer(num_attention_heads, attention_head_dim, mlp_ratio, activation_fn) for _ in range(num_layers)
        )
        self.proj_out = TarFlowOutputProjection(width, 2 * token_dim)
        self.decode_token = decode_token
        self.sweep_window = sweep_window
        self.steps_are_compiled = False

    def compile_steps(self, *args, **kwargs):
        """Compile the steps that the solvers repeat, each as a whole. Takes the arguments of `torch.compile`."""
        self.decode_token = torch.compile(decode_token, *args, **kwargs)
        self.sweep_window = torch.compile(sweep_window, *args, **kwargs)
        self.steps_are_compiled = True

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without compiled functions, as a copied module starts without its compiled forward.
        steps = {"decode_token": decode_token, "sweep_window": sweep_window, "steps_are_compiled": False}
        return super().__getstate__() | steps

    def forward(
        self,
        tokens: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        output_hidden_states: Collection[int] = (),
        inverse: bool = False,
        guidance: Guidance = Guidance(),
        settings: SolverSettings = SolverSettings(),
    ) -> TarFlowBlockOutput:
        """
        Map the block's input to its latents in one parallel pass or, with `inverse=True`, latents to data.

        Args:
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`):
                The block's input; with `inverse=True` its latents.
            class_labels: As in [`TarFlowTransformer2DModel.forward`].
            output_hidden_states (collection of `int`):
                Layers, numbered from 1, whose hidden states are returned. Ignored with `inverse=True`.
            inverse (`bool`, defaults to `False`): Map latents to data. No gradient flows through it.
            guidance ([`Guidance`]): Of the inverse. Without `inverse`, the map is the one whose inverse is guided so.
            settings ([`SolverSettings`]): How to invert. Ignored without `inverse`.
        Returns:
            [`TarFlowBlockOutput`].
        """
        tokens = self._permute(tokens)
        hidden_states, sweeps = {}, None
        if inverse:
            tokens, log_scale, shift, sweeps = invert_block(self, tokens, class_labels, guidance, settings)
        else:
            log_scale, shift, hidden_states = self.predict(tokens, class_labels, output_hidden_states)
            if guidance.is_on:
                log_scale, shift = guide_prediction(self, tokens, log_scale, shift, guidance)
            tokens = (tokens - shift) * torch.exp(-log_scale)
            hidden_states = {layer: self._permute(states) for layer, states in hidden_states.items()}
        return TarFlowBlockOutput(
            self._permute(tokens), self._permute(log_scale), self._permute(shift), hidden_states, sweeps
        )

    def _permute(self, tokens: torch.Tensor) -> torch.Tensor:
        """Change from raster order to the block's own order, or back: reversal is its own inverse."""
        return tokens.flip(-2) if self.reverse_order else tokens

    @property
    def dtype(self) -> torch.dtype:
        """
        The dtype of hidden states.

        It is that of a normalization's weight: quantization and layerwise casting change the weights of products only.
        """
        return self.layers[0].norm1.weight.dtype

    # The methods below serve `forward` and the solvers. Nothing else may call them: hooks wrap `__call__` only.

    def rotary(self, device: torch.device) -> torch.Tensor | None:
        """Return the [`rotary_embedding`] in the block's own order, or `None` if positions are learned."""
        if self.pos_embed is not None:
            return None
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self._permute(rotary_embedding(self.grid_size, self.attention_head_dim, device, dtype))

    def position_embedding(self) -> torch.Tensor | None:
        """Return `(num_tokens, width)` in the block's own order, or `None` if positions are rotary."""
        return None if self.pos_embed is None else self._permute(self.pos_embed)

    def embed_classes(self, class_labels: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Return `(1 or batch_size, 1, width)`: the mean of the table for no class, zeros without a table."""
        if self.class_embed is None:
            return torch.zeros(1, 1, self.width, device=device, dtype=self.dtype)
        return embed_classes(self.class_embed, class_labels).to(self.dtype).unsqueeze(1)

    def predict(
        self,
        tokens: torch.Tensor,
        class_labels: torch.Tensor | None,
        output_hidden_states: Collection[int],
        temperature: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """
        Predict log-scale and shift of every token in one pass, each from the tokens before it.

        Returns:
            `tuple`: log-scale, shift and the requested hidden states by layer, all in the block's own order.
        """
        conditioning = self.embed_classes(class_labels, tokens.device)
        if self.pos_embed is not None:
            conditioning = self.position_embedding() + conditioning
        hidden_states = self.proj_in(tokens.to(self.dtype)) + conditioning
        rotary = self.rotary(tokens.device)
        collected = {}
        for number, layer in enumerate(self.layers, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, rotary, temperature)
            else:
                hidden_states = layer(hidden_states, rotary, temperature)
            if number in output_hidden_states:
                collected[number] = hidden_states
        # The output at token i predicts token i + 1, so outputs are shifted right by one. The first token gets zeros.
        prediction = F.pad(self.proj_out(hidden_states)[:, :-1], (0, 0, 1, 0)).to(tokens.dtype)
        log_scale, shift = prediction.chunk(2, dim=-1)
        return log_scale, shift, collected


# Model


@dataclass
class TarFlowOutput(BaseOutput):
    """
    The output of [`TarFlowTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
            Latents, or with `inverse=True` data. float32, or float64 for a float64 model or sample.
        log_abs_det (`torch.Tensor` of shape `(batch_size,)`):
            `log |det d output / d input|` of the map that was applied, in nats, summed over all dimensions.
        hidden_states (`dict` of `(block, layer)` to `torch.Tensor` of shape `(batch_size, num_tokens, width)`):
            The hidden states that `output_hidden_states` asked for, in raster order. `None` if it asked for none.
        report ([`TarFlowInverseReport`]): How the inverse was found. `None` without `output_report`.
        token_log_abs_det (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            The part of `log_abs_det` that each token contributes, in raster order: the sum of its log-scales in all
            blocks that ran, with a minus sign unless `inverse`. `None` without `output_token_log_abs_det`.
    """

    # Accelerate rebuilds outputs under mixed precision and needs defaults for that.
    sample: torch.Tensor | None = None
    log_abs_det: torch.Tensor | None = None
    hidden_states: dict[tuple[int, int], torch.Tensor] | None = None
    report: TarFlowInverseReport | None = None
    token_log_abs_det: torch.Tensor | None = None


def check_loaded_flow(model: "TarFlowTransformer2DModel", loading_info: dict[str, list], path: str | os.PathLike):
    """Raise ValueError if a configuration is incomplete, or if its model and the loaded weights differ in names."""
    left_out = sorted(set(model.config.get("_use_default_values", ())) - {"inverse_profile"})
    if left_out:
        raise ValueError(
            f"The configuration in {str(path)!r} leaves out {left_out}, without which the flow is unknown. Restore the"
            " `config.json` that was saved with the weights, or give the values as arguments."
        )
    # A quantized model names its weights otherwise, and what they are quantized by beside them.
    kinds = ("missing_keys",) if model.config.get("quantization_config") else ("missing_keys", "unexpected_keys")
    names = {kind: sorted(loading_info[kind]) for kind in kinds}
    if any(names.values()):
        found = [
            f"{len(keys)} are {kind.partition('_')[0]} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for kind, keys in names.items()
            if keys
        ]
        raise ValueError(
            f"The weights in {str(path)!r} do not fit their configuration: {' and '.join(found)}. Restore the"
            " `config.json` that was saved with the weights."
        )


class TarFlowTransformer2DModel(ModelMixin, AttentionMixin, PeftAdapterMixin, ConfigMixin):
    r"""
    TARFlow: a normalizing flow of images made of autoregressive transformer blocks.

    An image (or a VAE latent) is cut into `(sample_size / patch_size)^2` tokens in raster order. Flow blocks follow
    one another: block 1 is next to the image, the last block next to the noise. Every second block sees the tokens in
    reverse order. An untrained flow is the identity.

    Args:
        sample_size (`int`, defaults to 64): Height and width of the square sample: pixels of an image, cells of a
            latent.
        patch_size (`int`, defaults to 4): Height and width of a token. It must divide `sample_size`.
        in_channels (`int`, defaults to 3): 3 for RGB images, 4 for the latents of Stable Diffusion's VAE.
        num_blocks (`int`, defaults to 8): Number of flow blocks.
        num_layers (`int` or `list[int]`, defaults to 8):
            Transformer layers in every block, or a list with the number for each block, from the image side.
        num_attention_heads (`int`, defaults to 16), attention_head_dim (`int`, defaults to 64):
            Their product is the width.
        mlp_ratio (`float`, defaults to 4.0): Hidden width of the feed-forward layers, relative to the width.
        activation_fn (`str`, defaults to `"gelu"`):
            Activation of the feed-forward layers: `"gelu"` or `"swiglu"`. The hidden width of `"swiglu"` is
            `2/3 * mlp_ratio * width`, rounded up to a multiple of 64. That gives about as many parameters.
        position_embedding (`str`, defaults to `"learned"`):
            `"learned"` is a table in every block. `"rope"` rotates queries and keys by the token's row (the first half
            of each head) and column (the second half), whatever the block's order. It needs an `attention_head_dim`
            that is a multiple of 4.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes. `None` makes an unconditional model.
        noise_std (`float`, defaults to 0.05):
            sigma of the noise that the model is trained with, in units of the sample (images are in [-1, 1]).
            [`FlowBackPipeline`] removes this noise after sampling.
        noise_type (`str`, defaults to `"gaussian"`):
            `"gaussian"`, or `"uniform"` for density models. Their samples are never denoised.
        inverse_profile (`dict`, *optional*):
            The result of [`~TarFlowTransformer2DModel.profile_inverse`]. `solver="auto"` chooses by it. It is ignored
            while adapters are attached, and `fuse_lora` removes it: it was measured with other weights.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf import TarFlowTransformer2DModel

        >>> model = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, in_channels=1, num_blocks=2, num_layers=2, num_attention_heads=2,
        ...     attention_head_dim=16, num_classes=10,
        ... )
        >>> images = torch.rand(4, 1, 8, 8) * 2 - 1
        >>> latents = model(images, torch.tensor([3, 1, 4, 1])).sample
        >>> restored = model(latents, torch.tensor([3, 1, 4, 1]), inverse=True).sample
        >>> torch.allclose(images, restored)
        True
        ```

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, 2024, https://arxiv.org/abs/2412.06329
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["TarFlowLayer"]
    _no_split_modules = ["TarFlowBlock"]
    _skip_keys = ["key_value_cache"]  # offloading must not move or copy what a layer writes to
    _skip_layerwise_casting_patterns = ["proj_in", "proj_out", "pos_embed", "class_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        patch_size: int = 4,
        in_channels: int = 3,
        num_blocks: int = 8,
        num_layers: int | list[int] = 8,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        activation_fn: str = "gelu",
        position_embedding: str = "learned",
        num_classes: int | None = 1000,
        noise_std: float = 0.05,
        noise_type: str = "gaussian",
        inverse_profile: dict[str, Any] | None = None,
    ):
        super().__init__()
        layers_per_block = self._check_config()
        check_inverse_profile(inverse_profile, (sample_size // patch_size) ** 2, layers_per_block)
        self.blocks = nn.ModuleList(
            TarFlowBlock(
                grid_size=sample_size // patch_size,
                token_dim=in_channels * patch_size**2,
                num_layers=layers,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                mlp_ratio=mlp_ratio,
                activation_fn=activation_fn,
                position_embedding=position_embedding,
                num_classes=num_classes,
                reverse_order=index % 2 == 1,
            )
            for index, layers in enumerate(layers_per_block)
        )
        # With streams, diffusers' group offloading of blocks waits for copies only if there is a module beside them.
        self.beside_blocks = nn.Identity()
        self.gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Load a saved flow. Weights that do not fit the configuration are refused: their flow would be another one.

        Args:
            pretrained_model_name_or_path (`str`): A folder that holds a saved flow, or a repository's id on the Hub.
            kwargs: Arguments of [`~diffusers.ModelMixin.from_pretrained`], such as `dtype` and `subfolder`.
        Returns:
            [`TarFlowTransformer2DModel`]: the flow, in evaluation mode.
        Raises:
            ValueError: if weights are missing or left over, or if the configuration leaves an argument out. The
                message names them.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        check_loaded_flow(model, loading_info, pretrained_model_name_or_path)
        return (model, loading_info) if output_loading_info else model

    def patchify(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Cut samples into tokens.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): Data or latents.
        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`: tokens in raster order, whose values are
            ordered by channel, row and column. float32, or float64 for a float64 model or sample.
        Raises:
            ValueError: if `sample` has another shape or is empty.
        """
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if sample.ndim != 4 or tuple(sample.shape[1:]) != expected:
            raise ValueError(
                f"`sample` must have shape (batch_size, {expected[0]}, {expected[1]}, {expected[2]}), as in this"
                f" model's config, but has shape {tuple(sample.shape)}. Resize images first; a latent model takes what"
                " its VAE's encoder returns."
            )
        if len(sample) == 0:
            raise ValueError(f"`sample` must hold at least one sample, but has shape {tuple(sample.shape)}.")
        # Densities need float32, whatever the dtype of the weights.
        dtype = torch.promote_types(torch.promote_types(sample.dtype, self.blocks[0].dtype), torch.float32)
        return F.pixel_unshuffle(sample.to(dtype), config.patch_size).flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Join tokens into samples: the inverse of [`~TarFlowTransformer2DModel.patchify`]."""
        grid_size = self.config.sample_size // self.config.patch_size
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (grid_size, grid_size)), self.config.patch_size)

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        output_hidden_states: Iterable[tuple[int, int]] | None = None,
        blocks: Iterable[int] | None = None,
        inverse: bool = False,
        guidance_scale: float = 1.0,
        guidance_rule: str = "linear",
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        solver: str = "auto",
        tolerance: float | None = None,
        window_size: int | None = None,
        output_report: bool = False,
        output_token_log_abs_det: bool = False,
        return_dict: bool = True,
    ) -> TarFlowOutput | tuple:
        r"""
        Map data to latents in one parallel pass or, with `inverse=True`, latents to data.

        To invert a flow block is to find the one `u` with `u = m(u) + exp(a(u)) z`. The solver `"sequential"` computes
        its tokens one after another. `"jacobi"` computes a window of tokens at once, each from the previous values of
        the tokens before it, and repeats this. After `k` of these sweeps the first `k` tokens are exact, and so are
        further ones that no longer change. The window then moves past them. `"auto"` uses the solver that it expects
        to be faster for each block.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                Images in [-1, 1], or VAE latents already multiplied by the VAE's `scaling_factor`. With
                `inverse=True`, the flow's latents.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Class indices. -1 is no class, as is `None` for the whole batch: it uses the mean of the class table.
                A float tensor of shape `(batch_size, num_classes)` holds class weights instead and receives gradients.
            output_hidden_states (iterable of `(block, layer)`, *optional*):
                Places whose hidden states are returned. Blocks and layers are numbered from 1, blocks from the image
                side. Not with `inverse=True`.
            blocks (iterable of `int`, *optional*):
                The flow blocks to apply, numbered from 1. They run in the flow's order, ascending or with
                `inverse=True` descending. Default: all.
            inverse (`bool`, defaults to `False`): Map latents to data. No gradient flows through it.
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance as in diffusers: 1.0 and less is off. All arguments from here to
                `output_report` need `inverse=True`.
            guidance_rule (`str`, defaults to `"linear"`): `"linear"` or `"product"`, see [`apply_guidance`].
            guidance_schedule (`str`, defaults to `"constant"`):
                `"constant"`, or `"linear"`: guidance grows from nothing at the first token of the block's own order to
                `guidance_scale` at the last.
            guidance_temperature (`float`, defaults to 1.0):
                Divides the attention logits of the weak branch. An unconditional model is guided by this difference.
            solver (`str`, defaults to `"auto"`):
                `"sequential"`: exact to rounding, with `num_tokens - 1` network evaluations a block. `"jacobi"`: exact
                to `tolerance`, with at most as many evaluations, each of a whole window. `"auto"`: chooses by batch
                size, device, number of tokens and the config's `inverse_profile`. Without a profile it tries sweeps
                where they can pay, and continues token by token if the first ones settle too few tokens.
            tolerance (`float`, *optional*):
                A sweep leaves a value `u` unchanged if it changes it by at most `0.01 * tolerance * max(1, |u|)`. It
                settles the tokens up to and including the first that changed. Default: 1e-5 in float32, 1e-10 in
                float64. On trained flows the sample is then within `tolerance` of the sequential one. This is not
                guaranteed: later tokens and blocks multiply remaining errors and rounding, without bound if the flow
                is ill-conditioned. 0 is guaranteed: then a sweep has to repeat values to the bit, which takes at most
                `num_tokens - 1` sweeps on any flow.
            window_size (`int`, *optional*):
                Tokens in a Jacobi sweep, from 1 to `num_tokens`. Default: by the profile; without one, the window
                that doubles the time of a sweep.
            output_report (`bool`, defaults to `False`): Return a [`TarFlowInverseReport`]. It costs one forward pass.
            output_token_log_abs_det (`bool`, defaults to `False`): Return each token's part of `log_abs_det`, too.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`TarFlowOutput`] instead of a tuple `(sample, log_abs_det[, hidden_states][,
                report][, token_log_abs_det])`.
        Returns:
            [`TarFlowOutput`] or `tuple`. Tensors are float32, or float64 for a float64 model or sample.
        Raises:
            ValueError: if a shape, a number, a name or a label does not fit the model. Labels on a GPU, and those of a
                compiled model, are not checked: reading them would wait for the GPU, or break the graph.
        """
        check_class_labels(class_labels, len(sample), self.config.num_classes)
        numbers = self._check_blocks(blocks)
        guidance = Guidance(guidance_scale, guidance_rule, guidance_schedule, guidance_temperature)
        check_guidance(guidance, inverse, is_conditional=self.config.num_classes is not None)
        if class_labels is None and guidance.temperature == 1.0:
            guidance = Guidance()  # both branches are the same
        check_solver(solver, tolerance, window_size, output_report, inverse, self._num_tokens)
        places = [] if output_hidden_states is None else self._check_places(output_hidden_states, numbers, inverse)

        tokens, hidden_states, report = self.patchify(sample), None, None
        if inverse:
            chosen = {number: self.blocks[number - 1] for number in numbers}
            profile = None if self.attached_adapters else self.config.inverse_profile
            settings = {
                number: choose_settings(
                    block,
                    profile_of_block(profile, number, tokens.device.type),
                    tokens,
                    guidance,
                    solver,
                    tolerance,
                    window_size,
                )
                for number, block in chosen.items()
            }
            tokens, token_log_abs_dets, report = invert_flow(
                chosen, settings, tokens, class_labels, guidance, output_report
            )
        else:
            tokens, token_log_abs_dets, hidden_states = self._apply_blocks(tokens, class_labels, numbers, places)
        log_abs_det, token_log_abs_det = tokens.new_zeros(len(tokens)), tokens.new_zeros(tokens.shape[:2])
        for of_block in token_log_abs_dets:
            log_abs_det, token_log_abs_det = log_abs_det + of_block.sum(dim=1), token_log_abs_det + of_block
        output = TarFlowOutput(
            self.unpatchify(tokens),
            log_abs_det,
            hidden_states or None,
            report,
            token_log_abs_det if output_token_log_abs_det else None,
        )
        return output if return_dict else output.to_tuple()

    def _apply_blocks(
        self,
        tokens: torch.Tensor,
        class_labels: torch.Tensor | None,
        numbers: list[int],
        places: list[tuple[int, int]],
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[tuple[int, int], torch.Tensor]]:
        """Return latents, for every block each token's part of the log-determinant, and the states at `places`."""
        token_log_abs_dets, hidden_states = [], {}
        for number in numbers:
            layers = [layer for block, layer in places if block == number]
            output = self.blocks[number - 1](tokens, class_labels, layers)
            tokens = output.tokens
            token_log_abs_dets.append(-output.log_scale.sum(dim=2))
            hidden_states.update({(number, layer): states for layer, states in output.hidden_states.items()})
        return tokens, token_log_abs_dets, hidden_states

    def log_prob(self, sample: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        r"""
        Compute the exact log-density of `sample`: `log N(z; 0, I) + log |det dz/dsample|`, where `z` are its latents.

        Args:
            sample, class_labels: As in [`~TarFlowTransformer2DModel.forward`].
        Returns:
            `torch.Tensor` of shape `(batch_size,)`: nats, summed (not averaged) over the `D = in_channels *
            sample_size^2` dimensions; float32, or float64 for a float64 model. The model is trained on data with
            noise, and this is the density of noisy data, not of clean images.
        Raises:
            ValueError: as [`~TarFlowTransformer2DModel.forward`].

        Example:
            ```py
            >>> import torch
            >>> from flowback_hf import TarFlowTransformer2DModel

            >>> model = TarFlowTransformer2DModel(
            ...     sample_size=8, patch_size=2, in_channels=1, num_blocks=2, num_layers=1, num_attention_heads=2,
            ...     attention_head_dim=16, num_classes=10,
            ... )
            >>> model.log_prob(torch.zeros(4, 1, 8, 8), torch.tensor([3, 1, 4, -1])).shape
            torch.Size([4])
            ```
        """
        output = self(sample, class_labels)
        latents = output.sample.flatten(1)
        return -0.5 * (latents.square() + math.log(2 * math.pi)).sum(dim=1) + output.log_abs_det

    @torch.no_grad()
    def profile_inverse(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rule: str = "linear",
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        tolerance: float | None = None,
    ) -> dict[str, Any]:
        r"""
        Measure how many Jacobi sweeps each flow block needs, by window size and initial guess, for `solver="auto"`.

        The profile is registered as the config's `inverse_profile` and saved with the model. `"auto"` combines it with
        the costs of the device that samples. Where sweeps cannot win on the device that measures, it stops early and
        leaves their number out, so measure on the device that you will sample with. The profile belongs to the
        weights that it was measured with: measure again after training.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                Noise. Four samples are enough.
            class_labels, guidance_scale, guidance_rule, guidance_schedule, guidance_temperature, tolerance:
                As in [`~TarFlowTransformer2DModel.forward`]. Use those that you will sample with.
        Returns:
            `dict`: `num_tokens` and `num_layers`, which identify the architecture; `window_sizes`; from block 1 on,
            `initial_guesses` and the mean `sweeps` for each window size, `None` where they are too many to win on this
            device; `device_type`, guidance and tolerance of the measurement.
        Raises:
            ValueError: as [`~TarFlowTransformer2DModel.forward`], or if adapters are attached.

        Example:
            ```py
            >>> import torch
            >>> from flowback_hf import TarFlowTransformer2DModel

            >>> model = TarFlowTransformer2DModel(
            ...     sample_size=8, patch_size=2, num_blocks=2, num_layers=1, num_attention_heads=2,
            ...     attention_head_dim=16, num_classes=10,
            ... )
            >>> profile = model.profile_inverse(torch.randn(2, 3, 8, 8), torch.tensor([3, 1]), guidance_scale=2.0)
            >>> profile["window_sizes"]
            [4, 15]
            >>> model.config.inverse_profile == profile
            True
            ```
        """
        if self.attached_adapters:
            raise ValueError(
                f"`profile_inverse` measures a flow without adapters, but {self.attached_adapters} are attached and"
                " may be switched. Make them part of the weights first, with `fuse_lora` and then `unload_lora`."
            )
        check_class_labels(class_labels, len(latents), self.config.num_classes)
        guidance = Guidance(guidance_scale, guidance_rule, guidance_schedule, guidance_temperature)
        self.check_inverse_arguments(
            guidance_scale, guidance_rule, guidance_schedule, guidance_temperature, "jacobi", tolerance
        )
        tokens = self.patchify(latents)
        tolerance = DEFAULT_TOLERANCES[tokens.dtype] if tolerance is None else tolerance
        profile = {
            "num_tokens": self._num_tokens,
            "num_layers": [len(block.layers) for block in self.blocks],
            **measure_sweeps(self.blocks, tokens, class_labels, guidance, tolerance),
            "device_type": tokens.device.type,
            "guidance_scale": guidance_scale,
            "guidance_rule": guidance_rule,
            "guidance_schedule": guidance_schedule,
            "guidance_temperature": guidance_temperature,
            "tolerance": tolerance,
        }
        self.register_to_config(inverse_profile=profile)
        return profile

    def check_inverse_arguments(
        self,
        guidance_scale: float = 1.0,
        guidance_rule: str = "linear",
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        solver: str = "auto",
        tolerance: float | None = None,
    ):
        """
        Check arguments of the inverse without inverting anything. [`FlowBackPipeline`] does so before it draws noise.

        Args:
            guidance_scale, guidance_rule, guidance_schedule, guidance_temperature, solver, tolerance:
                As in [`~TarFlowTransformer2DModel.forward`].
        Raises:
            ValueError: as [`~TarFlowTransformer2DModel.forward`].
        """
        guidance = Guidance(guidance_scale, guidance_rule, guidance_schedule, guidance_temperature)
        check_guidance(guidance, inverse=True, is_conditional=self.config.num_classes is not None)
        check_solver(solver, tolerance, None, output_report=False, inverse=True, num_tokens=self._num_tokens)

    @property
    def attached_adapters(self) -> list[str]:
        """The names of the PEFT adapters that are attached, whether they are enabled or not."""
        return list(getattr(self, "peft_config", None) or {})

    # Pipelines look up in the signature which arguments they may pass on.
    @functools.wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, *args, **kwargs):
        """
        Save the flow to a folder, as every diffusers model does. Takes the arguments of its `save_pretrained`.

        Raises:
            ValueError: if adapters are attached. diffusers would save them among the weights, which then do not load.
        """
        if self.attached_adapters:
            raise ValueError(
                f"`save_pretrained` saves a flow without adapters, but {self.attached_adapters} are attached. Save"
                " them with the pipeline's `save_lora_weights` and detach them with `unload_lora`. Or make them part"
                " of the weights, with `fuse_lora` and then `unload_lora`."
            )
        super().save_pretrained(*args, **kwargs)

    def fuse_lora(self, *args, **kwargs):
        """
        Add adapters to the weights, as in every diffusers model. Takes the arguments of its `fuse_lora`.

        The config's `inverse_profile` is removed, because the weights change. What was compiled is compiled again.
        """
        super().fuse_lora(*args, **kwargs)
        self.register_to_config(inverse_profile=None)
        if self.blocks[0].steps_are_compiled:
            # Code that Inductor compiled with `freezing` holds the old weights as constants.
            torch.compiler.reset()

    def compile_repeated_blocks(self, *args, **kwargs):
        """
        Compile the layers and the steps of the solvers, each as a whole. Takes the arguments of `torch.compile`.

        [`FlowBackPipeline.compile`] chooses them for the device.
        """
        super().compile_repeated_blocks(*args, **kwargs)
        for block in self.blocks:
            block.compile_steps(*args, **kwargs)

    @property
    def _num_tokens(self) -> int:
        return (self.config.sample_size // self.config.patch_size) ** 2

    def _check_config(self) -> list[int]:
        """Return the number of layers of each block. Raise ValueError if an argument is out of its range."""
        config = self.config
        counts = ["sample_size", "patch_size", "in_channels", "num_blocks", "num_attention_heads"]
        counts += ["attention_head_dim"] + (["num_classes"] if config.num_classes is not None else [])
        for name in counts:
            check_number(name, config[name], int, at_least=1)
        check_number("mlp_ratio", config.mlp_ratio, float, above=0.0)
        check_number("noise_std", config.noise_std, float, at_least=0.0)
        is_list = isinstance(config.num_layers, (list, tuple))
        layers_per_block = list(config.num_layers) if is_list else [config.num_layers] * config.num_blocks
        for num_layers in layers_per_block:
            check_number("num_layers", num_layers, int, at_least=1)
        if config.sample_size % config.patch_size != 0:
            raise ValueError(
                f"`sample_size` must be divisible by `patch_size`, but they are {config.sample_size} and"
                f" {config.patch_size}."
            )
        if len(layers_per_block) != config.num_blocks:
            raise ValueError(
                f"`num_layers` must be one number, or a list of one for each of the {config.num_blocks} flow blocks"
                f" (`num_blocks`), but is {config.num_layers}."
            )
        choices = {
            "activation_fn": ACTIVATION_FNS,
            "position_embedding": POSITION_EMBEDDINGS,
            "noise_type": NOISE_TYPES,
        }
        for name, known in choices.items():
            if config[name] not in known:
                raise ValueError(f"`{name}` must be one of {known}, but is {config[name]!r}.")
        if config.position_embedding == "rope" and config.attention_head_dim % 4 != 0:
            raise ValueError(
                "`attention_head_dim` must be a multiple of 4 for `position_embedding='rope'`, which rotates pairs of"
                f" values in each half of a head, but is {config.attention_head_dim}."
            )
        return layers_per_block

    def _check_blocks(self, blocks: Iterable[int] | None) -> list[int]:
        num_blocks = len(self.blocks)
        if blocks is None:
            return list(range(1, num_blocks + 1))
        chosen = list(blocks) if isinstance(blocks, Iterable) else [blocks]
        for number in chosen:
            check_number("blocks", number, int, at_least=1, at_most=num_blocks)
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"`blocks` must be different numbers from 1 to {num_blocks}, but are {chosen}.")
        return sorted(chosen)

    def _check_places(
        self, places: Iterable[tuple[int, int]], numbers: list[int], inverse: bool
    ) -> list[tuple[int, int]]:
        places = list(places)
        if inverse and places:
            raise ValueError(
                "`output_hidden_states` cannot be combined with `inverse=True`. The forward pass of the data has the"
                " same hidden states."
            )
        for block, layer in places:
            check_number("output_hidden_states", layer, int)
            if block not in numbers or not 1 <= layer <= len(self.blocks[block - 1].layers):
                raise ValueError(
                    f"`output_hidden_states` asks for layer {layer} of flow block {block}, but the blocks that run are"
                    f" {numbers}, with {[len(self.blocks[number - 1].layers) for number in numbers]} layers."
                )
        return places
