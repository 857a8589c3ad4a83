# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The training objective of a learned inverse: what it is shown of its flow, and how far it is from it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from diffusers.utils import BaseOutput

from flowback_hf.alignment.teacher import RepresentationTeacher
from flowback_hf.models.transformer_reverse import TarFlowReverseTransformer2DModel
from flowback_hf.models.transformer_tarflow import Guidance, TarFlowTransformer2DModel, check_class_labels
from flowback_hf.pipelines.pipeline_flowback import unscale_latents
from flowback_hf_cli.numbers import check_number


SUPERVISIONS = ("heads", "data_space", "final")


@dataclass
class ReverseFlowOutput(BaseOutput):
    """
    The output of [`ReverseFlowObjective`]. All tensors are scalars.

    Args:
        loss: The sum of the weighted distances. Its `backward()` computes all gradients.
        reconstruction: Mean squared error of the returned data.
        hidden: Mean squared error of what the stages know of the flow's blocks, averaged over the blocks. `None` for
            the supervision `"final"`.
        perceptual: `1 - cos` of the teacher's features, averaged over patches, in [0, 2]. `None` without a teacher.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    perceptual: torch.Tensor | None = None


@torch.no_grad()
def trajectory_of(
    flow: TarFlowTransformer2DModel,
    noisy_sample: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    guidance: Guidance = Guidance(),
) -> list[torch.Tensor]:
    """
    Compute what a flow's blocks exchange, in one forward pass.

    Args:
        flow ([`TarFlowTransformer2DModel`]): The flow.
        noisy_sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): `x^0`.
        class_labels: As in [`TarFlowTransformer2DModel.forward`].
        guidance ([`Guidance`]): If the sample was drawn with guidance, the one that it was drawn with.
    Returns:
        `list[torch.Tensor]`: `x^0, x^1, ..., x^N` in the shape of `noisy_sample`; `x^i` is the output of block `i`,
        and `x^N` are the latents.
    """
    tokens = flow.patchify(noisy_sample)
    trajectory = [tokens]
    for block in flow.blocks:
        tokens = block(tokens, class_labels, guidance=guidance).tokens
        trajectory.append(tokens)
    return [flow.unpatchify(tokens) for tokens in trajectory]


def squared_error(sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each sample, `(batch_size,)`."""
    return (sample - target).square().flatten(1).mean(dim=1)


