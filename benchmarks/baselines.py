"""What the benchmarks measure the package against."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from flowback_hf.models.transformer_tarflow import (
    TarFlowAttention,
    TarFlowBlock,
    TarFlowTransformer2DModel,
)


# The keys and the values of a layer: one tensor a token, or one of a module's tokens and all before it.
KeyValueCache = tuple[list[torch.Tensor], list[torch.Tensor]]
ModuleCache = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def published_token_loop(
    model: TarFlowTransformer2DModel, latents: torch.Tensor, class_labels: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """
    Latents to data as TARFlow's sampling is published, with this model's weights: flow blocks from the last to the
    first, token by token, for each layer a list of every token's keys and values that is copied at every
    token, and the conditional and the unconditional network called one after the other, each with its own lists.

    Args:
        model ([`TarFlowTransformer2DModel`]): A class-conditional model.
        latents (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): Noise.
        class_labels (`torch.LongTensor` of shape `(batch_size,)`): Class indices; -1 is no class.
        guidance_scale (`float`): 1.0 is off. Linear guidance, constant over the sequence.
    Returns:
        `torch.Tensor` of the shape of `latents`.

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, https://arxiv.org/abs/2412.06329
    """
    return invert_blocks(model, latents, class_labels, guidance_scale, lambda number, *block: invert_block(*block))


def invert_blocks(
    model: TarFlowTransformer2DModel,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    guidance_scale: float,
    invert: Callable[[int, TarFlowBlock, torch.Tensor, list[torch.Tensor], float], torch.Tensor],
) -> torch.Tensor:
    """Flow blocks from the last to the first, each by `invert(number, block, latents, conditionings, weight)` in its
    own token order; the second conditioning, where there is one, is that of the unguided branch."""
    no_class = torch.full_like(class_labels, -1)
    tokens = model.patchify(latents)
    for number, block in reversed(list(enumerate(model.blocks, start=1))):
        is_reversed = number % 2 == 0
        positions = block.pos_embed.flip(0) if is_reversed else block.pos_embed
        conditionings = [positions + embed_classes(block, class_labels)]
        if guidance_scale != 1.0:
            conditionings.append(positions + embed_classes(block, no_class))
        tokens = tokens.flip(1) if is_reversed else tokens
        tokens = invert(number, block, tokens, conditionings, guidance_scale - 1.0)
        tokens = tokens.flip(1) if is_reversed else tokens
    return model.unpatchify(tokens)


def embed_classes(block: TarFlowBlock, class_labels: torch.Tensor) -> torch.Tensor:
    """`(batch_size, 1, width)`; no class is the mean of the table."""
    has_class = (class_labels >= 0).unsqueeze(1)
    classes = torch.where(has_class, block.class_embed[class_labels.clamp(min=0)], block.class_embed.mean(dim=0))
    return classes.unsqueeze(1)


def invert_block(
    block: TarFlowBlock, latents: torch.Tensor, conditionings: list[torch.Tensor], weight: float
) -> torch.Tensor:
    """One flow block, in its own token order: `u_i = m_i(u_<i) + exp(a_i(u_<i)) z_i`."""
    tokens = latents.clone()
    caches = [[([], []) for _ in block.layers] for _ in conditionings]
    for position in range(latents.shape[1] - 1):
        token = tokens[:, position : position + 1]
        log_scale, shift, _ = predict_next(block, token, conditionings[0][:, position : position + 1], caches[0])
        if len(conditionings) > 1:
            conditioning = conditionings[1][:, position : position + 1]
            log_scale_u, shift_u, _ = predict_next(block, token, conditioning, caches[1])
            log_scale = log_scale + weight * (log_scale - log_scale_u)
            shift = shift + weight * (shift - shift_u)
        tokens[:, position + 1] = shift + torch.exp(log_scale) * latents[:, position + 1]
    return tokens


def predict_next(
    block: TarFlowBlock, token: torch.Tensor, conditioning: torch.Tensor, caches: list[KeyValueCache]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Log-scale and shift of the token after `token`, whose keys and values are added to `caches`, and the hidden
    states of `token` after every layer."""
    hidden_states = block.proj_in(token) + conditioning
    collected = []
    for layer, cache in zip(block.layers, caches):
        hidden_states = hidden_states + attend(layer.attn, layer.norm1(hidden_states), cache)
        hidden_states = hidden_states + layer.ff(layer.norm2(hidden_states))
        collected.append(hidden_states)
    return *block.proj_out(hidden_states)[:, 0].chunk(2, dim=-1), collected


