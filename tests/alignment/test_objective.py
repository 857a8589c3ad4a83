import gc
import itertools
import subprocess
import weakref
from pathlib import Path

import peft
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from flowback_hf import AlignedFlowObjective

from ..conftest import start_two_processes


PLACES = [(2, 1), (2, 2), (3, 1)]
TEACHER_DIM = 5
# The paper's projector and features. What is not said otherwise is tested with these.
PAPERS = {"projector_dim": 6, "projector_type": "mlp", "normalize_teacher_features": False}


def make_objective(flow, strategy, order=None, places=PLACES, weight=0.3, **options):
    torch.manual_seed(7)
    options = {"teacher_dim": TEACHER_DIM, **PAPERS, **options}
    objective = AlignedFlowObjective(flow, strategy, places=places, order=order, weight=weight, **options)
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
    """Return gradients by name of the parameters that are trained; None for those outside of the graph."""
    names, parameters = zip(*[(name, each) for name, each in module.named_parameters() if each.requires_grad])
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


def alignment_of(objective, hidden_states, teacher_features):
    """Return the negative mean cosine, written out: all places have the same weight."""
    cosines = []
    for (block, layer), states in hidden_states.items():
        projected = objective.projectors[f"block{block}_layer{layer}"](states)
        norms = projected.norm(dim=-1) * teacher_features.norm(dim=-1)
        cosines.append(((projected * teacher_features).sum(dim=-1) / norms).mean())
    return -sum(cosines) / len(cosines)


def block_inputs(flow, batch):
    """Return x^0 .. x^N as tokens."""
    states = [flow.patchify(batch["noisy_sample"])]
    for block in flow.blocks:
        states.append(block(states[-1], batch["class_labels"]).tokens)
    return states


def hidden_states_at(objective, number, tokens, batch):
    layers = [layer for block, layer in objective.places if block == number]
    output = objective.flow.blocks[number - 1](tokens, batch["class_labels"], layers)
    return {(number, layer): states for layer, states in output.hidden_states.items()}


def reached_by_the_generative_pass(objective):
    """Return block numbers from the noise to the lowest aligned block."""
    return range(len(objective.flow.blocks), min(block for block, _ in objective.places) - 1, -1)


def plain_nll(objective, batch):
    return (
        -objective.flow.log_prob(batch["noisy_sample"], batch["class_labels"]).mean()
        / batch["noisy_sample"][0].numel()
    )


def forward_alignment(objective, batch):
    """Compute the alignment in the likelihood pass, as one graph."""
    flow = objective.flow
    states = block_inputs(flow, batch)
    hidden_states = {}
    for number in range(1, len(flow.blocks) + 1):
        hidden_states |= hidden_states_at(objective, number, states[number - 1], batch)
    return alignment_of(objective, hidden_states, batch["teacher_features"])


def detach_alignment(objective, batch):
    """Follow the paper's Algorithm 2 literally: inverse blocks are conditioned on cached, detached inputs."""
    flow = objective.flow
    states = [state.detach() for state in block_inputs(flow, batch)]
    hidden_states = {}
    x = states[-1]
    for number in reached_by_the_generative_pass(objective):
        conditioning = states[number - 1]
        output = flow.blocks[number - 1](conditioning, batch["class_labels"])
        x = output.shift + torch.exp(output.log_scale) * x
        hidden_states |= hidden_states_at(objective, number, conditioning, batch)
    return alignment_of(objective, hidden_states, batch["teacher_features"])


def sequential_inverse(block, latents, class_labels):
    """Invert token by token in the block's own order, as one differentiable graph without a cache."""
    order = range(latents.shape[1])
    order = list(reversed(order)) if block.reverse_order else list(order)
    tokens = [torch.zeros_like(latents[:, 0])] * len(order)
    for index in order:
        output = block(torch.stack(tokens, dim=1), class_labels)
        tokens[index] = output.shift[:, index] + torch.exp(output.log_scale[:, index]) * latents[:, index]
    return torch.stack(tokens, dim=1)


