# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is uploaded with the weights of a model that loads without the package: it needs torch and diffusers only.

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, logging


GUIDANCE_RULES = ("linear", "product")
GUIDANCE_SCHEDULES = ("constant", "linear")
NOISE_TYPES = ("gaussian", "uniform")
ACTIVATION_FNS = ("gelu", "swiglu")
POSITION_EMBEDDINGS = ("learned", "rope")
ROTARY_BASE = 10_000.0

SOLVERS = ("auto", "sequential", "jacobi")
INITIAL_GUESSES = ("latents", "zeros")
DEFAULT_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
# A value that a sweep changes by no more than this share of the tolerance counts as unchanged: later tokens and flow
# blocks amplify what is left of its error. Rounding alone changes it by a few units of its last place.
SETTLED_SHARE = 0.01
SETTLED_UNITS = 8


class StepCosts(NamedTuple):
    """
    What a solver's steps take, in units of one more row of a sweep: a token of one branch of one sample.

    Args:
        token, sweep (`float`): A token's step and a window's sweep, whatever they evaluate: reading weights, kernels.
        token_row (`float`): One more row of a token's step. It reads a cache that a sweep reads for a window of rows.
    """

    token: float
    token_row: float
    sweep: float


# By device; then if they are compiled. The CPU's are measured, CUDA's estimated from how many operations it does while
# it reads a byte.
STEP_COSTS = {
    "cpu": {False: StepCosts(18, 2.2, 37), True: StepCosts(6, 2.2, 20)},
    "cuda": {False: StepCosts(2048, 10, 3072), True: StepCosts(512, 10, 768)},
}
# "auto" sweeps only where that promises to save a quarter: the promise is an estimate.
JACOBI_MUST_SAVE = 0.25
PROBE_SWEEPS = 6
# A sweep of no more rows than this takes too little memory to be divided.
UNDIVIDED_ROWS = 512
PROFILE_WINDOW_SIZES = (4, 16, 64, 256)


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
            The hidden states that `output_hidden_states` asked for, in raster order; `None` if it asked for none.
        report ([`TarFlowInverseReport`]): What `output_report` asked for; `None` if it did not.
    """

    sample: torch.Tensor | None = None
    log_abs_det: torch.Tensor | None = None
    hidden_states: dict[tuple[int, int], torch.Tensor] | None = None
    report: "TarFlowInverseReport | None" = None


@dataclass
class TarFlowInverseReport:
    """
    How an inverse was found, and how exact it is.

    Args:
        solvers (`dict` of block to `str`):
            `"sequential"` or `"jacobi"`, the one that the block was begun with: `"auto"` without a profile may go on
            from Jacobi sweeps token by token.
        sweeps (`dict` of block to `torch.LongTensor` of shape `(batch_size,)`):
            Network evaluations that each sample took part in, both branches of guidance counted as one; a sequential
            block has `num_tokens - 1`.
        network_evaluations (`dict` of block to `int`): Those of the whole batch: the largest of `sweeps`.
        residual (`torch.Tensor` of shape `(batch_size,)`):
            Certified after the fact by one parallel pass: the largest `|f(x) - z|` of a sample, where `x` is the data
            returned, `z` the latents given and `f` the flow, guided as it was inverted. Not finite for a sample that
            overflowed.
    """

    solvers: dict[int, str]
    sweeps: dict[int, torch.Tensor]
    network_evaluations: dict[int, int]
    residual: torch.Tensor


@dataclass(frozen=True)
class InverseOptions:
    """How [`TarFlowBlock`] inverts: guidance as in [`TarFlowTransformer2DModel.forward`], and a solver's settings.

    Args:
        window_size (`int`): Tokens of a sweep; 0 is the sequential solver.
        initial_guess (`str`): What tokens are before their first sweep: their `"latents"` or `"zeros"`.
        tolerance (`float`): As in [`TarFlowTransformer2DModel.forward`].
        least_pace (`float`): Sweeps that settle fewer tokens than this give way to single tokens after a few.
    """

    guidance_scale: float = 1.0
    guidance_rule: str = "linear"
    guidance_schedule: str = "constant"
    guidance_temperature: float = 1.0
    window_size: int = 0
    initial_guess: str = "latents"
    tolerance: float = 0.0
    least_pace: float = 0.0


class KeyValueCache(NamedTuple):
    """
    Keys and values of the tokens so far in one layer, and where a window of tokens has its place among them.

    Args:
        states (`torch.Tensor` of shape `(num_rows, 2, heads, num_tokens, head_dim)`):
            Finite everywhere, also where nothing has been written yet; those of the window are written into it.
        positions (`torch.LongTensor` of shape `(num_rows or 1, window_size)`): 0-based numbers of the window's tokens.
        attention_mask (`torch.BoolTensor` of shape `(num_rows or 1, 1, window_size, length)`):
            True where a token of the window sees one of the first `length` tokens.
    """

    states: torch.Tensor
    positions: torch.Tensor
    attention_mask: torch.Tensor


class TarFlowLayerNorm(nn.LayerNorm):
    """Layer normalization computed in float32, or wider where its input is, and returned in the input's dtype."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(hidden_states.to(dtype), self.normalized_shape, weight, bias, self.eps).to(
            hidden_states.dtype
        )