def attend(attention: TarFlowAttention, hidden_states: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    # (batch_size, 3, heads, 1, head_dim)
    states = attention.to_qkv(hidden_states).unflatten(-1, (3, attention.heads, attention.head_dim))
    query, key, value = states.permute(0, 2, 3, 1, 4).unbind(dim=1)
    keys, values = cache
    keys.append(key)
    values.append(value)
    hidden_states = F.scaled_dot_product_attention(query, torch.cat(keys, dim=2), torch.cat(values, dim=2))
    return attention.to_out[0](hidden_states.transpose(1, 2).flatten(2))


@torch.no_grad()
def selective_jacobi_decoding(
    model: TarFlowTransformer2DModel,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    guidance_scale: float,
    tolerance: float,
) -> torch.Tensor:
    """
    SeJD: the block next to the noise token by token, each other one by Jacobi sweeps over the whole sequence, from
    zeros and without a cache, until no value of the batch changes by `tolerance`. Arguments and result otherwise as of
    [`published_token_loop`].

    Reference: Accelerating Inference of Normalizing Flow Models via Selective Jacobi Decoding,
    https://arxiv.org/abs/2505.24791
    """

    def invert(number, block, latents, conditionings, weight):
        if number == len(model.blocks):
            return invert_block(block, latents, conditionings, weight)
        sweep = partial(sweep_module, block, latents, conditionings, weight, [[] for _ in conditionings], 0)
        return sweep_until(largest, tolerance, sweep, torch.zeros_like(latents))[0]

    return invert_blocks(model, latents, class_labels, guidance_scale, invert)


@dataclass
class GSJacobiRecipe:
    """Of each block, from block 1: how many modules its sequence is cut into, and whether sweeps start from zeros."""

    num_modules: list[int]
    from_zeros: list[bool]


@torch.no_grad()
def gs_jacobi(
    model: TarFlowTransformer2DModel,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    guidance_scale: float,
    tolerance: float,
    recipe: GSJacobiRecipe,
) -> torch.Tensor:
    """
    GS-Jacobi: sequences are cut into modules; Jacobi sweeps inside a module until its change, root mean square over
    the whole batch, is below `tolerance`; its keys and values are then kept for the modules after it. Arguments and
    result otherwise as of [`published_token_loop`].

    Reference: Accelerate TarFlow Sampling with GS-Jacobi Iteration, https://arxiv.org/abs/2505.12849
    """

    def invert(number, block, latents, conditionings, weight):
        num_tokens = latents.shape[1]
        tokens = torch.zeros_like(latents) if recipe.from_zeros[number - 1] else latents.clone()
        tokens[:, 0] = latents[:, 0]
        caches = [[] for _ in conditionings]
        # Token 0 is known: modules are of those that follow it.
        for positions in torch.arange(1, num_tokens).chunk(recipe.num_modules[number - 1]):
            start, stop = positions[0].item() - 1, positions[-1].item() + 1
            module_conditionings = [each[:, start:stop] for each in conditionings]
            sweep = partial(sweep_module, block, latents[:, start:stop], module_conditionings, weight, caches, start)
            tokens[:, start:stop], _ = sweep_until(root_mean_square, tolerance, sweep, tokens[:, start:stop])
            caches = [
                predict_module(block, tokens[:, start : stop - 1], conditioning[:, : stop - 1 - start], cache)[2]
                for conditioning, cache in zip(module_conditionings, caches)
            ]
        return tokens

    return invert_blocks(model, latents, class_labels, guidance_scale, invert)


@torch.no_grad()
def calibrate_gs_jacobi(
    model: TarFlowTransformer2DModel,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    guidance_scale: float,
    tolerance: float,
    num_modules: int = 8,
) -> GSJacobiRecipe:
    """
    The recipe, from a few samples: each block starts from what one sweep brings nearer to its solution (the initial
    guessing metric), and the block that takes most sweeps (the convergence ranking) is cut into modules. The ranking
    is by the sweeps themselves, which the published metric estimates.
    """
    sweeps, from_zeros = {}, {}

    def invert(number, block, latents, conditionings, weight):
        solution = invert_block(block, latents, conditionings, weight)
        sweep = partial(sweep_module, block, latents, conditionings, weight, [[] for _ in conditionings], 0)
        guesses = {False: latents, True: torch.zeros_like(latents)}
        errors = {is_zeros: largest(sweep(guess) - solution) for is_zeros, guess in guesses.items()}
        from_zeros[number] = bool(errors[True] < errors[False])
        _, sweeps[number] = sweep_until(root_mean_square, tolerance, sweep, guesses[from_zeros[number]])
        return solution

    invert_blocks(model, latents, class_labels, guidance_scale, invert)
    toughest = max(sweeps, key=sweeps.get)
    numbers = range(1, len(model.blocks) + 1)
    return GSJacobiRecipe(
        num_modules=[num_modules if number == toughest else 1 for number in numbers],
        from_zeros=[from_zeros[number] for number in numbers],
    )


def largest(values: torch.Tensor) -> torch.Tensor:
    return values.abs().max()


def root_mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean().sqrt()


def sweep_until(
    measure: Callable[[torch.Tensor], torch.Tensor],
    tolerance: float,
    sweep: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, int]:
    """Sweeps until what `measure` says of a change is below `tolerance`, or as often as there are tokens.
    Returns the tokens, and the number of sweeps."""
    for number in range(1, tokens.shape[1] + 1):
        swept = sweep(tokens)
        change, tokens = swept - tokens, swept
        if measure(change) < tolerance:
            break
    return tokens, number


def sweep_module(
    block: TarFlowBlock,
    latents: torch.Tensor,
    conditionings: list[torch.Tensor],
    weight: float,
    caches: list[list[ModuleCache]],
    start: int,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """`u <- m(u) + exp(a(u)) z` for all but the first of `tokens`, number `start` of the sequence, which is known."""
    predictions = [
        predict_module(block, tokens[:, :-1], conditioning[:, :-1], cache)[:2]
        for conditioning, cache in zip(conditionings, caches)
    ]
    log_scale, shift = predictions[0]
    if len(predictions) > 1:
        log_scale = log_scale + weight * (log_scale - predictions[1][0])
        shift = shift + weight * (shift - predictions[1][1])
    first = latents[:, :1] if start == 0 else tokens[:, :1]
    return torch.cat([first, shift + torch.exp(log_scale) * latents[:, 1:]], dim=1)


def predict_module(
    block: TarFlowBlock,
    tokens: torch.Tensor,
    conditioning: torch.Tensor,
    caches: list[ModuleCache],
) -> tuple[torch.Tensor, torch.Tensor, list[ModuleCache]]:
    """Log-scale and shift of the token after each of `tokens`, and the keys and values of every layer with theirs."""
    hidden_states = block.proj_in(tokens) + conditioning
    extended = []
    for number, layer in enumerate(block.layers):
        attention = layer.attn
        states = attention.to_qkv(layer.norm1(hidden_states)).unflatten(-1, (3, attention.heads, attention.head_dim))
        query, keys, values = states.permute(0, 2, 3, 1, 4).unbind(dim=1)
        if caches:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(caches[number], (keys, values)))
        extended.append((keys, values))
        num_before = keys.shape[2] - query.shape[2]
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril(num_before)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        hidden_states = hidden_states + attention.to_out[0](attended.transpose(1, 2).flatten(2))
        hidden_states = hidden_states + layer.ff(layer.norm2(hidden_states))
    return *block.proj_out(hidden_states).chunk(2, dim=-1), extended