def reverse_alignment(objective, batch):
    """Compute the alignment in the generative pass from the detached latents, as the paper defines it."""
    flow = objective.flow
    x = block_inputs(flow, batch)[-1].detach()
    hidden_states = {}
    for number in reached_by_the_generative_pass(objective):
        x = sequential_inverse(flow.blocks[number - 1], x, batch["class_labels"])
        hidden_states |= hidden_states_at(objective, number, x, batch)
    return alignment_of(objective, hidden_states, batch["teacher_features"])


def unrolled_reverse_alignment(objective, batch, order):
    """Take `order + 1` fixed-point steps from the detached input. The graph's gradient is the truncated series."""
    flow = objective.flow
    states = [state.detach() for state in block_inputs(flow, batch)]
    x = states[-1]
    hidden_states = {}
    for number in reached_by_the_generative_pass(objective):
        block, latents, u = flow.blocks[number - 1], x, states[number - 1]
        for _ in range(order + 1):
            output = block(u, batch["class_labels"])
            u = output.shift + torch.exp(output.log_scale) * latents
        x = u
        hidden_states |= hidden_states_at(objective, number, x, batch)
    return alignment_of(objective, hidden_states, batch["teacher_features"])


NAIVE = {
    "forward": (("forward", None), forward_alignment),
    "detach": (("detach", None), detach_alignment),
    "reverse-exact": (("reverse", "exact"), reverse_alignment),
    "reverse-0": (("reverse", 0), lambda *args: unrolled_reverse_alignment(*args, order=0)),
    "reverse-1": (("reverse", 1), lambda *args: unrolled_reverse_alignment(*args, order=1)),
    "reverse-2": (("reverse", 2), lambda *args: unrolled_reverse_alignment(*args, order=2)),
}


def assert_gradients_equal(actual, expected, relative_tolerance):
    """Compare each parameter relative to its largest entry. Zeros must be exactly zero in both."""
    compared = 0
    for name, gradient in expected.items():
        if gradient is None or (gradient == 0).all():
            assert actual[name] is None or (actual[name] == 0).all(), name
            continue
        tolerance = relative_tolerance * gradient.abs().max().item()
        torch.testing.assert_close(actual[name].double(), gradient, rtol=0, atol=tolerance, msg=name)
        compared += 1
    assert compared > 10  # otherwise only zeros would have been compared


@pytest.mark.parametrize("name", NAIVE)
def test_gradient_is_that_of_the_naive_graph(flow, batch, name):
    (strategy, order), naive_alignment = NAIVE[name]
    objective = make_objective(flow, strategy, order)
    naive = naive_alignment(objective, batch)
    output = objective(**batch)
    torch.testing.assert_close(output.alignment, naive, rtol=0, atol=1e-12)
    assert_gradients_equal(gradients(output.alignment, objective), gradients(naive, objective), 1e-8)


@pytest.mark.parametrize("name", NAIVE)
def test_one_backward_adds_the_likelihood_and_the_weighted_alignment(flow, batch, name):
    (strategy, order), naive_alignment = NAIVE[name]
    objective = make_objective(flow, strategy, order)
    expected = gradients(plain_nll(objective, batch) + 0.3 * naive_alignment(objective, batch), objective)
    objective(**batch).loss.backward()
    assert_gradients_equal({name: p.grad for name, p in objective.named_parameters()}, expected, 1e-8)


@pytest.mark.parametrize("name", NAIVE)
def test_an_adapter_gets_the_gradient_of_the_naive_graph(flow, batch, name):
    (strategy, order), naive_alignment = NAIVE[name]
    targets = ["to_qkv", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    torch.manual_seed(0)
    flow.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    for parameter in flow.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.1)
    objective = make_objective(flow, strategy, order)
    expected = gradients(plain_nll(objective, batch) + 0.3 * naive_alignment(objective, batch), objective)
    assert {name.split(".")[-3] for name in expected if name.startswith("flow")} == {"lora_A", "lora_B"}
    objective(**batch).loss.backward()
    stored = {name: parameter.grad for name, parameter in objective.named_parameters()}
    assert_gradients_equal(stored, expected, 1e-8)
    assert all(gradient is None for name, gradient in stored.items() if name not in expected)