class TarFlowOutputProjection(nn.Linear):
    """
    Hidden states to log-scales and shifts, computed in float32, or wider where its input is, also under autocast.

    Both start at zero, weight and bias, so that an untrained flow is the identity.
    """

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def rotary_embedding(grid_size: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    r"""
    Cosines and sines of how much each token turns each pair of a head's values: `(2, num_tokens, head_dim / 2)`, in
    raster order.

    The first half of a head turns with the token's row, the second with its column, both counted from 0: pair `k` of
    the `head_dim / 4` in a half by `position * theta^(-4 k / head_dim)` radians, theta = 10^4.

    Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding,
    https://arxiv.org/abs/2104.09864
    """
    exponents = torch.arange(0, head_dim, 4, device=device, dtype=dtype) / head_dim
    positions = torch.arange(grid_size, device=device, dtype=dtype)
    angles = torch.outer(positions, ROTARY_BASE**-exponents)  # (grid_size, head_dim / 4)
    angles = torch.cat([angles.repeat_interleave(grid_size, dim=0), angles.repeat(grid_size, 1)], dim=1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Turns pairs of neighbours in `(batch_size, num_tokens, 2, heads, head_dim)`, queries and keys in one go."""
    cosine, sine = rotary[..., None, None, :]
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return rotated.flatten(-2).to(states.dtype)


def attend_from_one_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    What `F.scaled_dot_product_attention` returns for a single query, written out for a compiler, which makes of it two
    passes over the cache: a kernel for many queries takes longer to call than one query takes to answer.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(dtype) * keys.to(dtype)).sum(dim=-1) / math.sqrt(query.shape[-1])
    weights = torch.where(attention_mask.squeeze(2), logits, -math.inf).softmax(dim=-1)
    return (weights.unsqueeze(-1) * values.to(dtype)).sum(dim=2, keepdim=True).to(query.dtype)


class TarFlowAttnProcessor:
    """Causal self-attention, over a whole sequence or of a window of its tokens to those in a key/value cache."""

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
        # A token alone overflows for good. In a window it may for the time being, and must not reach the tokens before
        # it: what a mask hides is still multiplied by 0, which makes NaN of infinity.
        in_window = positions.shape[1] > 1
        if in_window:
            is_finite = keys_and_values.isfinite().flatten(2).all(dim=2)[..., None, None]
            keys_and_values = torch.where(is_finite[..., None], keys_and_values, 0.0)
        rows = torch.arange(len(query), device=query.device).unsqueeze(1)
        cached[rows, :, :, positions] = keys_and_values.to(cached.dtype)
        # A causal kernel would line the window up with the start of the cache. Backends made for long sequences have
        # nothing to gain here, and choosing one takes as long as a small product.
        keys, values = cached[:, :, :, : attention_mask.shape[-1]].unbind(dim=1)
        is_compiled_step = torch.compiler.is_compiling() and not in_window
        attend = attend_from_one_token if is_compiled_step else F.scaled_dot_product_attention
        attended = attend(query.transpose(1, 2), keys, values, attention_mask).transpose(1, 2)
        return torch.where(is_finite, attended, math.nan) if in_window else attended


class TarFlowAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention. Queries, keys and values are one product: rows of `to_qkv` in this order."""

    _default_processor_cls = TarFlowAttnProcessor
    _available_processors = [TarFlowAttnProcessor]
    _supports_qkv_fusion = False  # they are fused as they are
    fused_projections = True

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        width = heads * head_dim
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
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
        hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, width)`):
            All tokens of the sequence, or a window of them where a `key_value_cache` is given.
        rotary (`torch.Tensor` of shape `(2, num_tokens, head_dim / 2)`, *optional*):
            What [`rotary_embedding`] gives for the tokens of `hidden_states`, in their order; of shape
            `(2, batch_size, num_tokens, head_dim / 2)` where they differ from sample to sample.
        temperature (`torch.Tensor` of shape `(batch_size, 1, 1, 1)`, *optional*):
            Divides the attention logits, sample by sample.
        key_value_cache ([`KeyValueCache`], *optional*): Of this layer; the window's keys and values are added to it.
    """

    def __init__(self, heads: int, head_dim: int, mlp_ratio: float, activation_fn: str):
        super().__init__()
        width = heads * head_dim
        inner_dim = int(mlp_ratio * width)
        if activation_fn == "swiglu":
            # Two thirds, since its gate is a third matrix; kernels like multiples of 64.
            inner_dim = 64 * math.ceil(2 * mlp_ratio * width / (3 * 64))
        self.norm1 = TarFlowLayerNorm(width)
        self.attn = TarFlowAttention(heads, head_dim)
        self.norm2 = TarFlowLayerNorm(width)
        self.ff = FeedForward(width, inner_dim=inner_dim, activation_fn=activation_fn)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        key_value_cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        attended = self.attn(self.norm1(hidden_states), rotary, temperature, key_value_cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.ff(self.norm2(hidden_states))


class InverseState(NamedTuple):
    """
    What the solvers of one block's inverse read and write, in the block's own token order. Local to a call.

    Under guidance a sample has two branches, the conditional one before its weak one; else one. The network evaluates
    rows: the branches of the first sample, then those of the next.

    Args:
        latents, tokens, log_scale, shift (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`):
            `z`, and `u`, `a` and `m` as far as they are known. Contiguous: of tokens that do not lie in memory one
            after another, Inductor (torch 2.13) made wrong values.
        class_embedding (`torch.Tensor` of shape `(batch_size, branches, 1, width)`)
        position_embedding (`torch.Tensor` of shape `(num_tokens, width)`, *optional*)
        rotary (`torch.Tensor` of shape `(2, num_tokens, head_dim / 2)`, *optional*)
        temperature (`torch.Tensor` of shape `(batch_size, branches, 1, 1, 1)`, *optional*)
        guidance_weight (`torch.Tensor` of shape `(num_tokens, 1)`, *optional*): `w` of each token; `None` is off.
        guidance_rule (`str`)
        key_value_caches (`tuple` of `torch.Tensor` of shape
            `(batch_size, branches, 2, heads, num_tokens, head_dim)`): By layer.
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

    def view(self, samples: slice) -> "InverseState":
        """Some of the samples, in the same memory."""
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
        Lets one graph of a compiled step serve all batch sizes but 1. On a CPU that also makes its products oneDNN's:
        a size that is fixed gets MKL's, which take twice as long on CPUs of another maker.
        """
        batched = (self.latents, self.tokens, self.log_scale, self.shift, self.class_embedding, self.temperature)
        for values in (*batched, *self.key_value_caches, *others):
            if values is not None and len(values) > 1:
                torch._dynamo.maybe_mark_dynamic(values, 0)

    def retire(self, sample: int, last: int):
        """A sample that is done changes places with the last one at work, and leaves what only work needs to it."""
        if sample == last:
            return
        for values in (self.latents, self.tokens, self.log_scale, self.shift):
            values[[sample, last]] = values[[last, sample]]
        for values in (self.class_embedding, *self.key_value_caches):
            values[sample] = values[last]


def evaluate_window(
    block: "TarFlowBlock", state: InverseState, positions: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One evaluation of a block's network: guided log-scale and shift of the tokens that follow those at `positions`,
    `(batch_size or 1, window_size)`, none of which is at `length` or beyond. Writes keys and values of `positions`.
    """
    samples = torch.arange(len(state.tokens), device=positions.device).unsqueeze(1)
    tokens = state.tokens[samples, positions].to(block.proj_in.weight.dtype)
    row_positions = positions
    if state.branches == 2:
        tokens = tokens.repeat_interleave(2, dim=0)
        row_positions = positions if len(positions) == 1 else positions.repeat_interleave(2, dim=0)
    temperature = None if state.temperature is None else state.temperature.flatten(0, 1)
    hidden_states = block.proj_in(tokens) + state.class_embedding.flatten(0, 1)
    if state.position_embedding is not None:
        hidden_states = hidden_states + state.position_embedding[row_positions]
    rotary = None if state.rotary is None else state.rotary[:, row_positions]
    attention_mask = torch.arange(length, device=positions.device) <= row_positions[:, None, :, None]
    for layer, cache in zip(block.layers, state.key_value_caches):
        key_value_cache = KeyValueCache(cache.flatten(0, 1), row_positions, attention_mask)
        hidden_states = layer(hidden_states, rotary, temperature, key_value_cache)
    log_scale, shift = block.proj_out(hidden_states).to(state.tokens.dtype).chunk(2, dim=-1)
    if state.branches == 2:
        weight = state.guidance_weight[positions + 1]
        log_scale, shift = log_scale.unflatten(0, (-1, 2)), shift.unflatten(0, (-1, 2))
        log_scale, shift = apply_guidance(log_scale, shift, weight, state.guidance_rule)
    return log_scale, shift


