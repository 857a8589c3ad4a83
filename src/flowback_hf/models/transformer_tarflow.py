# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is uploaded with the weights of a model that loads without the package: it needs torch and diffusers only.

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput


GUIDANCE_RULES = ("linear", "product")
GUIDANCE_SCHEDULES = ("constant", "linear")
NOISE_TYPES = ("gaussian", "uniform")
ACTIVATION_FNS = ("gelu", "swiglu")
POSITION_EMBEDDINGS = ("learned", "rope")
ROTARY_BASE = 10_000.0


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
    """

    sample: torch.Tensor | None = None
    log_abs_det: torch.Tensor | None = None
    hidden_states: dict[tuple[int, int], torch.Tensor] | None = None


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
    cosine, sine = rotary[:, :, None, None]
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return rotated.flatten(-2).to(states.dtype)


class TarFlowAttnProcessor:
    """Causal self-attention, over a whole sequence or of its next token to those in a key/value cache."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "TarFlowAttention",
        hidden_states: torch.Tensor,
        rotary: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        key_value_cache: torch.Tensor | None = None,
        position: int = 0,
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
            key_value_cache[:, :, :, position : position + 1] = states[:, 0, 1:].unsqueeze(3)
            # One query at the end of the cache sees all of it; a causal kernel would align it with the start. Backends
            # made for long sequences have nothing to gain here, and choosing one takes as long as a small product.
            keys, values = key_value_cache[:, :, :, : position + 1].unbind(dim=1)
            attended = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values).transpose(1, 2)
        return attn.to_out[0](attended.flatten(2, 3).to(query.dtype))


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
        key_value_cache: torch.Tensor | None = None,
        position: int = 0,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary, temperature, key_value_cache, position)


