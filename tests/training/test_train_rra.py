import functools
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import datasets
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.files import read_json_lines
from flowback_hf.training import trainer
from flowback_hf.training.checkpoints import is_sane, read_progress
from flowback_hf.training.flow import add_classes

from ..conftest import REPOSITORY, start_two_processes, write_images
from ..drills.runs import assert_same_run, start, wait_until


LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
]
LAUNCH += ["--dynamo_backend", "no"]


def launch(arguments, **options):
    command = [*LAUNCH, "--num_processes", "1", str(REPOSITORY / "training" / "train_rra.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, *arguments], env=environment, start_new_session=True, **options)


def read_metrics(folder):
    return read_json_lines(folder / "metrics.jsonl")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def state_of(folder):
    """All weights of a run's last checkpoint and of its pipeline."""
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return state | {f"objective.{name}": tensor for name, tensor in load_file(last / "model.safetensors").items()}


# Runs


def test_a_launched_run_leaves_a_pipeline_metrics_and_pictures(arguments, tmp_path):
    output_dir = tmp_path / "run"
    process = launch(arguments(output_dir=output_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert names(output_dir) == [
        "checkpoint-2",
        "checkpoint-4",
        "loss_curve.png",
        "metrics.jsonl",
        "model_index.json",
        "samples",
        "training_args.json",
        "transformer",
    ]
    assert names(output_dir / "samples") == ["step-0000000.png", "step-0000004.png"]
    # two classes of four images, enlarged
    assert PIL.Image.open(output_dir / "samples" / "step-0000004.png").size == (4 * 64, 2 * 64)
    assert "Training" in output and "loss=" in output  # the progress bar

    metrics = read_metrics(output_dir)
    assert [record["step"] for record in metrics] == [0, 1, 2, 3, 4, 4]
    assert set(metrics[1]) == {
        "step", "epoch", "loss", "nll", "alignment", "cosine_similarity/block1_layer2",
        "cosine_similarity/block2_layer2", "neumann_growth/block1", "neumann_growth/block2", "max_log_scale",
        "gradient_norm", "learning_rate", "images_per_second", "images_skipped",
    }  # fmt: skip
    assert metrics[1]["loss"] == pytest.approx(metrics[1]["nll"] + 0.1 * metrics[1]["alignment"], abs=1e-6)
    assert metrics[-1]["validation_nll"] < metrics[0]["validation_nll"]

    pipeline = FlowBackPipeline.from_pretrained(output_dir)
    assert pipeline.get_label_ids(["cat", "dog"]) == [0, 1]
    assert pipeline(class_labels=["dog"]).images[0].size == (8, 8)
    # the teacher is no part of a checkpoint
    checkpoint = load_file(output_dir / "checkpoint-4" / "model.safetensors")
    assert {name.split(".")[0] for name in checkpoint} == {"flow", "projectors"}
    # the pipeline has the averaged weights, not the last ones
    last = checkpoint["flow.blocks.0.proj_in.weight"]
    averaged = pipeline.transformer.blocks[0].proj_in.weight
    assert 0 < (last - averaged).abs().max() < 0.1


def test_a_killed_run_goes_on_exactly(arguments, tmp_path):
    # 5 batches an epoch, 2 batches a step: checkpoint-5 is in the middle of the third epoch
    options = {"max_train_steps": 16, "gradient_accumulation_steps": 2, "random_flip": True, "validation_steps": 3}
    options |= {"checkpointing_steps": 5}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(tmp_path / "log-whole", arguments(output_dir=whole, **options))
    process = start(tmp_path / "log-killed", arguments(output_dir=killed, **options))
    wait_until(lambda: (killed / "checkpoint-5").exists(), process)
    process.kill()
    assert not (killed / "model_index.json").exists(), "the run ended before it was killed"

    line = arguments(output_dir=killed, resume_from_checkpoint="latest", **options)
    process = start(tmp_path / "log-resumed", line)
    assert process.wait() == 0, process.log
    assert reference.wait() == 0, reference.log
    assert_same_run(killed, whole)


def test_two_processes(arguments, tmp_path):
    output_dir = tmp_path / "run"
    script = REPOSITORY / "training" / "train_rra.py"
    process = start_two_processes(
        script, arguments(output_dir=output_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    metrics = read_metrics(output_dir)
    assert [record["step"] for record in metrics] == [0, 1, 2, 3, 4, 4]
    # 20 images, 4 for each of two processes: an epoch has two steps, where one process alone would make five
    assert [record["epoch"] for record in metrics[1:5]] == [0, 0, 1, 1]
    assert metrics[-1]["validation_nll"] < metrics[0]["validation_nll"]
    assert FlowBackPipeline.from_pretrained(output_dir)(class_labels=[0]).images


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"alignment": "none"}, {"loss", "nll"}),
        ({"alignment": "forward"}, {"alignment"}),
        ({"alignment": "detach"}, {"alignment"}),
        ({"alignment_order": "exact"}, {"alignment", "neumann_growth/block1"}),
        ({"position_embedding": "rope", "activation_fn": "swiglu", "alignment_order": 1}, {"neumann_growth/block1"}),
        ({"alignment_blocks": [1], "alignment_layer": 1}, {"cosine_similarity/block1_layer1"}),
        ({"scale_lr": True, "learning_rate": 1e-3, "lr_scheduler": "constant"}, {"loss"}),
        ({"unconditional": True, "label_column": "nothing", "validation_guidance_scale": 2.0}, {"alignment"}),
        ({"in_channels": 1, "num_layers": [1, 2], "use_ema": True}, {"alignment"}),
    ],
)
def test_options(train_rra, arguments, tmp_path, options, expected):
    train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "run", max_train_steps=3, **options)))
    metrics = read_metrics(tmp_path / "run")
    assert expected <= set(metrics[1])
    assert ("alignment" in metrics[1]) == (options.get("alignment") != "none")
    # in the third step: the blocks of an untrained flow have no Jacobian, and the first step only warms up
    growths = [metrics[3][name] for name in metrics[3] if name.startswith("neumann_growth")]
    assert bool(growths) == ("alignment" not in options)
    assert all((growth != 1) == ("alignment_order" in options) for growth in growths)
    pipeline = FlowBackPipeline.from_pretrained(tmp_path / "run")
    assert len(pipeline(num_images_per_prompt=2).images) == 2 and pipeline.config.guidance_scale == 1.0
    config = pipeline.transformer.config
    assert config.num_classes == (None if "unconditional" in options else 2)
    defaults = {"in_channels": 3, "num_layers": 2, "position_embedding": "learned", "activation_fn": "gelu"}
    for name, default in defaults.items():
        assert config[name] == options.get(name, default)
    if options.get("scale_lr"):
        assert metrics[1]["learning_rate"] == pytest.approx(1e-3 * 4)