def take_token(block: "TarFlowBlock", state: InverseState, position: torch.Tensor, length: int):
    """
    The sequential solver's step: from token `position`, `(1, 1)` and the same for all samples, the one after it.

    Shapes and addresses stay the same from token to token, and nothing is read back: it compiles into one graph, which
    a CUDA graph can replay. `position` counts itself up.
    """
    log_scale, shift = evaluate_window(block, state, position, length)
    following = position[0] + 1
    latents = state.latents.index_select(1, following)
    state.log_scale.index_copy_(1, following, log_scale)
    state.shift.index_copy_(1, following, shift)
    state.tokens.index_copy_(1, following, shift + torch.exp(log_scale) * latents)
    position += 1


def sweep_window(
    block: "TarFlowBlock", state: InverseState, last: torch.Tensor, window_size: int, length: int, tolerance: float
) -> torch.Tensor:
    """
    The Jacobi solver's step: one sweep `u <- m(u) + exp(a(u)) z` over the window after each sample's `last` settled
    token, `(batch_size,)`. Returns the last one that is settled then, at least one further.
    """
    num_tokens = state.tokens.shape[1]
    begin = last.clamp(max=num_tokens - 1 - window_size)
    positions = begin.unsqueeze(1) + torch.arange(window_size, device=last.device)
    following = positions + 1
    samples = torch.arange(len(last), device=last.device).unsqueeze(1)
    log_scale, shift = evaluate_window(block, state, positions, length)
    old_tokens = state.tokens[samples, following]
    tokens = shift + torch.exp(log_scale) * state.latents[samples, following]

    is_open = following > last.unsqueeze(1)
    # Everything before the first open token is settled, so that it is exact now, whatever it is. A later one that is
    # not finite keeps its last finite value until its turn comes.
    is_first = following == last.unsqueeze(1) + 1
    is_new = (is_open & (tokens.isfinite().all(dim=2) | is_first)).unsqueeze(2)
    state.tokens[samples, following] = torch.where(is_new, tokens, old_tokens)
    state.log_scale[samples, following] = torch.where(is_new, log_scale, state.log_scale[samples, following])
    state.shift[samples, following] = torch.where(is_new, shift, state.shift[samples, following])

    # Up to the first token that has changed: it saw only such as have not, so that it is settled, too. Those after it
    # saw what it was before.
    change = ((tokens - old_tokens).abs() / tokens.abs().clamp(min=1)).amax(dim=2)
    largest_change = tolerance and max(SETTLED_SHARE * tolerance, SETTLED_UNITS * torch.finfo(tokens.dtype).eps)
    has_changed = is_open & ~(change <= largest_change)  # NaN has
    return torch.where(has_changed, following, num_tokens).amin(dim=1).minimum(following[:, -1])


