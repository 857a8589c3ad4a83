"""The learned inverse's network. What it is trained for is tested in tests/alignment."""

import copy
import math

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file

from flowback_hf import FlowBackPipeline, TarFlowReverseTransformer2DModel, TarFlowTransformer2DModel
from flowback_hf.models.transformer_reverse import HEADS_FILE, hash_flow

from ..conftest import TINY_REVERSE_CONFIG, randomise_weights


def assert_close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


LABELS = {
    "none": None,
    "dropped": torch.tensor([-1, -1]),
    "classes": torch.tensor([2, 4]),
    "mixed": torch.tensor([3, -1]),
    "weights": torch.tensor([[0.1, 0.2, 0.4, 0.05, 0.25], [0.6, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64),
}


@pytest.fixture
def noise():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# The formulas written out, patch by patch and head by head


def plain_norm(norm, states):
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def plain_attention(attention, states, grid_size):
    head_dim = states.shape[-1] // attention.heads
    rows_and_columns = [(row, column) for row in range(grid_size) for column in range(grid_size)]
    frequencies = [10_000 ** (-number / (head_dim // 4)) for number in range(head_dim // 4)]
    angles = torch.tensor(
        [[f * row for f in frequencies] + [f * column for f in frequencies] for row, column in rows_and_columns],
        dtype=states.dtype,
    )

    def turn(head):
        pairs = torch.view_as_complex(head.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)

    query, key, value = (states @ attention.to_qkv.weight.T).chunk(3, dim=-1)
    heads = []
    for start in range(0, query.shape[-1], head_dim):
        head = slice(start, start + head_dim)
        logits = turn(query[..., head]) @ turn(key[..., head]).transpose(1, 2) / math.sqrt(head_dim)
        heads.append(logits.softmax(-1) @ value[..., head])
    return torch.cat(heads, dim=-1) @ attention.to_out[0].weight.T


def plain_embedding(stage, labels, index, weight):
    no_class = stage.class_embed.mean(0)
    embedding = no_class
    if labels is not None and labels.is_floating_point():
        embedding = sum(share * row for share, row in zip(labels[index], stage.class_embed))
    elif labels is not None and labels[index] >= 0:
        embedding = stage.class_embed[labels[index]]

    def mlp(vector):
        inner, outer = stage.guidance_embed[0], stage.guidance_embed[2]
        hidden = inner.weight @ torch.cat([vector, weight.view(1)]) + inner.bias
        return outer.weight @ (hidden / (1 + torch.exp(-hidden)))

    return embedding + weight * (mlp(embedding) - mlp(no_class))


def plain_inverse(model, noise, labels, weights):
    patch, size = model.config.patch_size, model.config.sample_size
    corners = [(y, x) for y in range(0, size, patch) for x in range(0, size, patch)]
    states = torch.stack([noise[:, :, y : y + patch, x : x + patch].flatten(1) for y, x in corners], dim=1)
    states = model.stages[0].proj_in(states)
    for number, stage in enumerate(model.stages):
        if number > 0 and model.config.through_data_space:
            states = stage.proj_in(states)
        embedding = torch.stack([plain_embedding(stage, labels, index, weights[index]) for index in range(len(noise))])
        states = states + embedding[:, None]
        for layer in stage.layers:
            states = states + plain_attention(layer.attn, plain_norm(layer.norm1, states), size // patch)
            inner, gate = (plain_norm(layer.norm2, states) @ layer.ff.net[0].proj.weight.T).chunk(2, dim=-1)
            states = states + (inner * gate / (1 + torch.exp(-gate))) @ layer.ff.net[2].weight.T
        if number == len(model.stages) - 1 or model.config.through_data_space:
            states = stage.proj_out(states)
    sample = torch.empty_like(noise)
    for number, (y, x) in enumerate(corners):
        sample[:, :, y : y + patch, x : x + patch] = states[:, number].reshape(len(noise), -1, patch, patch)
    return sample


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("architecture", [{}, {"patch_size": 1}, {"through_data_space": True}])
def test_it_is_the_formulas_written_out(random_reverse_transformer, noise, labels, architecture):
    model = random_reverse_transformer(**architecture)
    scales = torch.tensor([2.5, 1.0], dtype=torch.float64)
    expected = plain_inverse(model, noise, labels, scales - 1)
    assert (expected - noise).abs().max() > 0.1
    assert_close(model(noise, labels, scales).sample, expected)
    for scale in (1.0, 2.5):
        expected = plain_inverse(model, noise, labels, torch.full((2,), scale - 1, dtype=torch.float64))
        assert_close(model(noise, labels, scale).sample, expected)


def test_labels_and_guidance_matter_and_guidance_of_no_class_does_not(random_reverse_transformer, noise):
    model = random_reverse_transformer()
    plain = model(noise, LABELS["classes"]).sample
    assert (plain - model(noise, LABELS["dropped"]).sample).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    guided = model(noise, LABELS["classes"], 2.0).sample
    assert (plain - guided).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    # exactly, and not only nearly: 1.0 is off, and a tensor of ones too
    assert torch.equal(model(noise, LABELS["classes"], torch.ones(2)).sample, plain)
    dropped = model(noise, LABELS["dropped"]).sample
    assert_close(model(noise, LABELS["dropped"], 2.0).sample, dropped)
    assert torch.equal(model(noise, None, 2.0).sample, dropped)


def test_every_token_attends_to_every_other(random_reverse_transformer, noise):
    model = random_reverse_transformer(num_blocks=1, patch_size=2)
    jacobian = torch.autograd.functional.jacobian(
        lambda sample: model(sample, LABELS["classes"][:1]).sample, noise[:1]
    )
    patches = torch.nn.functional.pixel_unshuffle(jacobian.reshape(48, 3, 4, 4), 2).flatten(2).abs().amax(dim=1)
    assert patches.min() > 0


def test_an_untrained_one_is_zero_and_learns(noise):
    model = TarFlowReverseTransformer2DModel(**TINY_REVERSE_CONFIG)
    noise = noise.float()
    assert torch.equal(model(noise, LABELS["classes"]).sample, torch.zeros_like(noise))
    target = noise.flip(-1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (model(noise, LABELS["classes"], torch.tensor([1.0, 2.0])).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("through_data_space", [False, True])
def test_stages_tokens_and_trajectory_on_request(random_reverse_transformer, noise, through_data_space):
    model = random_reverse_transformer(through_data_space=through_data_space)
    plain = model(noise, LABELS["classes"])
    assert plain.hidden_states is None and plain.trajectory is None
    with pytest.raises(ValueError, match="`output_trajectory` needs the learned inverse's heads.*`load_heads"):
        model(noise, output_trajectory=True)
    model.add_heads()
    randomise_weights(model.heads, seed=1)
    model.heads.mean.copy_(torch.arange(3.0))
    model.heads.std.fill_(2.0)
    output = model(noise, LABELS["classes"], output_hidden_states=True, output_trajectory=True)
    assert torch.equal(output.sample, plain.sample)
    assert list(output.hidden_states) == list(output.trajectory) == [2, 1, 0]
    for number, states in output.hidden_states.items():
        assert states.shape == (2, 4, 12 if through_data_space else 8)
        standardized = states if through_data_space else model.heads.projections[number](states)
        assert_close(model.patchify(output.trajectory[number]), 2 * standardized + number)
    (sample,) = model(noise, LABELS["classes"], return_dict=False)
    assert torch.equal(sample, plain.sample)


def test_saved_and_loaded_to_the_bit_with_heads_in_a_file_of_their_own(random_reverse_transformer, noise, tmp_path):
    model, noise = random_reverse_transformer().float(), noise.float()
    model.add_heads()
    randomise_weights(model.heads, seed=1)
    model.heads.std.fill_(0.5)
    model.save_pretrained(tmp_path / "reverse_transformer")
    assert model.heads is not None
    names = {"config.json", "diffusion_pytorch_model.safetensors", HEADS_FILE}
    assert {path.name for path in (tmp_path / "reverse_transformer").iterdir()} == names
    loaded = TarFlowReverseTransformer2DModel.from_pretrained(tmp_path, subfolder="reverse_transformer")
    assert loaded.heads is None and not loaded.training
    expected = model(noise, LABELS["classes"], 2.0, output_trajectory=True)
    assert torch.equal(loaded(noise, LABELS["classes"], 2.0).sample, expected.sample)
    loaded.load_heads(tmp_path)
    trajectory = loaded(noise, LABELS["classes"], 2.0, output_trajectory=True).trajectory
    for number, sample in expected.trajectory.items():
        assert torch.equal(trajectory[number], sample)
    # the heads of another model change nothing
    other = random_reverse_transformer(patch_size=1).float()
    other.add_heads()
    other.save_pretrained(tmp_path / "other" / "reverse_transformer")
    with pytest.raises(ValueError, match="must be those of this learned inverse, but .* with other sizes"):
        loaded.load_heads(tmp_path / "other")
    assert torch.equal(loaded.heads.std, model.heads.std)
    # plain sampling works without the file
    (tmp_path / "reverse_transformer" / HEADS_FILE).unlink()
    loaded = TarFlowReverseTransformer2DModel.from_pretrained(tmp_path, subfolder="reverse_transformer")
    with pytest.raises(OSError, match=HEADS_FILE):
        loaded.load_heads(tmp_path)


def test_a_variant_is_saved_beside_the_weights_and_shards_are_small(
    random_reverse_transformer, randomised_model, noise, tmp_path
):
    model = random_reverse_transformer().float()
    model.add_heads()
    model.heads.std.copy_(torch.tensor([0.1, 0.2, 0.3]))  # which float16 rounds
    pipeline = FlowBackPipeline(randomised_model(num_blocks=3).float(), reverse_transformer=model)
    expected = model(noise.float(), LABELS["classes"], 2.0).sample
    pipeline.save_pretrained(tmp_path)
    copy.deepcopy(pipeline).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    weights = {"diffusion_pytorch_model.safetensors": torch.float32, HEADS_FILE: torch.float32}
    weights |= {"diffusion_pytorch_model.fp16.safetensors": torch.float16, "heads.fp16.safetensors": torch.float16}
    for name, dtype in weights.items():
        tensors = load_file(tmp_path / "reverse_transformer" / name)
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}, name
    loaded = FlowBackPipeline.from_pretrained(tmp_path).reverse_transformer
    assert torch.equal(loaded(noise.float(), LABELS["classes"], 2.0).sample, expected)
    loaded.load_heads(tmp_path, variant="fp16")
    assert torch.equal(loaded.heads.std, model.heads.std.half())
    assert not torch.equal(loaded.heads.std, model.heads.std)

    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded" / "reverse_transformer").glob("diffusion_*.safetensors"))) > 1


def test_only_the_main_process_saves_the_heads(random_reverse_transformer, tmp_path):
    model = random_reverse_transformer().float()
    model.add_heads()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / HEADS_FILE).exists() and model.heads is not None


def test_the_heads_are_there_before_a_folder_is_pushed(random_reverse_transformer, tmp_path, monkeypatch):
    """diffusers pushes the folder at the end of its own saving."""
    pushed = []

    def save(model, save_directory, *args, push_to_hub=False, **kwargs):
        pushed.extend(path.name for path in save_directory.iterdir() if push_to_hub)

    monkeypatch.setattr(ModelMixin, "save_pretrained", save)
    model = random_reverse_transformer().float()
    model.add_heads()
    model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert pushed == [HEADS_FILE]


def test_precision_checkpointing_and_compilation(random_reverse_transformer, noise, fresh_compiler):
    model = random_reverse_transformer().float()
    noise = noise.float()
    expected = model(noise, LABELS["classes"], 2.0).sample
    assert expected.dtype == torch.float32
    halved = random_reverse_transformer().to(torch.bfloat16)(noise, LABELS["classes"], 2.0).sample
    assert halved.dtype == torch.float32 and 0 < (halved - expected).abs().max() < 0.3

    def gradients():
        model.zero_grad()
        model(noise, LABELS["classes"], torch.tensor([1.0, 2.0])).sample.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients()
    calls, layers = [], [layer for stage in model.stages for layer in stage.layers]
    hooks = [layer.register_forward_pre_hook(lambda module, args: calls.append(module)) for layer in layers]
    model.enable_gradient_checkpointing()
    for checkpointed, gradient in zip(gradients(), plain, strict=True):
        assert_close(checkpointed, gradient, atol=1e-6)
    assert sorted(map(calls.count, layers)) == [2] * len(layers)  # each ran again in the backward pass
    for hook in hooks:
        hook.remove()
    model.disable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True)
    assert_close(model(noise, LABELS["classes"], 2.0).sample, expected, atol=1e-5)


# Its flow


def test_for_flow_takes_the_flows_sizes_and_is_no_larger(randomised_model):
    flow = randomised_model(num_layers=[2, 3, 6], patch_size=1, mlp_ratio=3.0)
    model = TarFlowReverseTransformer2DModel.for_flow(flow, num_attention_heads=3, max_guidance_scale=2.0)
    # 11 layers in four stages
    assert [len(stage.layers) for stage in model.stages] == [2] * 4
    sizes = {"num_layers": 2, "patch_size": 1, "mlp_ratio": 3.0, "attention_head_dim": 4, "num_attention_heads": 3}
    assert sizes.items() <= model.config.items()
    shallow = TarFlowReverseTransformer2DModel.for_flow(randomised_model(num_layers=1))
    assert [len(stage.layers) for stage in shallow.stages] == [1] * 4
    assert model.config.flow_hash == hash_flow(flow)
    with pytest.raises(ValueError, match="`num_blocks` must be 3, as in the flow, but is 4"):
        TarFlowReverseTransformer2DModel.for_flow(flow, num_blocks=4)


def test_the_hash_tells_flows_apart_whatever_precision_they_are_loaded_in(randomised_model):
    hashes = [hash_flow(randomised_model(seed=seed).float()) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert hash_flow(randomised_model()) == hash_flow(randomised_model().to(torch.bfloat16)) == hashes[0]
    assert hash_flow(randomised_model().half()) is None
    trained = randomised_model().float()
    trained.blocks[1].layers[0].ff.net[2].weight.data[0, 0] += 0.1
    assert hash_flow(trained) != hashes[0]


def test_another_flow_is_refused(randomised_model, random_reverse_transformer):
    flow = randomised_model()
    model = TarFlowReverseTransformer2DModel.for_flow(flow)
    model.check_flow(flow)
    model.check_flow(randomised_model().to(torch.bfloat16))
    with pytest.raises(ValueError, match="is that of a flow with other weights. Train one for this flow with"):
        model.check_flow(randomised_model(seed=1))
    with pytest.raises(ValueError, match="must have the flow's `num_classes`, 4, but has 5"):
        model.check_flow(randomised_model(num_classes=4))
    with pytest.raises(ValueError, match="must have the flow's `sample_size`, 6, but has 4"):
        model.check_flow(TarFlowTransformer2DModel(6, 2, num_blocks=3, num_layers=1, num_classes=5))


# Bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"patch_size": 3}, "`sample_size` must be divisible by `patch_size`, but they are 4 and 3"),
        ({"num_layers": 0}, "`num_layers` must be a whole number of at least 1, but is 0"),
        ({"attention_head_dim": 6}, "`attention_head_dim` must be a multiple of 4"),
        ({"mlp_ratio": 0.0}, "`mlp_ratio` must be a finite number above 0"),
        ({"min_guidance_scale": 2.0}, "`max_guidance_scale` must be a finite number of at least 2"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        TarFlowReverseTransformer2DModel(**{**TINY_REVERSE_CONFIG, "max_guidance_scale": 1.0, **config})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"guidance_scale": 3.5}, r"`guidance_scale` must be between 1.0 and 3.0, for which this .* but is 3.5"),
        ({"guidance_scale": -0.5}, "`guidance_scale` must be a finite number of at least 0.0"),
        ({"guidance_scale": torch.ones(3)}, r"must be a number or have shape \(2,\), but has shape \(3,\)"),
        ({"class_labels": torch.tensor([5, 0])}, "`class_labels` must lie between 0 and 4"),
        ({"class_labels": torch.tensor([0])}, r"`class_labels` must be integers of shape \(2,\)"),
        ({"sample": torch.zeros(2, 3, 5, 5)}, r"`sample` must have shape \(batch_size, 3, 4, 4\)"),
    ],
)
def test_bad_arguments_are_refused(random_reverse_transformer, noise, arguments, message):
    with pytest.raises(ValueError, match=message):
        random_reverse_transformer()(**{"sample": noise, "class_labels": LABELS["classes"], **arguments})


def test_guidance_without_classes_is_refused(random_reverse_transformer, noise):
    model = random_reverse_transformer(num_classes=None)
    assert model(noise).sample.isfinite().all()
    with pytest.raises(ValueError, match="`guidance_scale` must be 1.0 for a learned inverse without classes"):
        model(noise, guidance_scale=2.0)
    fixed = random_reverse_transformer(min_guidance_scale=2.0, max_guidance_scale=2.0)
    with pytest.raises(ValueError, match="`guidance_scale` must be 2.0, for which"):
        fixed(noise, LABELS["classes"])