class ReverseFlowObjective(nn.Module):
    r"""
    The distance of a learned inverse `G` from what its frozen flow `F` does:

        loss = D(x, x') + weight * mean_i D(norm(x^i), phi_i(h^i)) + perceptual_weight * D_features(x, x')

    `x` is clean data, `x^0 = x + noise`, `x^i` the output of flow block `i`, which one forward pass of `F` computes,
    and `x'` what `G` makes of `x^N`. `h^i` are the tokens of the stage that ends at `x^i`, `phi_i` a head and `norm`
    standardizes with fixed statistics of each `x^i`, see [`~ReverseFlowObjective.measure_statistics`]. Distances `D`
    are mean squared errors of each sample.

    **Supervision** of the stages: `"heads"` as above. With `"data_space"`, every stage passes on its estimate of `x^i`
    and nothing else. With `"final"`, nothing but `x'` is compared.

    **Guidance.** With the guidance weight `w = guidance_scale - 1` as its input, a stage learns to return in one
    evaluation what guidance would make of its two branches, `h_w = (1 + w) G_i(h | c) - w G_i(h | no class)`. What is
    compared is therefore `(h_w + w stop_grad(G_i(h | no class))) / (1 + w)`, which costs one more evaluation, without
    gradients. The branch without a class learns from samples whose labels are dropped.

    **Adaptive weights.** Each sample's distance is multiplied by `stop_grad((D + adaptive_offset)^-adaptive_power)`.

    **Use.** The parameters of `G` and its heads are trained; flow, teacher and VAE are frozen. The latter are part of
    this module, so that Accelerate moves them. Statistics must be measured before the first step.

    Args:
        reverse_transformer ([`TarFlowReverseTransformer2DModel`]):
            The learned inverse to train. Its config has `denoises` and `through_data_space`. Heads are added to it.
        flow ([`TarFlowTransformer2DModel`]): Its flow.
        supervision (`str`, defaults to `"heads"`): `"heads"`, `"data_space"` or `"final"`.
        weight (`float`, defaults to 1.0): Weight of the stages' distances.
        normalize (`bool`, defaults to `True`): Standardize `x^i`. Otherwise, blocks with large values dominate.
        adaptive_power (`float`, defaults to 0.0): 0 weighs all samples alike.
        adaptive_offset (`float`, defaults to 0.01): It bounds the adaptive weights.
        teacher ([`RepresentationTeacher`], *optional*): Whose features are compared.
        perceptual_weight (`float`, defaults to 1.0): Weight of their distance.
        vae ([`~diffusers.AutoencoderKL`], *optional*): Of a latent flow: the teacher sees decoded images.

    Raises:
        ValueError: if the learned inverse does not belong to the flow or does not fit the supervision, or a number is
            out of its range.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf import ReverseFlowObjective, TarFlowReverseTransformer2DModel, TarFlowTransformer2DModel

        >>> flow = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, in_channels=1, num_blocks=2, num_layers=2, num_attention_heads=2,
        ...     attention_head_dim=16, num_classes=10,
        ... )
        >>> objective = ReverseFlowObjective(TarFlowReverseTransformer2DModel.for_flow(flow), flow)
        >>> clean_sample, class_labels = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([3, 1, 4, -1])
        >>> noisy_sample = clean_sample + 0.05 * torch.randn(4, 1, 8, 8)
        >>> objective.measure_statistics([(noisy_sample, class_labels)])
        >>> objective(clean_sample, noisy_sample, class_labels).loss.backward()
        ```

    Reference: Lu et al., Bidirectional Normalizing Flow: From Data to Noise and Back, 2025,
    https://arxiv.org/abs/2512.10953
    """

    def __init__(
        self,
        reverse_transformer: TarFlowReverseTransformer2DModel,
        flow: TarFlowTransformer2DModel,
        supervision: str = "heads",
        weight: float = 1.0,
        normalize: bool = True,
        adaptive_power: float = 0.0,
        adaptive_offset: float = 0.01,
        teacher: RepresentationTeacher | None = None,
        perceptual_weight: float = 1.0,
        vae: AutoencoderKL | None = None,
    ):
        super().__init__()
        if supervision not in SUPERVISIONS:
            raise ValueError(f"`supervision` must be one of {SUPERVISIONS}, but is {supervision!r}.")
        for name, value in {"weight": weight, "perceptual_weight": perceptual_weight}.items():
            check_number(name, value, float, at_least=0.0)
        check_number("adaptive_power", adaptive_power, float, at_least=0.0)
        check_number("adaptive_offset", adaptive_offset, float, above=0.0)
        if (supervision == "data_space") != reverse_transformer.config.through_data_space:
            raise ValueError(
                "The supervision 'data_space' needs a learned inverse with `through_data_space=True`, and the others"
                f" one without, but `supervision` is {supervision!r} and `through_data_space` is"
                f" {reverse_transformer.config.through_data_space}."
            )
        reverse_transformer.check_flow(flow)
        self.reverse_transformer = reverse_transformer
        self.flow = flow.requires_grad_(False)
        self.teacher = teacher
        self.vae = None if vae is None else vae.requires_grad_(False)
        self.supervision = supervision
        self.weight = weight
        self.normalize = normalize
        self.adaptive_power = adaptive_power
        self.adaptive_offset = adaptive_offset
        self.perceptual_weight = perceptual_weight
        if supervision != "final":
            reverse_transformer.add_heads()

    @property
    def model(self) -> TarFlowReverseTransformer2DModel:
        """What is trained: the learned inverse."""
        return self.reverse_transformer

    @torch.no_grad()
    def measure_statistics(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]]):
        """
        Measure the mean and the standard deviation of the values of every `x^i`, which `norm` uses from then on.

        Args:
            batches (iterable of `(noisy_sample, class_labels)`): What the flow was trained on. A few hundred samples
                are enough.
        Raises:
            ValueError: if the flow is not finite on them.
        """
        count, sums, squares = 0, 0.0, 0.0
        for noisy_sample, class_labels in batches:
            values = torch.stack(trajectory_of(self.flow, noisy_sample, class_labels)[:-1]).double().flatten(1)
            check_finite(values)
            count += values.shape[1]
            sums, squares = sums + values.sum(dim=1), squares + values.square().sum(dim=1)
        if self.supervision == "final" or not self.normalize:
            return
        mean = sums / count
        heads = self.reverse_transformer.heads
        heads.mean.copy_(mean)
        heads.std.copy_((squares / count - mean.square()).sqrt())

    def forward(
        self,
        clean_sample: torch.Tensor,
        noisy_sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance_scale: torch.Tensor | None = None,
        sampled: torch.Tensor | None = None,
        sampled_guidance: Guidance = Guidance(),
    ) -> ReverseFlowOutput:
        """
        Compute the loss of a batch of pairs.

        A pair of data is `clean_sample` and `noisy_sample`, which adds the noise of the flow's training. A pair of the
        exact sampler is what it drew, denoised and not; guidance in these is learned as it is.

        Args:
            clean_sample, noisy_sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                The pairs.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): -1 drops a label, for `F` too.
            guidance_scale (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                The guidance that a pair of data teaches; 1.0 is none. Ignored for pairs of the sampler.
            sampled (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): Which pairs are those of the sampler.
            sampled_guidance ([`Guidance`]): The guidance that these were drawn with.
        Returns:
            [`ReverseFlowOutput`].
        Raises:
            ValueError: if labels do not fit the flow.
        """
        check_class_labels(class_labels, len(clean_sample), self.flow.config.num_classes)
        trajectory = self._trajectory(noisy_sample, class_labels, sampled, sampled_guidance)
        weight, undone = self._guidance_weights(clean_sample, class_labels, guidance_scale, sampled, sampled_guidance)
        compared, stages = self._run_stages(trajectory[-1], class_labels, weight, undone)

        target = clean_sample if self.reverse_transformer.config.denoises else noisy_sample
        terms = {"reconstruction": (1.0, [squared_error(compared, target)])}
        if self.supervision != "final":
            heads = self.reverse_transformer.heads
            terms["hidden"] = (
                self.weight,
                [
                    squared_error(
                        self.reverse_transformer.unpatchify(heads(states, number).to(compared.dtype)),
                        (trajectory[number] - heads.mean[number]) / heads.std[number],
                    )
                    for number, states in stages.items()
                ],
            )
        if self.teacher is not None:
            terms["perceptual"] = (self.perceptual_weight, [self._perceptual_distance(compared, target)])
        loss = sum(
            weight * torch.stack([self._weigh(each) for each in distances]).mean()
            for weight, distances in terms.values()
        )
        means = {name: torch.stack(distances).mean().detach() for name, (_, distances) in terms.items()}
        return ReverseFlowOutput(loss=loss, **means)

    def _trajectory(
        self,
        noisy_sample: torch.Tensor,
        class_labels: torch.Tensor | None,
        sampled: torch.Tensor | None,
        sampled_guidance: Guidance,
    ) -> list[torch.Tensor]:
        """Compute what the flow's blocks exchange, with guidance where a pair was drawn with it."""
        if sampled is None or not sampled_guidance.is_on:
            return trajectory_of(self.flow, noisy_sample, class_labels)
        trajectory = [torch.empty_like(noisy_sample) for _ in range(self.flow.config.num_blocks + 1)]
        for rows, guidance in ((~sampled, Guidance()), (sampled, sampled_guidance)):
            if rows.any():
                labels = None if class_labels is None else class_labels[rows]
                for states, states_of_rows in zip(
                    trajectory, trajectory_of(self.flow, noisy_sample[rows], labels, guidance)
                ):
                    states[rows] = states_of_rows
        return trajectory

    def _guidance_weights(
        self,
        clean_sample: torch.Tensor,
        class_labels: torch.Tensor | None,
        guidance_scale: torch.Tensor | None,
        sampled: torch.Tensor | None,
        sampled_guidance: Guidance,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return `w` as the model gets it, and as it is undone before the comparison, `(batch_size,)` each."""
        if class_labels is None or (guidance_scale is None and sampled is None):
            return None, None
        zeros = clean_sample.new_zeros(len(clean_sample))
        undone = zeros if guidance_scale is None else guidance_scale.to(zeros) - 1.0
        if not class_labels.is_floating_point():
            undone = torch.where(class_labels < 0, zeros, undone)
        if sampled is None:
            return undone, undone
        undone = torch.where(sampled, zeros, undone)
        return torch.where(sampled, sampled_guidance.scale - 1.0, undone), None if guidance_scale is None else undone

    def _run_stages(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        weight: torch.Tensor | None,
        undone: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return the sample and the tokens of the stages by block, both with guidance undone."""
        model = self.reverse_transformer
        states = model.patchify(latents)
        dtype, rotary = states.dtype, model.rotary(states.device)
        compared = {}
        for number, stage in zip(range(model.config.num_blocks - 1, -2, -1), model.stages):
            stage_input = states
            states = compared[number] = stage(stage_input, class_labels, weight, rotary)
            if undone is not None:
                with torch.no_grad():
                    unguided = stage(stage_input, None, None, rotary)
                share = undone.to(states.dtype).view(-1, 1, 1)
                compared[number] = (states + share * unguided) / (1 + share)
        return model.unpatchify(compared.pop(-1).to(dtype)), compared

    def _perceptual_distance(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return `1 - cos` of the teacher's features, averaged over the patches of each sample, `(batch_size,)`."""
        with torch.no_grad():
            expected = self.teacher(self._decode(target)).float()
        features = self.teacher(self._decode(sample)).float()
        return (1 - F.cosine_similarity(features, expected, dim=-1)).mean(dim=1)

    def _decode(self, sample: torch.Tensor) -> torch.Tensor:
        """Turn the flow's data into images in about [-1, 1]."""
        if self.vae is None:
            return sample
        return self.vae.decode(unscale_latents(sample, self.vae.config).to(self.vae.dtype)).sample

    def _weigh(self, distances: torch.Tensor) -> torch.Tensor:
        """Average the distances of samples with their adaptive weights."""
        return ((distances.detach() + self.adaptive_offset) ** -self.adaptive_power * distances).mean()


def check_finite(values: torch.Tensor):
    """Raise ValueError unless a flow is finite on its data."""
    if not values.isfinite().all():
        raise ValueError(
            "The flow must be finite on the training data, but its blocks' outputs are not. Check the flow with"
            " pipelines/evaluate_flow.py, and whether the data are those that it was trained on."
        )
