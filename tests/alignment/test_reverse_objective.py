"""What a learned inverse is trained for, in float64 on random flows."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ConvNextV2Config, ConvNextV2Model, Dinov2Config, Dinov2Model

from flowback_hf import RepresentationTeacher, ReverseFlowObjective, TarFlowReverseTransformer2DModel
from flowback_hf.alignment.reverse_objective import trajectory_of
from flowback_hf.models.transformer_tarflow import Guidance

from ..conftest import randomise_weights


LABELS = torch.tensor([2, 4, -1, 0])
SCALES = torch.tensor([1.0, 2.5, 3.0, 1.5], dtype=torch.float64)


def assert_close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture
def clean():
    return torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


@pytest.fixture
def noisy(clean):
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return clean + 0.1 * noise


@pytest.fixture
def make_objective(randomised_model, noisy):
    """A function of the options that differ: an objective with random weights and measured statistics."""

    def make(denoises=True, flow_config=None, vae=None, **options):
        flow = randomised_model(**(flow_config or {}))
        through_data_space = options.get("supervision") == "data_space"
        model = TarFlowReverseTransformer2DModel.for_flow(
            flow, max_guidance_scale=3.0, through_data_space=through_data_space, denoises=denoises
        ).to(torch.float64)
        objective = ReverseFlowObjective(model, flow, vae=vae, **options)
        randomise_weights(model, seed=3)
        if vae is None:
            objective.measure_statistics([(noisy, LABELS)])
        return objective

    return make


def encoder(kind):
    torch.manual_seed(0)
    if kind == "convnext":
        return ConvNextV2Model(
            ConvNextV2Config(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=16, patch_size=4)
        )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    return Dinov2Model(Dinov2Config(**sizes))


def teacher(kind="dinov2"):
    return RepresentationTeacher(encoder(kind), grid_size=2).to(torch.float64)


# The flow's trajectory


def test_the_trajectory_is_what_the_blocks_exchange(randomised_model, noisy):
    flow = randomised_model()
    trajectory = trajectory_of(flow, noisy, LABELS)
    assert len(trajectory) == 4 and torch.equal(trajectory[0], noisy)
    for number in range(1, 4):
        assert_close(trajectory[number], flow(trajectory[number - 1], LABELS, blocks=[number]).sample)
    assert_close(trajectory[3], flow(noisy, LABELS).sample)


def test_the_trajectory_of_a_guided_sample_is_the_samplers_backwards(randomised_model, noisy):
    flow, labels = randomised_model(), LABELS.clamp(min=0)
    states, guidance = noisy, Guidance(2.0, "product")
    expected = [states]
    for number in (3, 2, 1):
        arguments = {"guidance_scale": 2.0, "guidance_rule": "product", "solver": "sequential"}
        states = flow(states, labels, blocks=[number], inverse=True, **arguments).sample
        expected.insert(0, states)
    for actual, state in zip(trajectory_of(flow, expected[0], labels, guidance), expected, strict=True):
        assert_close(actual, state, atol=1e-8)
    assert (trajectory_of(flow, expected[0], labels)[-1] - noisy).abs().max() > 1e-2


def test_statistics_standardize_every_block(make_objective, clean, noisy):
    objective = make_objective()
    heads = objective.reverse_transformer.heads
    for number, states in enumerate(trajectory_of(objective.flow, noisy, LABELS)[:-1]):
        standardized = (states - heads.mean[number]) / heads.std[number]
        assert_close(standardized.mean(), torch.zeros(()).double(), atol=1e-8)
        assert_close(standardized.std(correction=0), torch.ones(()).double(), atol=1e-6)
    # in several batches as in one
    mean, std = heads.mean.clone(), heads.std.clone()
    objective.measure_statistics([(noisy[:1], LABELS[:1]), (noisy[1:], LABELS[1:])])
    assert_close(heads.mean, mean, atol=1e-8)
    assert_close(heads.std, std, atol=1e-8)


# The loss


def plain_loss(objective, clean, noisy, weights=None):
    """The formula of the objective, stage by stage."""
    model, flow = objective.reverse_transformer, objective.flow
    weights = torch.zeros(4, dtype=torch.float64) if weights is None else weights
    trajectory = trajectory_of(flow, noisy, LABELS)
    states, rotary, stages = model.patchify(trajectory[-1]), model.rotary(noisy.device), []
    for stage in model.stages:
        guided, unguided = stage(states, LABELS, weights, rotary), stage(states, None, None, rotary)
        stages.append((guided + weights[:, None, None] * unguided) / (1 + weights[:, None, None]))
        states = guided
    hidden = []
    for states, number in zip(stages, (2, 1, 0)):
        estimate = model.unpatchify(model.heads.projections[number](states))
        target = (trajectory[number] - model.heads.mean[number]) / model.heads.std[number]
        hidden.append((estimate - target).square().mean())
    return (model.unpatchify(stages[-1]) - clean).square().mean(), sum(hidden) / 3


@pytest.mark.parametrize("supervision", ["heads", "data_space"])
def test_the_loss_is_the_formula_written_out(make_objective, clean, noisy, supervision):
    objective = make_objective(supervision=supervision, weight=0.5)
    output = objective(clean, noisy, LABELS)
    reconstruction, hidden = plain_loss(objective, clean, noisy)
    assert_close(output.reconstruction, reconstruction)
    assert_close(output.hidden, hidden)
    assert_close(output.loss, reconstruction + 0.5 * hidden)

    guided = objective(clean, noisy, LABELS, SCALES)
    # guidance of a sample without a class is none
    reconstruction, hidden = plain_loss(objective, clean, noisy, (SCALES - 1) * (LABELS >= 0))
    assert_close(guided.loss, reconstruction + 0.5 * hidden)
    assert (guided.loss - output.loss).abs() > 1e-4
    assert_close(objective(clean, noisy, LABELS, torch.ones(4)).loss, output.loss)


def test_the_unguided_branch_gets_no_gradient_through_guidance(make_objective, clean, noisy):
    """It is what guidance starts from. Only samples without a class teach it."""
    objective, labels = make_objective(), LABELS.clamp(min=0)
    model = objective.reverse_transformer
    compared, _ = objective._run_stages(noisy, labels, SCALES - 1, SCALES - 1)
    sample = model(noisy, labels, SCALES).sample
    # d compared / d sample = 1 / (1 + w), with the unguided branch held fixed
    (gradient,) = torch.autograd.grad(compared.sum(), model.stages[-1].proj_out.bias)
    (expected,) = torch.autograd.grad((sample / SCALES.view(-1, 1, 1, 1)).sum(), model.stages[-1].proj_out.bias)
    assert_close(gradient, expected)


def test_a_perfect_guided_sampler_has_no_reconstruction_error(make_objective, clean, noisy):
    """The comparison undoes guidance exactly: `h_w` made of two branches gives the conditional branch back."""
    objective, weight = make_objective(supervision="final"), 1.5
    model, labels = objective.reverse_transformer, LABELS.clamp(min=0)
    latents = objective.flow(noisy, labels).sample
    for stage in model.stages[:-1]:
        stage.guidance_embed[2].weight.data.zero_()
    conditional = model(latents, labels).sample
    last = model.stages[-1]
    states = model.patchify(latents)
    for stage in model.stages[:-1]:
        states = stage(states, labels, None, model.rotary(states.device))
    unguided = last(states, None, None, model.rotary(states.device))

    class Guided(torch.nn.Module):
        def forward(self, inputs, class_labels, guidance_weight, rotary):
            if class_labels is None:
                return unguided
            return (1 + weight) * last(inputs, class_labels, None, rotary) - weight * unguided

    model.stages[-1] = Guided()
    output = objective(conditional.detach(), noisy, labels, torch.full((4,), 1 + weight))
    assert_close(output.reconstruction, torch.zeros(()).double(), atol=1e-20)


def test_pairs_of_the_sampler_are_learned_as_they_are(make_objective, clean, noisy):
    objective = make_objective(supervision="final")
    labels, guidance = LABELS.clamp(min=0), Guidance(2.0)
    sampled = torch.tensor([True, False, True, False])
    output = objective(clean, noisy, labels, None, sampled, guidance)
    latents = trajectory_of(objective.flow, noisy, labels)[-1]
    latents[sampled] = trajectory_of(objective.flow, noisy[sampled], labels[sampled], guidance)[-1]
    scales = torch.where(sampled, 2.0, 1.0)
    expected = (objective.reverse_transformer(latents, labels, scales).sample - clean).square().mean()
    assert_close(output.loss, expected)
    # the other pairs may teach guidance at the same time
    both = objective(clean, noisy, labels, SCALES, sampled, guidance).loss
    assert (both - output.loss).abs() > 1e-5
    # whose scales count, and not those of pairs of the sampler
    for rows, counts in ((sampled, False), (~sampled, True)):
        other = objective(clean, noisy, labels, torch.where(rows, 2.25, SCALES), sampled, guidance).loss
        assert torch.equal(other, both) != counts


def test_no_gradient_reaches_flow_and_teacher_and_every_weight_of_the_model_has_one(make_objective, clean, noisy):
    objective = make_objective(teacher=teacher())
    objective(clean, noisy, LABELS, SCALES).loss.backward()
    frozen = [*objective.flow.parameters(), *objective.teacher.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    trained = dict(objective.reverse_transformer.named_parameters())
    assert len(trained) > 20 and any(name.startswith("heads") for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0.5},
        {"normalize": False},
        {"adaptive_power": 1.0},
        {"adaptive_power": 1.0, "adaptive_offset": 1.0},
        {"supervision": "final"},
        {"denoises": False},
        {"teacher": teacher()},
        {"teacher": teacher("convnext")},
        {"teacher": teacher(), "perceptual_weight": 0.1},
    ],
    ids=str,
)
def test_each_option_changes_the_gradient(make_objective, clean, noisy, options):
    def gradient(**options):
        objective = make_objective(**options)
        objective(clean, noisy, LABELS, SCALES).loss.backward()
        return objective.reverse_transformer.stages[0].layers[0].attn.to_qkv.weight.grad

    others = [gradient()]
    if "adaptive_offset" in options:
        others.append(gradient(adaptive_power=1.0))
    if "perceptual_weight" in options:
        others.append(gradient(teacher=options["teacher"]))
    for other in others:
        assert (gradient(**options) - other).abs().max() > 1e-4 * other.abs().max()


def test_adaptive_weights_are_of_each_sample_and_held_fixed(make_objective, clean, noisy):
    objective = make_objective(supervision="final", adaptive_power=0.5, adaptive_offset=0.1)
    output = objective(clean, noisy, LABELS)
    latents = objective.flow(noisy, LABELS).sample
    distances = (objective.reverse_transformer(latents, LABELS).sample - clean).square().mean(dim=(1, 2, 3))
    assert_close(output.loss, (distances * (distances + 0.1) ** -0.5).mean())
    assert_close(output.reconstruction, distances.mean())
    bias = objective.reverse_transformer.stages[-1].proj_out.bias
    (gradient,) = torch.autograd.grad(output.loss, bias)
    (expected,) = torch.autograd.grad((distances * (distances.detach() + 0.1) ** -0.5).mean(), bias)
    assert_close(gradient, expected)


def test_the_perceptual_distance_is_of_features_of_decoded_images(make_objective, tiny_vae, clean):
    latent_flow = {"in_channels": 4}
    vae = tiny_vae.to(torch.float64)
    grey = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    objective = make_objective(flow_config=latent_flow, supervision="final", vae=vae, teacher=teacher())
    output = objective(grey, grey, LABELS)
    sample = objective.reverse_transformer(objective.flow(grey, LABELS).sample, LABELS).sample
    features = [objective.teacher(vae.decode(each / 0.5 + 0.1).sample).float() for each in (sample, grey)]
    assert_close(output.perceptual, 1 - F.cosine_similarity(*features, dim=-1).mean(), atol=1e-6)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in vae.parameters())


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"supervision": "all"}, r"`supervision` must be one of \('heads', 'data_space', 'final'\), but is 'all'"),
        ({"weight": -1.0}, "`weight` must be a finite number of at least 0"),
        ({"adaptive_offset": 0.0}, "`adaptive_offset` must be a finite number above 0"),
    ],
)
def test_bad_options_are_refused(make_objective, options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(**options)


def test_what_does_not_fit_is_refused(randomised_model, make_objective, noisy):
    flow, other = randomised_model(), randomised_model(seed=1)
    with pytest.raises(ValueError, match="is that of a flow with other weights"):
        ReverseFlowObjective(TarFlowReverseTransformer2DModel.for_flow(other), flow)
    with pytest.raises(ValueError, match="'data_space' needs a learned inverse with `through_data_space=True`"):
        ReverseFlowObjective(TarFlowReverseTransformer2DModel.for_flow(flow), flow, supervision="data_space")
    objective = make_objective()
    with pytest.raises(ValueError, match="The flow must be finite on the training data, but"):
        objective.measure_statistics([(noisy * torch.inf, LABELS)])