def test_checkpointing_and_half_precision_reach_the_flow(train_rra, arguments, tmp_path, monkeypatch):
    def second_loss(name, **options):  # at the first step the flow is the identity
        AcceleratorState._reset_state(reset_partial_state=True)
        line = arguments(output_dir=tmp_path / name, max_train_steps=2, **options)
        train_rra.main(train_rra.parse_args(line))
        return read_metrics(tmp_path / name)[2]["loss"]

    checkpointed, enable = [], TarFlowTransformer2DModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        TarFlowTransformer2DModel,
        "enable_gradient_checkpointing",
        lambda flow, *arguments: checkpointed.append(flow) or enable(flow, *arguments),
    )
    plain = second_loss("plain")
    assert not checkpointed
    assert second_loss("checkpointed", gradient_checkpointing=True) == plain and len(checkpointed) == 1
    halved = second_loss("halved", mixed_precision="bf16")
    assert 1e-6 < abs(halved - plain) < 0.01


def test_projector_and_normalization_change_the_alignment_and_are_saved(train_rra, arguments, tmp_path):
    options = {"plain": {}, "mlp": {"projector_type": "mlp"}, "raw": {"normalize_teacher_features": False}}
    alignments, projectors = {}, {}
    for name, own in options.items():
        line = arguments(output_dir=tmp_path / name, max_train_steps=2, **own)
        train_rra.main(train_rra.parse_args(line))
        alignments[name] = read_metrics(tmp_path / name)[1]["alignment"]
        state = load_file(tmp_path / name / "checkpoint-2" / "model.safetensors")
        projectors[name] = {
            key: tuple(state[key].shape) for key in state if key.startswith("projectors.block2_layer2")
        }
        settings = json.loads((tmp_path / name / "training_args.json").read_text())
        assert ({"projector_type": "conv", "normalize_teacher_features": True} | own).items() <= settings.items()
        line = arguments(output_dir=tmp_path / name, resume_from_checkpoint="latest", **options["plain"])
        if own:
            with pytest.raises(ValueError, match=f"it differs in --{next(iter(own))}"):
                train_rra.main(train_rra.parse_args(line))
    assert len(set(alignments.values())) == 3
    assert projectors["raw"] == projectors["plain"] and len(projectors["mlp"]) == 6
    # a flow of width 8 and a teacher of dimension 16
    assert projectors["plain"]["projectors.block2_layer2.conv.weight"] == (16, 8, 3, 3)


