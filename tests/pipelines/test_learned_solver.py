"""Sampling with a learned inverse. Loading it from the Hub, with and without the package, is in tests/test_hub.py."""

import json
import threading

import pytest
import torch

from flowback_hf import (
    FlowBackClassificationPipeline,
    FlowBackPipeline,
    TarFlowReverseTransformer2DModel,
)
from flowback_hf.models.transformer_reverse import HEADS_FILE

from ..conftest import command_line, randomise_weights


@pytest.fixture
def make_pipe(randomised_model):
    """A function of the learned inverse's arguments: a pipeline with one, with random weights everywhere."""

    def make(vae=None, flow_config=None, with_heads=True, **config):
        flow = randomised_model(noise_std=0.1, **(flow_config or {})).float()
        reverse_transformer = TarFlowReverseTransformer2DModel.for_flow(flow, **{"max_guidance_scale": 3.0, **config})
        if with_heads:
            reverse_transformer.add_heads()
        randomise_weights(reverse_transformer, seed=1)
        pipe = FlowBackPipeline(flow, vae, reverse_transformer=reverse_transformer.eval())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def sample(pipe, **options):
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    arguments = {"class_labels": [1, 0], "solver": "learned", "output_type": "latent", **options}
    return pipe(generator=generator, **arguments).images


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_one_evaluation_and_none_of_the_flow(make_pipe):
    pipe = make_pipe()
    calls = count_calls(pipe.reverse_transformer), count_calls(pipe.transformer)
    images = sample(pipe, guidance_scale=2.0)
    assert [len(each) for each in calls] == [1, 0]
    latents = pipe.prepare_latents(2, torch.Generator().manual_seed(0))
    expected = pipe.reverse_transformer(latents, torch.tensor([1, 0]), 2.0).sample
    assert torch.equal(images, expected) and not images.requires_grad


def test_seed_labels_and_guidance_decide_the_image(make_pipe):
    pipe = make_pipe()
    images = sample(pipe)
    assert torch.equal(sample(pipe), images)
    assert torch.equal(sample(pipe, latents=pipe.prepare_latents(2, torch.Generator().manual_seed(0))), images)
    for other in ({"seed": 1}, {"class_labels": [2, 3]}, {"guidance_scale": 2.0}, {"solver": "auto"}):
        assert (sample(pipe, **other) - images).abs().amax(dim=(1, 2, 3)).min() > 1e-3, other
    pipe.register_to_config(guidance_scale=2.0)
    assert torch.equal(sample(pipe), sample(pipe, guidance_scale=2.0))
    assert torch.equal(sample(pipe, guidance_scale=1.0), images)


def test_noisy_data_need_the_heads(make_pipe):
    pipe = make_pipe()
    noisy = sample(pipe, denoise=False)
    latents = pipe.prepare_latents(2, torch.Generator().manual_seed(0))
    output = pipe.reverse_transformer(latents, torch.tensor([1, 0]), output_trajectory=True)
    assert torch.equal(noisy, output.trajectory[0]) and not torch.equal(noisy, output.sample)
    with pytest.raises(ValueError, match="`denoise=False` needs the learned inverse's heads, which plain sampling"):
        sample(make_pipe(with_heads=False), denoise=False)


def test_one_that_does_not_denoise_is_denoised_by_the_score(make_pipe):
    pipe = make_pipe(denoises=False, with_heads=False)
    noisy = sample(pipe, denoise=False)
    labels = torch.tensor([1, 0])
    assert torch.equal(sample(pipe), pipe.denoise(noisy, labels))
    assert (sample(pipe) - noisy).abs().max() > 1e-3


def test_a_latent_flow(make_pipe, tiny_vae):
    pipe = make_pipe(vae=tiny_vae, flow_config={"in_channels": 4})
    images = sample(pipe, output_type="pil")
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    assert images[0].tobytes() != images[1].tobytes()


def test_an_unconditional_flow(make_pipe):
    pipe = make_pipe(flow_config={"num_classes": None}, max_guidance_scale=1.0)
    assert sample(pipe, class_labels=None, num_images_per_prompt=3).shape[0] == 3
    with pytest.raises(ValueError, match="`guidance_scale` must be 1.0 for a learned inverse without classes"):
        sample(pipe, class_labels=None, guidance_scale=2.0)


