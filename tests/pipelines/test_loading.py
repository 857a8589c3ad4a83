"""What users of diffusers do with any pipeline: load, convert, encode, offload."""

import json

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.hooks.group_offloading import ModuleGroup
from safetensors.torch import load_file, save_file

from flowback_hf import (
    FlowBackClassificationPipeline,
    FlowBackPipeline,
    TarFlowReverseTransformer2DModel,
    TarFlowTransformer2DModel,
)


@pytest.fixture
def pipe(randomised_model):
    pipeline = FlowBackPipeline(
        randomised_model().float(), id2label={0: "ant", 1: "bee"}, guidance_scale=1.5, guidance_rule="product"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def latent_pipe(randomised_model, tiny_vae):
    pipeline = FlowBackPipeline(randomised_model(in_channels=4).float(), vae=tiny_vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=[1, 0], generator=generator, **{"output_type": "latent", **options}).images


# Loading


@pytest.mark.parametrize("pipeline_class", [FlowBackPipeline, FlowBackClassificationPipeline])
def test_diffusion_pipeline_loads_a_folder(pipe, tmp_path, pipeline_class):
    pipeline_class.from_pipe(pipe).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is pipeline_class is getattr(diffusers, pipeline_class.__name__)
    assert type(loaded.transformer) is TarFlowTransformer2DModel
    assert loaded.config.guidance_rule == "product" and loaded.labels == {"ant": 0, "bee": 1}
    assert torch.equal(sample(FlowBackPipeline.from_pipe(loaded)), sample(pipe))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_from_pipe_shares_components_both_ways(latent_pipe, dtype):
    latent_pipe.transformer.to(dtype)
    latent_pipe.register_to_config(guidance_scale=1.5, id2label={0: "ant"})
    classifier = FlowBackClassificationPipeline.from_pipe(latent_pipe)
    again = FlowBackPipeline.from_pipe(classifier)
    third = FlowBackPipeline.from_pipe(again, guidance_scale=3.0)
    for other in (classifier, again, third):
        assert other.transformer is latent_pipe.transformer and other.vae is latent_pipe.vae
        assert other.transformer.dtype == dtype and other.labels == {"ant": 0}
    assert type(third) is FlowBackPipeline
    assert (again.config.guidance_scale, third.config.guidance_scale) == (1.5, 3.0)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_from_pipe_casts_only_where_it_is_asked_to(latent_pipe, name):
    latent_pipe.transformer.to(torch.bfloat16)
    FlowBackClassificationPipeline.from_pipe(latent_pipe)
    assert (latent_pipe.transformer.dtype, latent_pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    other = FlowBackPipeline.from_pipe(latent_pipe, **{name: torch.float64})
    assert (other.transformer.dtype, other.vae.dtype) == (torch.float64, torch.float64)
    with pytest.raises(TypeError, match="guidance"):
        FlowBackPipeline.from_pipe(latent_pipe, guidance=3.0)


def test_from_pipe_needs_a_flow(tiny_vae):
    class Decoder(DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(ValueError, match="must be a pipeline of a flow, with a `transformer`, but is a Decoder"):
        FlowBackPipeline.from_pipe(Decoder(tiny_vae))


def test_components_make_the_same_pipeline(latent_pipe):
    again = FlowBackPipeline(**latent_pipe.components)
    again.set_progress_bar_config(disable=True)
    assert set(latent_pipe.components) == {"transformer", "vae", "reverse_transformer"}
    assert torch.equal(sample(again), sample(latent_pipe))


@pytest.mark.parametrize(
    "saving, loading",
    [
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"safe_serialization": False}, {"use_safetensors": False}),
        ({}, {"use_safetensors": True}),
        ({}, {"low_cpu_mem_usage": False}),
        ({}, {"low_cpu_mem_usage": True}),
        ({}, {"device_map": "balanced"}),
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_options_of_saving_and_loading(pipe, tmp_path, saving, loading):
    pipe.save_pretrained(tmp_path, **saving)
    if "variant" in saving:
        assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = FlowBackPipeline.from_pretrained(tmp_path, **loading)
    torch.testing.assert_close(sample(loaded), sample(pipe), rtol=0, atol=1e-5)


# Weights that do not fit


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name not in remove}
    path.write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 1}, r"are unexpected \(blocks\.0\.layers\.1\.attn.*, \.\.\.\)"),
        ({"num_layers": 3}, r"are missing \(blocks\.0\.layers\.2\.attn.*, \.\.\.\)"),
        ({"position_embedding": "rope"}, r"unexpected \(blocks\.0\.pos_embed"),
        ({"remove": ["noise_std", "noise_type"]}, r"leaves out \['noise_std', 'noise_type'\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(randomised_model, tmp_path, change, message):
    randomised_model(num_layers=2, attention_head_dim=8).save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        TarFlowTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_missing_tensor_is_refused_by_name(pipe, tmp_path, low_cpu_mem_usage):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["blocks.1.class_embed"]
    save_file(weights, file, metadata={"format": "pt"})
    for load in (DiffusionPipeline.from_pretrained, FlowBackClassificationPipeline.from_pretrained):
        with pytest.raises(ValueError, match=r"do not fit .*: 1 are missing \(blocks\.1\.class_embed\)"):
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_arguments_may_complete_a_configuration(randomised_model, tmp_path):
    model = randomised_model(noise_std=0.2)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, remove=["noise_std", "inverse_profile"])
    loaded, info = TarFlowTransformer2DModel.from_pretrained(tmp_path, noise_std=0.3, output_loading_info=True)
    assert loaded.config.noise_std == 0.3 and info["missing_keys"] == []


