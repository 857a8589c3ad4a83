"""Sharded runs (FSDP2) on two processes of a CPU: their gradients, and the same training as without sharding."""

import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowback_hf.files import read_metrics_log
from flowback_hf.training import list_checkpoints

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


def test_a_sharded_run_is_that_of_one_process_and_goes_on_with_another_number(run, tmp_path):
    end(run("whole", 1, variables={}))
    end(run("run", 2))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
