import inspect
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import TorchAoConfig
from hypothesis import given, settings
from hypothesis import strategies as st

import flowback_hf.models.transformer_tarflow as transformer_tarflow
from flowback_hf import FlowBackPipeline
from flowback_hf.models.transformer_tarflow import (
    ACTIVATION_FNS,
    POSITION_EMBEDDINGS,
    TarFlowTransformer2DModel,
    apply_guidance,
    rotary_embedding,
    rotate,
)


NUM_CLASSES = 5
CLASS_WEIGHTS = torch.tensor([[0.1, 0.2, 0.4, 0.05, 0.25], [0.6, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
CONDITIONS = {
    "unconditional": (None, None),
    "no-labels": (NUM_CLASSES, None),
    "dropped": (NUM_CLASSES, torch.tensor([-1, -1])),
    "classes": (NUM_CLASSES, torch.tensor([2, 4])),
    "mixed": (NUM_CLASSES, torch.tensor([3, -1])),
    "weights": (NUM_CLASSES, CLASS_WEIGHTS),
}
SHAPES = {
    "rgb": {"sample_size": 4, "patch_size": 2, "in_channels": 3},
    "grey": {"sample_size": 6, "patch_size": 2, "in_channels": 1},
    "latent-patch-1": {"sample_size": 3, "patch_size": 1, "in_channels": 4},
    "latent-patch-3": {"sample_size": 6, "patch_size": 3, "in_channels": 4},
}
ONE_TOKEN = {"sample_size": 2, "patch_size": 2, "in_channels": 3}
ARCHITECTURES = {
    "plain": {},
    "deep-shallow": {"num_layers": [1, 1, 2]},
    "rope": {"position_embedding": "rope"},
    "swiglu": {"activation_fn": "swiglu"},
    "deep-shallow-rope-swiglu": {
        "num_layers": [1, 1, 2],
        "position_embedding": "rope",
        "activation_fn": "swiglu",
        "attention_head_dim": 8,
    },
}
GUIDANCE = {
    f"{rule}-{schedule}-temperature-{temperature}": {
        "guidance_scale": 2.5,
        "guidance_rule": rule,
        "guidance_schedule": schedule,
        "guidance_temperature": temperature,
    }
    for rule in ("linear", "product")
    for schedule in ("constant", "linear")
    for temperature in (1.0, 1.7)
}

each_condition = pytest.mark.parametrize("num_classes, class_labels", CONDITIONS.values(), ids=CONDITIONS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
each_guidance = pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)


def random_sample(model, batch_size=2, seed=1, dtype=torch.float64):
    config = model.config
    shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_not_close(actual, other, by):
    assert (actual - other).abs().max() > by


def jacobian_between_tokens(model, sample, class_labels, block):
    """Return the Jacobian of one flow block between tokens in the block's order: (T, d, T, d), output first."""
    num_tokens, token_dim = model.patchify(sample).shape[1:]

    def apply_block(tokens):
        output = model(model.unpatchify(tokens), class_labels, blocks=[block])
        return model.patchify(output.sample)[0]

    jacobian = torch.autograd.functional.jacobian(apply_block, model.patchify(sample))
    jacobian = jacobian.reshape(num_tokens, token_dim, num_tokens, token_dim)
    return jacobian.flip(0, 2) if block % 2 == 0 else jacobian


# The method's formulas written out, token by token and head by head. They use the model's weights and nothing else.


def plain_patchify(sample, patch_size):
    starts = range(0, sample.shape[-1], patch_size)
    patches = [sample[:, :, y : y + patch_size, x : x + patch_size] for y in starts for x in starts]
    return torch.stack([patch.flatten(1) for patch in patches], dim=1)


def plain_unpatchify(tokens, sample, patch_size):
    image = torch.empty_like(sample)
    starts = range(0, sample.shape[-1], patch_size)
    corners = [(y, x) for y in starts for x in starts]
    for number, (y, x) in enumerate(corners):
        patch = tokens[:, number].reshape(len(sample), -1, patch_size, patch_size)
        image[:, :, y : y + patch_size, x : x + patch_size] = patch
    return image


def plain_layer_norm(norm, hidden_states):
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def plain_rotation(head, rows_and_columns):
    """Rotate neighbouring pairs of (B, T, head_dim), as complex numbers, by the token's row or column."""
    num_pairs = head.shape[-1] // 4
    frequencies = [10_000 ** (-number / num_pairs) for number in range(num_pairs)]
    angles = [[f * row for f in frequencies] + [f * column for f in frequencies] for row, column in rows_and_columns]
    pairs = torch.view_as_complex(head.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * torch.tensor(angles, dtype=head.dtype))).flatten(-2)


def plain_attention(attention, hidden_states, temperature, rows_and_columns):
    num_tokens, head_dim = hidden_states.shape[1], attention.head_dim
    query, key, value = attention.to_qkv(hidden_states).chunk(3, dim=-1)
    is_later = torch.ones(num_tokens, num_tokens).triu(1).bool()
    heads = []
    for start in range(0, query.shape[-1], head_dim):
        head = slice(start, start + head_dim)
        query_head, key_head = query[..., head], key[..., head]
        if rows_and_columns is not None:
            query_head = plain_rotation(query_head, rows_and_columns)
            key_head = plain_rotation(key_head, rows_and_columns)
        logits = query_head @ key_head.transpose(1, 2) / math.sqrt(head_dim) / temperature
        heads.append(logits.masked_fill(is_later, -math.inf).softmax(-1) @ value[..., head])
    return attention.to_out[0](torch.cat(heads, dim=-1))


def plain_feed_forward(feed_forward, hidden_states):
    inner = feed_forward.net[0].proj(hidden_states)
    if inner.shape[-1] != feed_forward.net[2].in_features:  # the second half is swiglu's gate
        inner, gate = inner.chunk(2, dim=-1)
        return feed_forward.net[2](inner * gate / (1 + torch.exp(-gate)))
    return feed_forward.net[2](0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))))


def plain_class_embedding(block, class_labels, index):
    table = block.class_embed
    if class_labels is None or (class_labels.ndim == 1 and class_labels[index] == -1):
        return table.sum(0) / len(table)
    if class_labels.ndim == 1:
        return table[class_labels[index]]
    return sum(weight * row for weight, row in zip(class_labels[index], table))