def test_callbacks_see_one_step(make_pipe):
    pipe, seen = make_pipe(), []

    def callback(pipe, step, block, kwargs):
        seen.append((step, block, pipe.num_timesteps, pipe.guidance_scale))
        return {"latents": 2 * kwargs["latents"]}

    doubled = sample(pipe, guidance_scale=2.0, callback_on_step_end=callback)
    assert seen == [(0, 0, 1, 2.0)]
    assert torch.equal(doubled, 2 * sample(pipe, guidance_scale=2.0))


def test_two_threads_get_what_they_asked_for(make_pipe):
    pipe = make_pipe()
    expected = {scale: sample(pipe, guidance_scale=scale) for scale in (1.0, 3.0)}
    results = {}

    def draw(scale):
        results[scale] = [sample(pipe, guidance_scale=scale) for _ in range(20)]

    threads = [threading.Thread(target=draw, args=(scale,)) for scale in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, images in results.items():
        assert all(torch.equal(each, expected[scale]) for each in images)


# Saving and loading


def test_saved_loaded_and_shared(make_pipe, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "reverse_transformer" / HEADS_FILE).exists()
    loaded = FlowBackPipeline.from_pretrained(tmp_path)
    assert type(loaded.reverse_transformer) is TarFlowReverseTransformer2DModel
    assert loaded.reverse_transformer.heads is None
    assert torch.equal(sample(loaded, guidance_scale=2.0), sample(pipe, guidance_scale=2.0))
    loaded.reverse_transformer.load_heads(tmp_path)
    assert torch.equal(sample(loaded, denoise=False), sample(pipe, denoise=False))
    shared = FlowBackPipeline.from_pipe(pipe, guidance_scale=2.0)
    assert shared.reverse_transformer is pipe.reverse_transformer
    assert torch.equal(sample(shared), sample(pipe, guidance_scale=2.0))


def test_a_classifier_does_without_it(make_pipe, tmp_path, library_log):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    classifier = FlowBackClassificationPipeline.from_pretrained(tmp_path)
    assert set(classifier.components) == {"transformer", "vae"} and "not expected" not in library_log.text
    index = json.loads((tmp_path / "model_index.json").read_text())
    unknown = {"other_transformer": index["reverse_transformer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | unknown))
    FlowBackClassificationPipeline.from_pretrained(tmp_path)
    assert "not expected" in library_log.text  # diffusers warns of any other component
    classifier = FlowBackClassificationPipeline.from_pipe(pipe)
    assert classifier.transformer is pipe.transformer and set(classifier.components) == {"transformer", "vae"}
    assert FlowBackPipeline.from_pipe(classifier).reverse_transformer is None


def test_in_half_the_memory_it_is_still_that_of_its_flow(make_pipe, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    halved = FlowBackPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(sample(halved), sample(pipe), rtol=0, atol=0.2)


def test_compiled_with_the_flow(make_pipe, fresh_compiler):
    pipe = make_pipe()
    expected = sample(pipe, guidance_scale=2.0)
    pipe.compile()
    torch.testing.assert_close(sample(pipe, guidance_scale=2.0), expected, rtol=0, atol=1e-5)


# Bad input: one sentence before any work


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 4.0}, "`guidance_scale` must be between 1.0 and 3.0, for which .* but is 4.0"),
        ({"guidance_rule": "linear"}, "`guidance_rule`, .*`tolerance` are for the exact solvers: leave them out"),
        ({"guidance_schedule": "linear"}, "`tolerance` are for the exact solvers: leave them out"),
        ({"guidance_temperature": 2.0}, "`tolerance` are for the exact solvers: leave them out"),
        ({"tolerance": 0.1}, "`tolerance` are for the exact solvers: leave them out"),
        ({"class_labels": [5, 0]}, "`class_labels` must lie between 0 and 4"),
        ({"solver": "learnt"}, "`solver` must be one of"),
    ],
)
def test_bad_arguments(make_pipe, options, message):
    pipe = make_pipe()
    calls = count_calls(pipe.reverse_transformer), count_calls(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        sample(pipe, **options)
    assert not any(calls)


def test_without_the_component_it_says_how_to_train_one(make_pipe):
    pipe = FlowBackPipeline(make_pipe().transformer)
    with pytest.raises(ValueError, match="has no `reverse_transformer`. Train one with `python training/"):
        sample(pipe)


def test_a_learned_inverse_of_another_flow(make_pipe, randomised_model):
    pipe = make_pipe()
    other = FlowBackPipeline(randomised_model(seed=1).float(), reverse_transformer=pipe.reverse_transformer)
    assert sample(other, solver="auto").isfinite().all()
    with pytest.raises(ValueError, match="is that of a flow with other weights"):
        sample(other)
    larger = FlowBackPipeline(randomised_model(num_classes=7).float(), reverse_transformer=pipe.reverse_transformer)
    with pytest.raises(ValueError, match="must have the flow's `num_classes`, 7, but has 5"):
        sample(larger)


@pytest.mark.parametrize(
    "edit, arguments",
    [
        ("swap_class", {"source": 0, "target": 1}),
        ("interpolate", {"class_labels": [0, 1], "num_steps": 3}),
        ("vary", {"class_labels": 0}),
    ],
)
def test_an_edit_without_the_heads(make_pipe, edit, arguments):
    pipe = make_pipe(with_heads=False)
    images = [torch.rand(3, 4, 4)] * (2 if edit == "interpolate" else 1)
    calls = count_calls(pipe.reverse_transformer), count_calls(pipe.transformer)
    with pytest.raises(ValueError, match="`denoise=False` needs the learned inverse's heads"):
        getattr(pipe, edit)(*images, solver="learned", **arguments)
    assert not any(calls)
    getattr(pipe, edit)(*images, solver="learned", denoise=True, **arguments)
    assert calls[0] == [1]


@pytest.fixture
def pipes(make_pipe, randomised_model):
    """Pipelines that a learned inverse does not belong to, and one that it does."""
    right, unconditional = make_pipe(), make_pipe(flow_config={"num_classes": None}, max_guidance_scale=1.0)

    def of(flow):
        return FlowBackPipeline(flow.float(), reverse_transformer=right.reverse_transformer)

    return {
        "no component": FlowBackPipeline(right.transformer),
        "other weights": of(randomised_model(seed=1)),
        "other size": of(randomised_model(sample_size=8)),
        "other classes": of(randomised_model(num_classes=7)),
        "unconditional": unconditional,
        "right": right,
        "without heads": make_pipe(with_heads=False),
    }


MISTAKES = {
    "no component": ({}, "has no `reverse_transformer`. Train one with"),
    "other weights": ({}, "is that of a flow with other weights"),
    "other size": ({}, "must have the flow's `sample_size`, 8, but has 4"),
    "other classes": ({}, "must have the flow's `num_classes`, 7, but has 5"),
    "unconditional": ({}, "`guidance_scale` must be 1.0 for a learned inverse without classes, but is 1.5"),
    "right: guidance": ({"guidance_scale": 4.0}, "must be between 1.0 and 3.0, for which this learned inverse"),
    "right: rule": ({"guidance_rule": "linear"}, "`guidance_rule`, .* are for the exact solvers: leave them out"),
    "without heads": ({"no_denoise": True}, "`denoise=False` needs the learned inverse's heads"),
}


@pytest.mark.parametrize(
    "command, mistake",
    # an evaluation always removes the noise
    [("sample", mistake) for mistake in MISTAKES] + [("evaluate_flow", mistake) for mistake in list(MISTAKES)[:-1]],
)
def test_the_commands_say_it_before_anything_is_written(pipes, script, tmp_path, command, mistake):
    options, message = MISTAKES[mistake]
    options = {"guidance_scale": 1.5, **options}
    if command == "evaluate_flow":
        # Neither the data nor the encoder is looked for.
        options |= {"guidance_scales": options.pop("guidance_scale"), "data_dir": "nowhere", "features": "nowhere"}
    pipes[mistake.partition(":")[0]].save_pretrained(tmp_path / "flow")
    line = command_line(model=tmp_path / "flow", output_dir=tmp_path / "out", solver="learned", **options)
    module = script(command)
    arguments = [module.parse_args(line)] + ([line] if command == "evaluate_flow" else [])
    with pytest.raises(ValueError, match=message):
        module.main(*arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_loads_the_heads_of_noisy_images(make_pipe, script, tmp_path):
    make_pipe().save_pretrained(tmp_path / "flow")
    images = {}
    for no_denoise in (True, None):
        folder = tmp_path / f"out-{no_denoise}"
        line = command_line(model=tmp_path / "flow", output_dir=folder, solver="learned", no_denoise=no_denoise)
        module = script("sample")
        module.main(module.parse_args([*line, "--num_images", "1"]))
        images[no_denoise] = (folder / "000000.png").read_bytes()
    assert images[True] != images[None]


def test_a_flow_with_an_adapter(make_pipe):
    peft = pytest.importorskip("peft")
    pipe = make_pipe()
    pipe.transformer.add_adapter(peft.LoraConfig(r=1, target_modules=["to_qkv"]))
    with pytest.raises(ValueError, match="is that of the flow without adapters, but .* are attached"):
        sample(pipe)
