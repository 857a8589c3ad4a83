# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The training objective of a flow: its likelihood, and the alignment of its hidden states with a frozen teacher."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch.autograd.function import once_differentiable

from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel, check_class_labels
from flowback_hf.places import Place, check_places, place_name
from flowback_hf_cli.numbers import check_number


STRATEGIES = ("none", "forward", "detach", "reverse")
PROJECTOR_TYPES = ("mlp", "conv")

STANDARDIZE_EPSILON = 1e-6


@dataclass
class AlignedFlowOutput(BaseOutput):
    """
    The output of [`AlignedFlowObjective`]. All tensors are scalars.

    Args:
        loss: `nll + weight * alignment`. Its `backward()` computes all gradients.
        nll: `-log p(x | y) / D`, averaged over the batch, in nats per dimension.
        alignment: `-cos(teacher features, projected hidden states)`, averaged over places, batch and patches, in
            [-1, 1]. `None` for the strategy `"none"`.
        cosine_similarity: `{(block, layer): mean cosine}`, in [-1, 1].
        max_log_scale: The largest absolute log-scale of any block. It shows how close the flow is to overflowing.
        neumann_growth: `{block: |v| / |g|}`: the factor by which the Neumann series of `"reverse"` changes the norm of
            a block's gradient.
    """

    loss: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    alignment: torch.Tensor | None = None
    cosine_similarity: dict[Place, torch.Tensor] | None = None
    max_log_scale: torch.Tensor | None = None
    neumann_growth: dict[int, torch.Tensor] | None = None