def plain_network(block, number, tokens, class_labels, temperature=1.0):
    """Return the log-scale and shift at each of `tokens`, which are the first ones in the block's order."""
    hidden_states = tokens @ block.proj_in.weight.T + block.proj_in.bias
    rows_and_columns = None
    if block.pos_embed is not None:
        positions = block.pos_embed if number % 2 == 1 else block.pos_embed.flip(0)
        hidden_states = hidden_states + positions[: tokens.shape[1]]
    else:
        raster = [(row, column) for row in range(block.grid_size) for column in range(block.grid_size)]
        rows_and_columns = (raster if number % 2 == 1 else raster[::-1])[: tokens.shape[1]]
    if block.class_embed is not None:
        classes = [plain_class_embedding(block, class_labels, index) for index in range(len(tokens))]
        hidden_states = hidden_states + torch.stack(classes)[:, None]
    for layer in block.layers:
        attended = plain_attention(
            layer.attn, plain_layer_norm(layer.norm1, hidden_states), temperature, rows_and_columns
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + plain_feed_forward(layer.ff, plain_layer_norm(layer.norm2, hidden_states))
    return (hidden_states @ block.proj_out.weight.T + block.proj_out.bias).chunk(2, dim=-1)


def plain_forward(model, sample, class_labels):
    """Return latents and log-determinant."""
    tokens, log_abs_det = plain_patchify(sample, model.config.patch_size), torch.zeros(len(sample), dtype=sample.dtype)
    for number, block in enumerate(model.blocks, start=1):
        tokens = tokens.flip(1) if number % 2 == 0 else tokens
        log_scale, shift = plain_network(block, number, tokens, class_labels)
        first = torch.zeros_like(tokens[:, :1])
        log_scale, shift = torch.cat([first, log_scale[:, :-1]], 1), torch.cat([first, shift[:, :-1]], 1)
        tokens = (tokens - shift) / log_scale.exp()
        tokens = tokens.flip(1) if number % 2 == 0 else tokens
        log_abs_det = log_abs_det - log_scale.sum((1, 2))
    return plain_unpatchify(tokens, sample, model.config.patch_size), log_abs_det


def plain_guidance(strong, weak, weight, rule):
    (log_scale_c, shift_c), (log_scale_u, shift_u) = strong, weak
    if rule == "linear":
        return log_scale_c + weight * (log_scale_c - log_scale_u), shift_c + weight * (shift_c - shift_u)
    sigma_c, sigma_u = log_scale_c.exp(), log_scale_u.exp()
    ratio = (sigma_c / sigma_u).clamp(max=1) ** 2
    precision = 1 + weight - weight * ratio
    shift = ((1 + weight) * shift_c - weight * ratio * shift_u) / precision
    return (sigma_c / precision.sqrt()).log(), shift


def plain_inverse(
    model,
    latents,
    class_labels,
    guidance_scale=1.0,
    guidance_rule="linear",
    guidance_schedule="constant",
    guidance_temperature=1.0,
):
    """Return data. Each token takes two full evaluations of the network on all tokens before it."""
    tokens = plain_patchify(latents, model.config.patch_size)
    last = tokens.shape[1] - 1
    for number in range(len(model.blocks), 0, -1):
        block = model.blocks[number - 1]
        noise = tokens.flip(1) if number % 2 == 0 else tokens
        data = noise[:, :1]
        for index in range(1, last + 1):
            strong = [values[:, -1] for values in plain_network(block, number, data, class_labels)]
            weak = [values[:, -1] for values in plain_network(block, number, data, None, guidance_temperature)]
            weight = (guidance_scale - 1) * (index / last if guidance_schedule == "linear" else 1)
            log_scale, shift = plain_guidance(strong, weak, weight, guidance_rule)
            token = shift + log_scale.exp() * noise[:, index]
            data = torch.cat([data, token[:, None]], dim=1)
        tokens = data.flip(1) if number % 2 == 0 else data
    return plain_unpatchify(tokens, latents, model.config.patch_size)


# Values


@each_condition
@each_architecture
@each_shape
def test_forward_is_the_method_written_out(randomised_model, shape, architecture, num_classes, class_labels):
    model = randomised_model(**shape, **architecture, num_classes=num_classes)
    sample = random_sample(model)
    output = model(sample, class_labels)
    latents, log_abs_det = plain_forward(model, sample, class_labels)
    assert_not_close(latents, sample, by=0.1)
    assert_close(output.sample, latents, atol=1e-10)
    assert_close(output.log_abs_det, log_abs_det, atol=1e-10)


@each_condition
@each_architecture
@each_shape
def test_inverse_undoes_forward_and_forward_undoes_inverse(
    randomised_model, shape, architecture, num_classes, class_labels
):
    model = randomised_model(**shape, **architecture, num_classes=num_classes)
    sample = random_sample(model)
    encoded = model(sample, class_labels)
    decoded = model(encoded.sample, class_labels, inverse=True)
    assert_not_close(encoded.sample, sample, by=0.1)
    assert_close(decoded.sample, sample, atol=1e-10)
    assert decoded.log_abs_det.abs().min() > 1e-3
    assert_close(decoded.log_abs_det, -encoded.log_abs_det, atol=1e-10)

    generated = model(sample, class_labels, inverse=True)
    assert_not_close(generated.sample, sample, by=0.1)
    assert_close(model(generated.sample, class_labels).sample, sample, atol=1e-10)


@each_condition
@each_architecture
def test_sampling_is_the_method_written_out(randomised_model, architecture, num_classes, class_labels):
    model = randomised_model(**architecture, num_classes=num_classes)
    latents = random_sample(model)
    assert_close(
        model(latents, class_labels, inverse=True).sample, plain_inverse(model, latents, class_labels), atol=1e-10
    )


@each_condition
def test_flow_of_one_token_is_the_identity(randomised_model, num_classes, class_labels):
    model = randomised_model(**ONE_TOKEN, num_classes=num_classes)
    sample = random_sample(model)
    for inverse in (False, True):
        output = model(sample, class_labels, inverse=inverse)
        assert torch.equal(output.sample, sample)
        assert torch.equal(output.log_abs_det, torch.zeros(2, dtype=torch.float64))
    guidance = {"guidance_scale": 3.0, "guidance_schedule": "linear", "guidance_temperature": 2.0}
    assert torch.equal(model(sample, class_labels, inverse=True, **guidance).sample, sample)


@each_condition
def test_blocks_one_at_a_time_equal_the_whole_to_the_bit(randomised_model, num_classes, class_labels):
    model = randomised_model(num_blocks=4, num_layers=[1, 2, 1, 1], num_classes=num_classes)
    sample = random_sample(model)
    for inverse, numbers in ((False, (1, 2, 3, 4)), (True, (4, 3, 2, 1))):
        whole = model(sample, class_labels, inverse=inverse)
        current, log_abs_det = sample, torch.zeros(2, dtype=torch.float64)
        for number in numbers:
            output = model(current, class_labels, blocks=[number], inverse=inverse)
            assert_not_close(output.sample, current, by=1e-3)
            current, log_abs_det = output.sample, log_abs_det + output.log_abs_det
        assert torch.equal(current, whole.sample)
        assert torch.equal(log_abs_det, whole.log_abs_det)


@pytest.mark.parametrize("number", [1, 2])
def test_block_returns_its_log_scale_and_shift_in_raster_order(randomised_model, number):
    model = randomised_model()
    block, tokens, class_labels = model.blocks[number - 1], model.patchify(random_sample(model)), torch.tensor([2, -1])
    latents, log_scale, shift, hidden_states, sweeps = block(tokens, class_labels)
    assert hidden_states == {} and sweeps is None
    assert log_scale.abs().max() > 1e-2 and shift.abs().max() > 1e-2
    assert_close(latents, (tokens - shift) / log_scale.exp(), atol=1e-12)
    first = 0 if number == 1 else -1
    assert not log_scale[:, first].any() and not shift[:, first].any()

    inverse = block(latents, class_labels, inverse=True)
    assert_close(inverse.tokens, tokens, atol=1e-10)
    assert_close(inverse.log_scale, log_scale, atol=1e-10)
    assert_close(inverse.shift, shift, atol=1e-10)
    assert inverse.hidden_states == {} and inverse.sweeps.tolist() == [3, 3]


def test_blocks_run_in_their_own_order_whatever_order_they_are_given_in(randomised_model):
    model = randomised_model()
    sample = random_sample(model)
    for inverse in (False, True):
        given = model(sample, blocks=iter([3, 1]), inverse=inverse)
        assert torch.equal(given.sample, model(sample, blocks=[1, 3], inverse=inverse).sample)
        first, second = (3, 1) if inverse else (1, 3)
        halfway = model(sample, blocks=[first], inverse=inverse).sample
        assert torch.equal(given.sample, model(halfway, blocks=[second], inverse=inverse).sample)
    nothing = model(sample, blocks=[])
    assert torch.equal(nothing.sample, sample)
    assert not nothing.log_abs_det.any()


def assert_log_abs_det_is_the_jacobians(model, sample, class_labels, blocks):
    def flow(flat):
        return model(flat.view_as(sample), class_labels, blocks=blocks).sample.flatten()

    jacobian = torch.autograd.functional.jacobian(flow, sample.flatten())
    expected = torch.linalg.slogdet(jacobian).logabsdet
    # Guards against a model that is the identity: there, wrong log-determinants pass too.
    assert expected.abs() > 1e-3
    assert_close(model(sample, class_labels, blocks=blocks).log_abs_det[0], expected, atol=1e-10)


@pytest.mark.parametrize("blocks", [[1], [2], [3], None], ids=["block-1", "block-2", "block-3", "whole"])
@each_architecture
@each_shape
def test_log_abs_det_is_the_autograd_jacobian(randomised_model, shape, architecture, blocks):
    model = randomised_model(**shape, **architecture)
    assert_log_abs_det_is_the_jacobians(model, random_sample(model, batch_size=1), torch.tensor([2]), blocks)


@each_condition
@each_architecture
def test_log_abs_det_is_the_autograd_jacobian_under_every_condition(
    randomised_model, architecture, num_classes, class_labels
):
    model = randomised_model(**architecture, num_classes=num_classes)
    class_labels = None if class_labels is None else class_labels[:1]
    assert_log_abs_det_is_the_jacobians(model, random_sample(model, batch_size=1), class_labels, None)


@pytest.mark.parametrize("block", [1, 2, 3, 4])
@each_architecture
@each_shape
def test_blocks_are_causal_in_alternating_orders(randomised_model, shape, architecture, block):
    model = randomised_model(**{**shape, **architecture, "num_blocks": 4, "num_layers": 1})
    jacobian = jacobian_between_tokens(model, random_sample(model, batch_size=1), torch.tensor([1]), block)
    num_tokens, token_dim = jacobian.shape[:2]
    off_diagonal = ~torch.eye(token_dim, dtype=torch.bool)
    for output in range(num_tokens):
        for source in range(num_tokens):
            between = jacobian[output, :, source]
            if source > output:
                assert (between == 0).all(), f"token {output} depends on token {source}"
            elif source == output:
                assert (between[off_diagonal] == 0).all() and (between.diagonal() > 0).all()
            else:
                assert (between != 0).any(), f"token {output} does not depend on token {source}"
    # The first token is not changed.
    assert torch.equal(jacobian[0, :, 0], torch.eye(token_dim, dtype=torch.float64))


@each_condition
@each_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_untrained_flow_is_the_identity_to_the_last_bit(dtype, architecture, num_classes, class_labels):
    config = {"num_layers": 2, "attention_head_dim": 4, **architecture}
    model = TarFlowTransformer2DModel(
        **SHAPES["rgb"], num_blocks=3, num_attention_heads=2, num_classes=num_classes, **config
    ).to(dtype)
    sample = random_sample(model, dtype=dtype)
    for inverse in (False, True):
        output = model(sample, class_labels, inverse=inverse)
        assert torch.equal(output.sample, sample)
        assert torch.equal(output.log_abs_det, torch.zeros(2, dtype=dtype))


# Density


@each_condition
@each_architecture
def test_log_prob_is_the_density_of_a_transformed_gaussian(randomised_model, architecture, num_classes, class_labels):
    model = randomised_model(**architecture, num_classes=num_classes)
    sample = random_sample(model)
    latents, log_abs_det = plain_forward(model, sample, class_labels)
    gaussian = torch.distributions.Normal(torch.zeros_like(sample[0]), 1.0)
    expected = torch.distributions.Independent(gaussian, 3).log_prob(latents) + log_abs_det
    actual = model.log_prob(sample, class_labels)
    assert actual.shape == (2,)
    assert_close(actual, expected, atol=1e-9)


def test_one_hot_class_weights_equal_the_class(randomised_model):
    model = randomised_model()
    sample, class_labels = random_sample(model), torch.tensor([2, 4])
    one_hot = torch.nn.functional.one_hot(class_labels, NUM_CLASSES).double()
    expected = model.log_prob(sample, class_labels)
    assert_not_close(expected, model.log_prob(sample, torch.tensor([3, 0])), by=1e-3)
    assert_close(model.log_prob(sample, one_hot), expected, atol=1e-10)


def test_one_hot_class_weights_equal_the_class_under_autocast(randomised_model):
    model = randomised_model().float()
    sample, class_labels = random_sample(model).float(), torch.tensor([2, 4])
    one_hot = torch.nn.functional.one_hot(class_labels, NUM_CLASSES).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(sample, one_hot).sample, model(sample, class_labels).sample)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_class_labels_of_every_integer_dtype_mean_the_same(randomised_model, dtype):
    model = randomised_model()
    # As many labels as classes: used as a mask, they would select rows of the class table without an error.
    sample, class_labels = random_sample(model, batch_size=NUM_CLASSES), torch.tensor([4, 3, 2, 1, 1])
    assert torch.equal(model.log_prob(sample, class_labels.to(dtype)), model.log_prob(sample, class_labels))