def test_uniform_noise_trains_a_density_model_and_logs_bits(train_rra, arguments, tmp_path):
    line = arguments(output_dir=tmp_path / "run", noise_type="uniform", max_train_steps=2)
    train_rra.main(train_rra.parse_args(line))
    first = read_metrics(tmp_path / "run")[0]
    nats = first["validation_nll"]
    assert first["validation_bits_per_dim"] == pytest.approx((nats + math.log(128)) / math.log(2))
    # The images are uniform noise, of which an untrained flow has 8.566 bits: half their second moment, 1/6 nat, the
    # constant and log 128.
    assert first["validation_bits_per_dim"] == pytest.approx(8.566, abs=0.03)


def test_no_ema_saves_the_last_weights(train_rra, arguments, tmp_path):
    line = arguments(output_dir=tmp_path / "run", max_train_steps=2) + ["--no-use_ema"]
    train_rra.main(train_rra.parse_args(line))
    state = state_of(tmp_path / "run")
    assert torch.equal(state["blocks.0.proj_in.weight"], state["objective.flow.blocks.0.proj_in.weight"])


def test_old_checkpoints_are_deleted_once_a_new_one_is_safe(train_rra, arguments, tmp_path):
    output_dir = tmp_path / "run"
    (output_dir / "checkpoint-best").mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds another model"):
        train_rra.main(train_rra.parse_args(arguments(output_dir=output_dir)))
    (output_dir / "checkpoint-best").rmdir()
    line = arguments(output_dir=output_dir, checkpointing_steps=1, checkpoints_total_limit=2)
    train_rra.main(train_rra.parse_args(line))
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


# Inductor takes half a minute without a cache.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.drill)])
def test_a_compiled_run_learns_what_a_plain_one_does(
    train_rra, arguments, tmp_path, caplog, monkeypatch, fresh_compiler, backend
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for name, options in {"plain": {}, "compiled": {"torch_compile": True}}.items():
        assert not torch._dynamo.utils.counters["frames"]
        with torch._functorch.config.patch(donated_buffer=True), caplog.at_level("INFO"):
            train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / name, **options)))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert re.search(r"A step takes .* s with every layer compiled and .* without those of the flow", caplog.text)
    losses = [[record["loss"] for record in read_metrics(tmp_path / name)[1:5]] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[0][3] != losses[0][0]


# Data and models


def test_a_parquet_file_without_a_validation_split(train_rra, arguments, tmp_path):
    rows = {"picture": [], "kind": []}
    for number in range(12):
        rows["picture"].append(PIL.Image.new("RGB", (9, 12), (20 * number, 10, 90)))
        rows["kind"].append("bird" if number % 3 else "ant")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    line = arguments(
        train_data_dir=None,
        dataset_name=tmp_path / "rows.parquet",
        image_column="picture",
        label_column="kind",
        train_val_split=0.25,
        output_dir=tmp_path / "run",
    )
    train_rra.main(train_rra.parse_args(line))
    assert FlowBackPipeline.from_pretrained(tmp_path / "run").labels == {"ant": 0, "bird": 1}


def test_odd_images_are_converted_and_broken_ones_skipped(train_rra, arguments, tmp_path, caplog):
    folder = tmp_path / "odd"
    for name in ("cat", "dog"):
        write_images(folder / "train" / name, 4, seed=1)
    PIL.Image.new("L", (20, 9), 200).save(folder / "train" / "cat" / "grey.png")
    PIL.Image.new("CMYK", (8, 8), (10, 20, 30, 40)).save(folder / "train" / "cat" / "cmyk.jpg")
    PIL.Image.new("RGBA", (8, 8), (10, 20, 30, 40)).save(folder / "train" / "dog" / "alpha.png")
    PIL.Image.new("P", (8, 8)).save(folder / "train" / "dog" / "palette.png")
    whole = (folder / "train" / "cat" / "0.png").read_bytes()
    (folder / "train" / "dog" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "dog" / "text.png").write_text("not an image")
    line = arguments(train_data_dir=folder, train_val_split=0.1, output_dir=tmp_path / "run", max_train_steps=8)
    with caplog.at_level("WARNING"):
        train_rra.main(train_rra.parse_args(line))
    for name in ("truncated.png", "text.png"):
        assert caplog.text.count(f"{name} ") == 1
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-2]["images_skipped"] >= 4  # two files in each of the two to three epochs


