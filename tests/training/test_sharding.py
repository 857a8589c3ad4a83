"""Sharded runs (FSDP2) on two processes of a CPU: their gradients, and the same training as without sharding."""

import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowback_hf import FlowBackPipeline
from flowback_hf.files import read_metrics_log
from flowback_hf.training import list_checkpoints, load_averaged_parameters

from ..conftest import REPOSITORY
from ..drills.runs import Process, start_group


GRADIENTS = Path(__file__).with_name("sharded_gradients.py")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def set_environment(variables: dict[str, str], _: int):
    os.environ |= variables


def end(processes: list[Process], code: int = 0):
    for process in processes:
        assert process.wait(120) == code, process.log


def losses_of(folder: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_metrics_log(folder) if "loss" in record}


def pipeline_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same_run(folder: Path, expected: Path):
    """The same averaged weights and the same figures, but for float32's rounding."""
    weights, expected_weights = pipeline_of(folder), pipeline_of(expected)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert losses_of(folder).keys() == losses_of(expected).keys()
    for step, record in losses_of(expected).items():
        for name in ("loss", "nll", "alignment", "gradient_norm", "learning_rate"):
            assert losses_of(folder)[step][name] == pytest.approx(record[name], rel=1e-4)


@pytest.fixture
def run(arguments, tmp_path):
    """A function that starts a run of four images a step on some processes, sharded unless told otherwise."""

    def start_run(name: str, num_processes: int, variables=FSDP, **options) -> list[Process]:
        options = {"max_train_steps": 6, "validation_steps": 3, "label_dropout": 0.5} | options
        # Adam would otherwise make steps of the rounding of gradients that are zero.
        options |= {"output_dir": tmp_path / name, "train_batch_size": 4 // num_processes, "adam_epsilon": 1e-3}
        (tmp_path / "logs").mkdir(exist_ok=True)
        prepare = functools.partial(set_environment, variables)
        return start_group(tmp_path / "logs", [arguments(**options)] * num_processes, prepare)

    return start_run


# Gradients


def check_gradients(tmp_path: Path, num_processes: int, *line: str):
    end(start_group(tmp_path, [list(line)] * num_processes, script=GRADIENTS))


def test_gradients_are_those_of_one_process(tmp_path):
    """Of all strategies, with accumulation, and the optimizer's steps."""
    check_gradients(tmp_path, 2)


@pytest.mark.parametrize("unit_classes", [[], ["TarFlowLayer"]], ids=["root", "layers"])
def test_gradients_with_other_units(tmp_path, unit_classes):
    line = ["--unit_classes", *unit_classes, "--strategies", "detach", "reverse-exact", "--checkpointing"]
    check_gradients(tmp_path, 2, *line)


# The whole matrix. Two groups of two processes are HSDP.
@pytest.mark.drill
@pytest.mark.parametrize("checkpointing", [[], ["--checkpointing"]], ids=["", "checkpointing"])
@pytest.mark.parametrize("unit_classes", [[], ["TarFlowBlock"], ["TarFlowLayer"]], ids=["root", "blocks", "layers"])
@pytest.mark.parametrize("num_processes, num_replicas", [(2, 1), (3, 1), (4, 2)])
def test_all_gradients(drill, tmp_path, num_processes, num_replicas, unit_classes, checkpointing):
    line = ["--unit_classes", *unit_classes, "--num_replicas", str(num_replicas), *checkpointing]
    check_gradients(tmp_path, num_processes, *line)
    drill("Gradients of sharded flows", settings=1, strategies=6, wrong=0)


# Runs


def test_a_sharded_run_goes_on_with_another_number_of_processes(run, tmp_path):
    """It trains as one process does. Of four processes, some have no row of the class tables."""
    end(run("whole", 1, variables={}))
    folder = tmp_path / "run"
    end(run("run", 2))
    assert_same_run(folder, tmp_path / "whole")
    first, second, third = list_checkpoints(folder)
    names = sorted(path.name for path in third.iterdir())
    shards = [f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    assert names == ["metrics.jsonl", "progress.json", *shards, "training_args.json"]
    kept = pipeline_of(folder)
    shutil.rmtree(second)
    shutil.rmtree(third)
    end(run("run", 4, resume_from_checkpoint="latest"))
    assert_same_run(folder, tmp_path / "whole")
    assert not all(torch.equal(tensor, kept[name]) for name, tensor in pipeline_of(folder).items())
    assert len(list(list_checkpoints(folder)[-1].glob("shard-*"))) == 4
    flow = FlowBackPipeline.from_pretrained(folder).transformer
    load_averaged_parameters(first, flow.parameters())
    load_averaged_parameters(list_checkpoints(folder)[-1], flow.parameters())
    assert all(torch.equal(tensor, pipeline_of(folder)[name]) for name, tensor in flow.state_dict().items())

    end(run("run", 2, variables={}, resume_from_checkpoint="latest"), 2)
