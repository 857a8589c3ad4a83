"""What the benchmarks measure the package against."""

import torch
import torch.nn.functional as F

from flowback_hf.models.transformer_tarflow import (
    TarFlowAttention,
    TarFlowBlock,
    TarFlowTransformer2DModel,
)


# The keys and the values of a layer, one tensor a token.
KeyValueCache = tuple[list[torch.Tensor], list[torch.Tensor]]


@torch.no_grad()
def published_token_loop(
    model: TarFlowTransformer2DModel, latents: torch.Tensor, class_labels: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """
    Latents to data as TARFlow's sampling is published, with this model's weights: flow blocks from the last to the
    first, token by token, for each layer a list of every token's keys and values that is concatenated anew at every
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
    no_class = torch.full_like(class_labels, -1)
    tokens = model.patchify(latents)
    for number, block in reversed(list(enumerate(model.blocks, start=1))):
        is_reversed = number % 2 == 0
        positions = block.pos_embed.flip(0) if is_reversed else block.pos_embed
        conditionings = [positions + embed_classes(block, class_labels)]
        if guidance_scale != 1.0:
            conditionings.append(positions + embed_classes(block, no_class))
        tokens = tokens.flip(1) if is_reversed else tokens
        tokens = invert_block(block, tokens, conditionings, guidance_scale - 1.0)
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