def test_fine_tuning_keeps_known_classes_and_starts_new_ones_at_the_mean(
    train_rra, arguments, randomised_model, tmp_path
):
    flow = randomised_model(sample_size=8, num_classes=2, noise_std=0.2).float()
    pretrained = FlowBackPipeline(flow, id2label={0: "dog", 1: "wolf"}, guidance_scale=2.5, guidance_rule="product")
    pretrained.save_pretrained(tmp_path / "pretrained")
    sizes = ("resolution", "patch_size", "num_blocks", "num_layers", "num_attention_heads", "attention_head_dim")
    line = arguments(
        pretrained_model_name_or_path=tmp_path / "pretrained",
        output_dir=tmp_path / "run",
        learning_rate=0.0,
        adam_weight_decay=0.0,
        **dict.fromkeys(sizes),
    )
    train_rra.main(train_rra.parse_args(line))
    pipeline = FlowBackPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.labels == {"dog": 0, "wolf": 1, "cat": 2} and pipeline.transformer.config.noise_std == 0.2
    assert (pipeline.config.guidance_scale, pipeline.config.guidance_rule) == (2.5, "product")
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, -1])
    torch.testing.assert_close(pipeline.transformer(sample, labels).sample, flow(sample, labels).sample)
    for block, old in zip(pipeline.transformer.blocks, flow.blocks):
        torch.testing.assert_close(block.class_embed[2], old.class_embed.mean(dim=0))


@pytest.mark.parametrize(
    ("id2label", "label_ids", "names"),
    [
        ({0: "cat, house cat", 1: "dog"}, [0, 3], {0: "cat, house cat", 1: "dog", 3: "cow"}),  # class 2 has no name
        ({0: "cow", 1: "cat", 2: "cow"}, None, None),
        (None, [3, 4], {0: "0", 1: "1", 2: "2", 3: "cat", 4: "cow"}),
    ],
)
def test_new_classes_are_numbered_after_all_that_the_flow_has(randomised_model, id2label, label_ids, names):
    pipeline = FlowBackPipeline(randomised_model(num_classes=3), id2label=id2label)
    if label_ids is None:
        with pytest.raises(
            ValueError, match=r"'cow' cannot be told apart: it may be any of the flow's classes \[0, 2\]"
        ):
            add_classes(pipeline, ["cat", "cow"])
        return
    labelled = add_classes(pipeline, ["cat", "cow"])
    assert (labelled.label_ids, labelled.id2label) == (label_ids, names)
    assert labelled.flow.config.num_classes == max(label_ids) + 1


