"""Other arrangements of the reverse alignment, which the package's own is measured against and tested with."""

import math

import torch
from baselines import embed_classes, predict_next

from flowback_hf import AlignedFlowObjective
from flowback_hf.alignment.objective import standardize_over_patches
from flowback_hf.models.transformer_tarflow import TarFlowBlock
from flowback_hf.places import Place, place_name


def two_evaluation_loss(
    objective: AlignedFlowObjective,
    noisy_sample: torch.Tensor,
    class_labels: torch.Tensor,
    teacher_features: torch.Tensor,
) -> torch.Tensor:
    """
    The loss of the strategy `"reverse"` by two evaluations of every block that the alignment reaches: the likelihood
    pass is one ordinary graph; the alignment evaluates its blocks again, each on a leaf, and finds its cotangents
    there.
    """
    flow = objective.flow
    nll, states = likelihood_pass(objective, noisy_sample, class_labels)

    losses, inner_products = [], []
    cotangent = torch.zeros_like(states[-1])
    for number in range(min(block for block, _ in objective.places), len(flow.blocks) + 1):
        layers = [layer for block, layer in objective.places if block == number]
        block_input = states[number - 1].detach().requires_grad_()
        output = flow.blocks[number - 1](block_input, class_labels, layers)
        log_scale, shift, hidden_states = output.log_scale, output.shift, output.hidden_states
        scaled_latents = (block_input - shift).detach()
        for layer in layers:
            leaf = hidden_states[layer].detach().requires_grad_()
            loss = mean_negative_cosine(objective, (number, layer), leaf, teacher_features)
            losses.append(loss)
            (states_cotangent,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            inner_products.append((states_cotangent * hidden_states[layer]).sum())
            (carried,) = torch.autograd.grad(hidden_states[layer], block_input, states_cotangent, retain_graph=True)
            cotangent = cotangent + carried
        neumann_cotangent = cotangent
        for _ in range(objective.num_neumann_terms):
            cotangents = neumann_cotangent * scaled_latents, neumann_cotangent
            (carried,) = torch.autograd.grad((log_scale, shift), block_input, cotangents, retain_graph=True)
            neumann_cotangent = cotangent + carried
        inner_products.append((neumann_cotangent * (scaled_latents * log_scale + shift)).sum())
        cotangent = torch.exp(log_scale.detach()) * neumann_cotangent
    surrogate = sum(inner_products) / len(losses)
    return nll + objective.weight * (sum(losses) / len(losses) + surrogate - surrogate.detach())


def sequential_loss(
    objective: AlignedFlowObjective,
    noisy_sample: torch.Tensor,
    class_labels: torch.Tensor,
    teacher_features: torch.Tensor,
) -> torch.Tensor:
    """The loss of the strategy `"reverse"` as the paper defines it."""
    nll, states = likelihood_pass(objective, noisy_sample, class_labels)
    alignment = sequential_alignment(objective, states[-1].detach(), class_labels, teacher_features)
    return nll + objective.weight * alignment


def sequential_alignment(
    objective: AlignedFlowObjective, latents: torch.Tensor, class_labels: torch.Tensor, teacher_features: torch.Tensor
) -> torch.Tensor:
    """
    The alignment on a generative pass, token by token with a key/value cache, that is kept whole as one graph down to
    the lowest aligned block.
    """
    tokens, losses = latents, []
    for number in range(len(objective.flow.blocks), min(block for block, _ in objective.places) - 1, -1):
        tokens, hidden_states = differentiable_inverse(objective.flow.blocks[number - 1], tokens, class_labels)
        for block, layer in objective.places:
            if block == number:
                states = hidden_states[layer - 1]
                losses.append(mean_negative_cosine(objective, (block, layer), states, teacher_features))
    return sum(losses) / len(losses)


def likelihood_pass(
    objective: AlignedFlowObjective, noisy_sample: torch.Tensor, class_labels: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`-log p / D` as one graph, and the tokens between the blocks: data first, latents last."""
    states, nll = [objective.flow.patchify(noisy_sample)], 0.0
    for block in objective.flow.blocks:
        output = block(states[-1], class_labels)
        states.append(output.tokens)
        nll = nll + output.log_scale.mean()
    return nll + 0.5 * (states[-1].square().mean() + math.log(2 * math.pi)), states


def differentiable_inverse(
    block: TarFlowBlock, latents: torch.Tensor, class_labels: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents to data token by token; returns the data and the hidden states of every layer, in raster order."""

    def permute(states: torch.Tensor) -> torch.Tensor:
        return states.flip(1) if block.reverse_order else states

    conditioning = permute(block.pos_embed.unsqueeze(0) + embed_classes(block, class_labels))
    latents = permute(latents)
    caches = [([], []) for _ in block.layers]
    tokens, layer_states = [latents[:, :1]], [[] for _ in block.layers]
    for position in range(latents.shape[1]):
        log_scale, shift, states = predict_next(
            block, tokens[position], conditioning[:, position : position + 1], caches
        )
        for collected, state in zip(layer_states, states):
            collected.append(state)
        if position + 1 < latents.shape[1]:
            following = latents[:, position + 1 : position + 2]
            tokens.append(shift.unsqueeze(1) + torch.exp(log_scale.unsqueeze(1)) * following)
    return permute(torch.cat(tokens, dim=1)), [permute(torch.cat(states, dim=1)) for states in layer_states]


def mean_negative_cosine(
    objective: AlignedFlowObjective, place: Place, hidden_states: torch.Tensor, teacher_features: torch.Tensor
) -> torch.Tensor:
    projected = objective.projectors[place_name(place)](hidden_states)
    if objective.normalize_teacher_features:
        teacher_features = standardize_over_patches(teacher_features)
    return -torch.cosine_similarity(projected, teacher_features, dim=-1).mean()