class NeighbourhoodProjector(torch.nn.Module):
    """A convolution of 3x3 tokens with the weights of an objective's projector, written out as a sum of products."""

    def __init__(self, projector):
        super().__init__()
        self.conv = projector.conv

    def forward(self, hidden_states):
        grid_size = int(hidden_states.shape[1] ** 0.5)
        projected = []
        for row, column in itertools.product(range(grid_size), repeat=2):
            total = self.conv.bias
            for down, right in itertools.product((-1, 0, 1), repeat=2):
                if 0 <= row + down < grid_size and 0 <= column + right < grid_size:
                    weight = self.conv.weight[:, :, 1 + down, 1 + right]
                    total = total + hidden_states[:, (row + down) * grid_size + column + right] @ weight.T
            projected.append(total)
        return torch.stack(projected, dim=1)


@pytest.mark.parametrize("name", NAIVE)
def test_a_convolution_as_projector_gets_the_gradient_of_the_naive_graph(flow, batch, name):
    (strategy, order), naive_alignment = NAIVE[name]
    objective = make_objective(flow, strategy, order, projector_type="conv")
    output = objective(**batch)
    actual = gradients(output.alignment, objective)
    for place, projector in objective.projectors.items():
        objective.projectors[place] = NeighbourhoodProjector(projector)
    naive = naive_alignment(objective, batch)
    torch.testing.assert_close(output.alignment, naive, rtol=0, atol=1e-12)
    assert_gradients_equal(actual, gradients(naive, objective), 1e-8)
    assert output.alignment != make_objective(flow, strategy, order)(**batch).alignment


@pytest.mark.parametrize("name", NAIVE)
def test_normalized_features_are_standardized_over_the_patches_of_each_image(flow, batch, name):
    (strategy, order), naive_alignment = NAIVE[name]
    plain = make_objective(flow, strategy, order)(**batch)
    objective = make_objective(flow, strategy, order, normalize_teacher_features=True)
    output = objective(**batch)
    standardized = torch.empty_like(batch["teacher_features"])
    for image, channel in itertools.product(range(3), range(TEACHER_DIM)):
        values = batch["teacher_features"][image, :, channel]
        deviation = (values.square().mean() - values.mean() ** 2).sqrt()
        standardized[image, :, channel] = (values - values.mean()) / (deviation + 1e-6)
    naive = naive_alignment(objective, batch | {"teacher_features": standardized})
    torch.testing.assert_close(output.alignment, naive, rtol=0, atol=1e-12)
    assert_gradients_equal(gradients(output.alignment, objective), gradients(naive, objective), 1e-8)
    assert (output.alignment - plain.alignment).abs() > 1e-3