def test_a_model_config_file(train_rra, arguments, tmp_path):
    config = {"sample_size": 8, "patch_size": 4, "num_blocks": 1, "num_layers": 1, "num_attention_heads": 1,
              "attention_head_dim": 8}  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(config))
    sizes = ("resolution", "patch_size", "num_blocks", "num_layers", "num_attention_heads", "attention_head_dim")
    line = arguments(model_config=tmp_path / "model.json", output_dir=tmp_path / "run", **dict.fromkeys(sizes))
    train_rra.main(train_rra.parse_args(line))
    saved = FlowBackPipeline.from_pretrained(tmp_path / "run").transformer.config
    assert {name: saved[name] for name in config} == config and saved.num_classes == 2


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column": "photo"}, r"`--image_column` must be a column .*'image', 'label'.* but is 'photo'"),
        ({"label_column": "class"}, r"`--label_column` must be a column .*'image', 'label'.* but is 'class'"),
        ({"train_data_dir": "nowhere"}, "`--train_data_dir` must be an existing folder, but is 'nowhere'"),
        ({"model_config": "nowhere.json"}, "`--model_config` must be an existing JSON file, but is 'nowhere.json'"),
        (
            {"teacher_model_name_or_path": "./nowhere"},
            "`--teacher_model_name_or_path` cannot be loaded. The teacher './nowhere' is not an",
        ),
        ({"alignment_blocks": [3]}, "`places` names flow block 3"),
        ({"alignment_layer": 5}, "`places` names layer 5 of flow block 1"),
        ({"alignment": "detach", "alignment_order": 1}, "`order` is for the strategy 'reverse' only"),
        ({"patch_size": 3}, "`sample_size` must be divisible by `patch_size`, but they are 8 and 3"),
        ({"num_layers": [1, 2, 3]}, "`num_layers` must be one number, or a list of one for each of the 2"),
        (
            {"train_batch_size": 64},
            "`--train_batch_size` 64 on 1 process with .* needs 64 images a step, but .* has 20",
        ),
        ({"validation_class_labels": ["horse"]}, "'horse' is not one. The nearest known ones are"),
        ({"validation_class_labels": [7]}, "`class_labels` must lie between 0 and 1"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "`--resume_from_checkpoint` must be latest or one of"),
    ],
)
def test_bad_arguments_raise_and_leave_nothing(train_rra, arguments, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "run", **options)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, installed, error, message",
    [
        ("tensorboard", [], ImportError, r'tensorboard needs a package .*: pip install "flowback_hf\[tensorboard\]"'),
        ("wandb", ["tensorboard"], ImportError, r'wandb needs a package .*: pip install "flowback_hf\[wandb\]"'),
        (
            "comet_ml",
            ["tensorboard"],
            ImportError,
            r"comet_ml needs a package .*: pip install comet_ml\. Or leave it out",
        ),
        ("all", [], ImportError, r'all needs a package .*: pip install "flowback_hf\[tensorboard\]"'),
        ("tensorbored", ["tensorboard"], ValueError, "must be one of .*, tensorboard, .* but is 'tensorbored'"),
    ],
)
def test_a_tracker_that_cannot_log_is_an_error_before_any_work(
    train_rra, arguments, tmp_path, monkeypatch, name, installed, error, message
):
    monkeypatch.setattr(trainer, "get_available_trackers", lambda: installed)
    with pytest.raises(error, match=f"`--report_to` {message}"):
        train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "run", report_to=name)))
    assert not (tmp_path / "run").exists()


def test_trackers_with_an_extra_are_in_setup():
    setup = (REPOSITORY / "setup.py").read_text()
    assert all(f'"{name}": ["{name}>=' in setup for name in trainer.TRACKER_EXTRAS)


@pytest.mark.parametrize(
    "line, message",
    [
        (["--output_dir", "x"], "give one of --dataset_name, --train_data_dir and --latents"),
        (
            ["--output_dir", "x", "--train_data_dir", "y", "--train_batch_size", "0"],
            "argument --train_batch_size: must",
        ),
        (
            ["--output_dir", "x", "--train_data_dir", "y", "--label_dropout", "2"],
            "argument --label_dropout: must be a finite number of at least 0 and at most 1, but is 2.0",
        ),
        (["--output_dir", "x", "--train_data_dir", "y", "--alignment", "up"], "invalid choice: 'up'"),
        (["--output_dir", "x", "--train_data_dir", "y", "--alignment_order", "all"], "--alignment_order"),
    ],
)
def test_the_parser_refuses(train_rra, capsys, line, message):
    with pytest.raises(SystemExit):
        train_rra.parse_args(line)
    assert re.search(message, capsys.readouterr().err)


