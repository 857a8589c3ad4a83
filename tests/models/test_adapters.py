"""A flow with LoRA adapters is still a flow, and another one than without."""

import peft
import pytest
import torch
import torch._inductor.config

from flowback_hf import TarFlowTransformer2DModel
from flowback_hf.models import transformer_tarflow


TARGET_MODULES = ["to_qkv", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
LABELS = torch.tensor([1, -1])


def attach(model, adapter_name="default", seed=0, target_modules=TARGET_MODULES):
    """An adapter with random weights of a trained one's size in each factor."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=target_modules)
    model.add_adapter(config, adapter_name)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.copy_(0.1 * noise)


@pytest.fixture(params=[{}, {"position_embedding": "rope", "activation_fn": "swiglu", "num_layers": [1, 2, 1]}])
def model(request, randomised_model):
    return randomised_model(sample_size=6, **request.param)  # nine tokens


@pytest.fixture
def sample():
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_differs(actual, other):
    assert (actual - other).abs().max() > 1e-2


def test_the_determinant_is_that_of_the_jacobian_and_every_solver_inverts(model, sample):
    plain = model(sample, LABELS)
    attach(model)
    output = model(sample, LABELS)
    assert_differs(output.log_abs_det, plain.log_abs_det)

    def flow(flat):
        return model(flat.view_as(sample[:1]), LABELS[:1]).sample.flatten()

    jacobian = torch.autograd.functional.jacobian(flow, sample[0].flatten())
    assert_close(output.log_abs_det[0], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-10)
    for solver in ("sequential", "jacobi", "auto"):
        inverse = model(output.sample, LABELS, inverse=True, solver=solver)
        assert_close(inverse.sample, sample, atol=1e-9)
        assert_close(inverse.log_abs_det, -output.log_abs_det, atol=1e-9)


def test_adapters_are_weighted_added_fused_switched_and_deleted(model, sample):
    plain = model(sample, LABELS).sample.detach()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    attach(model, "first", seed=1)
    attach(model, "second", seed=2)
    factors = {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}

    def by_hand(scales):
        """The flow whose weights are W + scale * alpha / rank * B A, computed here."""
        state = dict(weights)
        for name, factor in factors.items():
            layer, _, rest = name.partition(".lora_A.")
            adapter_name = rest.partition(".")[0]
            if adapter_name in scales:
                change = factors[f"{layer}.lora_B.{adapter_name}.weight"] @ factor
                state[f"{layer}.weight"] = state[f"{layer}.weight"] + 3 * scales[adapter_name] * change
        reference = TarFlowTransformer2DModel.from_config(model.config).double()
        reference.load_state_dict(state)
        return reference(sample, LABELS).sample.detach()

    for scales in ({"first": 1.0}, {"second": 0.5}, {"first": 0.25, "second": 1.0}):
        model.set_adapters(list(scales), list(scales.values()))
        assert model.active_adapters() == list(scales)
        expected = by_hand(scales)
        assert_differs(expected, plain)
        assert_close(model(sample, LABELS).sample, expected)
        model.fuse_lora()
        assert_close(model(sample, LABELS).sample, expected)
        model.unfuse_lora()
        assert_close(model(sample, LABELS).sample, expected)
    model.disable_adapters()
    assert_close(model(sample, LABELS).sample, plain)
    model.enable_adapters()
    assert_close(model(sample, LABELS).sample, expected)
    model.delete_adapters("first")
    model.set_adapters("second", 0.5)
    assert_close(model(sample, LABELS).sample, by_hand({"second": 0.5}))
    assert model.attached_adapters == ["second"]


def test_an_adapter_is_saved_and_loaded_by_itself(model, sample, tmp_path):
    plain = model(sample, LABELS).sample.detach()
    attach(model, target_modules=["to_qkv", "ff.net.2"])
    expected = model(sample, LABELS).sample
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert model.attached_adapters == []
    assert_close(model(sample, LABELS).sample, plain)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_close(model(sample, LABELS).sample, expected)


def test_a_profile_of_other_weights_is_not_used(randomised_model, monkeypatch):
    model = randomised_model(sample_size=6)
    latents = torch.randn(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    profile = model.profile_inverse(latents)
    used = []

    def profile_of_block(given, number, device_type):
        used.append(given)
        return transformer_tarflow.BlockProfile("latents", {4: 1.0}) if given else None

    monkeypatch.setattr(transformer_tarflow, "profile_of_block", profile_of_block)
    model(latents, inverse=True)
    assert used == [profile] * 3
    attach(model)
    model(latents, inverse=True)
    model.disable_adapters()
    model(latents, inverse=True)
    assert used[3:] == [None] * 6
    with pytest.raises(ValueError, match=r"`profile_inverse` measures a flow without adapters, but \['default'\] are"):
        model.profile_inverse(latents)
    model.delete_adapters("default")
    model(latents, inverse=True)
    assert used[9:] == [profile] * 3
    attach(model)
    model.fuse_lora()
    model.unload_lora()
    assert model.config.inverse_profile is None
    assert model.profile_inverse(latents) == model.config.inverse_profile


def test_saving_refuses_attached_adapters_and_keeps_fused_ones(model, sample, tmp_path):
    attach(model)
    expected = model(sample, LABELS).sample
    with pytest.raises(ValueError, match=r"`save_pretrained` saves a flow without adapters, but \['default'\]"):
        model.save_pretrained(tmp_path / "flow")
    assert not (tmp_path / "flow").exists()
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path / "flow")
    saved = TarFlowTransformer2DModel.from_pretrained(tmp_path / "flow", dtype=torch.float64)
    assert_close(saved(sample, LABELS).sample, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers_and_steps_follow_the_adapters(randomised_model):
    model = randomised_model(num_blocks=1)
    latents = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def samples():
        return model(latents, LABELS).sample.detach(), model(latents, LABELS, inverse=True, solver="sequential").sample

    attach(model)
    changes = {
        "attached": lambda: None,
        "weighted": lambda: model.set_adapters("default", 0.5),
        "fused": lambda: (model.set_adapters("default"), model.fuse_lora(), model.unload_lora()),
    }
    expected = {}
    for name, change in changes.items():
        change()
        expected[name] = samples()
    model = randomised_model(num_blocks=1)
    attach(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for name, change in changes.items():
        change()
        for actual, each in zip(samples(), expected[name]):
            assert_close(actual, each, atol=1e-10)
    for weighted, attached in zip(expected["weighted"], expected["attached"]):
        assert_differs(weighted, attached)


@pytest.mark.usefixtures("fresh_compiler")
def test_weights_that_a_compiler_has_frozen_are_compiled_again(randomised_model):
    """Without that, the second fused flow would silently be the first."""
    model = randomised_model(num_blocks=1).float()
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    attach(model)
    outputs = {False: [], True: []}
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        for is_compiled, samples in outputs.items():
            if is_compiled:
                model.compile_repeated_blocks(fullgraph=True)
            for scale in (0.5, 1.0):
                model.set_adapters("default", scale)
                model.fuse_lora()
                samples.append(model(latents, LABELS).sample)
                model.unfuse_lora()
    for actual, expected in zip(outputs[True], outputs[False]):
        assert_close(actual, expected, atol=1e-5)
    assert_differs(*outputs[False])