def test_uniform_class_weights_equal_no_class(randomised_model):
    model = randomised_model()
    sample = random_sample(model)
    expected = model.log_prob(sample)
    assert_not_close(expected, model.log_prob(sample, torch.tensor([2, 4])), by=1e-3)
    uniform = torch.full((2, NUM_CLASSES), 1 / NUM_CLASSES, dtype=torch.float64)
    assert_close(model.log_prob(sample, uniform), expected, atol=1e-10)
    assert torch.equal(model.log_prob(sample, torch.tensor([-1, -1])), expected)


def test_gradients_to_sample_and_class_weights_are_those_of_finite_differences(randomised_model):
    model = randomised_model()
    sample, class_weights = random_sample(model).requires_grad_(), CLASS_WEIGHTS.clone().requires_grad_()
    gradients = torch.autograd.grad(model.log_prob(sample, class_weights).sum(), (sample, class_weights))
    assert all(gradient.abs().min() > 0 for gradient in gradients)
    assert torch.autograd.gradcheck(model.log_prob, (sample, class_weights), atol=1e-6, rtol=1e-5)


@each_condition
@each_architecture
def test_gradients_to_the_parameters_are_those_of_the_method_written_out(
    randomised_model, architecture, num_classes, class_labels
):
    model = randomised_model(**architecture, num_classes=num_classes)
    sample, parameters = random_sample(model), dict(model.named_parameters())
    latents, log_abs_det = plain_forward(model, sample, class_labels)
    expected = torch.autograd.grad(log_abs_det.sum() - 0.5 * latents.square().sum(), parameters.values())
    actual = torch.autograd.grad(model.log_prob(sample, class_labels).sum(), parameters.values())
    for name, actual_gradient, expected_gradient in zip(parameters, actual, expected):
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=0, atol=1e-9, msg=name)


@each_architecture
def test_every_parameter_gets_a_gradient(randomised_model, architecture):
    model = randomised_model(**architecture)
    model.log_prob(random_sample(model), torch.tensor([3, -1])).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name
        if name.endswith("class_embed"):
            assert (parameter.grad.abs().amax(dim=1) > 1e-6).all(), name


# Architectures


