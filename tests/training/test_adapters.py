"""Training an adapter instead of the flow, with `training/train_rra.py --lora_rank`."""

import re
import shutil
import subprocess

import peft
import pytest
import torch
from safetensors.torch import load_file

from flowback_hf import AlignedFlowObjective, FlowBackPipeline
from flowback_hf.data import ImageSource, Splits
from flowback_hf.files import read_json_lines
from flowback_hf.model_card import is_as_written
from flowback_hf.training import Trainer, TrainingArguments

from ..conftest import REPOSITORY, image_rows, start_two_processes


ADAPTER_FILE = "pytorch_lora_weights.safetensors"
SIZES = ("resolution", "patch_size", "num_blocks", "num_layers", "num_attention_heads", "attention_head_dim")


@pytest.fixture
def pretrained(randomised_model, tmp_path):
    """A saved flow of the two classes of the data, with a profile."""
    flow = randomised_model(sample_size=8, num_classes=2, num_layers=2).float()
    flow.profile_inverse(torch.zeros(1, 3, 8, 8))
    FlowBackPipeline(flow, id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def line(arguments, pretrained):
    """The command line of a run with an adapter, as a function of what differs."""
    options = {"pretrained_model_name_or_path": pretrained, "lora_rank": 2, **dict.fromkeys(SIZES)}
    return lambda **others: arguments(**(options | others))


def loaded_flow(pretrained, folder):
    """The pretrained flow with what a run left in its folder, as the card says."""
    pipeline = FlowBackPipeline.from_pretrained(pretrained)
    pipeline.load_lora_weights(folder)
    if (folder / "class_embed.safetensors").exists():
        pipeline.load_class_embeddings(folder)
    return pipeline


def test_a_run_trains_the_adapter_only_and_says_how_to_load_it(train_rra, line, pretrained, tmp_path):
    folder = tmp_path / "run"
    train_rra.main(train_rra.parse_args(line(output_dir=folder, validation_guidance_scale=2.0)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "checkpoint-2", "checkpoint-4", "loss_curve.png", "metrics.jsonl", ADAPTER_FILE, "samples",
        "training_args.json",
    ]  # fmt: skip
    metrics = read_json_lines(folder / "metrics.jsonl")
    assert metrics[-1]["validation_nll"] < metrics[0]["validation_nll"] and "alignment" in metrics[1]
    # Neither the flow nor its average is kept in checkpoints.
    checkpoint = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert {name.partition(".")[0] for name in checkpoint} == {"flow", "projectors"}
    assert all(".lora_" in name for name in checkpoint if name.startswith("flow."))
    adapter = load_file(folder / ADAPTER_FILE)
    assert len(load_file(folder / "checkpoint-4" / "ema.safetensors")) == len(adapter) == 3 * 2 * 4 * 2

    pipeline = loaded_flow(pretrained, folder)
    assert set(pipeline.transformer.peft_config["default_0"].target_modules) == {
        "to_qkv", "to_out.0", "ff.net.0.proj", "ff.net.2"
    }  # fmt: skip
    own = {name.replace(".base_layer", ""): each for name, each in pipeline.transformer.named_parameters()}
    for name, parameter in FlowBackPipeline.from_pretrained(pretrained).transformer.named_parameters():
        assert torch.equal(own[name], parameter), name
    card = (folder / "README.md").read_text()
    assert is_as_written(card) and 'pipe.load_lora_weights("path/to/run")' in card and "class_embed" not in card
    assert "| rank | 2 |" in card and "guidance_scale=2.0" in card and str(tmp_path) not in card


def test_class_tables_are_trained_and_saved_if_asked_and_know_new_classes(train_rra, line, randomised_model, tmp_path):
    flow = randomised_model(sample_size=8, num_classes=2).float()
    FlowBackPipeline(flow, id2label={0: "dog", 1: "wolf"}).save_pretrained(tmp_path / "other")
    options = {"pretrained_model_name_or_path": tmp_path / "other", "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"does not know the classes \['cat'\], .* add --lora_train_class_embed"):
        train_rra.main(train_rra.parse_args(line(**options)))
    assert not (tmp_path / "run").exists()
    train_rra.main(train_rra.parse_args(line(lora_train_class_embed=True, **options)))
    pipeline = loaded_flow(tmp_path / "other", tmp_path / "run")
    assert pipeline.labels == {"dog": 0, "wolf": 1, "cat": 2}
    assert (pipeline.transformer.blocks[0].class_embed[:2] - flow.blocks[0].class_embed).abs().min() > 0
    assert pipeline(class_labels=["cat"], output_type="pt").images.isfinite().all()
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'pipe.load_class_embeddings("path/to/run")' in card and "| class tables | trained |" in card


def test_a_resumed_run_ends_with_the_same_adapter_to_the_bit(train_rra, line, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {"lora_alpha": 4.0, "lora_train_class_embed": True, "lora_target_modules": ["to_qkv", "proj_out"]}
    train_rra.main(train_rra.parse_args(line(output_dir=whole, **options)))
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    for name in (ADAPTER_FILE, "class_embed.safetensors"):
        (resumed / name).unlink()
    train_rra.main(train_rra.parse_args(line(output_dir=resumed, resume_from_checkpoint="latest", **options)))
    for name in (
        ADAPTER_FILE,
        "class_embed.safetensors",
        "checkpoint-4/model.safetensors",
        "checkpoint-4/ema.safetensors",
    ):
        expected, actual = load_file(whole / name), load_file(resumed / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items()), name
    first, last = (load_file(whole / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    assert all(not torch.equal(first[key], tensor) for key, tensor in last.items())
    with pytest.raises(ValueError, match=r"it differs in --lora_rank \(2 then, 3 now\)"):
        other = line(output_dir=whole, resume_from_checkpoint="latest", **options | {"lora_rank": 3})
        train_rra.main(train_rra.parse_args(other))


def test_two_processes(line, pretrained, tmp_path):
    script = REPOSITORY / "training" / "train_rra.py"
    command = line(output_dir=tmp_path / "run", max_train_steps=2, validation_steps=2, lora_train_class_embed=True)
    process = start_two_processes(script, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    metrics = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["validation_nll"] < metrics[0]["validation_nll"]
    assert loaded_flow(pretrained, tmp_path / "run")(class_labels=["dog"]).images
    # The names in a checkpoint are those of one process, and the flow is left out.
    names = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    trained = [name for name in names if not name.startswith("projectors.")]
    assert all(name.startswith("flow.blocks.") and (".lora_" in name or "class_embed" in name) for name in trained)


@pytest.mark.parametrize(
    "options",
    [
        {"alignment": "none"},
        {"alignment_order": "exact"},
        {"alignment": "detach", "gradient_checkpointing": True, "mixed_precision": "bf16"},
    ],
    ids=["none", "exact", "checkpointing"],
)
def test_ways_to_train(train_rra, line, tmp_path, options):
    """Their gradients have tests of their own: here they pass through Accelerate."""
    train_rra.main(train_rra.parse_args(line(output_dir=tmp_path / "run", max_train_steps=2, **options)))
    adapter = load_file(tmp_path / "run" / ADAPTER_FILE)
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in adapter.values())


def test_a_trainer_of_python_trains_the_attached_adapter(randomised_model, tmp_path):
    flow = randomised_model(sample_size=8, num_classes=1).float()
    before = {name: parameter.clone() for name, parameter in flow.named_parameters()}
    flow.add_adapter(peft.LoraConfig(r=1, target_modules=["to_qkv"]), "style")
    source = ImageSource(Splits(image_rows(9), image_rows(3), ["cat"]), flow.config, label_ids=[0])
    arguments = TrainingArguments(str(tmp_path / "run"), train_batch_size=4, max_train_steps=1, lr_warmup_steps=0)
    pipeline = Trainer(AlignedFlowObjective(flow, "none"), source, arguments, id2label={0: "cat"}).fit()
    assert pipeline.get_list_adapters() == {"transformer": ["style"]} and (tmp_path / "run" / ADAPTER_FILE).exists()
    for name, parameter in flow.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
    flow.add_adapter(peft.LoraConfig(r=1, target_modules=["to_qkv"]), "second")
    with pytest.raises(ValueError, match=r"at most one adapter, .* but \['style', 'second'\] are attached"):
        Trainer(AlignedFlowObjective(flow, "none"), source, TrainingArguments(str(tmp_path / "other")))


def test_a_trained_flow_has_no_profile_of_other_weights(train_rra, arguments, pretrained, tmp_path):
    options = {"pretrained_model_name_or_path": pretrained, **dict.fromkeys(SIZES)}
    assert FlowBackPipeline.from_pretrained(pretrained).transformer.config.inverse_profile is not None
    train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "run", max_train_steps=1, **options)))
    assert FlowBackPipeline.from_pretrained(tmp_path / "run").transformer.config.inverse_profile is None


@pytest.mark.parametrize(
    "target, message",
    [
        (
            "to_q",
            r"must be among \['proj_in', 'attn.to_qkv', 'attn.to_out.0', .*'proj_out'\].* one is 'to_q'. Queries",
        ),
        ("norm1", ".* one is 'norm1'"),
    ],
)
def test_other_target_modules_are_refused(train_rra, line, tmp_path, target, message):
    with pytest.raises(ValueError, match=f"`--lora_target_modules` {message}"):
        command = line(output_dir=tmp_path / "run", lora_target_modules=["ff.net.2", target])
        train_rra.main(train_rra.parse_args(command))
    assert not (tmp_path / "run").exists()


def test_without_peft_the_error_names_the_extra(train_rra, line, tmp_path, monkeypatch):
    monkeypatch.setattr("flowback_hf.training.adapters.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"`--lora_rank` needs PEFT.*pip install 'flowback_hf\[lora\]'"):
        train_rra.main(train_rra.parse_args(line(output_dir=tmp_path / "run")))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_alpha": 4}, "--lora_alpha, --lora_target_modules and --lora_train_class_embed belong to --lora_rank"),
        ({"lora_rank": 4}, "--lora_rank needs a flow to start from: give --pretrained_model_name_or_path"),
        (
            {"lora_rank": 0, "pretrained_model_name_or_path": "x"},
            "argument --lora_rank: must be a whole number of at least 1, but is 0",
        ),
        (
            {"lora_rank": 4, "lora_alpha": -1, "pretrained_model_name_or_path": "x"},
            "argument --lora_alpha: must be a finite number above 0, but is -1.0",
        ),
        (
            {"lora_rank": 4, "push_to_hub": True, "pretrained_model_name_or_path": "x"},
            "--push_to_hub publishes a whole flow: leave it out with --lora_rank",
        ),
    ],
)
def test_the_parser_refuses(train_rra, arguments, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        train_rra.parse_args(arguments(output_dir=tmp_path, **options))
    assert re.search(message, capsys.readouterr().err)
