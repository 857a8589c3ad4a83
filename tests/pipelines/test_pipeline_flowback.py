import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.callbacks import PipelineCallback
from diffusers.utils import logging

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.pipelines.pipeline_flowback import scale_latents, unscale_latents


ID2LABEL = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark", 3: "hammerhead", 4: "stingray"}


@pytest.fixture
def pipe(randomised_model):
    pipeline = FlowBackPipeline(randomised_model(noise_std=0.05).float(), id2label=ID2LABEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def unconditional_pipe(randomised_model):
    pipeline = FlowBackPipeline(randomised_model(num_classes=None).float())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# What comes out


def test_the_default_output_is_pil_images(pipe):
    images = pipe(class_labels=[1, 2], generator=seeded()).images
    assert [(image.size, image.mode) for image in images] == [((4, 4), "RGB")] * 2
    assert np.asarray(images[0]).std() > 0


def test_output_types_agree(pipe):
    outputs = {
        kind: pipe(class_labels=[3, 1], generator=seeded(), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    expected = (outputs["latent"] / 2 + 0.5).clamp(0, 1)
    assert outputs["latent"].dtype == torch.float32 and outputs["latent"].shape == (2, 3, 4, 4)
    torch.testing.assert_close(outputs["pt"], expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(outputs["np"], expected.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-7)
    pil = np.stack([np.asarray(image) for image in outputs["pil"]]) / 255
    np.testing.assert_allclose(pil, outputs["np"], rtol=0, atol=0.5 / 255 + 1e-6)


def test_grey_images_are_grey(randomised_model):
    pipeline = FlowBackPipeline(randomised_model(in_channels=1).float())
    assert pipeline(class_labels=[0]).images[0].mode == "L"


def test_return_dict_false_is_a_tuple(pipe):
    (images,) = pipe(class_labels=[1], generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, pipe(class_labels=[1], generator=seeded(), output_type="pt").images)


@pytest.mark.parametrize(
    "labels", [[1, 2], ["goldfish", "great white shark"], [[1], [2]], [1, "great white shark"], torch.tensor([1, 2])]
)
def test_labels_by_number_name_nesting_and_tensor(pipe, labels):
    expected = pipe.transformer(pipe.prepare_latents(2, seeded()), torch.tensor([1, 2]), inverse=True).sample
    actual = pipe(class_labels=labels, generator=seeded(), denoise=False, output_type="latent").images
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_a_single_label_and_synonyms(pipe):
    assert pipe.get_label_ids("Tinca tinca") == [0] and pipe.get_label_ids(["tench", "stingray"]) == [0, 4]
    by_name = pipe(class_labels="Tinca tinca", generator=seeded(), output_type="pt").images
    assert torch.equal(by_name, pipe(class_labels=0, generator=seeded(), output_type="pt").images)


def test_num_images_per_prompt(pipe, unconditional_pipe):
    repeated = pipe(class_labels=[3, 1], num_images_per_prompt=2, generator=seeded(), output_type="pt").images
    listed = pipe(class_labels=[3, 3, 1, 1], generator=seeded(), output_type="pt").images
    assert repeated.shape[0] == 4 and torch.equal(repeated, listed)
    assert len(unconditional_pipe(num_images_per_prompt=3).images) == 3
    assert len(pipe(num_images_per_prompt=3).images) == 3


def test_no_class_is_minus_one_and_none(pipe):
    minus_one = pipe(class_labels=[-1], generator=seeded(), output_type="latent").images
    none = pipe(generator=seeded(), output_type="latent").images
    torch.testing.assert_close(minus_one, none, rtol=0, atol=1e-6)
    assert (none - pipe(class_labels=[1], generator=seeded(), output_type="latent").images).abs().max() > 1e-2


# Noise


def test_a_seed_gives_the_same_noise_and_images_however_batched(pipe):
    labels = [1, 2, 0]
    generator = seeded(5)
    one_by_one_noise = torch.cat([pipe.prepare_latents(1, generator) for _ in labels])
    assert torch.equal(pipe.prepare_latents(3, seeded(5)), one_by_one_noise)

    together = pipe(class_labels=labels, generator=seeded(5), output_type="latent").images
    generator = seeded(5)
    alone = torch.cat([pipe(class_labels=[y], generator=generator, output_type="latent").images for y in labels])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_a_generator_for_each_image(pipe):
    listed = pipe(class_labels=[1, 1], generator=[seeded(3), seeded(9)], output_type="latent").images
    single = pipe(class_labels=[1], generator=seeded(9), output_type="latent").images
    torch.testing.assert_close(listed[1:], single, rtol=0, atol=1e-5)


def test_exact_inversion(pipe):
    x = torch.randn(2, 3, 4, 4, generator=seeded())
    y = torch.tensor([4, 0])
    latents = pipe.transformer(x, y).sample
    restored = pipe(latents=latents, class_labels=y, denoise=False, output_type="latent").images
    assert (latents - x).abs().max() > 0.1
    torch.testing.assert_close(restored, x, rtol=0, atol=1e-5)


# Denoising


def test_denoising_against_a_finite_difference_gradient(randomised_model):
    transformer = randomised_model(noise_std=0.3)
    pipeline = FlowBackPipeline(transformer)
    noisy = pipeline(class_labels=[2], generator=seeded(), denoise=False, output_type="latent").images
    denoised = pipeline(class_labels=[2], generator=seeded(), output_type="latent").images

    step = 1e-5
    directions = torch.eye(noisy.numel(), dtype=torch.float64).view(-1, *noisy.shape[1:])
    labels = torch.full((noisy.numel(),), 2)
    with torch.no_grad():
        plus = transformer.log_prob(noisy + step * directions, labels)
        minus = transformer.log_prob(noisy - step * directions, labels)
    score = ((plus - minus) / (2 * step)).view_as(noisy)
    assert score.abs().max() > 0.1
    torch.testing.assert_close(denoised, noisy + 0.3**2 * score, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_denoising_works_in_any_mode(pipe, mode):
    expected = pipe(class_labels=[2], generator=seeded(), output_type="latent").images
    with mode():
        actual = pipe(class_labels=[2], generator=seeded(), output_type="latent").images
    assert not actual.requires_grad and torch.equal(actual, expected)
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize(
    "config, changes",
    [({"noise_std": 0.3}, True), ({"noise_std": 0.0}, False), ({"noise_std": 0.3, "noise_type": "uniform"}, False)],
)
def test_just_gaussian_noise_is_removed(randomised_model, config, changes):
    pipeline = FlowBackPipeline(randomised_model(**config))
    noisy = pipeline(class_labels=[2], generator=seeded(), denoise=False, output_type="latent").images
    sample = pipeline(class_labels=[2], generator=seeded(), output_type="latent").images
    assert torch.equal(noisy, sample) != changes


# Guidance


def test_guidance_reaches_the_flow_and_defaults_to_the_pipelines(randomised_model):
    transformer = randomised_model()
    call = {"class_labels": [1], "denoise": False, "output_type": "latent"}
    plain = FlowBackPipeline(transformer)(generator=seeded(), **call).images
    pipeline = FlowBackPipeline(transformer, guidance_scale=2.0, guidance_rule="product")
    noise = pipeline.prepare_latents(1, seeded())
    guidance = {"guidance_scale": 2.0, "guidance_rule": "product"}
    expected = transformer(noise, torch.tensor([1]), inverse=True, **guidance).sample
    actual = pipeline(generator=seeded(), **call).images
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert pipeline.guidance_scale == 2.0
    assert torch.equal(pipeline(generator=seeded(), guidance_scale=1.0, **call).images, plain)
    linear = pipeline(generator=seeded(), guidance_rule="linear", **call).images
    annealed = pipeline(generator=seeded(), guidance_schedule="linear", **call).images
    heated = pipeline(generator=seeded(), guidance_temperature=2.0, **call).images
    for other in (plain, linear, annealed, heated):
        assert (other - actual).abs().max() > 1e-6


def test_an_unconditional_flow_guides_itself(unconditional_pipe):
    call = {"denoise": False, "output_type": "latent"}
    plain = unconditional_pipe(generator=seeded(), **call).images
    guided = unconditional_pipe(generator=seeded(), guidance_scale=2.0, guidance_temperature=2.0, **call).images
    assert (plain - guided).abs().max() > 1e-6
    with pytest.raises(ValueError, match="guides itself"):
        unconditional_pipe(guidance_scale=2.0)


# While it runs


def test_callback_sees_every_block_and_may_change_latents_and_guidance(pipe):
    seen = []

    def callback(pipeline, step, block, tensors):
        seen.append((step, block, tensors["latents"].shape))
        pipeline._guidance_scale = 3.0
        return {"latents": torch.zeros_like(tensors["latents"])}

    changed = pipe(class_labels=[1], denoise=False, output_type="latent", callback_on_step_end=callback).images
    assert seen == [(0, 3, (1, 3, 4, 4)), (1, 2, (1, 3, 4, 4)), (2, 1, (1, 3, 4, 4))]
    assert torch.equal(changed, torch.zeros(1, 3, 4, 4))
    assert pipe.guidance_scale == 3.0 and pipe.num_timesteps == 3


def test_a_callback_changes_the_guidance_of_the_blocks_after_it(pipe):
    def callback(pipeline, step, block, tensors):
        pipeline._guidance_scale = 3.0

    labels, options = torch.tensor([1]), {"inverse": True, "guidance_rule": pipe.config.guidance_rule}
    changed = pipe(class_labels=[1], generator=seeded(), guidance_scale=2.0, denoise=False, output_type="latent",
                   callback_on_step_end=callback).images  # fmt: skip
    after_step = pipe.transformer(pipe.prepare_latents(1, seeded()), labels, blocks=[3], guidance_scale=2.0, **options)
    expected = pipe.transformer(after_step.sample, labels, blocks=[2, 1], guidance_scale=3.0, **options).sample
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0])
def test_guidance_of_one_and_less_is_off_as_in_diffusers(pipe, guidance_scale):
    def callback(pipeline, step, block, tensors):
        pipeline._guidance_scale = guidance_scale  # diffusers' own cutoff callbacks set 0.0

    options = {"class_labels": [1], "output_type": "latent"}
    expected = pipe(generator=seeded(), guidance_scale=1.0, **options).images
    for option in ({}, {"callback_on_step_end": callback}):
        images = pipe(generator=seeded(), guidance_scale=guidance_scale, **option, **options).images
        assert torch.equal(images, expected)


def test_a_callback_of_diffusers_brings_its_tensor_inputs(pipe):
    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": 0 * callback_kwargs["latents"]}

    class Unknown(Zero):
        tensor_inputs = ["prompt_embeds"]

    options = {"class_labels": [1], "denoise": False, "output_type": "latent"}
    assert not pipe(**options, callback_on_step_end=Zero(1.0)).images.any()
    with pytest.raises(ValueError, match="must be among .* but holds \\['prompt_embeds'\\]"):
        pipe(**options, callback_on_step_end=Unknown(1.0))


def test_a_callback_that_fails_leaves_no_call_behind(pipe):
    def callback(*_):
        raise KeyError("callback")

    with pytest.raises(KeyError):
        pipe(class_labels=[1], callback_on_step_end=callback)
    assert not pipe._running_calls
    pipe._interrupt = True  # as the button of a page does from another thread: it is meant for running calls
    images = [pipe(class_labels=[1], generator=seeded(), output_type="latent").images for _ in range(2)]
    assert torch.equal(*images)


def test_interrupt_stops_after_the_block(pipe):
    blocks = []

    def callback(pipeline, step, block, tensors):
        blocks.append(block)
        pipeline._interrupt = True

    stopped = pipe(
        class_labels=[1], generator=seeded(), denoise=False, output_type="latent", callback_on_step_end=callback
    ).images
    expected = pipe.transformer(pipe.prepare_latents(1, seeded()), torch.tensor([1]), inverse=True, blocks=[3]).sample
    assert blocks == [3] and torch.equal(stopped, expected)


def test_the_progress_bar_counts_blocks(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(class_labels=[1])
    assert "3/3" in capsys.readouterr().err


def test_overflow_is_reported_and_not_replaced(pipe, caplog):
    latents = torch.zeros(2, 3, 4, 4)
    latents[1] = torch.inf
    logger = logging.get_logger("flowback_hf.pipelines.pipeline_flowback")
    logger.addHandler(caplog.handler)
    images = pipe(latents=latents, class_labels=[0, 1], output_type="latent").images
    logger.removeHandler(caplog.handler)
    assert "Images [1] of this call overflowed" in caplog.text
    assert torch.isfinite(images[0]).all() and not torch.isfinite(images[1]).all()


def test_a_vae_that_overflows_is_reported(randomised_model, tiny_vae):
    pipeline = FlowBackPipeline(randomised_model(in_channels=4).float(), vae=tiny_vae)
    tiny_vae.decoder.conv_out.bias.data.fill_(torch.inf)
    with pytest.raises(OverflowError, match=r"Images \[0\] of this call overflowed .* Try another seed"):
        pipeline(class_labels=[0], on_overflow="raise")
    tiny_vae.half()
    with pytest.raises(OverflowError, match="the VAE needs more than float16"):
        pipeline(class_labels=[0], on_overflow="raise")
    assert pipeline(class_labels=[0], on_overflow="raise", output_type="latent").images.isfinite().all()


def test_overflow_raises_where_it_is_asked_to(pipe):
    latents = torch.zeros(2, 3, 4, 4)
    latents[1] = torch.inf
    with pytest.raises(OverflowError, match=r"Images \[1\] of this call overflowed .* Try another seed"):
        pipe(latents=latents, class_labels=[0, 1], on_overflow="raise")
    pipe(latents=torch.zeros(2, 3, 4, 4), class_labels=[0, 1], on_overflow="raise")
    with pytest.raises(ValueError, match=r"`on_overflow` must be one of \('warn', 'raise'\), but is 'ignore'"):
        pipe(class_labels=[0], on_overflow="ignore")


@pytest.mark.parametrize("solver", ["auto", "jacobi"])
def test_solvers_give_the_same_images(pipe, solver):
    arguments = {"class_labels": [1, 2], "guidance_scale": 2.0, "output_type": "latent", "denoise": False}
    expected = pipe(**arguments, solver="sequential", generator=seeded()).images
    images = pipe(**arguments, solver=solver, tolerance=0, generator=seeded()).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    if solver == "jacobi":
        rough = pipe(**arguments, solver=solver, tolerance=1e3, generator=seeded()).images
        assert (rough - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`solver` must be one of"):
        pipe(**arguments, solver="newton")


def test_model_cpu_offload(pipe):
    expected = pipe(class_labels=[1], generator=seeded(), output_type="latent").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    offloaded = pipe(class_labels=[1], generator=seeded(), output_type="latent").images
    assert torch.equal(offloaded, expected)


def test_sequential_cpu_offload(pipe):
    expected = pipe(class_labels=[1], guidance_scale=2.0, generator=seeded(), output_type="latent").images
    # What `enable_sequential_cpu_offload` does to a component; it wants an accelerator itself.
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert pipe.transformer.blocks[0].class_embed.device.type == "meta"
    actual = pipe(class_labels=[1], guidance_scale=2.0, generator=seeded(), output_type="latent").images
    assert torch.equal(actual, expected)


# Latent flows


@pytest.fixture
def latent_pipe(randomised_model, tiny_vae):
    pipeline = FlowBackPipeline(randomised_model(in_channels=4, noise_std=0.3).float(), vae=tiny_vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_denoising_and_guidance_happen_in_latent_space(latent_pipe):
    transformer, vae, labels = latent_pipe.transformer, latent_pipe.vae, torch.tensor([1])
    noise = latent_pipe.prepare_latents(1, seeded())
    noisy = transformer(noise, labels, inverse=True, guidance_scale=2.0).sample.requires_grad_()
    (score,) = torch.autograd.grad(transformer.log_prob(noisy, labels).sum(), noisy)
    expected = (noisy + 0.3**2 * score).detach()

    call = {"class_labels": [1], "guidance_scale": 2.0}
    latent = latent_pipe(generator=seeded(), output_type="latent", **call).images
    assert latent.shape == (1, 4, 4, 4)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-5)
    image = latent_pipe(generator=seeded(), output_type="pt", **call).images
    with torch.no_grad():
        decoded = vae.decode(latent / 0.5 + 0.1).sample
    assert image.shape == (1, 3, 8, 8)
    torch.testing.assert_close(image, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    for other in ({"denoise": False}, {"guidance_scale": 1.0}):
        changed = latent_pipe(generator=seeded(), output_type="pt", **{**call, **other}).images
        assert (changed - image).abs().max() > 1e-4


def test_encoding_draws_from_the_posterior_and_scaling_is_undone(latent_pipe):
    images = torch.rand(2, 3, 8, 8, generator=seeded())
    vae = latent_pipe.vae
    with torch.no_grad():
        posterior = vae.encode(images * 2 - 1).latent_dist
    draw = posterior.sample(seeded(1))
    encoded = latent_pipe.encode(images, seeded(1))
    torch.testing.assert_close(encoded, (draw - 0.1) * 0.5, rtol=0, atol=1e-6)
    assert (latent_pipe.encode(images, seeded(2)) - encoded).abs().max() > 1e-2
    torch.testing.assert_close(latent_pipe.encode(images), (posterior.mode() - 0.1) * 0.5, rtol=0, atol=1e-6)
    restored = unscale_latents(scale_latents(draw, vae.config), vae.config)
    torch.testing.assert_close(restored, draw, rtol=0, atol=1e-6)

    latents = latent_pipe.transformer(encoded, torch.tensor([1, 2])).sample
    call = {"class_labels": [1, 2], "denoise": False, "output_type": "pt"}
    with torch.no_grad():
        decoded = (vae.decode(draw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(latent_pipe(latents=latents, **call).images, decoded, rtol=0, atol=1e-4)


def test_a_latent_pipeline_is_saved_with_its_vae(latent_pipe, tmp_path):
    latent_pipe.save_pretrained(tmp_path)
    loaded = FlowBackPipeline.from_pretrained(tmp_path)
    call = {"class_labels": [1], "output_type": "pt"}
    expected = latent_pipe(generator=seeded(), **call).images
    # A loaded file's tensors are aligned otherwise than fresh ones, and small products round accordingly.
    torch.testing.assert_close(loaded(generator=seeded(), **call).images, expected, rtol=0, atol=1e-5)
    assert loaded.vae_scale_factor == 2


def test_a_vae_that_does_not_fit_the_flow_is_refused(randomised_model, tiny_vae):
    with pytest.raises(
        ValueError, match=r"`vae` must have as many latent channels .* `in_channels`, but they are 4 and 3"
    ):
        FlowBackPipeline(randomised_model(), vae=tiny_vae)


# Files


def test_save_and_load(pipe, tmp_path):
    pipe.register_to_config(guidance_scale=1.5, guidance_rule="product")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["flowback_hf", "TarFlowTransformer2DModel"]
    assert index["id2label"] == {str(label): name for label, name in ID2LABEL.items()}
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert files == ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]

    loaded = FlowBackPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is TarFlowTransformer2DModel and not loaded.transformer.training
    assert loaded.labels == pipe.labels and loaded.config.guidance_scale == 1.5
    expected = pipe(class_labels=["goldfish"], generator=seeded(), output_type="latent").images
    assert torch.equal(loaded(class_labels=["goldfish"], generator=seeded(), output_type="latent").images, expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "model_index.json").read_text())["id2label"] == index["id2label"]


NEW_PROCESS = """
import sys, torch
from flowback_hf import FlowBackPipeline
torch.set_num_threads(1)
folder, dtype, output = sys.argv[1:]
pipe = FlowBackPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
generator = torch.Generator().manual_seed(0)
images = pipe(class_labels=[1, 4], guidance_scale=1.5, generator=generator, output_type="latent")
torch.save(images.images, output)
"""


@pytest.mark.parametrize("dtype, max_shard_size", [("float32", "10GB"), ("bfloat16", "10GB"), ("float32", "10KB")])
def test_same_images_in_a_new_process(pipe, tmp_path, dtype, max_shard_size):
    pipe.to(getattr(torch, dtype))
    pipe.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    shards = list((tmp_path / "model" / "transformer").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size == "10KB")
    subprocess.run([sys.executable, "-c", NEW_PROCESS, tmp_path / "model", dtype, tmp_path / "images.pt"], check=True)
    expected = pipe(class_labels=[1, 4], guidance_scale=1.5, generator=seeded(), output_type="latent").images
    actual = torch.load(tmp_path / "images.pt")
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"class_labels": [1], "generator": 42},
            "`generator` must be a `torch.Generator`, a list of them or None, but",
        ),
        ({"class_labels": [1], "generator": [42]}, "`generator` must be a `torch.Generator`, a list of them or None"),
        (
            {"class_labels": [1], "latents": [0.0]},
            r"`latents` must be a tensor of shape \(1, 3, 4, 4\), but are \[0.0\]",
        ),
        ({"class_labels": [True]}, "`class_labels` must be whole numbers or names, but one is True"),
        ({"class_labels": [1], "solver": "newton"}, "`solver` must be one of"),
        ({"class_labels": [5]}, r"`class_labels` must lie between 0 and 4, or be -1 for no class, but one is 5"),
        ({"class_labels": [-2]}, "one is -2"),
        ({"class_labels": []}, "must name at least one class"),
        ({"class_labels": [None, 3]}, "must be whole numbers or names, but one is None"),
        ({"class_labels": [1.5]}, "`class_labels` must be whole numbers or names, but one is 1.5"),
        ({"class_labels": "goldfinch"}, r"'goldfinch' is not one. The nearest known ones are \['goldfish'"),
        (
            {"class_labels": [1], "guidance_scale": -0.5},
            "`guidance_scale` must be a finite number of at least 0.0, but is -0.5",
        ),
        ({"class_labels": [1], "guidance_rule": "cubic"}, "`guidance_rule` must be one of .*'cubic'"),
        ({"class_labels": [1], "guidance_schedule": "cosine"}, "`guidance_schedule` must be one of .*'cosine'"),
        ({"class_labels": [1], "output_type": "jpeg"}, "`output_type` must be one of .* but is 'jpeg'"),
        (
            {"class_labels": [1], "num_images_per_prompt": 0},
            "`num_images_per_prompt` must be a whole number of at least 1, but is 0",
        ),
        ({"class_labels": [1, 2], "generator": [torch.Generator()]}, "one for each of the 2 images, but has 1"),
        (
            {"class_labels": [1], "latents": torch.zeros(2, 3, 4, 4)},
            r"`latents` must be a tensor of shape \(1, 3, 4, 4\)",
        ),
        ({"class_labels": [1], "callback_on_step_end_tensor_inputs": ["noise"]}, r"but holds \['noise'\]"),
    ],
)
def test_bad_input_raises_before_any_work(pipe, monkeypatch, arguments, message):
    def no_work(*args, **kwargs):
        pytest.fail("the flow ran")

    monkeypatch.setattr(type(pipe.transformer.blocks[0]), "forward", no_work)
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_labels_for_an_unconditional_flow_raise(unconditional_pipe):
    with pytest.raises(ValueError, match="`class_labels` must be None for an unconditional model, but is \\[1\\]"):
        unconditional_pipe(class_labels=[1])


@pytest.fixture
def digits(randomised_model):
    """Five classes: 0 is called 3, 1 is called 1, 2 is called 12, 3 and 4 are called cat and dog, hound."""
    return FlowBackPipeline(randomised_model(), id2label={0: "3", 1: "1", 2: "12", 3: "cat", 4: "dog, hound"})


def test_a_label_is_a_name_if_it_is_known_and_a_number_otherwise(digits):
    labels = ["cat", "hound", "12", "0", "-1", "1"]  # 12 is no class's number, and class 1 is called 1
    assert digits.get_label_ids(labels) == [3, 4, 2, 0, -1, 1]
    assert digits.normalize_class_labels([*labels, 3, ["dog"]]) == [3, 4, 2, 0, -1, 1, 3, 4]


def test_a_name_of_several_classes_is_refused_and_a_whole_name_goes_before_a_synonym(randomised_model):
    names = {0: "crane, bird", 1: "crane, machine", 2: "maillot, tank suit", 3: "maillot"}
    pipe = FlowBackPipeline(randomised_model(num_classes=4), id2label=names)
    assert pipe.get_label_ids(["maillot", "name:maillot", "tank suit", "bird", "id:1"]) == [3, 3, 2, 0, 1]
    assert pipe.get_label_ids("crane, machine") == [1]
    assert pipe.labels == {"bird": 0, "machine": 1, "maillot": 3, "tank suit": 2}
    for label in ("crane", "name:crane"):
        with pytest.raises(ValueError, match=r"'crane' is the name of the classes \[0, 1\]. Write 'id:0' for"):
            pipe(class_labels=label)


def test_a_label_of_two_classes_is_refused_and_either_can_be_written(digits):
    message = "'3' is the name of class 0 and the number of class 3. Write 'name:3' for the former or 'id:3' for the"
    with pytest.raises(ValueError, match=message):
        digits(class_labels=["3"])
    assert digits.normalize_class_labels(["name:3", "id:3", 3]) == [0, 3, 3]
    with pytest.raises(ValueError, match="'name:7' is not one"):
        digits.get_label_ids("name:7")
    with pytest.raises(ValueError, match="'id:cat' is not one"):
        digits.get_label_ids("id:cat")
    with pytest.raises(ValueError, match="must lie between 0 and 4, or be -1 for no class, but one is 9"):
        digits(class_labels="id:9")


def test_names_without_id2label_raise(randomised_model):
    with pytest.raises(ValueError, match="This pipeline has no `id2label`"):
        FlowBackPipeline(randomised_model())(class_labels="goldfish")