def vector_jacobian_product(
    outputs: Sequence[torch.Tensor], inputs: torch.Tensor, cotangents: Sequence[torch.Tensor]
) -> torch.Tensor:
    """
    Return the gradient that `inputs` receives if `outputs` receive `cotangents`.

    Gradients of parameters are not computed here, so the graph is kept for them. Autocast is off, as in any backward
    pass: operations run in the dtypes of the forward pass.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)[0]


class LikelihoodGradient(torch.autograd.Function):
    """
    Passes the likelihood's gradient from a block that was evaluated on a leaf to the blocks before it.

    The likelihood's cotangents arrive at this function. It passes them to the block's outputs, where autograd adds the
    alignment's cotangents on the way to the block's parameters. For the blocks before, it computes a vector-Jacobian
    product of the likelihood's cotangents only. The alignment therefore never reaches those blocks. This is exact in
    any precision: the alignment's gradient is not added first and subtracted later.
    """

    @staticmethod
    def forward(ctx, tokens, block_input, latents, log_scale):
        ctx.save_for_backward(block_input, latents, log_scale)
        return latents.view_as(latents), log_scale.view_as(log_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, latents_cotangent, log_scale_cotangent):
        block_input, *outputs = ctx.saved_tensors
        cotangents = latents_cotangent, log_scale_cotangent
        tokens_cotangent = None
        if ctx.needs_input_grad[0]:
            tokens_cotangent = vector_jacobian_product(outputs, block_input, cotangents)
        return tokens_cotangent, None, *cotangents


@dataclass
class FixedPoint:
    """
    A block's generative pass, `u = G(u, z) = m(u) + exp(a(u)) z`, with the values of its likelihood pass.

    `z` is held fixed.

    Args:
        block_input (`torch.Tensor` of shape `(batch_size, num_tokens, token_dim)`): `u`, a leaf of the graph.
        log_scale, shift (`torch.Tensor` of the same shape): `a` and `m`.
    """

    block_input: torch.Tensor
    log_scale: torch.Tensor
    shift: torch.Tensor

    @property
    def scaled_latents(self) -> torch.Tensor:
        """Return `exp(a) z = u - m`, which is also `dG/da`."""
        return (self.block_input - self.shift).detach()

    def transposed_jacobian_product(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Return `J^T w`, where `J = dG/du` and `w` is the cotangent."""
        cotangents = cotangent * self.scaled_latents, cotangent
        return vector_jacobian_product((self.log_scale, self.shift), self.block_input, cotangents)

    def inner_product(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Return a scalar whose gradient with respect to the block's parameters is `(dG/dtheta)^T w`."""
        return (cotangent * (self.scaled_latents * self.log_scale + self.shift)).sum()


class ConvProjector(nn.Module):
    """
    A convolution of 3x3 tokens, with zeros around the grid, as in iREPA.

    Args:
        width (`int`): Of the hidden states.
        teacher_dim (`int`): Of the teacher's features.
    """

    def __init__(self, width: int, teacher_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(width, teacher_dim, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Turn `(batch_size, num_tokens, width)`, tokens of a square in raster order, into teacher_dim channels."""
        grid_size = math.isqrt(hidden_states.shape[1])
        grid = hidden_states.transpose(1, 2).unflatten(2, (grid_size, grid_size))
        return self.conv(grid).flatten(2).transpose(1, 2)


def make_projector(projector_type: str, width: int, projector_dim: int, teacher_dim: int) -> nn.Module:
    """A module from hidden states `(batch_size, num_tokens, width)` to `(batch_size, num_tokens, teacher_dim)`."""
    if projector_type == "conv":
        return ConvProjector(width, teacher_dim)
    return nn.Sequential(
        nn.Linear(width, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, teacher_dim),
    )


def standardize_over_patches(teacher_features: torch.Tensor) -> torch.Tensor:
    """
    Give every channel mean 0 and standard deviation 1 over the patches of an image, as in iREPA.

    What all patches of an image share is gone then; what is left says how they differ.

    Args:
        teacher_features (`torch.Tensor` of shape `(batch_size, num_tokens, teacher_dim)`): Patch features.
    """
    features = teacher_features.to(torch.promote_types(teacher_features.dtype, torch.float32))
    mean, deviation = features.mean(dim=1, keepdim=True), features.std(dim=1, correction=0, keepdim=True)
    return (features - mean) / (deviation + STANDARDIZE_EPSILON)


class AlignedFlowObjective(nn.Module):
    r"""
    The likelihood of a flow, plus the alignment of its hidden states with a frozen teacher's patch features `v`:

        loss = nll + weight * L_align,   L_align = -mean over places, batch, patches of cos(v, Proj(h^(t, l)))

    The strategies have the same value. They differ in the blocks that the gradient of `L_align^(t)` reaches:

        "none"     no block
        "forward"  blocks 1..t, through the likelihood pass
        "detach"   block t only, because its input is detached; what the paper's Algorithm 2 computes
        "reverse"  blocks t..N, through the generative pass from the detached latents

    **Reverse.** The generative pass computes a block's input `u` as the fixed point of `G(u, z) = m(u) + exp(a(u)) z`.
    For a cotangent `g` on `u`, the implicit function theorem gives

        v = g + J^T v,  J = dG/du        d/dz = exp(a) v        d/dtheta = (dG/dtheta)^T v

    `J` is strictly lower triangular in token order, so the Neumann series `v = sum_k (J^T)^k g` ends after
    `num_tokens` terms. It is then the exact gradient of the sequential pass, which is never run. `order` is the number
    of terms after the first.

    **Cost.** Every block is evaluated once. In the blocks that both gradients reach and that must not pass on the
    alignment's (block t for `"detach"`, blocks t..N for `"reverse"`), the input is a leaf, and `backward()` computes
    one more vector-Jacobian product for the blocks before. A plain training step costs 3 forward passes of every
    block. In units of one block's forward pass, `"detach"` adds 1 for each of its blocks and `"reverse"` adds
    `1 + order`, and each place adds `l / num_layers`. For the paper's places (7, 6) and (8, 6) in 8 blocks of 8
    layers, order 0 adds a seventh of a step.

    **Use.** The flow's weights and the projectors' are this module's parameters. Give it to the optimizer, to
    Accelerate and to DDP. The teacher is not part of it. Under `no_grad`, only values are computed. To compile the
    layers (`flow.compile_repeated_blocks()`), set `torch._functorch.config.donated_buffer = False`, because several
    gradients are taken of one graph. A compiled layer computes its parameters' gradients each time. In the blocks with
    a leaf input, this may cost more than compiling saves.

    Args:
        flow ([`TarFlowTransformer2DModel`]): The flow to train.
        strategy (`str`, defaults to `"reverse"`): `"none"`, `"forward"`, `"detach"` or `"reverse"`.
        places (iterable of `(block, layer)`): Where to align. Blocks and layers are numbered from 1, blocks from the
            image side. Ignored for `"none"`.
        order (`int` or `"exact"`, *optional*): For `"reverse"` only: 0, 1, ..., or `"exact"`, which is
            `num_tokens - 1`. `None` is 0.
        weight (`float`, defaults to 0.1): lambda, the weight of the alignment.
        teacher_dim (`int`): Dimension of the teacher's features. Ignored for `"none"`.
        projector_dim (`int`, defaults to 1024): Hidden dimension of the MLP projectors. `"conv"` has none.
        projector_type (`str`, defaults to `"conv"`):
            `"conv"`, one convolution of 3x3 tokens, as in iREPA, or `"mlp"`, three linear layers with SiLU on each
            token, as in the paper.
        normalize_teacher_features (`bool`, defaults to `True`):
            Whether to standardize the teacher's features over the patches of each image, as in iREPA. The paper does
            not.

    Raises:
        ValueError: for an unknown strategy or projector, a place outside the flow, an order that does not fit the
            strategy, or a number that is out of its range.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel

        >>> flow = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, in_channels=1, num_blocks=2, num_layers=2, num_attention_heads=2,
        ...     attention_head_dim=16, num_classes=10,
        ... )
        >>> objective = AlignedFlowObjective(flow, places=[(2, 1)], teacher_dim=24)
        >>> output = objective(torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]), torch.randn(4, 16, 24))
        >>> output.loss.backward()
        >>> list(output.cosine_similarity)
        [(2, 1)]
        ```

    References: Flowing Backwards: Improving Normalizing Flows via Reverse Representation Alignment,
    https://arxiv.org/abs/2511.22345 (its section 3); implicit gradients as in Bai et al., Deep Equilibrium Models,
    https://arxiv.org/abs/1909.01377; iREPA, https://arxiv.org/abs/2512.10794
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
        projector_type: str = "conv",
        normalize_teacher_features: bool = True,
    ):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {STRATEGIES}, but is {strategy!r}.")
        if strategy != "reverse" and order is not None:
            raise ValueError(f"`order` is for the strategy 'reverse' only, but is {order!r} for {strategy!r}.")
        if projector_type not in PROJECTOR_TYPES:
            raise ValueError(f"`projector_type` must be one of {PROJECTOR_TYPES}, but is {projector_type!r}.")
        check_number("weight", weight, float, at_least=0.0)
        self.flow = flow
        self.strategy = strategy
        self.weight = weight
        self.normalize_teacher_features = normalize_teacher_features
        self.places: list[Place] = []
        # The blocks whose input is a leaf of the graph. Both gradients reach them, but only the likelihood's gradient
        # goes on to the blocks before.
        self.leaf_blocks: list[int] = []
        self.num_neumann_terms = 0
        self.projectors = nn.ModuleDict()
        if strategy == "none":
            return

        self.places = check_places(places, [len(block.layers) for block in flow.blocks])
        aligned_blocks = sorted({block for block, _ in self.places})
        if strategy == "detach":
            self.leaf_blocks = aligned_blocks
        if strategy == "reverse":
            self.leaf_blocks = list(range(aligned_blocks[0], len(flow.blocks) + 1))
            self.num_neumann_terms = check_order(flow, order)
        if teacher_dim is None:
            raise ValueError(
                f"`teacher_dim`, the dimension of the teacher's features, must be given for {strategy!r}."
            )
        check_number("teacher_dim", teacher_dim, int, at_least=1)
        check_number("projector_dim", projector_dim, int, at_least=1)
        self.teacher_dim = teacher_dim
        width = flow.config.num_attention_heads * flow.config.attention_head_dim
        for place in self.places:
            self.projectors[place_name(place)] = make_projector(projector_type, width, projector_dim, teacher_dim)

    @property
    def model(self) -> TarFlowTransformer2DModel:
        """What is trained: the flow."""
        return self.flow

    def forward(
        self,
        noisy_sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
    ) -> AlignedFlowOutput:
        """
        Compute the loss of a batch.

        Args:
            noisy_sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                What the flow is trained on: data in [-1, 1] plus noise.
            class_labels: As in [`TarFlowTransformer2DModel.forward`]. To drop a label, set it to -1.
            teacher_features (`torch.Tensor` of shape `(batch_size, num_tokens, teacher_dim)`):
                Features of the clean images on the flow's token grid, in raster order. Ignored for `"none"`.
        Returns:
            [`AlignedFlowOutput`].
        Raises:
            ValueError: if `teacher_features` are missing or of another shape, or labels do not fit the flow.
        """
        tokens = self.flow.patchify(noisy_sample)
        check_class_labels(class_labels, len(tokens), self.flow.config.num_classes)
        self._check_teacher_features(teacher_features, tokens)
        if self.normalize_teacher_features and self.places:
            teacher_features = standardize_over_patches(teacher_features)

        fixed_points: dict[int, FixedPoint] = {}
        log_scales, hidden_states = [], {}
        for number, block in enumerate(self.flow.blocks, start=1):
            is_leaf = torch.is_grad_enabled() and number in self.leaf_blocks
            block_input = tokens.detach().requires_grad_() if is_leaf else tokens
            output = block(block_input, class_labels, self._aligned_layers(number))
            hidden_states.update({(number, layer): states for layer, states in output.hidden_states.items()})
            log_scale = output.log_scale
            if is_leaf:
                fixed_points[number] = FixedPoint(block_input, log_scale, output.shift)
                tokens, log_scale = LikelihoodGradient.apply(tokens, block_input, output.tokens, log_scale)
            else:
                tokens = output.tokens
            log_scales.append(log_scale)
        # -log p / D, where log|det| = -sum a. The mean over tokens and values is the sum divided by D.
        nll = 0.5 * (tokens.square().mean() + math.log(2 * math.pi)) + sum(a.mean() for a in log_scales)
        max_log_scale = torch.stack([a.detach().abs().amax() for a in log_scales]).amax()
        if self.strategy == "none":
            return AlignedFlowOutput(loss=nll, nll=nll, max_log_scale=max_log_scale)

        neumann_growth = None
        if self.strategy == "reverse" and torch.is_grad_enabled():
            alignment, cosines, neumann_growth = self._reverse_alignment(fixed_points, hidden_states, teacher_features)
        else:
            cosines = {
                place: self._cosine(place, hidden_states[place], teacher_features).mean() for place in self.places
            }
            alignment = -torch.stack(list(cosines.values())).mean()
        return AlignedFlowOutput(
            loss=nll + self.weight * alignment,
            nll=nll,
            alignment=alignment,
            cosine_similarity={place: cosine.detach() for place, cosine in cosines.items()},
            max_log_scale=max_log_scale,
            neumann_growth=neumann_growth,
        )

    def _aligned_layers(self, number: int) -> list[int]:
        return [layer for block, layer in self.places if block == number]

    def _cosine(self, place: Place, hidden_states: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
        """Return the cosine similarity of every patch, `(batch_size, num_tokens)`."""
        projector = self.projectors[place_name(place)]
        projected = projector(hidden_states.to(next(projector.parameters()).dtype))
        dtype = torch.promote_types(projected.dtype, torch.float32)
        return F.cosine_similarity(projected.to(dtype), teacher_features.to(dtype), dim=-1)

    def _reverse_alignment(
        self,
        fixed_points: dict[int, FixedPoint],
        hidden_states: dict[Place, torch.Tensor],
        teacher_features: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[Place, torch.Tensor], dict[int, torch.Tensor]]:
        """
        Compute the alignment, with its gradient through the generative pass.

        This method computes the cotangents of all block outputs, from the lowest aligned block towards the latents,
        against the direction of the generative pass. The likelihood pass has computed every value it needs. The
        caller's `backward()` computes the gradients of the parameters: those of the inner product of a block's outputs
        with their cotangents.

        Returns:
            `tuple`: the alignment, the mean cosine of each place, and `neumann_growth` of [`AlignedFlowOutput`].
        """
        cosines, inner_products, neumann_growth = {}, [], {}
        cotangent = 0.0
        for number, fixed_point in fixed_points.items():
            for layer in self._aligned_layers(number):
                states = hidden_states[number, layer]
                # The projector has its own graph. Its parameters get their gradients from the cosine, those of the
                # flow from the inner products.
                detached_states = states.detach().requires_grad_()
                cosine = self._cosine((number, layer), detached_states, teacher_features)
                cosines[number, layer] = cosine.mean()
                # Cotangents of the sum over places, batch and patches: those of the mean would be too small for half
                # precision.
                states_cotangent = -vector_jacobian_product([cosine], detached_states, [torch.ones_like(cosine)])
                cotangent = cotangent + vector_jacobian_product([states], fixed_point.block_input, [states_cotangent])
                dtype = torch.promote_types(states.dtype, torch.float32)
                inner_products.append((states_cotangent.to(dtype) * states.to(dtype)).sum())

            # v = g + J^T v, repeated once for each term of the Neumann series
            neumann_cotangent = cotangent
            for _ in range(self.num_neumann_terms):
                neumann_cotangent = cotangent + fixed_point.transposed_jacobian_product(neumann_cotangent)
            inner_products.append(fixed_point.inner_product(neumann_cotangent))
            neumann_growth[number] = neumann_cotangent.norm() / cotangent.norm()
            cotangent = torch.exp(fixed_point.log_scale.detach()) * neumann_cotangent  # d/dz = exp(a) v

        alignment = -torch.stack(list(cosines.values())).mean()
        # The surrogate has the alignment's gradient with respect to the flow's parameters. Its value is subtracted.
        batch_size, num_tokens, _ = teacher_features.shape
        surrogate = torch.stack(inner_products).sum() / (len(self.places) * batch_size * num_tokens)
        return alignment + (surrogate - surrogate.detach()), cosines, neumann_growth

    def _check_teacher_features(self, teacher_features: torch.Tensor | None, tokens: torch.Tensor):
        if self.strategy == "none":
            return
        expected = (*tokens.shape[:2], self.teacher_dim)
        if teacher_features is None or tuple(teacher_features.shape) != expected:
            given = "None" if teacher_features is None else f"of shape {tuple(teacher_features.shape)}"
            raise ValueError(
                f"`teacher_features` must have shape {expected}, (batch_size, num_tokens, teacher_dim), but are"
                f" {given}. RepresentationTeacher computes them, with `grid_size=sample_size // patch_size`."
            )


def check_order(flow: TarFlowTransformer2DModel, order: int | str | None) -> int:
    """Return the number of Neumann terms after the first. Raise ValueError if `order` is not one."""
    if order == "exact":
        return (flow.config.sample_size // flow.config.patch_size) ** 2 - 1
    if order is None:
        return 0
    check_number("order", order, int, at_least=0)
    return order