# Encoding


def test_encode_takes_every_kind_of_image(pipe, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1
    pictures = [PIL.Image.fromarray(each) for each in array]
    pictures[0].save(tmp_path / "0.png")
    floats = array.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2)
    for images in (pictures, array, floats, tensor, list(tensor), [tmp_path / "0.png", pictures[1]]):
        data = pipe.encode(images)
        assert data.dtype == torch.float32 and data.shape == (2, 3, 4, 4)
        torch.testing.assert_close(data, expected, rtol=0, atol=1e-6)
    assert pipe.encode(pictures[0]).shape == (1, 3, 4, 4)
    with pytest.warns(UserWarning, match="resized and center-cropped"):
        assert pipe.encode(PIL.Image.new("RGB", (9, 7))).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="Image 0 must be 4x4 pixels of mode RGB, but is 9x7"):
        pipe.encode(PIL.Image.new("RGB", (9, 7)), strict=True)
    with pytest.raises(ValueError, match=r"Image 0 must hold floats in \[0, 1\] or uint8, but holds .* from -"):
        pipe.encode(2 * tensor - 1)


def test_encode_undoes_sampling(pipe):
    data = pipe.encode(sample(pipe, output_type="pt"))
    latents = pipe.transformer(data, torch.tensor([1, 0])).sample
    restored = pipe(latents=latents, class_labels=[1, 0], guidance_scale=1.0, denoise=False, output_type="pt").images
    torch.testing.assert_close(restored, (data / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_vae_without_a_distribution_encodes(randomised_model):
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(**channels, **blocks, scaling_factor=0.5)
    pipe = FlowBackPipeline(randomised_model(in_channels=4).float(), vae=vae)
    images = torch.rand(2, 3, 8, 8)
    data = pipe.encode(images)
    expected = vae.encode(2 * images - 1).latents * 0.5
    assert data.shape == (2, 4, 4, 4) and torch.allclose(data, expected)
    assert len(pipe.swap_class(images, source=0, target=1).images) == 2


# Memory


def test_group_offloading_moves_a_block_once_however_many_tokens(pipe, monkeypatch):
    expected = sample(pipe)
    onloaded, onload = [], ModuleGroup.onload_
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: (onloaded.extend(group.modules), onload(group)))
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, use_stream=False
    )
    assert torch.equal(sample(pipe, denoise=False), sample(pipe, denoise=False))
    assert [onloaded.count(block) for block in pipe.transformer.blocks] == [2] * len(pipe.transformer.blocks)
    assert torch.equal(sample(pipe), expected)


