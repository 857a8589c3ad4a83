"""What version 0.1.0 saved still loads and resumes: a run of four steps, killed after its checkpoint at the second."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowback_hf import FlowBackPipeline
from flowback_hf.files import read_json_lines
from flowback_hf.training import check_run_folder, load_averaged_parameters

from ..conftest import REPOSITORY


SAVED = REPOSITORY / "tests" / "version_0_1_0"
COMMAND = """
    --train_data_dir images --teacher_model_name_or_path teacher --cache_dir cache --resolution 8 --patch_size 2
    --num_blocks 2 --num_layers 1 --num_attention_heads 1 --attention_head_dim 8 --projector_dim 8
    --projector_type mlp --no-normalize_teacher_features --train_batch_size 4 --max_train_steps 4 --lr_warmup_steps 1
    --learning_rate 1e-2 --logging_steps 1 --validation_steps 4 --checkpointing_steps 2 --random_flip --ema_decay 0.5
    --output_dir run --resume_from_checkpoint latest
"""


@pytest.fixture
def killed_run(images, tmp_path, monkeypatch):
    """The folder that the run was started in."""
    shutil.copytree(SAVED / "run", tmp_path / "run")
    shutil.copytree(SAVED / "teacher", tmp_path / "teacher")
    (tmp_path / "images").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_a_run_resumes_and_ends_as_it_would_have(train_rra, killed_run):
    earlier = read_json_lines(killed_run / "metrics.jsonl")
    train_rra.main(train_rra.parse_args(COMMAND.split()))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    expected, actual = load_file(SAVED / "finished" / weights), load_file(killed_run / weights)
    assert expected.keys() == actual.keys()
    before = load_file(killed_run / "checkpoint-2" / "model.safetensors")
    moved = 0.0
    for name, tensor in expected.items():
        is_compared = torch.ones_like(tensor, dtype=torch.bool)
        if name.endswith("to_qkv.bias"):
            # Softmax ignores the keys' biases, so their gradient is rounding, which Adam scales up: it depends on the
            # processor.
            is_compared[len(tensor) // 3 : 2 * len(tensor) // 3] = False
        torch.testing.assert_close(actual[name][is_compared], tensor[is_compared], rtol=0, atol=1e-6)
        moved = max(moved, (tensor - before[f"flow.{name}"]).abs().max())
    assert moved > 1e-3
    records = read_json_lines(killed_run / "metrics.jsonl")
    assert records[:3] == earlier[:3] and [record["step"] for record in records] == [0, 1, 2, 3, 4, 4]
    for record, old in zip(records, earlier):
        assert record.keys() == old.keys()
        assert record.get("loss") == pytest.approx(old.get("loss"), abs=1e-5)
    assert (killed_run / "checkpoint-4" / "ema.safetensors").exists()


@pytest.mark.parametrize(
    "options, difference",
    [
        ("--projector_type mlp", r"--projector_type \('mlp' then, 'conv' now\)"),
        ("--no-normalize_teacher_features", r"--normalize_teacher_features \(False then, True now\)"),
    ],
)
def test_a_resumed_run_keeps_its_alignment(train_rra, killed_run, options, difference):
    with pytest.raises(ValueError, match=f"holds a different run; it differs in {difference}"):
        train_rra.main(train_rra.parse_args(COMMAND.replace(options, "").split()))


@pytest.mark.parametrize("saved", [{}, {"projector_type": None, "normalize_teacher_features": None}])
def test_a_run_without_alignment_goes_on_whatever_the_projectors(saved, tmp_path):
    settings = {"train_batch_size": 2, "num_processes": 1, "gradient_accumulation_steps": 1, "total_batch_size": 2}
    settings |= {"sharding": None, "alignment": "none"}
    (tmp_path / "training_args.json").write_text(json.dumps(settings | saved))
    now = settings | {"projector_type": "conv", "normalize_teacher_features": True}
    assert check_run_folder(tmp_path, now, "latest") == now
    with pytest.raises(ValueError, match=r"it differs in --alignment \('none' then, 'detach' now\)"):
        check_run_folder(tmp_path, now | {"alignment": "detach"}, "latest")


def test_averaged_weights_are_read_without_running_code(killed_run):
    flow = FlowBackPipeline.from_pretrained(SAVED / "finished").transformer
    finished = [parameter.clone() for parameter in flow.parameters()]
    load_averaged_parameters(killed_run / "checkpoint-2", flow.parameters())
    assert max((new - old).abs().max() for new, old in zip(flow.parameters(), finished)) > 1e-3


class Code:
    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


def test_a_planted_pickle_does_not_run(train_rra, killed_run, tmp_path):
    file = killed_run / "checkpoint-2" / "custom_checkpoint_0.pkl"
    planted = pickle.dumps(Code())
    file.write_bytes(planted + b"." * (file.stat().st_size - len(planted)))  # as large as progress.json says
    with pytest.raises(ValueError, match="its custom_checkpoint_0.pkl holds more than numbers, and reading it could"):
        train_rra.main(train_rra.parse_args(COMMAND.split()))
    assert not (tmp_path / "it_ran").exists()
    pickle.loads(planted)
    assert (tmp_path / "it_ran").exists(), "it would have run"


def test_a_saved_pipeline_loads_and_samples():
    pipeline = FlowBackPipeline.from_pretrained(SAVED / "finished")
    saved = load_file(SAVED / "finished" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, saved[name])
    assert pipeline.labels == {"cat": 0, "dog": 1}
    assert pipeline(class_labels=["dog"]).images[0].size == (8, 8)