def test_rotated_queries_and_keys_meet_at_the_difference_of_their_positions():
    """The embedding is relative: moving query and key by the same rows and columns changes no logit."""
    rotary = rotary_embedding(grid_size=4, head_dim=8, device=torch.device("cpu"), dtype=torch.float64)
    query_and_key = torch.randn(1, 1, 2, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = rotate(query_and_key.expand(1, 16, 2, 1, 8), rotary)[0, :, :, 0]  # the same token everywhere
    logits = (states[:, 0] @ states[:, 1].T).view(4, 4, 4, 4)  # row and column of the query, then of the key
    assert_close(logits[1:, 1:, 1:, 1:], logits[:-1, :-1, :-1, :-1], atol=1e-12)
    assert_not_close(logits[0, 0, 0, 1], logits[0, 0, 1, 0], by=1e-3)
    assert_not_close(logits[0, 1, 0, 0], logits[0, 0, 0, 1], by=1e-3)
    assert_close(states.norm(dim=-1), query_and_key[0, 0, :, 0].norm(dim=-1).expand(16, 2), atol=1e-12)


@pytest.mark.parametrize("option, value", [("position_embedding", "rope"), ("activation_fn", "swiglu")])
def test_each_option_changes_the_flow(randomised_model, option, value):
    model, other = randomised_model(), randomised_model(**{option: value})
    shared = {name: weight for name, weight in model.state_dict().items() if name in other.state_dict()}
    shared = {name: weight for name, weight in shared.items() if weight.shape == other.state_dict()[name].shape}
    other.load_state_dict(shared, strict=False)
    assert_not_close(other(random_sample(model)).sample, model(random_sample(model)).sample, by=1e-2)


@pytest.mark.parametrize("width, mlp_ratio, inner_dim", [(1024, 4.0, 2752), (96, 4.0, 256), (8, 2.0, 64)])
def test_swiglu_has_two_thirds_of_the_width_rounded_up(width, mlp_ratio, inner_dim):
    with torch.device("meta"):
        layer = transformer_tarflow.TarFlowLayer(1, width, mlp_ratio, "swiglu")
    assert layer.ff.net[2].weight.shape == (width, inner_dim)


# Guidance


@each_guidance
@each_architecture
def test_guidance_is_the_method_written_out(randomised_model, architecture, guidance):
    model = randomised_model(**architecture)
    latents, class_labels = random_sample(model, batch_size=3), torch.tensor([3, -1, 0])
    guided = model(latents, class_labels, inverse=True, **guidance).sample
    assert_not_close(guided, model(latents, class_labels, inverse=True).sample, by=1e-2)
    assert_close(guided, plain_inverse(model, latents, class_labels, **guidance), atol=1e-9)


@each_guidance
def test_guidance_by_class_weights_is_the_method_written_out(randomised_model, guidance):
    model = randomised_model()
    latents = random_sample(model)
    guided = model(latents, CLASS_WEIGHTS, inverse=True, **guidance).sample
    assert_not_close(guided, model(latents, CLASS_WEIGHTS, inverse=True).sample, by=1e-2)
    assert_close(guided, plain_inverse(model, latents, CLASS_WEIGHTS, **guidance), atol=1e-9)


@each_guidance
def test_unconditional_model_guides_itself_by_temperature(randomised_model, guidance):
    guidance = {**guidance, "guidance_temperature": 1.7}
    model = randomised_model(num_classes=None)
    latents = random_sample(model)
    guided = model(latents, inverse=True, **guidance).sample
    assert_not_close(guided, model(latents, inverse=True).sample, by=1e-2)
    assert_close(guided, plain_inverse(model, latents, None, **guidance), atol=1e-9)


@each_guidance
@pytest.mark.parametrize("name", ["plain", "deep-shallow-rope-swiglu"])
def test_log_abs_det_of_guided_sampling_is_the_autograd_jacobian(randomised_model, name, guidance):
    model = randomised_model(in_channels=1, **ARCHITECTURES[name])
    latents, class_labels = random_sample(model, batch_size=1), torch.tensor([2])

    def flow(flat):
        return plain_inverse(model, flat.view_as(latents), class_labels, **guidance).flatten()

    expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(flow, latents.flatten())).logabsdet
    actual = model(latents, class_labels, inverse=True, **guidance).log_abs_det[0]
    assert expected.abs() > 1e-3
    assert_close(actual, expected, atol=1e-9)