def test_what_all_patches_share_does_not_count_once_features_are_normalized(flow, batch):
    """A constant channel has no deviation to divide by, and half precision is computed in float32."""
    objective = make_objective(flow, "detach", normalize_teacher_features=True)
    features = batch["teacher_features"]
    shifted = 3.0 * features + torch.tensor([5.0, -5.0, 0.0, 1.0, 9.0])
    constant = features.clone()
    constant[..., 2] = 7.0
    values = [objective(**batch | {"teacher_features": each}).alignment for each in (features, shifted, constant)]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)  # of the epsilon
    assert values[2].isfinite() and values[2] != values[0]
    half = objective(**batch | {"teacher_features": 100 * features.half()}).alignment
    torch.testing.assert_close(half, values[0], rtol=0, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_at_any_places_of_any_flow(randomised_model, data):
    layers = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4), label="layers per block")
    places = [(block, layer) for block, count in enumerate(layers, start=1) for layer in range(1, count + 1)]
    places = data.draw(st.lists(st.sampled_from(places), min_size=1, unique=True), label="places")
    grid_size = data.draw(st.integers(1, 3), label="grid size")
    order = data.draw(st.sampled_from([0, 1, 3, "exact"]), label="order")
    labels = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=3), label="class labels")
    flow = randomised_model(
        seed=data.draw(st.integers(0, 9), label="seed"), sample_size=grid_size, patch_size=1, in_channels=2,
        num_blocks=len(layers), num_layers=layers, num_classes=3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = {"noisy_sample": (2, grid_size, grid_size), "teacher_features": (grid_size**2, TEACHER_DIM)}
    batch = {
        name: torch.randn(len(labels), *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    batch["class_labels"] = torch.tensor(labels)
    objective = make_objective(flow, "reverse", order, places)
    naive = (
        reverse_alignment(objective, batch)
        if order == "exact"
        else unrolled_reverse_alignment(objective, batch, order)
    )
    expected = gradients(plain_nll(objective, batch) + 0.3 * naive, objective)
    assert_gradients_equal(gradients(objective(**batch).loss, objective), expected, 1e-8)


REACHED = [
    ("forward", None, {1, 2}),
    ("detach", None, {2}),
    ("reverse", 0, {2, 3, 4}),
    ("reverse", "exact", {2, 3, 4}),
]


@pytest.mark.parametrize("strategy, order, reached", REACHED)
def test_the_alignment_of_block_2_reaches_only_its_blocks(flow, batch, strategy, order, reached):
    objective = make_objective(flow, strategy, order, places=[(2, 1)])
    actual = gradients(objective(**batch).alignment, flow)
    for number in range(1, 5):
        block_gradients = [g for name, g in actual.items() if name.startswith(f"blocks.{number - 1}.")]
        largest = max((g.abs().max().item() for g in block_gradients if g is not None), default=0.0)
        assert (largest > 0) == (number in reached), f"block {number}: {largest}"


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("strategy, order, reached", REACHED)
def test_other_blocks_get_only_the_gradient_of_the_likelihood_to_the_bit(
    flow, batch, strategy, order, reached, mixed_precision
):
    flow.float()
    batch = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}

    def flow_gradients(objective):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            loss = objective(**batch).loss
        return gradients(loss, flow)

    actual = flow_gradients(make_objective(flow, strategy, order, places=[(2, 1)]))
    plain = flow_gradients(make_objective(flow, "none"))
    for name, gradient in plain.items():
        number = int(name.split(".")[1]) + 1
        if number not in reached:
            assert torch.equal(actual[name], gradient), name
        # The class table influences every token of the block, so the alignment must reach it.
        elif name.endswith("class_embed"):
            assert not torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("strategy, order", [("none", None), *[row[:2] for row in REACHED]])
def test_every_block_is_evaluated_once(flow, batch, strategy, order):
    objective = make_objective(flow, strategy, order)
    called = []
    for number, block in enumerate(flow.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    objective(**batch).loss.backward()
    assert called == [1, 2, 3, 4]


def test_the_graph_is_freed_without_the_garbage_collector(flow, batch):
    objective = make_objective(flow, "reverse", 1)
    inputs = []
    flow.blocks[2].register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    gc.disable()
    try:
        output = objective(**batch)
        assert inputs[0]() is not None
        output.loss.backward()
        del output
        assert inputs[0]() is None
    finally:
        gc.enable()


def test_orders_converge_to_the_exact_gradient_and_it_differs_from_detach(flow, batch):
    def flat(strategy, order=None):
        output = make_objective(flow, strategy, order)(**batch)
        found = gradients(output.alignment, flow)
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
    objective = make_objective(flow, "reverse", 1)
    output, states = objective(**batch), block_inputs(flow, batch)
    expected = max(
        block(state, batch["class_labels"]).log_scale.abs().max() for block, state in zip(flow.blocks, states)
    )
    torch.testing.assert_close(output.max_log_scale, expected, rtol=0, atol=1e-14)
    assert sorted(output.neumann_growth) == [2, 3, 4]
    cotangent = 0.0
    for number in (2, 3, 4):
        block_input, latents = states[number - 1].detach().requires_grad_(), states[number].detach()
        block = flow.blocks[number - 1](block_input, batch["class_labels"])
        hidden_states = hidden_states_at(objective, number, block_input, batch)
        if hidden_states:
            cosines = -len(hidden_states) * alignment_of(objective, hidden_states, batch["teacher_features"])
            cotangent = cotangent - torch.autograd.grad(cosines, block_input)[0]
        inverse = block.shift + torch.exp(block.log_scale) * latents
        once_repeated = cotangent + torch.autograd.grad(inverse, block_input, cotangent)[0]
        growth = once_repeated.norm() / cotangent.norm()
        assert abs(growth - 1) > 1e-3
        torch.testing.assert_close(output.neumann_growth[number], growth, rtol=0, atol=1e-10)
        cotangent = torch.exp(block.log_scale.detach()) * once_repeated
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


# Ways to train: each must give the plain float64 gradient, up to its precision

TRAINED = ["forward", "detach", "reverse-0", "reverse-2"]
trained = pytest.mark.parametrize("name", TRAINED)


def make_trained(flow, name):
    (strategy, order), _ = NAIVE[name]
    return make_objective(flow, strategy, order)


def plain_gradients(objective, batch, name):
    """Return the gradients of the loss by the naive graphs."""
    _, naive_alignment = NAIVE[name]
    return gradients(plain_nll(objective, batch) + 0.3 * naive_alignment(objective, batch), objective)


def stored_gradients(objective):
    return {name: parameter.grad for name, parameter in objective.named_parameters()}


def single_precision(objective, batch):
    objective.float()
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def relative_error(actual, expected):
    names = [name for name, gradient in expected.items() if gradient is not None]
    flat_actual = torch.cat([actual[name].double().flatten() for name in names])
    flat_expected = torch.cat([expected[name].flatten() for name in names])
    return ((flat_actual - flat_expected).norm() / flat_expected.norm()).item()


@trained
def test_gradient_accumulation_and_clipping_by_accelerate(flow, batch, name):
    objective = make_trained(flow, name)
    images = [{key: tensor[number : number + 1] for key, tensor in batch.items()} for number in range(2)]
    plain = [plain_gradients(objective, image, name) for image in images]
    expected = {key: (plain[0][key] + plain[1][key]) / 2 for key in plain[0]}
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared = accelerator.prepare(objective)
    for image in images:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**image).loss)
    assert accelerator.sync_gradients
    assert_gradients_equal(stored_gradients(objective), expected, 1e-10)
    torch.testing.assert_close(accelerator.clip_grad_norm_(objective.parameters(), 0.1), norm, rtol=1e-10, atol=0)
    clipped = {key: gradient * 0.1 / norm for key, gradient in expected.items()}
    assert_gradients_equal(stored_gradients(objective), clipped, 1e-5)  # the norm is enlarged by 1e-6


@trained
def test_gradient_checkpointing(flow, batch, name):
    objective = make_trained(flow, name)
    expected = plain_gradients(objective, batch, name)
    flow.enable_gradient_checkpointing()
    objective(**batch).loss.backward()
    assert_gradients_equal(stored_gradients(objective), expected, 1e-10)


@pytest.mark.parametrize("name, backend", [*((name, "aot_eager") for name in TRAINED), ("reverse-2", "inductor")])
def test_compiled_layers(flow, batch, name, backend):
    objective = make_trained(flow, name)
    expected = plain_gradients(objective, batch, name)
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        flow.compile_repeated_blocks(fullgraph=True, backend=backend)
        objective(**batch).loss.backward()
    torch.compiler.reset()
    assert_gradients_equal(stored_gradients(objective), expected, 1e-10)


# Relative errors from rounding: 2^-8 per value in bfloat16 and 2^-11 in float16, over a few products.
AUTOCAST = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@trained
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
def test_autocast_with_loss_scaling(flow, batch, name, dtype):
    objective = make_trained(flow, name)
    expected = plain_gradients(objective, batch, name)
    batch = single_precision(objective, batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype):
        output = objective(**batch)
    assert output.loss.dtype == torch.float32
    scaler.scale(output.loss).backward()
    scaled = stored_gradients(objective)
    assert relative_error(scaled, expected) > 1000
    scaler.unscale_(optimizer)
    assert 1e-5 < relative_error(stored_gradients(objective), expected) < AUTOCAST[dtype]
    before = objective.flow.blocks[3].proj_in.weight.clone()
    scaler.step(optimizer)
    assert not torch.equal(before, objective.flow.blocks[3].proj_in.weight)


def test_autocast_by_accelerate(flow, batch):
    objective = make_trained(flow, "reverse-2")
    expected = plain_gradients(objective, batch, "reverse-2")
    batch = single_precision(objective, batch)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    output = accelerator.prepare(objective)(**batch)
    assert output.loss.dtype == torch.float32 and list(output.cosine_similarity) == PLACES
    accelerator.backward(output.loss)
    assert 1e-5 < relative_error(stored_gradients(objective), expected) < AUTOCAST[torch.bfloat16]


def test_two_processes_and_accumulation(flow, batch, tmp_path):
    batch = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in batch.items()}
    batch["noisy_sample"] = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    objective = make_trained(flow, "forward")
    setting = {
        "config": {key: value for key, value in flow.config.items() if not key.startswith("_")},
        "state_dict": objective.state_dict(),
        "arguments": {"places": PLACES, "weight": 0.3, "teacher_dim": TEACHER_DIM, **PAPERS},
        "strategies": {name: NAIVE[name][0] for name in TRAINED},
        "batch": batch,
    }
    torch.save(setting, tmp_path / "setting.pt")
    script = Path(__file__).with_name("ddp_gradients.py")
    process = start_two_processes(script, [tmp_path / "setting.pt", tmp_path / "gradients"], stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    for process in range(2):
        found = torch.load(tmp_path / f"gradients.{process}", weights_only=True)
        for name in TRAINED:
            assert_gradients_equal(found[name], plain_gradients(objective, batch, name), 1e-10)


# Values and arguments


def test_the_objective_leaves_no_gradient_behind_before_backward(flow, batch):
    objective = make_objective(flow, "reverse", "exact")
    objective(**batch)
    assert all(parameter.grad is None for parameter in objective.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strategy": "backward"}, "`strategy` must be one of .* but is 'backward'"),
        ({"strategy": "detach", "order": 1}, "`order` is for the strategy 'reverse' only"),
        ({"order": -1}, "`order` must be a whole number of at least 0, but is -1"),
        ({"order": "all"}, "`order` must be .* but is 'all'"),
        ({"places": []}, "`places` must hold at least one"),
        ({"places": [(2, 1), (2, 1)]}, "each of them once"),
        ({"places": [(5, 1)]}, r"`places` names flow block 5, but this flow's blocks are 1 \(image\) to 4 \(noise\)"),
        ({"places": [(0, 1)]}, "`places` names flow block 0"),
        ({"places": [(2, 3)]}, "`places` names layer 3 of flow block 2, but its layers are 1 to 2"),
        ({"projector_type": "linear"}, r"`projector_type` must be one of \('mlp', 'conv'\), but is 'linear'"),
        ({"teacher_dim": None}, "`teacher_dim`, the dimension of the teacher's features, must be given for 'reverse'"),
    ],
)
def test_bad_arguments_raise(flow, arguments, message):
    with pytest.raises(ValueError, match=message):
        AlignedFlowObjective(flow, **{"places": PLACES, "teacher_dim": TEACHER_DIM, **arguments})


@pytest.mark.parametrize("features", [None, torch.zeros(3, 4, TEACHER_DIM + 1), torch.zeros(3, 9, TEACHER_DIM)])
def test_wrong_teacher_features_raise(flow, batch, features):
    with pytest.raises(ValueError, match=r"`teacher_features` must have shape \(3, 4, 5\)"):
        make_objective(flow, "reverse")(batch["noisy_sample"], batch["class_labels"], features)