def test_group_offloading_by_streams_waits_for_its_copies(pipe):
    """It does so by a hook on the model itself, which diffusers adds if there is a module beside the blocks."""
    reverse_transformer = TarFlowReverseTransformer2DModel.for_flow(pipe.transformer)
    for model in (pipe.transformer, reverse_transformer):
        model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
        assert hasattr(model, "_diffusers_hook")


def test_the_layers_cache_is_never_moved(pipe):
    # Offloading copies what a module is called with to its device, unless the keyword is named here.
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", use_stream=False)
    assert "key_value_cache" in TarFlowTransformer2DModel._skip_keys
    caches = []
    layer = pipe.transformer.blocks[0].layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: caches.append(kwargs["key_value_cache"]), with_kwargs=True)
    sample(pipe, denoise=False)
    assert len(caches) > 1 and len({cache.states.data_ptr() for cache in caches}) == 1


def test_slicing_and_tiling_of_the_vae(latent_pipe):
    expected = sample(latent_pipe, output_type="pt")
    latent_pipe.vae.enable_slicing()
    torch.testing.assert_close(sample(latent_pipe, output_type="pt"), expected, rtol=0, atol=1e-5)
    latent_pipe.vae.enable_tiling()  # these latents fit one tile
    torch.testing.assert_close(sample(latent_pipe, output_type="pt"), expected, rtol=0, atol=1e-5)
    latent_pipe.vae.disable_slicing()
    latent_pipe.vae.tile_latent_min_size, latent_pipe.vae.tile_sample_min_size = 2, 4
    latent_pipe.vae.tile_overlap_factor = 0.5
    tiled = sample(latent_pipe, output_type="pt")
    assert tiled.shape == expected.shape and not torch.equal(tiled, expected)


def test_model_offloading_of_a_latent_pipeline(latent_pipe):
    expected = sample(latent_pipe, output_type="pt")
    latent_pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(latent_pipe.transformer, "_hf_hook") and hasattr(latent_pipe.vae, "_hf_hook")
    assert torch.equal(sample(latent_pipe, output_type="pt"), expected)
    latent_pipe.encode(torch.rand(1, 3, 8, 8))
    assert torch.equal(sample(latent_pipe, output_type="pt"), expected)


# Compiling


@pytest.fixture
def without_code_generation(fresh_compiler, monkeypatch):
    """Compiling without Inductor, and the arguments of each call."""
    compile, calls = torch.compile, []

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "mode"}
        return compile(*args, **kwargs, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", recorded)
    return calls


def test_one_call_compiles_sampling_and_classification(randomised_model, without_code_generation):
    flow = randomised_model(sample_size=8).float().requires_grad_(False)
    pipe = FlowBackPipeline(flow, id2label={0: "zero"})
    options = {"class_labels": [2, -1], "guidance_scale": 2.0, "output_type": "pt"}
    image, classify = PIL.Image.new("RGB", (8, 8), "red"), FlowBackClassificationPipeline.from_pipe(pipe)
    expected = pipe(**options, generator=torch.Generator().manual_seed(0)).images, classify(image, top_k=None)
    classify.compile()
    assert all(call == {"fullgraph": True} for call in without_code_generation)
    assert all(block.steps_are_compiled for block in flow.blocks)
    assert all(layer._compiled_call_impl is not None for block in flow.blocks for layer in block.layers)
    images = pipe(**options, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(images, expected[0], rtol=0, atol=1e-4)
    for actual, before in zip(classify(image, top_k=None), expected[1], strict=True):
        assert actual["score"] == pytest.approx(before["score"], abs=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA graphs fail where there is no GPU")
def test_where_cuda_graphs_fail_a_warning_says_so_once(randomised_model, without_code_generation, monkeypatch, caplog):
    pipe = FlowBackPipeline(randomised_model(sample_size=8).float())
    monkeypatch.setattr(FlowBackPipeline, "_execution_device", torch.device("cuda"))
    pipe.compile()
    modes = [call.get("mode") for call in without_code_generation]
    assert modes == ["reduce-overhead"] * (len(modes) // 2) + [None] * (len(modes) // 2)
    (warning,) = [record for record in caplog.records if "CUDA graphs" in record.message]
    assert "compiled without CUDA graphs, which failed: " in warning.message