def test_an_empty_parquet_file_raises(train_rra, arguments, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [], "label": []},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}),
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    line = arguments(train_data_dir=None, dataset_name=tmp_path / "rows.parquet", output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="`--dataset_name` '.*rows.parquet' holds no images that can be loaded"):
        train_rra.main(train_rra.parse_args(line))
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_raises(train_rra, arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`--train_data_dir` '.*empty' holds no images that can be loaded"):
        line = arguments(train_data_dir=tmp_path / "empty", output_dir=tmp_path / "run")
        train_rra.main(train_rra.parse_args(line))
    assert not (tmp_path / "run").exists()


def test_an_output_folder_of_another_run_is_refused(train_rra, arguments, tmp_path):
    output_dir = tmp_path / "run"
    train_rra.main(train_rra.parse_args(arguments(output_dir=output_dir, max_train_steps=2)))
    before = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*")}
    with pytest.raises(ValueError, match="already holds a run: add --resume_from_checkpoint latest"):
        train_rra.main(train_rra.parse_args(arguments(output_dir=output_dir, max_train_steps=2)))
    line = arguments(output_dir=output_dir, resume_from_checkpoint="latest", label_dropout=0.2, alignment="none")
    with pytest.raises(ValueError, match=r"--alignment \('reverse' then, 'none' now\), --label_dropout \(0.1 then"):
        train_rra.main(train_rra.parse_args(line))
    assert {path: path.stat().st_mtime_ns for path in output_dir.rglob("*")} == before


@pytest.mark.parametrize(
    "damage, reason",
    [
        ("truncated", r"model.safetensors has \d+ bytes instead of \d+"),
        ("missing", "model.safetensors is missing"),
        ("no progress", "there is no progress.json"),
    ],
)
def test_a_broken_checkpoint_falls_back_to_the_one_before(train_rra, arguments, tmp_path, caplog, damage, reason):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    for folder in (whole, damaged):
        train_rra.main(train_rra.parse_args(arguments(output_dir=folder)))
    weights = damaged / "checkpoint-4" / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    else:
        (damaged / "checkpoint-4" / "progress.json").unlink()
    with caplog.at_level("WARNING"):
        line = arguments(output_dir=damaged, resume_from_checkpoint="latest")
        train_rra.main(train_rra.parse_args(line))
    assert re.search(rf"checkpoint-4 is not used, because {reason}: falling back to the checkpoint", caplog.text)
    expected, actual = state_of(whole), state_of(damaged)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_resuming_without_a_checkpoint_says_so(train_rra, arguments, tmp_path, caplog):
    line = arguments(output_dir=tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=2)
    with caplog.at_level("WARNING"):
        train_rra.main(train_rra.parse_args(line))
    assert "There is no checkpoint to resume from" in caplog.text
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 1, 2, 2]


DIVERGING = {"learning_rate": 1e30, "max_grad_norm": 1e30, "lr_scheduler": "constant", "lr_warmup_steps": 0}


def test_ruined_weights_are_not_saved(train_rra, arguments, tmp_path):
    output_dir = tmp_path / "run"
    line = arguments(output_dir=output_dir, checkpointing_steps=1, validation_steps=100, **DIVERGING)
    with pytest.raises(FloatingPointError, match=r"Step 1 ruined the weights: their nll is (nan|inf).*start again"):
        train_rra.main(train_rra.parse_args(line))
    assert not list(output_dir.glob("checkpoint-*")) and not (output_dir / "model_index.json").exists()


@pytest.mark.parametrize("validation_steps", [1, 100])
def test_a_run_that_diverged_goes_on_as_another_branch(train_rra, arguments, tmp_path, caplog, validation_steps):
    """Two good steps, then a learning rate that ruins all."""
    output_dir = tmp_path / "run"
    options = {"output_dir": output_dir, "checkpointing_steps": 1, "lr_scheduler": "constant", "max_grad_norm": 1e30}
    options |= {"validation_steps": validation_steps, "resume_from_checkpoint": "latest"}
    train_rra.main(train_rra.parse_args(arguments(max_train_steps=2, **options)))
    with pytest.raises(FloatingPointError) as error:
        train_rra.main(train_rra.parse_args(arguments(learning_rate=1e30, max_train_steps=5, **options)))
    advice = r"good weights is .*checkpoint-2: go on from it with --resume_from_checkpoint checkpoint-2 and a lower"
    assert re.search(advice, str(error.value))
    options["resume_from_checkpoint"] = "checkpoint-2"
    with caplog.at_level("WARNING"):
        train_rra.main(train_rra.parse_args(arguments(learning_rate=1e-3, max_train_steps=5, **options)))
    assert "A new branch of the run starts at step 2: learning_rate (0.01 then, 0.001 now)." in caplog.text
    settings = json.loads((output_dir / "training_args.json").read_text())
    assert settings["learning_rate"] == 1e-3
    assert settings["branches"] == [{"from_step": 2, "changes": ["learning_rate (0.01 then, 0.001 now)"]}]
    metrics = read_metrics(output_dir)
    assert [record["learning_rate"] for record in metrics if "loss" in record] == [1e-2] * 2 + [1e-3] * 3
    assert json.loads((output_dir / "checkpoint-5" / "training_args.json").read_text()) == settings


