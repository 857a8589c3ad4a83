import pytest
import torch
from accelerate import Accelerator

from flowback_hf import AlignedFlowObjective


PLACES = [(2, 1), (2, 2), (3, 1)]
TEACHER_DIM = 5


def make_objective(flow, strategy, order=None, places=PLACES, weight=0.3):
    torch.manual_seed(7)
    objective = AlignedFlowObjective(
        flow, strategy, places=places, order=order, weight=weight, teacher_dim=TEACHER_DIM, projector_dim=6
    )
    return objective.to(next(flow.parameters()).dtype)


@pytest.fixture
def flow(randomised_model):
    return randomised_model(
        sample_size=4,
        patch_size=2,
        in_channels=1,
        num_blocks=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_classes=3,
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return {
        "noisy_sample": torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64),
        "class_labels": torch.tensor([1, -1, 2]),
        "teacher_features": torch.randn(3, 4, TEACHER_DIM, generator=generator, dtype=torch.float64),
    }


def gradients(loss, module):
    """By parameter name; None where no graph leads there."""
    names, parameters = zip(*module.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


def alignment_of(objective, hidden_states, teacher_features):
    """-mean cos, written out: every place counts alike."""
    cosines = []
    for (block, layer), states in hidden_states.items():
        projected = objective.projectors[f"block{block}_layer{layer}"](states)
        norms = projected.norm(dim=-1) * teacher_features.norm(dim=-1)
        cosines.append(((projected * teacher_features).sum(dim=-1) / norms).mean())
    return -sum(cosines) / len(cosines)


def block_inputs(flow, batch):
    """x^0 .. x^N as tokens."""
    states = [flow.patchify(batch["noisy_sample"])]
    for block in flow.blocks:
        states.append(block(states[-1], batch["class_labels"])[0])
    return states


def hidden_states_at(flow, number, tokens, batch):
    layers = [layer for block, layer in PLACES if block == number]
    *_, hidden_states = flow.blocks[number - 1](tokens, batch["class_labels"], layers)
    return {(number, layer): states for layer, states in hidden_states.items()}


def forward_alignment(objective, batch):
    """The likelihood pass as one graph."""
    flow = objective.flow
    states = block_inputs(flow, batch)
    hidden_states = {}
    for number in (2, 3):
        hidden_states |= hidden_states_at(flow, number, states[number - 1], batch)
    return alignment_of(objective, hidden_states, batch["teacher_features"])


def detach_alignment(objective, batch):
    """Algorithm 2 of the paper, literally: inverse blocks conditioned on cached, detached inputs."""
    flow = objective.flow
    states = [state.detach() for state in block_inputs(flow, batch)]
    hidden_states = {}
    x = states[-1]
    for number in range(4, 1, -1):
        conditioning = states[number - 1]
        _, log_scale, shift, _ = flow.blocks[number - 1](conditioning, batch["class_labels"])
        x = shift + torch.exp(log_scale) * x
        if number in (2, 3):
            hidden_states |= hidden_states_at(flow, number, conditioning, batch)
    return alignment_of(objective, hidden_states, batch["teacher_features"])


def sequential_inverse(block, latents, class_labels):
    """Token by token in the block's own order, one differentiable graph: no cache, no shortcut."""
    order = range(latents.shape[1])
    order = list(reversed(order)) if block.reverse_order else list(order)
    tokens = [torch.zeros_like(latents[:, 0])] * len(order)
    for index in order:
        _, log_scale, shift, _ = block(torch.stack(tokens, dim=1), class_labels)
        tokens[index] = shift[:, index] + torch.exp(log_scale[:, index]) * latents[:, index]
    return torch.stack(tokens, dim=1)


def reverse_alignment(objective, batch):
    """The generative pass from the detached latents, as the paper defines it."""
    flow = objective.flow
    x = block_inputs(flow, batch)[-1].detach()
    hidden_states = {}
    for number in range(4, 1, -1):
        x = sequential_inverse(flow.blocks[number - 1], x, batch["class_labels"])
        if number in (2, 3):
            hidden_states |= hidden_states_at(flow, number, x, batch)
    return alignment_of(objective, hidden_states, batch["teacher_features"])


def unrolled_reverse_alignment(objective, batch, order):
    """`order + 1` fixed-point steps from the cached, detached input: a graph whose gradient is the series so far."""
    flow = objective.flow
    states = [state.detach() for state in block_inputs(flow, batch)]
    x = states[-1]
    hidden_states = {}
    for number in range(4, 1, -1):
        block, latents, u = flow.blocks[number - 1], x, states[number - 1]
        for _ in range(order + 1):
            _, log_scale, shift, _ = block(u, batch["class_labels"])
            u = shift + torch.exp(log_scale) * latents
        x = u
        if number in (2, 3):
            hidden_states |= hidden_states_at(flow, number, x, batch)
    return alignment_of(objective, hidden_states, batch["teacher_features"])


NAIVE = {
    "forward": (("forward", None), forward_alignment),
    "detach": (("detach", None), detach_alignment),
    "reverse-exact": (("reverse", "exact"), reverse_alignment),
    "reverse-0": (("reverse", 0), lambda *args: unrolled_reverse_alignment(*args, order=0)),
    "reverse-1": (("reverse", 1), lambda *args: unrolled_reverse_alignment(*args, order=1)),
    "reverse-2": (("reverse", 2), lambda *args: unrolled_reverse_alignment(*args, order=2)),
}


@pytest.mark.parametrize("name", NAIVE)
def test_gradient_is_that_of_the_naive_graph(flow, batch, name):
    (strategy, order), naive_alignment = NAIVE[name]
    objective = make_objective(flow, strategy, order)
    naive = naive_alignment(objective, batch)
    expected = gradients(naive, objective)

    output = objective(**batch)
    torch.testing.assert_close(output.alignment, naive, rtol=0, atol=1e-12)
    actual = gradients(output.loss - output.nll, objective)

    compared = 0
    for parameter, gradient in expected.items():
        if gradient is None:
            assert actual[parameter] is None or (actual[parameter] == 0).all(), parameter
            continue
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(actual[parameter], 0.3 * gradient, rtol=0, atol=1e-8 * scale.item(), msg=parameter)
        compared += bool(gradient.abs().max() > 1e-6)
    assert compared > 20  # agreement in zeros alone would prove nothing


@pytest.mark.parametrize(
    "strategy, order, reached",
    [("forward", None, {1, 2}), ("detach", None, {2}), ("reverse", 0, {2, 3, 4}), ("reverse", "exact", {2, 3, 4})],
)
def test_the_alignment_of_block_2_reaches_just_its_blocks(flow, batch, strategy, order, reached):
    objective = make_objective(flow, strategy, order, places=[(2, 1)])
    output = objective(**batch)
    actual = gradients(output.loss - output.nll, flow)
    for number in range(1, 5):
        block_gradients = [g for name, g in actual.items() if name.startswith(f"blocks.{number - 1}.")]
        largest = max((g.abs().max().item() for g in block_gradients if g is not None), default=0.0)
        assert (largest > 0) == (number in reached), f"block {number}: {largest}"


def test_orders_converge_to_the_exact_gradient_and_it_differs_from_detach(flow, batch):
    def flat(strategy, order=None):
        output = make_objective(flow, strategy, order)(**batch)
        found = gradients(output.loss - output.nll, flow)
        return torch.cat(
            [(torch.zeros_like(p) if found[n] is None else found[n]).flatten() for n, p in flow.named_parameters()]
        )

    exact = flat("reverse", "exact")
    errors = [((flat("reverse", order) - exact).norm() / exact.norm()).item() for order in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-3
    assert errors[3] < 1e-12  # four tokens: the series ends after the fourth term
    assert (flat("detach") - exact).norm() / exact.norm() > 0.1


def test_every_strategy_has_the_same_values(flow, batch):
    outputs = [make_objective(flow, strategy)(**batch) for strategy in ("forward", "detach", "reverse")]
    plain = AlignedFlowObjective(flow, "none")(batch["noisy_sample"], batch["class_labels"])
    assert plain.alignment is None
    for output in outputs:
        torch.testing.assert_close(output.nll, plain.loss, rtol=0, atol=1e-14)
        torch.testing.assert_close(output.alignment, outputs[0].alignment, rtol=0, atol=1e-13)
        torch.testing.assert_close(output.loss, output.nll + 0.3 * output.alignment, rtol=0, atol=1e-13)
        assert list(output.cosine_similarity) == PLACES
        mean_cosine = sum(output.cosine_similarity.values()) / len(PLACES)
        torch.testing.assert_close(mean_cosine, -output.alignment, rtol=0, atol=1e-13)


def test_nll_is_log_prob_per_dimension(flow, batch):
    output = AlignedFlowObjective(flow, "none")(batch["noisy_sample"], batch["class_labels"])
    log_prob = flow.log_prob(batch["noisy_sample"], batch["class_labels"])
    torch.testing.assert_close(output.nll, -log_prob.mean() / 16, rtol=0, atol=1e-13)


def test_max_log_scale_and_growth_are_reported(flow, batch):
    output = make_objective(flow, "reverse", 1)(**batch)
    states = block_inputs(flow, batch)
    expected = max(block(state, batch["class_labels"])[1].abs().max() for block, state in zip(flow.blocks, states))
    torch.testing.assert_close(output.max_log_scale, expected, rtol=0, atol=1e-14)
    assert sorted(output.neumann_growth) == [2, 3, 4]
    assert all(growth != 1 for growth in output.neumann_growth.values())
    first_order = make_objective(flow, "reverse", 0)(**batch).neumann_growth
    assert all(growth == 1 for growth in first_order.values())


@pytest.mark.parametrize("strategy", ["forward", "detach", "reverse"])
def test_every_parameter_gets_a_gradient(flow, batch, strategy):
    objective = make_objective(flow, strategy)
    objective(**batch).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("strategy", ["none", "forward", "detach", "reverse"])
def test_no_grad_gives_the_same_values(flow, batch, strategy):
    objective = make_objective(flow, strategy)
    expected = objective(**batch)
    with torch.no_grad():
        actual = objective(**batch)
    assert not actual.loss.requires_grad
    torch.testing.assert_close(actual.loss, expected.loss.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("strategy", ["forward", "detach", "reverse"])
def test_gradient_checkpointing_changes_nothing(flow, batch, strategy):
    objective = make_objective(flow, strategy, 1 if strategy == "reverse" else None)
    expected = gradients(objective(**batch).loss, objective)
    flow.enable_gradient_checkpointing()
    actual = gradients(objective(**batch).loss, objective)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_bf16_autocast_stays_near_the_plain_gradient_and_reaches_no_other_block(flow, batch):
    objective = make_objective(flow, "reverse", 1, places=[(3, 1)])
    output = objective(**batch)
    expected = gradients(output.loss - output.nll, flow)
    flow.float()
    objective.float()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(objective)
    output = prepared(batch["noisy_sample"].float(), batch["class_labels"], batch["teacher_features"].float())
    assert output.loss.dtype == torch.float32 and list(output.cosine_similarity) == [(3, 1)]
    actual = gradients(output.loss - output.nll, flow)

    reached = [name for name in expected if name.startswith(("blocks.2.", "blocks.3."))]
    actual_reached = torch.cat([actual[name].double().flatten() for name in reached if expected[name] is not None])
    expected_reached = torch.cat([expected[name].flatten() for name in reached if expected[name] is not None])
    assert torch.cosine_similarity(actual_reached, expected_reached, dim=0) > 0.99
    for name, gradient in actual.items():
        if name not in reached:
            assert gradient is None or (gradient == 0).all(), name


def test_the_objective_leaves_no_gradient_behind_before_backward(flow, batch):
    objective = make_objective(flow, "reverse", "exact")
    objective(**batch)
    assert all(parameter.grad is None for parameter in objective.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strategy": "backward"}, "`strategy` must be one of .* but is 'backward'"),
        ({"strategy": "detach", "order": 1}, "`order` belongs to the strategy 'reverse' alone"),
        ({"order": -1}, "`order` must be 0, 1, 2, ... or 'exact', but is -1"),
        ({"order": "all"}, "`order` must be .* but is 'all'"),
        ({"places": []}, "`places` must hold at least one"),
        ({"places": [(2, 1), (2, 1)]}, "each of them once"),
        ({"places": [(5, 1)]}, r"`places` names flow block 5, but this flow's blocks are 1 \(image\) to 4 \(noise\)"),
        ({"places": [(0, 1)]}, "`places` names flow block 0"),
        ({"places": [(2, 3)]}, "`places` names layer 3 of flow block 2, but its layers are 1 to 2"),
        ({"teacher_dim": None}, "`teacher_dim` must be given"),
    ],
)
def test_bad_arguments_raise(flow, arguments, message):
    with pytest.raises(ValueError, match=message):
        AlignedFlowObjective(flow, **{"places": PLACES, "teacher_dim": TEACHER_DIM, **arguments})


@pytest.mark.parametrize("features", [None, torch.zeros(3, 4, TEACHER_DIM + 1), torch.zeros(3, 9, TEACHER_DIM)])
def test_wrong_teacher_features_raise(flow, batch, features):
    with pytest.raises(ValueError, match=r"`teacher_features` must have shape \(3, 4, 5\)"):
        make_objective(flow, "reverse")(batch["noisy_sample"], batch["class_labels"], features)
