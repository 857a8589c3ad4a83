"""Adapters as a diffusers user loads and saves them, on both pipelines."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.pipelines import pipeline_flowback


ID2LABEL = {0: "ant", 1: "bee, wasp", 2: "cat"}
LABELS = torch.tensor([1, -1])


@pytest.fixture
def make_pipeline(randomised_model):
    """A function of the class: a pipeline in float32, the same every time."""

    def make(pipeline_class=FlowBackPipeline, **config):
        return pipeline_class(randomised_model(**{"num_classes": 3, **config}).float(), id2label=ID2LABEL)

    return make


@pytest.fixture
def sample():
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def trained(make_pipeline):
    """A pipeline with an adapter attached, whose scale, alpha / rank, is 3."""
    pipeline = make_pipeline()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_qkv", "ff.net.2"], init_lora_weights=False)
    pipeline.transformer.add_adapter(config)
    return pipeline


@pytest.fixture
def folder(trained, tmp_path):
    """The adapter's folder, written as diffusers' training scripts write it."""
    flow = trained.transformer
    trained.save_lora_weights(
        tmp_path / "adapter",
        transformer_lora_layers=peft.get_peft_model_state_dict(flow),
        transformer_lora_adapter_metadata=flow.peft_config["default"].to_dict(),
    )
    return tmp_path / "adapter"


def test_a_saved_adapter_gives_the_same_images(make_pipeline, trained, folder):
    assert [path.name for path in folder.iterdir()] == ["pytorch_lora_weights.safetensors"]
    call = {"class_labels": ["bee", -1], "guidance_scale": 1.5, "output_type": "pt"}
    expected = trained(generator=torch.Generator().manual_seed(3), **call).images
    pipeline = make_pipeline()

    def images():
        return pipeline(generator=torch.Generator().manual_seed(3), **call).images

    plain = images()
    pipeline.load_lora_weights(folder, adapter_name="style")
    assert pipeline.get_list_adapters() == {"transformer": ["style"]}
    assert torch.equal(images(), expected) and not torch.equal(expected, plain)
    pipeline.disable_lora()
    assert torch.equal(images(), plain)
    pipeline.enable_lora()
    pipeline.set_adapters("style", 0.5)
    half = images()
    assert not torch.equal(half, plain) and not torch.equal(half, expected)
    pipeline.set_adapters("style")
    pipeline.fuse_lora()
    assert pipeline.fused_loras == {"style"}
    torch.testing.assert_close(images(), expected, rtol=0, atol=1e-5)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert pipeline.get_list_adapters() == {}
    torch.testing.assert_close(images(), plain, rtol=0, atol=1e-5)


def test_the_classifier_takes_adapters_too(make_pipeline, trained, folder, sample):
    classifier = make_pipeline(FlowBackClassificationPipeline)
    classifier.load_lora_weights(folder / "pytorch_lora_weights.safetensors")
    expected = FlowBackClassificationPipeline.from_pipe(trained)
    for method in ("bayes", "gradient"):
        scores = classifier.class_scores(sample, method=method)
        assert torch.equal(scores, expected.class_scores(sample, method=method))
        classifier.disable_lora()
        assert not torch.equal(classifier.class_scores(sample, method=method), scores)
        classifier.enable_lora()


def test_a_repository_that_brings_its_code_takes_adapters(trained, folder, tmp_path, make_pipeline, sample):
    from diffusers import DiffusionPipeline

    from flowback_hf.hub import write_repository

    write_repository(make_pipeline(), tmp_path / "repository", "flow")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "repository", trust_remote_code=True)
    assert type(pipeline).__module__.startswith("diffusers_modules")
    pipeline.load_lora_weights(folder, adapter_name="style")
    pipeline.set_adapters("style", 1.0)
    assert torch.equal(pipeline.transformer(sample, LABELS).sample, trained.transformer(sample, LABELS).sample)


def test_class_tables_travel_with_their_names(make_pipeline, randomised_model, sample, tmp_path):
    pipeline = make_pipeline(num_classes=4, seed=5)
    pipeline.register_to_config(id2label=ID2LABEL | {3: "dog"})
    pipeline.save_class_embeddings(tmp_path)
    loaded = make_pipeline()
    loaded.load_class_embeddings(tmp_path)
    assert loaded.labels == {"ant": 0, "bee": 1, "wasp": 1, "cat": 2, "dog": 3}
    assert loaded.transformer.config.num_classes == 4
    for block, expected in zip(loaded.transformer.blocks, pipeline.transformer.blocks, strict=True):
        assert torch.equal(block.class_embed, expected.class_embed)
    image = loaded(class_labels=["dog"], output_type="pt").images
    loaded.save_pretrained(tmp_path / "flow")
    assert FlowBackPipeline.from_pretrained(tmp_path / "flow").labels["dog"] == 3 and image.shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"must hold class tables for this flow, of widths \[8\], but .* \[8, 8, 8\]"):
        make_pipeline(num_blocks=1).load_class_embeddings(tmp_path)
    tables = load_file(tmp_path / "class_embed.safetensors")
    save_file(tables, tmp_path / "class_embed.safetensors")  # without names
    loaded.load_class_embeddings(tmp_path)
    assert loaded.config.id2label is None and loaded.transformer.config.num_classes == 4
    tables[min(tables)] = tables[min(tables)][:2].clone()
    save_file(tables, tmp_path / "class_embed.safetensors")
    with pytest.raises(ValueError, match=r"must hold class tables of as many classes each, but those of .* \[2, 4\]"):
        loaded.load_class_embeddings(tmp_path)
    with pytest.raises(ValueError, match="Class tables need a flow with classes, but this one is unconditional"):
        make_pipeline(num_classes=None).save_class_embeddings(tmp_path)


NOT_AN_ADAPTER = "`pretrained_model_name_or_path_or_dict` must be a folder, a file or a repository on the Hub that"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_attention_heads": 4}, r"an adapter of this flow, .*'transformer.blocks.0.*' of shape \(2, 8\) fits no"),
        ({"num_blocks": 2}, "an adapter of this flow, .*'transformer.blocks.2.*fits no layer here"),
    ],
)
def test_an_adapter_of_another_flow_is_refused_before_anything_is_attached(make_pipeline, folder, config, message):
    pipeline = make_pipeline(**config)
    names = [name for name, _ in pipeline.transformer.named_modules()]
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(folder)
    assert [name for name, _ in pipeline.transformer.named_modules()] == names


def test_other_files_are_refused_in_a_sentence(make_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipeline = make_pipeline()
    for source in (tmp_path, tmp_path / "nowhere", "nobody/nothing"):
        with pytest.raises(OSError, match=f"{NOT_AN_ADAPTER} holds an adapter's safetensors, but '{source}'"):
            pipeline.load_lora_weights(source)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=f"{NOT_AN_ADAPTER}.* cannot be read: "):
        pipeline.load_lora_weights(tmp_path)
    for name in ("unet.down.lora_A.weight", "transformer.blocks.0.proj_in.weight"):
        save_file({name: torch.zeros(1, 1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=f"must hold a LoRA adapter of a flow.* holds '{name}'"):
            pipeline.load_lora_weights(tmp_path / "other.safetensors")
    assert pipeline.transformer.attached_adapters == []


def test_without_peft_the_error_names_the_extra(make_pipeline, folder, monkeypatch):
    monkeypatch.setattr(pipeline_flowback, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"`load_lora_weights` needs PEFT.*pip install 'flowback_hf\[lora\]'"):
        make_pipeline().load_lora_weights(folder)
