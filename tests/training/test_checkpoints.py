"""Checkpoints that are written while training goes on."""

import functools
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowback_hf.training import checkpoints, list_checkpoints

from ..drills.runs import Process, assert_same_run, start, start_group, state_of
from .test_sharding import FSDP, set_environment


OPTIONS = {"max_train_steps": 6, "validation_steps": 100}


def act_before(name: str, number: int, action, *arguments):
    """Let this process do something before it calls a function of the checkpoints' module for the n-th time."""
    function, count = getattr(checkpoints, name), 0

    def delayed(*function_arguments):
        nonlocal count
        count += 1
        if count == number:
            action(*arguments)
        function(*function_arguments)

    setattr(checkpoints, name, delayed)


def act_when_opened(action, folder: Path, name: str, *arguments):
    """Let this process do something just before it opens a file of its folder, to read, write or flush it."""

    def watch(event: str, event_arguments: tuple):
        if event == "open" and re.fullmatch(f"{folder}/{name}", str(event_arguments[0])):
            action(*arguments)

    sys.addaudithook(watch)


def wait_for_line(folder: Path, step: int):
    """Wait until the log has a line of a step."""
    deadline = time.monotonic() + 60
    while f'"step": {step},' not in (folder / "metrics.jsonl").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline


def assert_same_checkpoints(folder: Path, expected: Path):
    """The same tensors in all checkpoints, to the bit."""
    assert_same_run(folder, expected)
    steps = [checkpoint.name for checkpoint in list_checkpoints(expected)]
    assert steps == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in steps:
        tensors, expected_tensors = tensors_of(folder / step), tensors_of(expected / step)
        assert tensors.keys() == expected_tensors.keys()
        assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors.items()), step


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights and their averages. What processes have in common may be in the file of either."""
    tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            number = file.name if tensor.ndim else "all"
            tensors[f"{number}: {name}"] = tensor
    return tensors


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def whole(arguments, tmp_path) -> Path:
    """A run that waits for its checkpoints."""
    process = start(tmp_path / "log", arguments(output_dir=tmp_path / "whole", **OPTIONS))
    assert process.wait() == 0, process.log
    return tmp_path / "whole"


def test_training_goes_on_while_a_checkpoint_is_written(arguments, whole, tmp_path):
    """The checkpoint is that of its step nonetheless. The next checkpoint waits for it."""
    folder = tmp_path / "run"
    line = arguments(output_dir=folder, async_checkpointing=True, **OPTIONS)
    before = functools.partial(act_before, "save_whole_state", 1, wait_for_line, folder, 3)
    process = start(tmp_path / "log", line, before)
    assert process.wait() == 0, process.log
    assert_same_checkpoints(folder, whole)


def test_a_kill_while_a_checkpoint_is_written(arguments, whole, tmp_path):
    """The one before is there until the new one is whole, and the run goes on from it."""
    folder = tmp_path / "run"
    options = OPTIONS | {"checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
    line = arguments(output_dir=folder, async_checkpointing=True, **options)
    # The first run saves two checkpoints, the second one starts from the first of these.
    for name, number in (("save_ema", 2), ("write_progress", 1)):
        process = start(tmp_path / "log", line, functools.partial(act_before, name, number, kill))
        assert process.wait() == -signal.SIGKILL
        assert [checkpoint.name for checkpoint in list_checkpoints(folder)] == ["checkpoint-2"]
        assert (folder / ".partial-checkpoint-4" / "model.safetensors").exists()
    process = start(tmp_path / "log", line)
    assert process.wait() == 0, process.log
    weights, expected = state_of(folder), state_of(whole)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert [checkpoint.name for checkpoint in list_checkpoints(folder)] == ["checkpoint-6"]


def fail():
    raise OSError(5, "the disk is broken")


@pytest.mark.parametrize("step", [2, 6], ids=["before the next", "at the end"])
def test_what_fails_in_the_background_ends_the_run(arguments, tmp_path, step):
    folder = tmp_path / "run"
    line = arguments(output_dir=folder, async_checkpointing=True, **OPTIONS)
    before = functools.partial(act_when_opened, fail, folder, f".partial-checkpoint-{step}/optimizer.bin")
    process = start(tmp_path / "log", line, before)
    assert process.wait() == 2
    assert "the disk is broken" in process.sentence
    assert f"checkpoint-{step}" not in [checkpoint.name for checkpoint in list_checkpoints(folder)]


def prepare_shards(folder: Path, action, arguments: tuple, rank: int):
    set_environment(FSDP, rank)
    if rank == 1:
        act_when_opened(action, folder, ".partial-checkpoint-4/shard-00002.*", *arguments)


def test_shards_are_written_while_training_goes_on(arguments, tmp_path):
    """One of two processes is killed in the middle of it, and later keeps the other one waiting."""
    (tmp_path / "logs").mkdir()

    def run(name: str, action, *action_arguments, **options) -> list[Process]:
        line = arguments(output_dir=tmp_path / name, train_batch_size=2, **(OPTIONS | options))
        prepare = functools.partial(prepare_shards, tmp_path / name, action, action_arguments)
        return start_group(tmp_path / "logs", [line] * 2, prepare)

    folder, options = tmp_path / "run", {"async_checkpointing": True, "resume_from_checkpoint": "latest"}
    assert all(process.wait() == 0 for process in run("whole", time.sleep, 0))
    first, second = run("run", kill, **options)
    assert second.wait() == -signal.SIGKILL and first.wait() != 0
    assert [checkpoint.name for checkpoint in list_checkpoints(folder)] == ["checkpoint-2"]
    for process in run("run", wait_for_line, folder, 5, **options):
        assert process.wait() == 0, process.log
    assert_same_checkpoints(folder, tmp_path / "whole")
