# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import BaseOutput

from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel


STRATEGIES = ("none", "forward", "detach", "reverse")

Place = tuple[int, int]


@dataclass
class AlignedFlowOutput(BaseOutput):
    """
    The output of [`AlignedFlowObjective`]. All tensors are scalars.

    Args:
        loss: `nll + weight * alignment`, whose `backward()` is all a caller needs.
        nll: `-log p(x | y) / D`, the mean over the batch, in nats per dimension.
        alignment: `-cos(teacher features, projected hidden states)`, the mean over places, batch and patches, in
            [-1, 1]; `None` for the strategy `"none"`.
        cosine_similarity: `{(block, layer): mean cosine}`, in [-1, 1].
        max_log_scale: The largest absolute log-scale of any block: how far the flow is from overflowing.
        neumann_growth: `{block: |v| / |g|}`, what the Neumann series of `"reverse"` makes of a block's gradient.
    """

    loss: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    alignment: torch.Tensor | None = None
    cosine_similarity: dict[Place, torch.Tensor] | None = None
    max_log_scale: torch.Tensor | None = None
    neumann_growth: dict[int, torch.Tensor] | None = None


class AlignedFlowObjective(nn.Module):
    r"""
    Likelihood of a flow, plus alignment of its hidden states with a frozen teacher's patch features `v`:

        loss = nll + weight * L_align,   L_align = -mean over places, batch, patches of cos(v, Proj(h^(t, l)))

    The four strategies have the same value and differ in where the gradient of `L_align^(t)` goes:

        "none"     nowhere
        "forward"  through the likelihood pass: blocks 1..t
        "detach"   block t alone, whose input is detached; what the paper's Algorithm 2 computes
        "reverse"  through the generative pass from the detached latents: blocks t..N

    **Reverse.** The generative pass computes a block's input `u` as the fixed point of `G(u, z) = m(u) + exp(a(u)) z`.
    For a cotangent `g` on `u`, the implicit function theorem gives

        v = g + J^T v,  J = dG/du        d/dz = exp(a) v        d/dtheta = (dG/dtheta)^T v

    `J` is strictly lower triangular in token order, so the Neumann series `v = sum_k (J^T)^k g` ends after
    `num_tokens` terms and is then exact: the gradient of the sequential pass, without one. `order` is the number of
    terms after the first.

    The flow's weights and the projectors' are this module's parameters: it is what an optimizer, Accelerate and DDP
    get. The teacher is not part of it. Under `no_grad` the values are computed and no gradient is.

    Args:
        flow ([`TarFlowTransformer2DModel`]): The flow to train.
        strategy (`str`, defaults to `"reverse"`): `"none"`, `"forward"`, `"detach"` or `"reverse"`.
        places (iterable of `(block, layer)`): Where to align, numbered from 1 and from the image side.
        order (`int` or `"exact"`, *optional*): For `"reverse"` alone: 0, 1, ... or `num_tokens - 1`. `None` is 0.
        weight (`float`, defaults to 0.1): lambda, the weight of the alignment.
        teacher_dim (`int`): Dimension of the teacher's features.
        projector_dim (`int`, defaults to 1024): Hidden dimension of the projectors, MLPs of three layers with SiLU.

    Raises:
        ValueError: for an unknown strategy, a place outside the flow, or an order that does not fit the strategy.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel

        >>> flow = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, in_channels=1, num_blocks=2, num_layers=2, num_attention_heads=2,
        ...     attention_head_dim=16, num_classes=10,
        ... )
        >>> objective = AlignedFlowObjective(flow, places=[(2, 1)], teacher_dim=24, projector_dim=32)
        >>> output = objective(torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]), torch.randn(4, 16, 24))
        >>> output.loss.backward()
        >>> list(output.cosine_similarity)
        [(2, 1)]
        ```

    References: Flowing Backwards: Improving Normalizing Flows via Reverse Representation Alignment,
    https://arxiv.org/abs/2511.22345 (its section 3); implicit gradients as in Bai et al., Deep Equilibrium Models,
    https://arxiv.org/abs/1909.01377
    """

    def __init__(
        self,
        flow: TarFlowTransformer2DModel,
        strategy: str = "reverse",
        places: Iterable[Place] | None = None,
        order: int | str | None = None,
        weight: float = 0.1,
        teacher_dim: int | None = None,
        projector_dim: int = 1024,
    ):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {STRATEGIES}, but is {strategy!r}.")
        if strategy != "reverse" and order is not None:
            raise ValueError(f"`order` belongs to the strategy 'reverse' alone, but is {order!r} for {strategy!r}.")
        self.flow = flow
        self.strategy = strategy
        self.weight = weight
        self.places: list[Place] = []
        self.num_neumann_terms = 0
        self.projectors = nn.ModuleDict()
        if strategy == "none":
            return

        self.places = check_places(flow, places)
        if strategy == "reverse":
            self.num_neumann_terms = check_order(flow, order)
        if teacher_dim is None:
            raise ValueError(f"`teacher_dim` must be given for the strategy {strategy!r}: it is the teacher's width.")
        width = flow.config.num_attention_heads * flow.config.attention_head_dim
        for place in self.places:
            self.projectors[projector_name(place)] = nn.Sequential(
                nn.Linear(width, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, teacher_dim),
            )

    def forward(
        self,
        noisy_sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
    ) -> AlignedFlowOutput:
        """
        Args:
            noisy_sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                What the flow is trained on: data in [-1, 1] plus noise.
            class_labels: As in [`TarFlowTransformer2DModel.forward`]; label dropout is the caller's, who writes -1.
            teacher_features (`torch.Tensor` of shape `(batch_size, num_tokens, teacher_dim)`):
                Features of the clean images on the flow's token grid, raster order. Not needed for `"none"`.
        Returns:
            [`AlignedFlowOutput`].
        Raises:
            ValueError: if `teacher_features` are missing or of another shape.
        """
        tokens = self.flow.patchify(noisy_sample)
        self._check_teacher_features(teacher_features, tokens)
        # The hidden states have the same values in every strategy: without gradients the likelihood pass has them all.
        shares_pass = self.strategy == "forward" or not torch.is_grad_enabled()

        block_inputs, log_scales, hidden_states = [], [], {}
        for number, block in enumerate(self.flow.blocks, start=1):
            block_inputs.append(tokens)
            layers = self._aligned_layers(number) if shares_pass else ()
            tokens, log_scale, _, block_hidden_states = block(tokens, class_labels, layers)
            log_scales.append(log_scale)
            hidden_states.update({(number, layer): states for layer, states in block_hidden_states.items()})
        # -log p / D: log|det| is -sum a, and the mean over tokens and values is that sum divided by D.
        nll = 0.5 * (tokens.square().mean() + math.log(2 * math.pi)) + sum(a.mean() for a in log_scales)
        max_log_scale = torch.stack([a.detach().abs().amax() for a in log_scales]).amax()
        if self.strategy == "none":
            return AlignedFlowOutput(loss=nll, nll=nll, max_log_scale=max_log_scale)

        # What has the alignment's gradient with respect to the flow's parameters, and the value zero.
        surrogate, neumann_growth = 0.0, None
        if self.strategy == "reverse" and not shares_pass:
            cosines, surrogate, neumann_growth = self._reverse(block_inputs, tokens, class_labels, teacher_features)
        else:
            if self.strategy == "detach" and not shares_pass:
                hidden_states = self._detached_hidden_states(block_inputs, class_labels)
            cosines = {
                place: self._cosine(place, hidden_states[place], teacher_features).mean() for place in self.places
            }
        alignment = -torch.stack(list(cosines.values())).mean()
        return AlignedFlowOutput(
            loss=nll + self.weight * (alignment + surrogate),
            nll=nll,
            alignment=alignment,
            cosine_similarity={place: cosine.detach() for place, cosine in cosines.items()},
            max_log_scale=max_log_scale,
            neumann_growth=neumann_growth,
        )

    def _aligned_layers(self, number: int) -> list[int]:
        return [layer for block, layer in self.places if block == number]

    def _cosine(self, place: Place, hidden_states: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
        """Cosine similarity of every patch, `(batch_size, num_tokens)`."""
        projected = self.projectors[projector_name(place)](hidden_states.to(self._projector_dtype))
        dtype = torch.promote_types(projected.dtype, torch.float32)
        return F.cosine_similarity(projected.to(dtype), teacher_features.to(dtype), dim=-1)

    @property
    def _projector_dtype(self) -> torch.dtype:
        return next(self.projectors.parameters()).dtype

    def _detached_hidden_states(
        self, block_inputs: list[torch.Tensor], class_labels: torch.Tensor | None
    ) -> dict[Place, torch.Tensor]:
        hidden_states = {}
        for number in sorted({block for block, _ in self.places}):
            *_, block_hidden_states = self.flow.blocks[number - 1](
                block_inputs[number - 1].detach(), class_labels, self._aligned_layers(number)
            )
            hidden_states.update({(number, layer): states for layer, states in block_hidden_states.items()})
        return hidden_states

    def _reverse(
        self,
        block_inputs: list[torch.Tensor],
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        teacher_features: torch.Tensor,
    ) -> tuple[dict[Place, torch.Tensor], torch.Tensor, dict[int, torch.Tensor]]:
        """
        The alignment through the generative pass, on a second evaluation of the blocks that its gradient reaches.

        The cotangents are found here, from the lowest aligned block towards the latents, against the direction of the
        generative pass: every value they need is at hand. What is left for the caller's `backward()` are the
        parameters, which the cotangents reach through an ordinary graph that enters no other block.

        Returns:
            `tuple`: the mean cosine of each place, whose graph reaches its projector alone; the surrogate; and the
            growth of each block's gradient.
        """
        block_outputs = [*block_inputs[1:], latents]
        cosines, inner_products, neumann_growth = {}, [], {}
        cotangent = torch.zeros_like(latents)
        for number in range(min(block for block, _ in self.places), len(self.flow.blocks) + 1):
            layers = self._aligned_layers(number)
            block_input = block_inputs[number - 1].detach().requires_grad_()
            _, log_scale, shift, block_hidden_states = self.flow.blocks[number - 1](block_input, class_labels, layers)
            # exp(a) z, which is also dG/da
            scale = torch.exp(log_scale.detach())
            scaled_latents = scale * block_outputs[number - 1].detach()

            for layer in layers:
                states = block_hidden_states[layer]
                detached_states = states.detach().requires_grad_()
                cosine = self._cosine((number, layer), detached_states, teacher_features)
                (states_cotangent,) = torch.autograd.grad(-cosine.sum(), detached_states, retain_graph=True)
                cosines[number, layer] = cosine.mean()
                (input_cotangent,) = torch.autograd.grad(states, block_input, states_cotangent, retain_graph=True)
                cotangent = cotangent + input_cotangent
                inner_products.append((states_cotangent * states).sum())

            # v = g + J^T v, one term of the Neumann series at a time
            neumann_cotangent = cotangent
            for _ in range(self.num_neumann_terms):
                (carried,) = torch.autograd.grad(
                    (log_scale, shift),
                    block_input,
                    (neumann_cotangent * scaled_latents, neumann_cotangent),
                    retain_graph=True,
                )
                neumann_cotangent = cotangent + carried
            neumann_growth[number] = neumann_cotangent.norm() / cotangent.norm()
            inner_products.append((neumann_cotangent * (scaled_latents * log_scale + shift)).sum())
            cotangent = scale * neumann_cotangent

        # The cotangents are those of a sum over places, batch and patches, which half precision holds better.
        surrogate = sum(inner_products) / (len(self.places) * latents.shape[0] * latents.shape[1])
        return cosines, surrogate - surrogate.detach(), neumann_growth

    def _check_teacher_features(self, teacher_features: torch.Tensor | None, tokens: torch.Tensor):
        if self.strategy == "none":
            return
        teacher_dim = self.projectors[projector_name(self.places[0])][-1].out_features
        expected = (*tokens.shape[:2], teacher_dim)
        if teacher_features is None or tuple(teacher_features.shape) != expected:
            given = "None" if teacher_features is None else f"of shape {tuple(teacher_features.shape)}"
            raise ValueError(
                f"`teacher_features` must have shape {expected}, (batch_size, num_tokens, teacher_dim), but are"
                f" {given}. RepresentationTeacher makes them, with `grid_size=sample_size // patch_size`."
            )


def projector_name(place: Place) -> str:
    block, layer = place
    return f"block{block}_layer{layer}"


def check_places(flow: TarFlowTransformer2DModel, places: Iterable[Place] | None) -> list[Place]:
    """The places as a list. Raises ValueError if there are none, if one is named twice or lies outside the flow."""
    places = [tuple(place) for place in places or []]
    layers_per_block = [len(block.layers) for block in flow.blocks]
    if not places or len(set(places)) != len(places):
        raise ValueError(f"`places` must hold at least one (block, layer), each of them once, but are {places}.")
    for block, layer in places:
        if not 1 <= block <= len(layers_per_block):
            raise ValueError(
                f"`places` names flow block {block}, but this flow's blocks are 1 (image) to {len(layers_per_block)}"
                " (noise)."
            )
        if not 1 <= layer <= layers_per_block[block - 1]:
            raise ValueError(
                f"`places` names layer {layer} of flow block {block}, but its layers are 1 to"
                f" {layers_per_block[block - 1]}."
            )
    return places


def check_order(flow: TarFlowTransformer2DModel, order: int | str | None) -> int:
    """The number of Neumann terms after the first. Raises ValueError for an order that is neither that nor "exact"."""
    if order == "exact":
        return (flow.config.sample_size // flow.config.patch_size) ** 2 - 1
    if order is None:
        return 0
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise ValueError(f"`order` must be 0, 1, 2, ... or 'exact', but is {order!r}.")
    return order