class TarFlowBlock(nn.Module):
    r"""
    One flow step: an affine autoregressive map over the tokens of an image, invertible in closed form.

    With input `u` in the block's own token order, `a_i` and `m_i` functions of the tokens before `i`, `a_0 = m_0 = 0`:

        z_i = (u_i - m_i(u_<i)) exp(-a_i(u_<i))        log |det dz/du| = -sum a        (data to latents, parallel)
        u_i = m_i(u_<i) + exp(a_i(u_<i)) z_i                                           (latents to data, sequential)

    What goes in and what comes out is in raster order, whatever the block's own order is.

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
        width = num_attention_heads * attention_head_dim
        self.proj_in = nn.Linear(token_dim, width)
        self.pos_embed = None
        if position_embedding == "learned":
            self.pos_embed = nn.Parameter(0.01 * torch.randn(grid_size**2, width))  # in raster order
        self.class_embed = None if num_classes is None else nn.Parameter(0.01 * torch.randn(num_classes, width))
        self.layers = nn.ModuleList(
            TarFlowLayer(num_attention_heads, attention_head_dim, mlp_ratio, activation_fn) for _ in range(num_layers)
        )
        self.proj_out = TarFlowOutputProjection(width, 2 * token_dim)
        self.take_token = take_token
        self.sweep_window = sweep_window
        self.steps_are_compiled = False

    def compile_steps(self, *args, **kwargs):
        """Compiles the steps that the solvers repeat, each whole; takes the arguments of `torch.compile`."""
        self.take_token = torch.compile(take_token, *args, **kwargs)
        self.sweep_window = torch.compile(sweep_window, *args, **kwargs)
        self.steps_are_compiled = True

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions are left behind, as a module leaves its compiled forward.
        steps = {"take_token": take_token, "sweep_window": sweep_window, "steps_are_compiled": False}
        return super().__getstate__() | steps

    def forward(
        self,
        tokens: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        output_hidden_states: Collection[int] = (),
        inverse: bool = False,
        options: InverseOptions = InverseOptions(),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int, torch.Tensor] | torch.Tensor]:
        """
        Args:
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`):
                The block's input; with `inverse=True` its latents.
            class_labels: As in [`TarFlowTransformer2DModel.forward`].
            output_hidden_states (collection of `int`): 1-based layers whose outputs are returned. Forward only.
            inverse (`bool`): Latents to data. No gradient flows through it.
            options ([`InverseOptions`]): Of the inverse. Guided forward, the latents are those of the guided map.
        Returns:
            `tuple`: latents (data with `inverse=True`), log-scale `a` and shift `m`, each in raster order and shaped
            as `tokens`, then a `dict` of layer to hidden states `(batch_size, num_tokens, width)`, in raster order;
            with `inverse=True` the sweeps of each sample instead, `(batch_size,)`.
        """
        tokens = self._permute(tokens)
        if inverse:
            tokens, log_scale, shift, details = self._invert(tokens, class_labels, options)
        else:
            log_scale, shift, hidden_states = self._predict(tokens, class_labels, output_hidden_states)
            if options.guidance_scale != 1.0:
                log_scale, shift = self._guide(tokens, log_scale, shift, options)
            tokens = (tokens - shift) * torch.exp(-log_scale)
            details = {layer: self._permute(states) for layer, states in hidden_states.items()}
        return self._permute(tokens), self._permute(log_scale), self._permute(shift), details

    def _permute(self, tokens: torch.Tensor) -> torch.Tensor:
        """Raster order to the block's own order, and back: reversal is its own inverse."""
        return tokens.flip(-2) if self.reverse_order else tokens

    def _rotary(self) -> torch.Tensor | None:
        """Cosines and sines of all tokens, in the block's own order; `None` where positions are learned."""
        if self.pos_embed is not None:
            return None
        weight = self.proj_in.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return self._permute(rotary_embedding(self.grid_size, self.attention_head_dim, weight.device, dtype))

    def _position_embedding(self) -> torch.Tensor | None:
        """`(num_tokens, width)`, in the block's own order; `None` for rotary positions."""
        return None if self.pos_embed is None else self._permute(self.pos_embed)

    def _class_embedding(self, class_labels: torch.Tensor | None) -> torch.Tensor:
        """`(1 or batch_size, 1, width)`: zeros for an unconditional model."""
        weight = self.proj_in.weight
        if self.class_embed is None:
            return weight.new_zeros(1, 1, self.proj_in.out_features)
        no_class = self.class_embed.mean(dim=0, keepdim=True)
        if class_labels is None:
            class_embedding = no_class
        elif class_labels.is_floating_point():
            # in full precision: what classification differentiates must agree with the rows of the table
            dtype = torch.promote_types(torch.promote_types(class_labels.dtype, self.class_embed.dtype), torch.float32)
            with torch.autocast(class_labels.device.type, enabled=False):
                class_embedding = class_labels.to(dtype) @ self.class_embed.to(dtype)
        else:
            has_class = (class_labels >= 0).unsqueeze(-1)
            class_embedding = torch.where(has_class, self.class_embed[class_labels.clamp(min=0).long()], no_class)
        return class_embedding.to(weight.dtype).unsqueeze(1)

    def _predict(
        self,
        tokens: torch.Tensor,
        class_labels: torch.Tensor | None,
        output_hidden_states: Collection[int],
        temperature: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """Log-scale and shift of every token at once, each from the tokens before it."""
        conditioning = self._class_embedding(class_labels)
        if self.pos_embed is not None:
            conditioning = self._position_embedding() + conditioning
        hidden_states = self.proj_in(tokens.to(self.proj_in.weight.dtype)) + conditioning
        rotary = self._rotary()
        collected = {}
        for number, layer in enumerate(self.layers, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, rotary, temperature)
            else:
                hidden_states = layer(hidden_states, rotary, temperature)
            if number in output_hidden_states:
                collected[number] = hidden_states
        # What is read off token i belongs to token i + 1: shifted right by one, so that the first token gets zeros.
        prediction = F.pad(self.proj_out(hidden_states)[:, :-1], (0, 0, 1, 0)).to(tokens.dtype)
        log_scale, shift = prediction.chunk(2, dim=-1)
        return log_scale, shift, collected

    def _guide(
        self, tokens: torch.Tensor, log_scale: torch.Tensor, shift: torch.Tensor, options: InverseOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided log-scale and shift of every token at once, from the conditional ones."""
        temperature = None
        if options.guidance_temperature != 1.0:
            temperature = self.proj_in.weight.new_full((1, 1, 1, 1), options.guidance_temperature)
        weak_log_scale, weak_shift, _ = self._predict(tokens, None, (), temperature)
        return apply_guidance(
            torch.stack([log_scale, weak_log_scale], dim=1),
            torch.stack([shift, weak_shift], dim=1),
            self._guidance_weight(tokens, options),
            options.guidance_rule,
        )

    def _guidance_weight(self, tokens: torch.Tensor, options: InverseOptions) -> torch.Tensor:
        """`w` of the papers for each token, `(num_tokens, 1)`: 0 is off; annealed, it grows from 0 at the first token
        to the whole at the last."""
        num_tokens = tokens.shape[1]
        weight = tokens.new_full((num_tokens, 1), options.guidance_scale - 1.0)
        if options.guidance_schedule == "linear":
            weight = weight * torch.arange(num_tokens, device=weight.device).unsqueeze(1) / max(num_tokens - 1, 1)
        return weight

    @torch.no_grad()
    def _invert(
        self, latents: torch.Tensor, class_labels: torch.Tensor | None, options: InverseOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Data, log-scale, shift, each in the block's own order, and each sample's sweeps."""
        batch_size, num_tokens, _ = latents.shape
        state = self._allocate_state(latents, class_labels, options)
        if options.window_size == 0 or num_tokens == 1:
            self._take_tokens(state, 0)
            return state.tokens, state.log_scale, state.shift, torch.full((batch_size,), num_tokens - 1)
        places, sweeps = self._sweep_windows(state, options)
        return state.tokens[places], state.log_scale[places], state.shift[places], sweeps

    def _allocate_state(
        self, latents: torch.Tensor, class_labels: torch.Tensor | None, options: InverseOptions
    ) -> InverseState:
        batch_size, num_tokens, _ = latents.shape
        is_guided = options.guidance_scale != 1.0
        branches = [class_labels, None] if is_guided else [class_labels]
        class_embedding = torch.stack([self._class_embedding(each).expand(batch_size, -1, -1) for each in branches], 1)
        temperature = guidance_weight = None
        if is_guided:
            guidance_weight = self._guidance_weight(latents, options)
            if options.guidance_temperature != 1.0:
                temperature = class_embedding.new_ones(batch_size, 2, 1, 1, 1)
                temperature[:, 1] = options.guidance_temperature
        latents = latents.clone(memory_format=torch.contiguous_format)
        tokens = torch.zeros_like(latents)
        if options.window_size > 0 and options.initial_guess == "latents":
            tokens = latents.clone()
        tokens[:, 0] = latents[:, 0]
        return InverseState(
            latents=latents,
            tokens=tokens,
            log_scale=torch.zeros_like(latents),
            shift=torch.zeros_like(latents),
            class_embedding=class_embedding,
            # Never a parameter, which would be a type of its own to a compiled step.
            position_embedding=None if self.pos_embed is None else self._position_embedding().detach(),
            rotary=self._rotary(),
            temperature=temperature,
            guidance_weight=guidance_weight,
            guidance_rule=options.guidance_rule,
            key_value_caches=self._allocate_key_value_caches(class_embedding, num_tokens),
        )

    def _allocate_key_value_caches(self, class_embedding: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """Zeros, in the dtype of the layers' projections."""
        device_type, dtype = class_embedding.device.type, class_embedding.dtype
        if torch.is_autocast_enabled(device_type) and dtype == torch.float32:  # autocast leaves float64 alone
            dtype = torch.get_autocast_dtype(device_type)
        branches = class_embedding.shape[:2]
        shapes = [(*branches, 2, each.attn.heads, num_tokens, each.attn.head_dim) for each in self.layers]
        return tuple(class_embedding.new_zeros(shape, dtype=dtype) for shape in shapes)

    def _take_tokens(self, state: InverseState, last: int):
        """The tokens after number `last`, one after another, each exactly."""
        num_tokens = state.tokens.shape[1]
        if self.steps_are_compiled:
            state.mark_batch_dynamic()
        position = torch.full((1, 1), last, device=state.tokens.device)
        for length in range(last + 1, num_tokens):
            self.take_token(self, state, position, round_up_length(length, num_tokens))

    def _sweep_windows(self, state: InverseState, options: InverseOptions) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Jacobi inside a window of tokens, Gauss-Seidel between windows, every sample at its own pace: what a sweep has
        settled is left behind, with its keys and values in the cache, and the window moves on.

        A sweep settles at least one token: those before it are, so that it is exact. `num_tokens - 1` sweeps suffice.

        Returns:
            `tuple`: where in `state` each sample has ended up, and its sweeps.
        """
        batch_size, num_tokens, _ = state.tokens.shape
        device = state.tokens.device
        window_size = min(options.window_size, num_tokens - 1)
        # Large windows take a part of the batch at a time, so that what a sweep computes on its way, some 14 widths a
        # row, stays below a fifth of the cache, 2 widths a token and layer.
        least_part = UNDIVIDED_ROWS // (window_size * state.branches)
        part_size = max(1, least_part, batch_size * num_tokens * len(self.layers) // (35 * window_size))
        # Samples change places, so that those at work are always the first: a view of them costs nothing.
        order = list(range(batch_size))
        settled = [0] * batch_size
        sweeps = [0] * batch_size
        num_active, num_sweeps = batch_size, 0
        while num_active > 0:
            length = round_up_length(max(settled[:num_active]) + window_size, num_tokens)
            for begin in range(0, num_active, part_size):
                part = slice(begin, min(begin + part_size, num_active))
                last = torch.tensor(settled[part], device=device)
                part_state = state.view(part)
                if self.steps_are_compiled:
                    part_state.mark_batch_dynamic(last)
                last = self.sweep_window(self, part_state, last, window_size, length, options.tolerance)
                settled[part] = last.tolist()
            num_sweeps += 1
            for place in reversed(range(num_active)):
                if settled[place] == num_tokens - 1:
                    sweeps[order[place]] = num_sweeps
                    num_active -= 1
                    state.retire(place, num_active)
                    for each in (order, settled):
                        each[place], each[num_active] = each[num_active], each[place]
            pace = sum(settled) / (num_sweeps * batch_size)
            if num_sweeps == PROBE_SWEEPS and num_active > 0 and pace < options.least_pace:
                slowest = min(settled[:num_active])
                self._take_tokens(state.view(slice(num_active)), slowest)
                for sample in order[:num_active]:
                    sweeps[sample] = num_sweeps + num_tokens - 1 - slowest
                break
        return torch.tensor(order, device=device).argsort(), torch.tensor(sweeps)


def round_up_length(length: int, num_tokens: int) -> int:
    """Of the cache that is attended to: one of at most eight, since each is a shape of its own to a compiled step."""
    multiple = max(32, math.ceil(num_tokens / 8))
    return min(num_tokens, multiple * math.ceil(length / multiple))


def apply_guidance(
    log_scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Classifier-free guidance of one affine autoregressive step, weight `w` (0 is off):

        linear:  a = a_c + w (a_c - a_u),  m = m_c + w (m_c - m_u)
        product: p_c^(1+w) / p_u^w of the Gaussians N(m, exp(a)^2), clipped at sigma_c = sigma_u so that it stays a
                 density: with s = min(sigma_c / sigma_u, 1)^2 and q = 1 + w - w s,
                 sigma = sigma_c / sqrt(q),  m = ((1 + w) m_c - w s m_u) / q

    Args:
        log_scale, shift (`torch.Tensor` of shape `(batch_size, 2, num_tokens, token_dim)`):
            `a` and `m` of the conditional branch, then of the weak one.
        weight (`torch.Tensor` of shape `(num_tokens, 1)`): `w >= 0` of each token, diffusers' `guidance_scale` less 1.
        rule (`str`): `"linear"` (TARFlow, https://arxiv.org/abs/2412.06329) or `"product"` (STARFlow,
            https://arxiv.org/abs/2506.06276).
    Returns:
        `tuple` of `torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`: guided log-scale and shift.
    """
    log_scale_c, log_scale_u = log_scale.unbind(dim=1)
    shift_c, shift_u = shift.unbind(dim=1)
    if rule == "linear":
        return log_scale_c + weight * (log_scale_c - log_scale_u), shift_c + weight * (shift_c - shift_u)
    # 1 - s by expm1 and m rewritten around m_c: the formulas above, without the differences of large numbers
    log_variance_ratio = 2 * (log_scale_c - log_scale_u).clamp(max=0)
    precision_ratio = 1 - weight * torch.expm1(log_variance_ratio)
    pull = weight * torch.exp(log_variance_ratio) / precision_ratio
    return log_scale_c - 0.5 * torch.log(precision_ratio), shift_c + pull * (shift_c - shift_u)


class TarFlowTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    r"""
    TARFlow: a normalizing flow of images made of autoregressive transformer blocks.

    An image (or a VAE latent) is cut into `(sample_size / patch_size)^2` tokens in raster order. Flow blocks follow
    one another, block 1 next to the image, the last one next to the noise; every second one sees the tokens reversed.
    An untrained flow is the identity.

    Args:
        sample_size (`int`): Height and width of the square sample, in pixels of an image or cells of a latent.
        patch_size (`int`): Height and width of a token; divides `sample_size`.
        in_channels (`int`): 3 for RGB images, 4 for the latents of Stable Diffusion's VAE.
        num_blocks (`int`): Flow blocks.
        num_layers (`int` or `list[int]`): Transformer layers in every block, or in each, from the image side.
        num_attention_heads (`int`), attention_head_dim (`int`): Their product is the width.
        mlp_ratio (`float`): Width of the feed-forward layers over that of the model.
        activation_fn (`str`, defaults to `"gelu"`):
            Of the feed-forward layers: `"gelu"` or `"swiglu"`, whose hidden width is `2/3 * mlp_ratio * width` rounded
            up to a multiple of 64, so that it has about as many parameters.
        position_embedding (`str`, defaults to `"learned"`):
            `"learned"`, a table in every block, or `"rope"`: queries and keys are turned by the token's row (the first
            half of each head) and column (the second), whatever the block's order; `attention_head_dim` is then a
            multiple of 4.
        num_classes (`int`, *optional*): `None` makes an unconditional model.
        noise_std (`float`): sigma of the noise the model is trained with, in units of the sample (images are in
            [-1, 1]); [`FlowBackPipeline`] removes it after sampling.
        noise_type (`str`): `"gaussian"`, or `"uniform"` for density models, whose samples are never denoised.
        inverse_profile (`dict`, *optional*):
            What [`~TarFlowTransformer2DModel.profile_inverse`] found, by which `solver="auto"` chooses.

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
        sizes = {
            "sample_size": sample_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "num_blocks": num_blocks,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "num_classes": 1 if num_classes is None else num_classes,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {size}.")
        if sample_size % patch_size != 0:
            raise ValueError(
                f"`sample_size` must be divisible by `patch_size`, but they are {sample_size} and {patch_size}."
            )
        layers_per_block = [num_layers] * num_blocks if isinstance(num_layers, int) else list(num_layers)
        if len(layers_per_block) != num_blocks or min(layers_per_block) < 1:
            raise ValueError(
                f"`num_layers` must be a positive integer, or one such for each of the {num_blocks} flow blocks"
                f" (`num_blocks`), but is {num_layers}."
            )
        choices = {
            "activation_fn": (activation_fn, ACTIVATION_FNS),
            "position_embedding": (position_embedding, POSITION_EMBEDDINGS),
            "noise_type": (noise_type, NOISE_TYPES),
        }
        for name, (choice, known) in choices.items():
            if choice not in known:
                raise ValueError(f"`{name}` must be one of {known}, but is {choice!r}.")
        if position_embedding == "rope" and attention_head_dim % 4 != 0:
            raise ValueError(
                "`attention_head_dim` must be a multiple of 4 for `position_embedding='rope'`, which turns pairs in"
                f" each half of a head, but is {attention_head_dim}."
            )
        if not mlp_ratio > 0:
            raise ValueError(f"`mlp_ratio` must be positive, but is {mlp_ratio}.")
        if not noise_std >= 0:
            raise ValueError(f"`noise_std` must not be negative, but is {noise_std}.")

        self._check_inverse_profile(inverse_profile, (sample_size // patch_size) ** 2, layers_per_block)

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
        self.gradient_checkpointing = False

    def patchify(self, sample: torch.Tensor) -> torch.Tensor:
        """`(batch_size, channels, height, width)` to tokens `(batch_size, num_tokens, token_dim)` in raster order; a
        token's values are ordered by channel, row and column. Raises ValueError for a sample of another shape."""
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if sample.ndim != 4 or tuple(sample.shape[1:]) != expected:
            raise ValueError(
                f"`sample` must have shape (batch_size, {expected[0]}, {expected[1]}, {expected[2]}), as in this"
                f" model's config, but has shape {tuple(sample.shape)}. Resize images first; a latent model takes what"
                " its VAE's encoder returns."
            )
        # Densities need float32, whatever the dtype of the weights.
        weight_dtype = self.blocks[0].proj_in.weight.dtype
        dtype = torch.promote_types(torch.promote_types(sample.dtype, weight_dtype), torch.float32)
        return F.pixel_unshuffle(sample.to(dtype), config.patch_size).flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of [`~TarFlowTransformer2DModel.patchify`]."""
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
        return_dict: bool = True,
    ) -> TarFlowOutput | tuple:
        r"""
        Data to latents in one parallel pass or, with `inverse=True`, latents to data by one of three solvers.

        A flow block is inverted by finding the one `u` that is `m(u) + exp(a(u)) z`. `"sequential"` computes its
        tokens one after another. `"jacobi"` sweeps over a window of tokens at once, each from what the sweep before
        made of those before it: after `k` sweeps the first `k` tokens are exact, and as many more as no longer change;
        the window moves on over those. `"auto"` takes for each block the one that should be faster.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                Images in [-1, 1], or VAE latents already multiplied by the VAE's `scaling_factor`; with
                `inverse=True` the flow's latents.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Class indices; -1 is no class, as is `None` for the whole batch: the mean of the class table. A float
                tensor of shape `(batch_size, num_classes)` holds class weights instead and receives gradients.
            output_hidden_states (iterable of `(block, layer)`, *optional*):
                Places, numbered from 1 and from the image side, whose hidden states are returned. Forward only.
            blocks (iterable of `int`, *optional*):
                The flow blocks to apply, numbered from 1, in their own order: ascending forward, descending with
                `inverse=True`. All by default.
            inverse (`bool`, defaults to `False`): Latents to data. No gradient flows through it.
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance, diffusers' convention: 1.0 is off. Inverse only, as are all that follow.
            guidance_rule (`str`, defaults to `"linear"`): `"linear"` or `"product"`, see [`apply_guidance`].
            guidance_schedule (`str`, defaults to `"constant"`):
                `"linear"` anneals: token `i` of the block's own order is guided by `w i / (num_tokens - 1)`.
            guidance_temperature (`float`, defaults to 1.0):
                Divides the attention logits of the weak branch. It is what guides an unconditional model.
            solver (`str`, defaults to `"auto"`):
                `"sequential"`: exact to rounding, `num_tokens - 1` network evaluations a block. `"jacobi"`: exact to
                `tolerance`, at most as many evaluations, each of a whole window. `"auto"`: by batch size, device, the
                number of tokens and the config's `inverse_profile`; without one it sweeps where that can pay and goes
                on token by token where the first sweeps do not settle enough.
            tolerance (`float`, *optional*):
                A sweep settles the tokens up to the first that it changes in any value by more than
                `0.01 * tolerance * max(1, |u|)`, and that one, which was computed from those before it. Default: 1e-5
                in float32, 1e-10 in float64. On trained flows the sample is then within `tolerance` of the sequential
                one. That cannot be promised: what is left of an error, and rounding, are multiplied by later tokens
                and blocks, without bound in a flow that is ill-conditioned. 0 can: tokens are then settled when a
                sweep repeats all before them to the bit, which `num_tokens - 1` sweeps bring about on any flow.
            window_size (`int`, *optional*):
                Tokens of a Jacobi sweep, from 1 to `num_tokens`. Default: by the profile, or what doubles the time of
                a sweep of one.
            output_report (`bool`, defaults to `False`): Return a [`TarFlowInverseReport`], at the cost of one forward.
            return_dict (`bool`, defaults to `True`):
                Otherwise a tuple `(sample, log_abs_det[, hidden_states][, report])`.
        Returns:
            [`TarFlowOutput`] or `tuple`. All in float32, or float64 for a float64 model or sample.
        Raises:
            ValueError: for a shape, a number or a name that does not fit the model. Labels themselves are not looked
                at, so that the whole model compiles into one graph: [`FlowBackPipeline`] checks them.
        """
        self._check_class_labels(class_labels, len(sample))
        numbers = self._check_blocks(blocks)
        options = InverseOptions(guidance_scale, guidance_rule, guidance_schedule, guidance_temperature)
        self._check_guidance(options, inverse)
        self._check_solver(solver, tolerance, window_size, output_report, inverse)
        places = [] if output_hidden_states is None else self._check_places(output_hidden_states, numbers, inverse)

        tokens = latents = self.patchify(sample)
        log_abs_det = tokens.new_zeros(len(tokens))
        hidden_states, solvers, sweeps = {}, {}, {}
        if inverse:
            tolerance = DEFAULT_TOLERANCES[tokens.dtype] if tolerance is None else tolerance
            options = replace(options, tolerance=tolerance)
            for number in reversed(numbers):
                block_options = self._choose_solver(number, options, solver, window_size, tokens)
                tokens, log_scale, _, sweeps[number] = self.blocks[number - 1](
                    tokens, class_labels, inverse=True, options=block_options
                )
                solvers[number] = "jacobi" if block_options.window_size else "sequential"
                log_abs_det = log_abs_det + log_scale.sum(dim=(1, 2))
        else:
            for number in numbers:
                layers = [layer for block, layer in places if block == number]
                tokens, log_scale, _, block_hidden_states = self.blocks[number - 1](tokens, class_labels, layers)
                log_abs_det = log_abs_det - log_scale.sum(dim=(1, 2))
                hidden_states.update({(number, layer): states for layer, states in block_hidden_states.items()})

        report = None
        if output_report:
            evaluations = {number: max(each.tolist(), default=0) for number, each in sweeps.items()}
            residual = self._certify(tokens, latents, class_labels, numbers, options)
            report = TarFlowInverseReport(solvers, sweeps, evaluations, residual)
        output = TarFlowOutput(self.unpatchify(tokens), log_abs_det, hidden_states or None, report)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def _certify(
        self,
        tokens: torch.Tensor,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        numbers: Iterable[int],
        options: InverseOptions,
    ) -> torch.Tensor:
        """The largest `|f(x) - z|` of each sample, `f` guided."""
        for number in numbers:
            tokens = self.blocks[number - 1](tokens, class_labels, options=options)[0]
        return (tokens - latents).abs().amax(dim=(1, 2))

    def _choose_solver(
        self, number: int, options: InverseOptions, solver: str, window_size: int | None, tokens: torch.Tensor
    ) -> InverseOptions:
        """The options with which a block is inverted."""
        num_steps = tokens.shape[1] - 1
        if solver == "sequential" or num_steps < 2:
            return options
        rows = len(tokens) * (1 if options.guidance_scale == 1.0 else 2)
        costs = STEP_COSTS.get(tokens.device.type, STEP_COSTS["cpu"])[self.blocks[number - 1].steps_are_compiled]
        token_cost = costs.token + rows * costs.token_row

        profile = self.config.inverse_profile
        if profile is not None:
            options = replace(options, initial_guess=profile["initial_guesses"][number - 1])
        if profile is not None and window_size is None:
            block_costs = {
                size: sweeps * (costs.sweep + size * rows)
                for size, sweeps in zip(profile["window_sizes"], profile["sweeps"][number - 1])
            }
            best = min(block_costs, key=block_costs.get)
            pays = block_costs[best] <= (1 - JACOBI_MUST_SAVE) * num_steps * token_cost
            return replace(options, window_size=best) if pays or solver == "jacobi" else options

        if window_size is None:
            window_size = max(4, 2 ** round(math.log2(max(costs.sweep / rows, 1))))
        options = replace(options, window_size=min(window_size, num_steps))
        if solver == "jacobi":
            return options
        # As many tokens have to be settled in a sweep as can be taken one by one in its time. A sweep settles half of
        # its window at best: where that is too few, there is nothing to try.
        least_pace = (costs.sweep + options.window_size * rows) / token_cost / (1 - JACOBI_MUST_SAVE)
        tries = least_pace <= options.window_size / 2
        return replace(options, least_pace=least_pace) if tries else replace(options, window_size=0)

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

        What it finds is a property of the flow and its guidance, not of the device: it is registered as the config's
        `inverse_profile`, saved with the model, and weighed against the costs of whatever device samples.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                Noise; four samples are plenty.
            class_labels, guidance_scale, guidance_rule, guidance_schedule, guidance_temperature, tolerance:
                As in [`~TarFlowTransformer2DModel.forward`], and as they will be in use.
        Returns:
            `dict`: `num_tokens` and `num_layers`, which tell whose profile it is; `window_sizes`; from block 1 on
            `initial_guesses` and the mean `sweeps` for each window size; the guidance and tolerance measured with.
        Raises:
            ValueError: as [`~TarFlowTransformer2DModel.forward`].

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
        self._check_class_labels(class_labels, len(latents))
        options = InverseOptions(guidance_scale, guidance_rule, guidance_schedule, guidance_temperature)
        self._check_guidance(options, inverse=True)
        self._check_solver("jacobi", tolerance, None, output_report=False, inverse=True)
        tokens = self.patchify(latents)
        tolerance = DEFAULT_TOLERANCES[tokens.dtype] if tolerance is None else tolerance
        num_tokens = tokens.shape[1]
        window_sizes = sorted({min(size, max(num_tokens - 1, 1)) for size in PROFILE_WINDOW_SIZES})
        initial_guesses, sweeps = [], []
        for block in logging.tqdm(list(reversed(self.blocks)), desc="Profiling the inverse"):
            found = {}
            for initial_guess in INITIAL_GUESSES:
                found[initial_guess] = []
                for window_size in window_sizes:
                    block_options = replace(
                        options, tolerance=tolerance, window_size=window_size, initial_guess=initial_guess
                    )
                    data, _, _, block_sweeps = block(tokens, class_labels, inverse=True, options=block_options)
                    found[initial_guess].append(block_sweeps.float().mean().item())
            tokens = data
            best = min(INITIAL_GUESSES, key=lambda initial_guess: sum(found[initial_guess]))
            initial_guesses.insert(0, best)
            sweeps.insert(0, found[best])
        profile = {
            "num_tokens": num_tokens,
            "num_layers": [len(block.layers) for block in self.blocks],
            "window_sizes": window_sizes,
            "initial_guesses": initial_guesses,
            "sweeps": sweeps,
            "guidance_scale": guidance_scale,
            "guidance_rule": guidance_rule,
            "guidance_schedule": guidance_schedule,
            "guidance_temperature": guidance_temperature,
            "tolerance": tolerance,
        }
        self.register_to_config(inverse_profile=profile)
        return profile

    def compile_repeated_blocks(self, *args, **kwargs):
        """
        Compile what runs again and again: the layers, and the steps of the inverse's solvers, each of them whole.

        Takes the arguments of `torch.compile`. On a CPU sampling is fastest with `freezing` and `max_autotune` set in
        `torch._inductor.config` (as `options` of a call they come too late for `freezing`); every flow block then has
        graphs of its own, for which `torch._dynamo.config.recompile_limit` has to make room.
        """
        super().compile_repeated_blocks(*args, **kwargs)
        for block in self.blocks:
            block.compile_steps(*args, **kwargs)

    def log_prob(self, sample: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        r"""
        Exact log-density of `sample`: `log N(z; 0, I) + log |det dz/dsample|`, where `z` are its latents.

        Args:
            sample, class_labels: As in [`~TarFlowTransformer2DModel.forward`].
        Returns:
            `torch.Tensor` of shape `(batch_size,)`: nats, summed (not averaged) over the `D = in_channels *
            sample_size^2` dimensions; float32, or float64 for a float64 model. The model is trained on noised data,
            and this is the density of that, not of clean images.
        Raises:
            ValueError: as [`~TarFlowTransformer2DModel.forward`].
        """
        output = self(sample, class_labels)
        latents = output.sample.flatten(1)
        return -0.5 * (latents.square() + math.log(2 * math.pi)).sum(dim=1) + output.log_abs_det

    def _check_class_labels(self, class_labels: torch.Tensor | None, batch_size: int):
        if class_labels is None:
            return
        num_classes = self.config.num_classes
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

    def _check_blocks(self, blocks: Iterable[int] | None) -> list[int]:
        num_blocks = len(self.blocks)
        if blocks is None:
            return list(range(1, num_blocks + 1))
        numbers = sorted(blocks)
        if len(set(numbers)) != len(numbers) or not all(1 <= number <= num_blocks for number in numbers):
            raise ValueError(f"`blocks` must be different numbers from 1 to {num_blocks}, but are {numbers}.")
        return numbers

    def _check_places(
        self, places: Iterable[tuple[int, int]], numbers: list[int], inverse: bool
    ) -> list[tuple[int, int]]:
        places = list(places)
        if inverse and places:
            raise ValueError("`output_hidden_states` cannot be combined with `inverse=True`: ask the forward.")
        for block, layer in places:
            if block not in numbers or not 1 <= layer <= len(self.blocks[block - 1].layers):
                raise ValueError(
                    f"`output_hidden_states` asks for layer {layer} of flow block {block}, but the blocks that run are"
                    f" {numbers}, with {[len(self.blocks[number - 1].layers) for number in numbers]} layers."
                )
        return places

    @staticmethod
    def _check_inverse_profile(profile: dict[str, Any] | None, num_tokens: int, num_layers: list[int]):
        if profile is None:
            return
        found = (profile.get("num_tokens"), profile.get("num_layers"))
        if found != (num_tokens, num_layers):
            raise ValueError(
                f"`inverse_profile` must be of this architecture, {num_tokens} tokens and {num_layers} layers in the"
                f" blocks, but is of {found[0]} tokens and {found[1]} layers. Measure it with `profile_inverse`, or"
                " leave it out."
            )

    def _check_solver(
        self, solver: str, tolerance: float | None, window_size: int | None, output_report: bool, inverse: bool
    ):
        if solver not in SOLVERS:
            raise ValueError(f"`solver` must be one of {SOLVERS}, but is {solver!r}.")
        is_number = isinstance(tolerance, (int, float))
        if tolerance is not None and not (is_number and 0 <= tolerance < math.inf):  # NaN is refused too
            raise ValueError(f"`tolerance` must be a number from 0, which is exact, or None, but is {tolerance!r}.")
        num_tokens = (self.config.sample_size // self.config.patch_size) ** 2
        if window_size is not None and not 1 <= window_size <= num_tokens:
            raise ValueError(
                f"`window_size` must be from 1 to this model's {num_tokens} tokens, but is {window_size}."
            )
        if window_size is not None and solver == "sequential":
            raise ValueError(
                f"`window_size` is of `solver='jacobi'` and `'auto'`, but is {window_size} with `'sequential'`."
            )
        if not inverse and (solver, tolerance, window_size, output_report) != ("auto", None, None, False):
            raise ValueError(
                "`solver`, `tolerance`, `window_size` and `output_report` are of an inverse, but `inverse` is False."
            )

    def _check_guidance(self, options: InverseOptions, inverse: bool):
        guidance_scale, guidance_rule = options.guidance_scale, options.guidance_rule
        guidance_schedule, guidance_temperature = options.guidance_schedule, options.guidance_temperature
        if not guidance_scale >= 1.0:  # NaN is refused too
            raise ValueError(f"`guidance_scale` must be at least 1.0, which is off, but is {guidance_scale}.")
        if guidance_rule not in GUIDANCE_RULES:
            raise ValueError(f"`guidance_rule` must be one of {GUIDANCE_RULES}, but is {guidance_rule!r}.")
        if guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"`guidance_schedule` must be one of {GUIDANCE_SCHEDULES}, but is {guidance_schedule!r}.")
        if not guidance_temperature > 0:
            raise ValueError(f"`guidance_temperature` must be positive, but is {guidance_temperature}.")
        if guidance_scale == 1.0:
            return
        if not inverse:
            raise ValueError(
                f"`guidance_scale` must be 1.0 with `inverse=False`, but is {guidance_scale}: guidance changes how"
                " latents become data, not the density of the data."
            )
        if self.config.num_classes is None and guidance_temperature == 1.0:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale} and `guidance_temperature` 1.0, but this model is unconditional"
                " and guides itself: give its weak branch another temperature."
            )