def test_weights_that_are_finite_but_ruined_are_not_called_good(train_rra, arguments, tmp_path):
    """A first step that makes the weights bad, but finite."""
    output_dir = tmp_path / "run"
    line = arguments(output_dir=output_dir, checkpointing_steps=1, checkpoints_total_limit=1, validation_steps=100,
                     lr_scheduler="constant", lr_warmup_steps=0, learning_rate=0.2, max_train_steps=1)  # fmt: skip
    train_rra.main(train_rra.parse_args(line))
    progress = read_progress(output_dir / "checkpoint-1")
    assert progress["figures"]["nll"] > progress["figures"]["lowest_nll"] + 1 and not is_sane(progress)


def test_an_earlier_branch_is_set_aside(train_rra, arguments, tmp_path, caplog):
    output_dir = tmp_path / "run"
    train_rra.main(train_rra.parse_args(arguments(output_dir=output_dir)))
    options = {"resume_from_checkpoint": "checkpoint-2", "learning_rate": 1e-3, "checkpointing_steps": 3}
    with caplog.at_level("WARNING"):
        train_rra.main(train_rra.parse_args(arguments(output_dir=output_dir, **options)))
    assert "checkpoint-4 comes after the step that the run goes on from: it is now" in caplog.text
    folders = sorted(path.name for path in output_dir.glob("*checkpoint-*"))
    assert folders == ["abandoned-checkpoint-4", "checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_run_that_goes_back_counts_its_checkpoints_from_there(train_rra, arguments, tmp_path):
    output_dir = tmp_path / "run"
    options = {"output_dir": output_dir, "checkpointing_steps": 1}
    train_rra.main(train_rra.parse_args(arguments(max_train_steps=4, **options)))
    options |= {"resume_from_checkpoint": "checkpoint-1", "checkpoints_total_limit": 2}
    train_rra.main(train_rra.parse_args(arguments(max_train_steps=3, **options)))
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_the_speed_is_that_of_training(train_rra, arguments, tmp_path, monkeypatch):
    """By a clock on which a step takes 1 second, and validations and checkpoints 100."""
    now = [0.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for name, seconds in {"_train_on": 1.0, "_evaluate": 100.0, "_save_checkpoint": 100.0}.items():

        def take(self, *arguments, method=getattr(trainer.Trainer, name), seconds=seconds):
            now[0] += seconds
            return method(self, *arguments)

        monkeypatch.setattr(trainer.Trainer, name, take)
    options = {"train_batch_size": 4, "validation_steps": 1, "checkpointing_steps": 2}
    train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "run", **options)))
    speeds = [record["images_per_second"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert speeds == [4.0] * 4


def test_a_resumed_run_records_what_was_changed(train_rra, arguments, tmp_path):
    output_dir = tmp_path / "run"
    train_rra.main(train_rra.parse_args(arguments(output_dir=output_dir)))
    options = {"resume_from_checkpoint": "latest", "max_train_steps": 5, "max_validation_samples": 3}
    options |= {"validation_guidance_scale": 3.0, "validation_class_labels": "1"}
    train_rra.main(train_rra.parse_args(arguments(output_dir=output_dir, **options)))
    settings = json.loads((output_dir / "training_args.json").read_text())
    assert {name: settings[name] for name in options} == options | {"validation_class_labels": [1]}


def test_an_order_that_is_none_is_said(train_rra, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_rra.parse_args(arguments(output_dir=tmp_path, alignment_order="exactly"))
    assert "--alignment_order: must be 0, 1, 2, ... or exact, but is 'exactly'" in capsys.readouterr().err