@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_a_compiled_model_does_not_unroll_its_loops_over_tokens(randomised_model, solver):
    def count_operations(grid_size):
        model = randomised_model(sample_size=2 * grid_size, patch_size=2, num_blocks=1, num_layers=[1])
        latents, labels, num_operations = random_sample(model), torch.tensor([2, -1]), [0]

        def backend(graph, _):
            num_operations[0] += len(graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        options = {"inverse": True, "solver": solver, "guidance_scale": 2.0}
        sample = torch.compile(model, backend=backend)(latents, labels, **options).sample
        assert_close(sample, model(latents, labels, **options).sample, atol=1e-10)
        return num_operations[0]

    assert count_operations(3) == count_operations(2)


def test_guidance_without_labels_costs_no_second_branch(randomised_model, monkeypatch):
    """Both branches would be the same."""
    model = randomised_model()
    latents = random_sample(model)
    unguided = model(latents, inverse=True).sample
    monkeypatch.setattr(transformer_tarflow, "apply_guidance", lambda *_: pytest.fail("there were two branches"))
    assert torch.equal(model(latents, inverse=True, guidance_scale=2.0).sample, unguided)


@each_guidance
def test_guidance_scale_of_one_is_off_to_the_bit(randomised_model, guidance):
    model = randomised_model()
    latents, class_labels = random_sample(model), torch.tensor([2, -1])
    unguided = model(latents, class_labels, inverse=True)
    off = model(latents, class_labels, inverse=True, **{**guidance, "guidance_scale": 1.0})
    assert torch.equal(off.sample, unguided.sample)
    assert torch.equal(off.log_abs_det, unguided.log_abs_det)


@pytest.mark.parametrize(
    "option, value",
    [
        ("guidance_scale", 1.5),
        ("guidance_rule", "product"),
        ("guidance_schedule", "linear"),
        ("guidance_temperature", 2.0),
    ],
)
def test_every_guidance_option_changes_the_sample(randomised_model, option, value):
    model = randomised_model()
    latents, class_labels = random_sample(model), torch.tensor([2, 4])
    options = {"guidance_scale": 2.0}
    usual = model(latents, class_labels, inverse=True, **options).sample
    assert_not_close(model(latents, class_labels, inverse=True, **{**options, option: value}).sample, usual, by=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("weight", [1e3, 1e6, 1e8, 1e12])
def test_product_rule_stays_finite_and_a_density_at_huge_weights(weight, dtype):
    # The weak branch is narrower, equally wide, a little wider, much wider.
    log_scale = torch.tensor([[0.3, 0.1, -0.2, -3.0], [0.1, 0.1, -0.199, 3.0]], dtype=dtype)
    shift = torch.tensor([[0.5, -0.5, 1.0, 0.2], [-0.5, 0.5, -1.0, 0.7]], dtype=dtype)
    guided = apply_guidance(log_scale[None, :, None], shift[None, :, None], weight, "product")
    guided_log_scale, guided_shift = (each[0] for each in guided)
    assert guided_log_scale.isfinite().all() and guided_shift.isfinite().all()
    assert (guided_log_scale <= log_scale[:1]).all()
    # If the weak branch is narrower or equally wide, the variance is that of the conditional branch.
    assert_close(guided_log_scale[0, :2], log_scale[0, :2], atol=1e-6)
    # Two equally wide Gaussians: the mean moves by w times their distance.
    torch.testing.assert_close(guided_shift[0, 1], (-0.5 - weight) * torch.ones((), dtype=dtype), rtol=1e-6, atol=0)


def test_sample_under_the_product_rule_stays_finite_at_huge_scales(randomised_model):
    model = randomised_model()
    latents = random_sample(model)
    for block in model.blocks:
        block.proj_out.weight.data.mul_(0.01)
    output = model(latents, torch.tensor([2, 4]), inverse=True, guidance_scale=1e3, guidance_rule="product")
    assert output.sample.isfinite().all() and output.log_abs_det.isfinite().all()
    assert_not_close(output.sample, model(latents, torch.tensor([2, 4]), inverse=True).sample, by=0.1)


# State


def attributes_of_all_modules(model):
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    attributes.update({f"{name}.processor": set(vars(each)) for name, each in model.attn_processors.items()})
    return attributes


def test_solver_changes_neither_its_input_nor_the_model(randomised_model):
    model = randomised_model()
    latents, class_labels = random_sample(model), torch.tensor([2, -1])
    latents_before, class_labels_before = latents.clone(), class_labels.clone()
    weights_before = {name: weight.clone() for name, weight in model.state_dict().items()}
    attributes_before = attributes_of_all_modules(model)
    model(latents, class_labels, inverse=True, guidance_scale=2.0, guidance_temperature=1.5)
    for block in (1, 2):
        model(latents, class_labels, blocks=[block], inverse=True)
    assert torch.equal(latents, latents_before)
    assert torch.equal(class_labels, class_labels_before)
    weights_after = model.state_dict()
    assert weights_after.keys() == weights_before.keys()
    assert all(torch.equal(weights_after[name], weight) for name, weight in weights_before.items())
    assert attributes_of_all_modules(model) == attributes_before


def test_sampling_works_in_every_gradient_mode_and_never_builds_a_graph(randomised_model):
    model = randomised_model()
    class_weights = CLASS_WEIGHTS.clone().requires_grad_()
    guidance = {"inverse": True, "guidance_scale": 2.0}
    with torch.enable_grad():
        with_gradients = model(random_sample(model).requires_grad_(), class_weights, **guidance)
    with torch.no_grad():
        without_gradients = model(random_sample(model), class_weights, **guidance)
    with torch.inference_mode():
        in_inference = model(random_sample(model), class_weights, **guidance)
    for output in (with_gradients, without_gradients, in_inference):
        assert not output.sample.requires_grad and not output.log_abs_det.requires_grad
        assert torch.equal(output.sample, with_gradients.sample)
        assert torch.equal(output.log_abs_det, with_gradients.log_abs_det)


def test_interrupted_sample_leaves_the_model_as_it_was(randomised_model):
    model = randomised_model()
    sample, class_labels = random_sample(model), torch.tensor([2, -1])
    forward_before = model(sample, class_labels)
    inverse_before = model(sample, class_labels, inverse=True)
    calls = []

    def interrupt_at_the_third_token(module, args, output):
        calls.append(output)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.blocks[1].layers[0].register_forward_hook(interrupt_at_the_third_token)
    with pytest.raises(KeyboardInterrupt):
        model(sample, class_labels, inverse=True, guidance_scale=2.0)
    handle.remove()

    assert len(calls) == 3
    forward_after = model(sample, class_labels)
    assert torch.equal(forward_after.sample, forward_before.sample)
    assert torch.equal(forward_after.log_abs_det, forward_before.log_abs_det)
    assert torch.equal(model(sample, class_labels, inverse=True).sample, inverse_before.sample)


def test_two_threads_may_sample_from_one_model(randomised_model):
    model = randomised_model()
    arguments = [(random_sample(model, seed=seed), torch.tensor([seed, -1])) for seed in (1, 2)]

    def sample(latents, class_labels):
        return model(latents, class_labels, inverse=True, guidance_scale=2.0).sample

    serial = [sample(*each) for each in arguments]
    # The threads wait for each other before every layer, so they alternate at every token.
    barrier = threading.Barrier(2, timeout=30)

    def wait_for_the_other():
        barrier.wait()

    handles = [
        layer.register_forward_pre_hook(lambda module, args: wait_for_the_other())
        for block in model.blocks
        for layer in block.layers
    ]
    with ThreadPoolExecutor(2) as executor:
        parallel = list(executor.map(lambda each: sample(*each), arguments))
    for handle in handles:
        handle.remove()
    assert_not_close(serial[0], serial[1], by=0.1)
    assert torch.equal(parallel[0], serial[0])
    assert torch.equal(parallel[1], serial[1])


# Hidden states


def test_hidden_states_are_the_layers_outputs_in_raster_order(randomised_model):
    model = randomised_model(num_layers=[2, 2, 1])
    sample, class_labels = random_sample(model), torch.tensor([2, -1])
    places = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    seen, handles = {}, []

    def save_as(place):
        return lambda module, args, output: seen.__setitem__(place, output)

    for block, layer in places:
        module = model.blocks[block - 1].layers[layer - 1]
        handles.append(module.register_forward_hook(save_as((block, layer))))
    plain = model(sample, class_labels)
    for handle in handles:
        handle.remove()
    expected = {place: states.flip(1) if place[0] == 2 else states for place, states in seen.items()}

    output = model(sample, class_labels, output_hidden_states=iter(places))
    assert torch.equal(output.sample, plain.sample)
    assert output.hidden_states.keys() == set(places)
    for place in places:
        assert output.hidden_states[place].shape == (2, 4, 8)
        assert torch.equal(output.hidden_states[place], expected[place]), place

    two = model(sample, class_labels, output_hidden_states=[(2, 2), (3, 1)], blocks=[2, 3])
    assert two.hidden_states.keys() == {(2, 2), (3, 1)}
    assert plain.hidden_states is None
    assert model(sample, class_labels, output_hidden_states=[]).hidden_states is None


def test_hidden_states_carry_gradients_to_their_block_and_those_before(randomised_model):
    model = randomised_model()
    states = model(random_sample(model), output_hidden_states=[(2, 1)]).hidden_states[2, 1]
    states.square().sum().backward()
    reached = [
        any(weight.grad is not None and weight.grad.any() for weight in block.parameters()) for block in model.blocks
    ]
    assert reached == [True, True, False]


def test_tuple_holds_what_the_dataclass_does(randomised_model):
    model = randomised_model()
    sample = random_sample(model)
    output = model(sample, output_hidden_states=[(2, 1)])
    latents, log_abs_det, hidden_states = model(sample, output_hidden_states=[(2, 1)], return_dict=False)
    assert torch.equal(latents, output.sample) and torch.equal(log_abs_det, output.log_abs_det)
    assert torch.equal(hidden_states[2, 1], output.hidden_states[2, 1])
    assert len(model(sample, return_dict=False)) == 2


def test_accelerate_can_rebuild_the_output(randomised_model):
    accelerate = pytest.importorskip("accelerate")
    model = randomised_model()
    output = model(random_sample(model), output_hidden_states=[(2, 1)])
    half = type(output)(
        output.sample.half(), output.log_abs_det.half(), {(2, 1): output.hidden_states[2, 1].bfloat16()}
    )
    rebuilt = accelerate.utils.convert_to_fp32(half)
    assert type(rebuilt) is type(output)
    assert rebuilt.sample.dtype == rebuilt.log_abs_det.dtype == rebuilt.hidden_states[2, 1].dtype == torch.float32
    assert torch.equal(rebuilt.sample, output.sample.half().float())


# Features of diffusers and torch


@each_architecture
def test_gradient_checkpointing_runs_the_layers_again_and_changes_no_gradient(randomised_model, architecture):
    model = randomised_model(**{**architecture, "num_layers": 2}).train()
    sample, class_labels = random_sample(model), torch.tensor([2, -1])
    model.log_prob(sample, class_labels).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    calls = dict.fromkeys(range(6), 0)
    layers = [layer for block in model.blocks for layer in block.layers]
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda module, args, number=number: calls.__setitem__(number, calls[number] + 1)
        )
    model.enable_gradient_checkpointing()
    log_prob = model.log_prob(sample, class_labels)
    assert set(calls.values()) == {1}
    log_prob.sum().backward()
    assert set(calls.values()) == {2}
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], atol=1e-12)