class TarFlowLayer(nn.Module):
    """
    A pre-norm causal transformer layer.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, width)`):
            All tokens of the sequence, or its token number `position` alone where a `key_value_cache` is given.
        rotary (`torch.Tensor` of shape `(2, num_tokens, head_dim / 2)`, *optional*):
            What [`rotary_embedding`] gives for the tokens of `hidden_states`, in their order.
        temperature (`torch.Tensor` of shape `(batch_size, 1, 1, 1)`, *optional*):
            Divides the attention logits, sample by sample.
        key_value_cache (`torch.Tensor` of shape `(batch_size, 2, heads, num_tokens, head_dim)`, *optional*):
            Keys and values of the tokens before `position`; those of this token are written into it.
        position (`int`): 0-based number of the token in the sequence. Without a cache it has no meaning.
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
        key_value_cache: torch.Tensor | None = None,
        position: int = 0,
    ) -> torch.Tensor:
        attended = self.attn(self.norm1(hidden_states), rotary, temperature, key_value_cache, position)
        hidden_states = hidden_states + attended
        return hidden_states + self.ff(self.norm2(hidden_states))


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

    def forward(
        self,
        tokens: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        output_hidden_states: Collection[int] = (),
        inverse: bool = False,
        guidance_scale: float = 1.0,
        guidance_rule: str = "linear",
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """
        Args:
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`):
                The block's input; with `inverse=True` its latents.
            class_labels: As in [`TarFlowTransformer2DModel.forward`].
            output_hidden_states (collection of `int`): 1-based layers whose outputs are returned. Forward only.
            inverse (`bool`): Latents to data. No gradient flows through it.
            guidance_scale, guidance_rule, guidance_schedule, guidance_temperature:
                As in [`TarFlowTransformer2DModel.forward`]. Inverse only.
        Returns:
            `tuple`: latents (data with `inverse=True`), log-scale `a` and shift `m`, each in raster order and shaped
            as `tokens`, then a `dict` of layer to hidden states `(batch_size, num_tokens, width)`, in raster order.
        """
        tokens = self._permute(tokens)
        if inverse:
            tokens, log_scale, shift = self._invert(
                tokens, class_labels, guidance_scale, guidance_rule, guidance_schedule, guidance_temperature
            )
            hidden_states = {}
        else:
            log_scale, shift, hidden_states = self._predict(tokens, class_labels, output_hidden_states)
            tokens = (tokens - shift) * torch.exp(-log_scale)
        hidden_states = {layer: self._permute(states) for layer, states in hidden_states.items()}
        return self._permute(tokens), self._permute(log_scale), self._permute(shift), hidden_states

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

    def _conditioning(self, class_labels: torch.Tensor | None) -> torch.Tensor:
        """What is added to the embedded tokens: `(1 or batch_size, num_tokens, width)`, in the block's own order."""
        if self.pos_embed is None:
            conditioning = self.proj_in.weight.new_zeros(1, self.grid_size**2, self.proj_in.out_features)
        else:
            conditioning = self._permute(self.pos_embed).unsqueeze(0)
        if self.class_embed is None:
            return conditioning
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
        return conditioning + class_embedding.to(conditioning.dtype).unsqueeze(1)

    def _predict(
        self, tokens: torch.Tensor, class_labels: torch.Tensor | None, output_hidden_states: Collection[int]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """Log-scale and shift of every token at once, each from the tokens before it."""
        hidden_states = self.proj_in(tokens.to(self.proj_in.weight.dtype)) + self._conditioning(class_labels)
        rotary = self._rotary()
        collected = {}
        for number, layer in enumerate(self.layers, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, rotary)
            else:
                hidden_states = layer(hidden_states, rotary)
            if number in output_hidden_states:
                collected[number] = hidden_states
        # What is read off token i belongs to token i + 1: shifted right by one, so that the first token gets zeros.
        prediction = F.pad(self.proj_out(hidden_states)[:, :-1], (0, 0, 1, 0)).to(tokens.dtype)
        log_scale, shift = prediction.chunk(2, dim=-1)
        return log_scale, shift, collected

    @torch.no_grad()
    def _invert(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        guidance_scale: float,
        guidance_rule: str,
        guidance_schedule: str,
        guidance_temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token by token, each exactly; the guided and the unguided branch are the two halves of one batch."""
        batch_size, num_tokens, _ = latents.shape
        guided = guidance_scale != 1.0
        temperature = None
        conditioning = self._conditioning(class_labels).expand(batch_size, -1, -1)
        if guided:
            weak_conditioning = self._conditioning(None).expand(batch_size, -1, -1)
            conditioning = torch.cat([conditioning, weak_conditioning])
            if guidance_temperature != 1.0:
                temperature = conditioning.new_ones(2 * batch_size, 1, 1, 1)
                temperature[batch_size:] = guidance_temperature
        rotary = self._rotary()
        key_value_caches = self._allocate_key_value_caches(conditioning)

        tokens = torch.zeros_like(latents)
        log_scale = torch.zeros_like(latents)
        shift = torch.zeros_like(latents)
        tokens[:, 0] = latents[:, 0]
        for position in range(num_tokens - 1):
            token = tokens[:, position : position + 1].to(self.proj_in.weight.dtype)
            if guided:
                token = token.repeat(2, 1, 1)
            hidden_states = self.proj_in(token) + conditioning[:, position : position + 1]
            token_rotary = None if rotary is None else rotary[:, position : position + 1]
            for layer, key_value_cache in zip(self.layers, key_value_caches):
                hidden_states = layer(hidden_states, token_rotary, temperature, key_value_cache, position)
            next_log_scale, next_shift = self.proj_out(hidden_states)[:, 0].to(latents.dtype).chunk(2, dim=-1)

            following = position + 1
            if guided:
                # w of the papers, 0 is off; annealed, it grows from 0 at the first token to w at the last.
                weight = guidance_scale - 1.0
                if guidance_schedule == "linear":
                    weight = weight * following / (num_tokens - 1)
                next_log_scale, next_shift = apply_guidance(next_log_scale, next_shift, weight, guidance_rule)
            log_scale[:, following] = next_log_scale
            shift[:, following] = next_shift
            tokens[:, following] = next_shift + torch.exp(next_log_scale) * latents[:, following]
        return tokens, log_scale, shift

    def _allocate_key_value_caches(self, conditioning: torch.Tensor) -> list[torch.Tensor]:
        """One `(batch_size, 2, heads, num_tokens, head_dim)` a layer, in the dtype of its projections."""
        batch_size, num_tokens, _ = conditioning.shape
        device_type, dtype = conditioning.device.type, conditioning.dtype
        if torch.is_autocast_enabled(device_type) and dtype == torch.float32:  # autocast leaves float64 alone
            dtype = torch.get_autocast_dtype(device_type)
        shapes = [(batch_size, 2, layer.attn.heads, num_tokens, layer.attn.head_dim) for layer in self.layers]
        return [conditioning.new_empty(shape, dtype=dtype) for shape in shapes]


def apply_guidance(
    log_scale: torch.Tensor, shift: torch.Tensor, weight: float, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Classifier-free guidance of one affine autoregressive step, weight `w` (0 is off):

        linear:  a = a_c + w (a_c - a_u),  m = m_c + w (m_c - m_u)
        product: p_c^(1+w) / p_u^w of the Gaussians N(m, exp(a)^2), clipped at sigma_c = sigma_u so that it stays a
                 density: with s = min(sigma_c / sigma_u, 1)^2 and q = 1 + w - w s,
                 sigma = sigma_c / sqrt(q),  m = ((1 + w) m_c - w s m_u) / q

    Args:
        log_scale, shift (`torch.Tensor` of shape `(2 * batch_size, token_dim)`):
            `a` and `m` of the conditional branch, then of the weak one.
        weight (`float`): `w >= 0`, diffusers' `guidance_scale` less 1.
        rule (`str`): `"linear"` (TARFlow, https://arxiv.org/abs/2412.06329) or `"product"` (STARFlow,
            https://arxiv.org/abs/2506.06276).
    Returns:
        `tuple` of `torch.Tensor` of shape `(batch_size, token_dim)`: guided log-scale and shift.
    """
    log_scale_c, log_scale_u = log_scale.chunk(2)
    shift_c, shift_u = shift.chunk(2)
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
        return_dict: bool = True,
    ) -> TarFlowOutput | tuple:
        r"""
        Data to latents in one parallel pass or, with `inverse=True`, latents to data token by token.

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
            inverse (`bool`, defaults to `False`):
                Latents to data: exact to rounding, `num_tokens - 1` network evaluations a block. No gradient flows
                through it.
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance, diffusers' convention: 1.0 is off. Inverse only, as are the next three.
            guidance_rule (`str`, defaults to `"linear"`): `"linear"` or `"product"`, see [`apply_guidance`].
            guidance_schedule (`str`, defaults to `"constant"`):
                `"linear"` anneals: token `i` of the block's own order is guided by `w i / (num_tokens - 1)`.
            guidance_temperature (`float`, defaults to 1.0):
                Divides the attention logits of the weak branch. It is what guides an unconditional model.
            return_dict (`bool`, defaults to `True`): Otherwise a tuple `(sample, log_abs_det[, hidden_states])`.
        Returns:
            [`TarFlowOutput`] or `tuple`. All in float32, or float64 for a float64 model or sample.
        Raises:
            ValueError: for a shape, a number or a name that does not fit the model. Labels themselves are not looked
                at, so that the whole model compiles into one graph: [`FlowBackPipeline`] checks them.
        """
        self._check_class_labels(class_labels, len(sample))
        numbers = self._check_blocks(blocks)
        guidance = {
            "guidance_scale": guidance_scale,
            "guidance_rule": guidance_rule,
            "guidance_schedule": guidance_schedule,
            "guidance_temperature": guidance_temperature,
        }
        self._check_guidance(inverse=inverse, **guidance)
        places = [] if output_hidden_states is None else self._check_places(output_hidden_states, numbers, inverse)

        tokens = self.patchify(sample)
        log_abs_det = tokens.new_zeros(len(tokens))
        hidden_states = {}
        for number in reversed(numbers) if inverse else numbers:
            layers = [layer for block, layer in places if block == number]
            tokens, log_scale, _, block_hidden_states = self.blocks[number - 1](
                tokens, class_labels, layers, inverse=inverse, **guidance
            )
            block_log_abs_det = log_scale.sum(dim=(1, 2))
            log_abs_det = log_abs_det + block_log_abs_det if inverse else log_abs_det - block_log_abs_det
            hidden_states.update({(number, layer): states for layer, states in block_hidden_states.items()})

        output = TarFlowOutput(self.unpatchify(tokens), log_abs_det, hidden_states or None)
        return output if return_dict else output.to_tuple()

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

    def _check_guidance(
        self,
        inverse: bool,
        guidance_scale: float,
        guidance_rule: str,
        guidance_schedule: str,
        guidance_temperature: float,
    ):
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