def test_compiled_layers_give_the_same_outputs(randomised_model, fresh_compiler):
    model = randomised_model()
    sample, class_labels = random_sample(model), torch.tensor([2, -1])
    calls = [
        {},
        {"output_hidden_states": [(2, 1)]},
        {"inverse": True},
        {"inverse": True, "guidance_scale": 2.0},
        {"inverse": True, "guidance_scale": 2.0, "guidance_temperature": 1.5},
    ]
    eager = [model(sample, class_labels, **call) for call in calls]
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for call, expected in zip(calls, eager):
        actual = model(sample, class_labels, **call)
        assert_close(actual.sample, expected.sample, atol=1e-12)
        assert_close(actual.log_abs_det, expected.log_abs_det, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_compiled_layers_give_the_same_gradients(randomised_model, fresh_compiler):
    model = randomised_model()
    sample, class_labels = random_sample(model), torch.tensor([2, -1])
    parameters = dict(model.named_parameters())
    eager = torch.autograd.grad(model.log_prob(sample, class_labels).sum(), parameters.values())
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    compiled = torch.autograd.grad(model.log_prob(sample, class_labels).sum(), parameters.values())
    for name, actual, expected in zip(parameters, compiled, eager):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["plain", "deep-shallow-rope-swiglu"])
def test_whole_forward_compiles_into_one_graph(randomised_model, fresh_compiler, name):
    model = randomised_model(**ARCHITECTURES[name])
    sample, class_labels = random_sample(model), torch.tensor([2, -1])
    eager = model(sample, class_labels, output_hidden_states=[(2, 1)])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(sample, class_labels, output_hidden_states=[(2, 1)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_close(output.sample, eager.sample, atol=1e-12)
    assert_close(output.log_abs_det, eager.log_abs_det, atol=1e-12)
    assert_close(output.hidden_states[2, 1], eager.hidden_states[2, 1], atol=1e-12)


def test_fusing_and_unfusing_leave_the_fused_projections_alone(randomised_model):
    model = randomised_model()
    sample, class_labels = random_sample(model), torch.tensor([2, -1])
    expected, names = model(sample, class_labels).sample, list(model.state_dict())
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    assert list(model.state_dict()) == names
    assert torch.equal(model(sample, class_labels).sample, expected)


def test_attention_backend_can_be_set(randomised_model, monkeypatch):
    model = randomised_model()
    sample = random_sample(model)
    expected = model(sample).sample
    backends = []
    spy_on_attention(monkeypatch, lambda kwargs: backends.append(kwargs["backend"]))
    model.set_attention_backend("native")
    assert_close(model(sample).sample, expected, atol=1e-12)
    assert [str(getattr(backend, "value", backend)) for backend in backends] == ["native"] * 3


def spy_on_attention(monkeypatch, record):
    original = transformer_tarflow.dispatch_attention_fn
    signature = inspect.signature(original)

    def spy(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        record(bound.arguments)
        return original(*args, **kwargs)

    monkeypatch.setattr(transformer_tarflow, "dispatch_attention_fn", spy)


def test_attention_is_causal_without_a_mask(randomised_model, monkeypatch):
    model = randomised_model()
    calls = []
    spy_on_attention(monkeypatch, calls.append)
    model(random_sample(model))
    assert [(call["is_causal"], call["attn_mask"]) for call in calls] == [(True, None)] * 3


def test_state_dict_holds_the_parameters_and_no_mask(randomised_model):
    model = randomised_model(sample_size=14, patch_size=2)  # T = 49, unlike every width in the model
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    tensors = [*model.state_dict().values(), *model.buffers()]
    assert not any(tensor.shape[-2:] == (49, 49) for tensor in tensors)


# Precision


def precision_model(randomised_model, dtype, **architecture):
    model = randomised_model(**architecture).to(dtype)
    return model, random_sample(model, dtype=torch.float32), torch.tensor([2, -1])


def is_rounded(tensor, *dtypes):
    return any(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for dtype in dtypes)


@each_architecture
def test_bfloat16_weights_compute_the_flow_in_float32(randomised_model, architecture):
    model, sample, class_labels = precision_model(randomised_model, torch.bfloat16, **architecture)
    encoded = model(sample, class_labels)
    decoded = model(encoded.sample, class_labels, inverse=True)
    for output in (encoded, decoded):
        assert output.sample.dtype == output.log_abs_det.dtype == torch.float32
    assert_not_close(encoded.sample, sample, by=1.0)
    # Hidden states have eight bits, and each direction sums in another order.
    assert_close(decoded.sample, sample, atol=0.06)

    reference = randomised_model(**architecture).float()(sample, class_labels)
    assert_close(encoded.sample, reference.sample, atol=0.1)
    for inverse in (False, True):
        output = model.blocks[0](model.patchify(sample), class_labels, inverse=inverse)
        for value in (output.tokens, output.log_scale, output.shift):
            assert value.dtype == torch.float32
            assert not is_rounded(value, torch.bfloat16)


def test_bfloat16_sample_is_lifted_to_float32(randomised_model):
    model, sample, class_labels = precision_model(randomised_model, torch.bfloat16)
    half_sample = sample.bfloat16()
    output = model(half_sample, class_labels)
    assert output.sample.dtype == output.log_abs_det.dtype == torch.float32
    assert torch.equal(output.sample, model(half_sample.float(), class_labels).sample)


def test_autocast_computes_the_flow_in_float32(randomised_model):
    model, sample, class_labels = precision_model(randomised_model, torch.float32)
    exact = model(sample, class_labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = model(sample, class_labels)
        decoded = model(encoded.sample, class_labels, inverse=True)
        guided = model(encoded.sample, class_labels, inverse=True, guidance_scale=2.0, guidance_temperature=1.5)
        blocks = [model.blocks[0](model.patchify(sample), class_labels, inverse=inverse) for inverse in (False, True)]
    for output in (encoded, decoded, guided):
        assert output.sample.dtype == output.log_abs_det.dtype == torch.float32
    assert not torch.equal(encoded.sample, exact.sample)  # autocast did something
    assert_close(encoded.sample, exact.sample, atol=0.1)
    assert_not_close(encoded.sample, sample, by=1.0)
    assert_close(decoded.sample, sample, atol=0.06)
    for output in blocks:
        for value in (output.tokens, output.log_scale, output.shift):
            assert value.dtype == torch.float32
            assert not is_rounded(value, torch.bfloat16)


def test_float64_model_samples_under_autocast(randomised_model):
    model = randomised_model()
    sample, class_labels = random_sample(model), torch.tensor([2, -1])
    # Autocast does not change float64, so what the solver allocates must be float64 too.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = model(sample, class_labels)
        decoded = model(encoded.sample, class_labels, inverse=True)
    assert_not_close(encoded.sample, sample, by=0.1)
    assert_close(decoded.sample, sample, atol=1e-10)


def test_float64_model_computes_a_float32_sample_in_float64(randomised_model):
    model, sample, class_labels = precision_model(randomised_model, torch.float64)
    for inverse in (False, True):
        output = model(sample, class_labels, inverse=inverse)
        assert output.sample.dtype == output.log_abs_det.dtype == torch.float64
        assert torch.equal(output.sample, model(sample.double(), class_labels, inverse=inverse).sample)
    assert model.log_prob(sample, class_labels).dtype == torch.float64


def quantize_with_torchao(model, folder):
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    model.save_pretrained(folder)
    settings = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())
    return TarFlowTransformer2DModel.from_pretrained(folder, dtype=model.dtype, quantization_config=settings)


def quantize_with_bitsandbytes(model, folder):
    """What `BitsAndBytesConfig(load_in_8bit=True)` makes of a model. `from_pretrained` refuses to do it on a CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and not name.endswith("proj_out"):
            quantized = bitsandbytes.nn.Linear8bitLt(*reversed(linear.weight.shape), has_fp16_weights=False)
            quantized.weight = bitsandbytes.nn.Int8Params(
                linear.weight.data, requires_grad=False, has_fp16_weights=False
            )
            quantized.bias = linear.bias
            model.set_submodule(name, quantized)
    return model.to("cpu")  # this quantizes


def cast_layerwise(model, folder):
    model.enable_layerwise_casting(torch.float8_e4m3fn, model.dtype)
    return model


def test_layerwise_casting_keeps_embeddings_norms_and_projections(randomised_model):
    model = cast_layerwise(randomised_model().float(), None)
    dtypes = {}
    for block in model.blocks:
        for name, parameter in block.named_parameters():
            dtypes.setdefault(parameter.dtype, set()).add(name.removesuffix(".weight").removesuffix(".bias"))
    assert dtypes == {
        torch.float32: {"proj_in", "proj_out", "pos_embed", "class_embed", "layers.0.norm1", "layers.0.norm2"},
        torch.float8_e4m3fn: {
            "layers.0.attn.to_qkv", "layers.0.attn.to_out.0", "layers.0.ff.net.0.proj", "layers.0.ff.net.2",
        },
    }  # fmt: skip


@pytest.mark.parametrize("position_embedding", ["learned", "rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compress", [cast_layerwise, quantize_with_torchao, quantize_with_bitsandbytes])
def test_compressed_weights_compute_the_flow_in_float32(
    randomised_model, tmp_path, compress, dtype, position_embedding
):
    architecture = {"attention_head_dim": 16, "position_embedding": position_embedding}
    model, sample, class_labels = precision_model(randomised_model, dtype, **architecture)
    exact = randomised_model(**architecture).float()(sample, class_labels)
    model = compress(model, tmp_path)
    with torch.no_grad():
        encoded = model(sample, class_labels)
        decoded = model(encoded.sample, class_labels, inverse=True)
        guided = model(encoded.sample, class_labels, inverse=True, guidance_scale=2.0, guidance_temperature=1.5)
    for output in (encoded, decoded, guided):
        assert output.sample.dtype == output.log_abs_det.dtype == torch.float32
    for inverse in (False, True):
        with torch.no_grad():
            output = model.blocks[0](model.patchify(sample), class_labels, inverse=inverse)
        for value in (output.tokens, output.log_scale, output.shift):
            assert value.dtype == torch.float32
            assert not is_rounded(value, torch.bfloat16, torch.float16)
    assert not torch.equal(encoded.sample, exact.sample)  # the weights are compressed
    assert_close(encoded.sample, exact.sample, atol=0.3)
    assert_close(decoded.sample, sample, atol=0.06)
    pipe = FlowBackPipeline(model)
    assert pipe.prepare_latents(1, None).dtype == pipe.encode(torch.rand(1, 3, 4, 4)).dtype == torch.float32


# Saving


RELOAD = """
import sys, torch
from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel
torch.set_num_threads(1)
folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt")
results = {}
for name, dtype in (("whole", torch.float32), ("whole", torch.bfloat16), ("sharded", torch.float32)):
    model = TarFlowTransformer2DModel.from_pretrained(f"{folder}/{name}", dtype=dtype)
    with torch.no_grad():
        forward, inverse = model(*inputs), model(*inputs, inverse=True, guidance_scale=2.0)
    results[f"{name}-{dtype}"] = (forward.sample, forward.log_abs_det, inverse.sample, inverse.log_abs_det)
torch.save(results, f"{folder}/results.pt")
"""


def test_saved_model_gives_the_same_bits_in_a_new_process(randomised_model, tmp_path):
    model = randomised_model(**ARCHITECTURES["deep-shallow-rope-swiglu"]).float()
    inputs = (random_sample(model, dtype=torch.float32), torch.tensor([2, -1]))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True)
    results = torch.load(tmp_path / "results.pt")

    for dtype, names in ((torch.float32, ("whole", "sharded")), (torch.bfloat16, ("whole",))):
        model = model.to(dtype)
        with torch.no_grad():
            forward, inverse = model(*inputs), model(*inputs, inverse=True, guidance_scale=2.0)
        expected = (forward.sample, forward.log_abs_det, inverse.sample, inverse.log_abs_det)
        for name in names:
            for actual_tensor, expected_tensor in zip(results[f"{name}-{dtype}"], expected):
                assert torch.equal(actual_tensor, expected_tensor), (name, dtype)


@pytest.mark.parametrize("num_layers, num_classes", [([1, 1, 2], None), (1, 5)])
def test_config_survives_saving(randomised_model, tmp_path, num_layers, num_classes):
    values = {
        "sample_size": 6,
        "patch_size": 3,
        "in_channels": 4,
        "num_blocks": 3,
        "num_layers": num_layers,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "mlp_ratio": 3.0,
        "activation_fn": "swiglu",
        "position_embedding": "rope",
        "num_classes": num_classes,
        "noise_std": 0.2,
        "noise_type": "uniform",
    }
    randomised_model(**values).save_pretrained(tmp_path)
    model = TarFlowTransformer2DModel.from_pretrained(tmp_path)
    assert {name: model.config[name] for name in values} == values
    parameters = inspect.signature(TarFlowTransformer2DModel.__init__).parameters.keys()
    assert values.keys() == parameters - {"self", "inverse_profile"}  # profiles have their own tests
    layers = num_layers if isinstance(num_layers, list) else [num_layers] * 3
    assert [len(block.layers) for block in model.blocks] == layers
    assert not model.training


# Any size


@settings(max_examples=25, deadline=None)
@given(
    grid_size=st.integers(1, 3),
    patch_size=st.integers(1, 3),
    in_channels=st.integers(1, 4),
    num_layers=st.lists(st.integers(1, 2), min_size=1, max_size=4),
    num_attention_heads=st.integers(1, 3),
    attention_head_dim=st.sampled_from([1, 2, 6]),
    activation_fn=st.sampled_from(ACTIVATION_FNS),
    position_embedding=st.sampled_from(POSITION_EMBEDDINGS),
    class_labels=st.none() | st.lists(st.integers(-1, 2), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_any_flow_is_invertible(
    randomised_model,
    grid_size,
    patch_size,
    in_channels,
    num_layers,
    num_attention_heads,
    attention_head_dim,
    activation_fn,
    position_embedding,
    class_labels,
    seed,
):
    model = randomised_model(
        seed=seed,
        sample_size=grid_size * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        num_blocks=len(num_layers),
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim * (4 if position_embedding == "rope" else 1),
        activation_fn=activation_fn,
        position_embedding=position_embedding,
        num_classes=None if class_labels is None else 3,
    )
    sample = random_sample(model, batch_size=1 if class_labels is None else len(class_labels), seed=seed)
    class_labels = None if class_labels is None else torch.tensor(class_labels)
    with torch.no_grad():
        encoded = model(sample, class_labels)
    decoded = model(encoded.sample, class_labels, inverse=True)
    is_identity = grid_size == 1
    assert torch.equal(encoded.sample, sample) == is_identity
    torch.testing.assert_close(decoded.sample, sample, rtol=0, atol=1e-9)
    torch.testing.assert_close(decoded.log_abs_det, -encoded.log_abs_det, rtol=1e-10, atol=1e-9)


# Bad input


@pytest.mark.parametrize(
    "config, match",
    [
        ({"sample_size": 5}, r"`sample_size` must be divisible by `patch_size`, but they are 5 and 2\."),
        ({"sample_size": 0}, r"`sample_size` must be a whole number of at least 1, but is 0\."),
        ({"patch_size": 0}, r"`patch_size` must be a whole number of at least 1, but is 0\."),
        ({"in_channels": 0}, r"`in_channels` must be a whole number of at least 1, but is 0\."),
        ({"num_blocks": 0}, r"`num_blocks` must be a whole number of at least 1, but is 0\."),
        ({"num_attention_heads": 0}, r"`num_attention_heads` must be a whole number of at least 1, but is 0\."),
        ({"attention_head_dim": -1}, r"`attention_head_dim` must be a whole number of at least 1, but is -1\."),
        ({"num_classes": 0}, r"`num_classes` must be a whole number of at least 1, but is 0\."),
        ({"num_layers": [1, 2]}, r"`num_layers` must be .* each of the 3 flow blocks.*but is \[1, 2\]\."),
        ({"num_layers": []}, r"`num_layers` must be .* each of the 3 flow blocks.*but is \[\]\."),
        ({"num_layers": [1, 0, 1]}, r"`num_layers` must be a whole number of at least 1, but is 0\."),
        ({"num_layers": 0}, r"`num_layers` must be a whole number of at least 1, but is 0\."),
        ({"activation_fn": "relu"}, r"`activation_fn` must be one of \('gelu', 'swiglu'\), but is 'relu'\."),
        ({"position_embedding": "sincos"}, r"`position_embedding` must be .*'rope'\), but is 'sincos'\."),
        (
            {"position_embedding": "rope", "attention_head_dim": 6},
            r"`attention_head_dim` must be a multiple of 4 for `position_embedding='rope'`, .*, but is 6\.",
        ),
        ({"noise_type": "laplace"}, r"`noise_type` must be one of \('gaussian', 'uniform'\), but is 'laplace'\."),
        ({"noise_std": -0.1}, r"`noise_std` must be a finite number of at least 0.0, but is -0\.1\."),
        ({"noise_std": math.nan}, r"`noise_std` must be a finite number of at least 0.0, but is nan\."),
        ({"mlp_ratio": 0.0}, r"`mlp_ratio` must be a finite number above 0.0, but is 0\.0\."),
    ],
)
def test_bad_config_is_refused(randomised_model, config, match):
    with pytest.raises(ValueError, match=match):
        randomised_model(**config)


WRONG_SAMPLE = r"`sample` must have shape \(batch_size, 3, 4, 4\), as in this model's config, but has shape "
WRONG_LABELS = r"`class_labels` must be integers of shape \(2,\) or floating-point class weights of shape \(2, 5\), "
WRONG_BLOCK = r"`blocks` must be a whole number of at least 1 and at most 3, but is "
WRONG_PLACE = (
    r"`output_hidden_states` asks for layer {} of flow block {}, but the blocks that run are {}, with {} layers"
)


@pytest.mark.parametrize(
    "call, match",
    [
        ({"sample": torch.zeros(2, 3, 8, 8)}, WRONG_SAMPLE + r"\(2, 3, 8, 8\)\."),
        ({"sample": torch.zeros(2, 1, 4, 4)}, WRONG_SAMPLE + r"\(2, 1, 4, 4\)\."),
        ({"sample": torch.zeros(3, 4, 4)}, WRONG_SAMPLE + r"\(3, 4, 4\)\."),
        ({"sample": torch.zeros(2, 3, 8, 8), "inverse": True}, WRONG_SAMPLE + r"\(2, 3, 8, 8\)\."),
        ({"sample": torch.zeros(0, 3, 4, 4)}, r"`sample` must hold at least one sample, but has shape \(0, 3, 4, 4\)"),
        ({"sample": torch.zeros(0, 3, 4, 4), "inverse": True}, r"`sample` must hold at least one sample, but has"),
        ({"class_labels": [1, 2]}, r"`class_labels` must be a tensor, but are \[1, 2\]\."),
        ({"class_labels": torch.zeros(2, 4)}, WRONG_LABELS + r"but are torch.float32 of shape \(2, 4\)\."),
        ({"class_labels": torch.zeros(2)}, WRONG_LABELS + r"but are torch.float32 of shape \(2,\)\."),
        ({"class_labels": torch.tensor([1])}, WRONG_LABELS + r"but are torch.int64 of shape \(1,\)\."),
        ({"class_labels": torch.tensor([[1], [1]])}, WRONG_LABELS + r"but are torch.int64 of shape \(2, 1\)\."),
        ({"class_labels": torch.tensor([True, False])}, WRONG_LABELS + r"but are torch.bool of shape \(2,\)\."),
        ({"class_labels": torch.tensor([0, -2])}, r"`class_labels` must lie between 0 and 4, or be -1 .*\[0, -2\]\."),
        ({"class_labels": torch.tensor([0, 5])}, r"`class_labels` must lie between 0 and 4, or be -1 .*\[0, 5\]\."),
        ({"blocks": [0]}, WRONG_BLOCK + r"0\."),
        ({"blocks": [4]}, WRONG_BLOCK + r"4\."),
        ({"blocks": [2, 2]}, r"`blocks` must be different numbers from 1 to 3, but are \[2, 2\]\."),
        ({"output_hidden_states": [(4, 1)]}, WRONG_PLACE.format(1, 4, r"\[1, 2, 3\]", r"\[1, 1, 1\]")),
        ({"output_hidden_states": [(0, 1)]}, WRONG_PLACE.format(1, 0, r"\[1, 2, 3\]", r"\[1, 1, 1\]")),
        ({"output_hidden_states": [(1, 0)]}, WRONG_PLACE.format(0, 1, r"\[1, 2, 3\]", r"\[1, 1, 1\]")),
        ({"output_hidden_states": [(1, 2)]}, WRONG_PLACE.format(2, 1, r"\[1, 2, 3\]", r"\[1, 1, 1\]")),
        ({"output_hidden_states": [(1, 1)], "blocks": [2]}, WRONG_PLACE.format(1, 1, r"\[2\]", r"\[1\]")),
        (
            {"output_hidden_states": [(1, 1)], "inverse": True},
            r"`output_hidden_states` cannot be combined with `inverse=True`",
        ),
        (
            {"guidance_scale": -0.5, "inverse": True},
            r"`guidance_scale` must be a finite number of at least 0\.0, but is -0\.5\.",
        ),
        ({"guidance_scale": 2.0}, "`guidance_scale` is for `inverse=True`, but is 2.0 with"),
        ({"guidance_rule": "product"}, "`guidance_rule` is for `inverse=True`, but is 'product' with"),
        ({"guidance_rule": "sum"}, r"`guidance_rule` must be one of \('linear', 'product'\), but is 'sum'\."),
        ({"guidance_schedule": "cosine"}, r"`guidance_schedule` must be one of .*'linear'\), but is 'cosine'\."),
        ({"guidance_temperature": 0.0}, r"`guidance_temperature` must be a finite number above 0.0, but is 0\.0\."),
        ({"guidance_temperature": -1.0}, r"`guidance_temperature` must be a finite number above 0.0, but is -1\.0\."),
    ],
)
def test_bad_call_is_refused(randomised_model, call, match):
    model = randomised_model()
    with pytest.raises(ValueError, match=match):
        model(**{"sample": random_sample(model), **call})


def test_unconditional_model_refuses_labels_and_guidance_without_temperature(randomised_model):
    model = randomised_model(num_classes=None)
    sample = random_sample(model)
    with pytest.raises(ValueError, match=r"`class_labels` must be None: this model is unconditional"):
        model(sample, torch.tensor([1, 2]))
    match = r"`guidance_scale` is 2\.0 and `guidance_temperature` 1\.0, but this model is unconditional"
    with pytest.raises(ValueError, match=match):
        model(sample, inverse=True, guidance_scale=2.0)


@pytest.mark.parametrize(
    "call", [{"guidance_scale": math.nan}, {"guidance_scale": 2.0, "guidance_temperature": math.nan}]
)
def test_guidance_by_nan_is_refused(randomised_model, call):
    model = randomised_model()
    with pytest.raises(ValueError, match=r"`guidance_(scale|temperature)` must be .* but is nan\."):
        model(random_sample(model), inverse=True, **call)
