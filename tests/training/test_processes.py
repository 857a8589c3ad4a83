"""One run on any number of processes: the same weights, one decision about files, one end."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowback_hf.files import read_json, read_metrics_log
from flowback_hf.training import list_checkpoints
from flowback_hf.training.checkpoints import check_files, read_progress

from ..conftest import start_two_processes
from ..drills.runs import Process, send_at_line, start_group, state_of, wait_until


# Batch size, processes and accumulated batches of steps that take four images. An epoch has five such steps.
DIVISIONS = {"one": (4, 1, 1), "two": (2, 2, 1), "two, accumulated": (1, 2, 2)}


@pytest.fixture
def run(arguments, tmp_path):
    """A function that runs to the end on some processes, and another folder if asked."""

    def start_run(division: str, name: str, prepare=None, **options) -> list[Process]:
        batch_size, num_processes, accumulation = DIVISIONS[division]
        options = {"max_train_steps": 6, "validation_steps": 100, "random_flip": True, "label_dropout": 0.5} | options
        line = arguments(
            output_dir=tmp_path / name,
            train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            # Adam would otherwise make steps of the rounding of gradients that are zero.
            adam_epsilon=1e-3,
            **options,
        )
        (tmp_path / "logs").mkdir(exist_ok=True)
        return start_group(tmp_path / "logs", [line] * num_processes, prepare)

    return start_run


def end(processes: list[Process], code: int = 0):
    for process in processes:
        assert process.wait(120) == code, process.log


def assert_same_weights(folder: Path, expected: Path):
    weights, expected_weights = state_of(folder), state_of(expected)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def losses_of(folder: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_metrics_log(folder) if "loss" in record}


@pytest.fixture
def whole(run, tmp_path) -> Path:
    """A run of one process that was never interrupted."""
    end(run("one", "whole"))
    return tmp_path / "whole"


@pytest.mark.parametrize("division", ["two", "two, accumulated"])
def test_a_run_is_the_same_however_its_steps_are_divided(run, whole, tmp_path, division):
    """Past the end of an epoch, with noise, mirrored images and dropped labels."""
    end(run(division, "run"))
    assert_same_weights(tmp_path / "run", whole)
    first = losses_of(whole)
    assert len({record["loss"] for record in first.values()}) == 6
    for step, record in losses_of(tmp_path / "run").items():
        for name in ("loss", "nll", "alignment", "gradient_norm", "max_log_scale"):
            assert record[name] == pytest.approx(first[step][name], rel=1e-4)
        for name in ("learning_rate", "epoch"):
            assert record[name] == first[step][name]


def test_a_run_goes_on_with_more_processes_and_with_fewer(run, whole, tmp_path):
    """Two steps on one process, two on two, two on one."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step, division in ((2, "two"), (4, "one")):
        for checkpoint in list_checkpoints(folder):
            if checkpoint.name != f"checkpoint-{step}":
                shutil.rmtree(checkpoint)
        end(run(division, "run", resume_from_checkpoint="latest"))
    assert_same_weights(folder, whole)
    rates = {step: record["learning_rate"] for step, record in losses_of(folder).items()}
    assert rates == {step: record["learning_rate"] for step, record in losses_of(whole).items()}
    assert len(set(rates.values())) == 6
    assert read_json(folder / "checkpoint-4" / "training_args.json")["num_processes"] == 2
    assert read_json(folder / "training_args.json")["num_processes"] == 1


def test_steps_of_another_number_of_images_are_refused_once(run, arguments, whole, tmp_path):
    lines = [arguments(output_dir=whole, resume_from_checkpoint="latest", train_batch_size=4, adam_epsilon=1e-3,
                       max_train_steps=6, random_flip=True, label_dropout=0.5)] * 2  # fmt: skip
    processes = start_group(tmp_path / "logs", lines)
    end(processes, 2)
    assert processes[0].sentence.endswith(
        "`--train_batch_size` 4 on 2 processes with `--gradient_accumulation_steps` 1 makes steps of 8 images, but the"
        " run to resume takes 4 (4 on 1 process with `--gradient_accumulation_steps` 1): choose them so that their"
        " product is the same."
    )
    assert "error: " not in processes[1].log


def go_to(folder: Path, rank: int):
    (folder / str(rank)).mkdir(parents=True)
    os.chdir(folder / str(rank))


def test_a_folder_that_processes_do_not_share_is_refused(arguments, tmp_path):
    (tmp_path / "logs").mkdir()
    lines = [arguments(output_dir="run", train_batch_size=2)] * 2
    processes = start_group(tmp_path / "logs", lines, functools.partial(go_to, tmp_path / "nodes"))
    end(processes, 2)
    assert "must be a folder that all 2 processes share, but those numbered [1] do not see" in processes[0].sentence


def test_a_signal_to_one_process_ends_all_at_the_same_step(run, whole, tmp_path):
    folder = tmp_path / "run"
    processes = run("two", "run", prepare=functools.partial(signal_main, folder), checkpointing_steps=100)
    end(processes, 128 + signal.SIGTERM)
    (checkpoint,) = list_checkpoints(folder)
    assert checkpoint.name == "checkpoint-3"  # the signal came in the second step
    assert "SIGTERM: saved up to step 3" in processes[0].log and "Traceback" not in processes[1].log
    end(run("two", "run", resume_from_checkpoint="latest"))
    assert_same_weights(folder, whole)


def test_the_end_of_training_frees_the_reducer_before_the_group():
    script = Path(__file__).with_name("ddp_end.py")
    process = start_two_processes(script, [], stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors


def test_a_process_that_is_killed_ends_the_others(run, tmp_path):
    folder = tmp_path / "run"
    processes = run("two", "run", max_train_steps=400, checkpointing_steps=1)
    wait_until(lambda: (folder / "checkpoint-2").exists(), processes[0])
    processes[1].kill()
    assert processes[0].wait(30) == 1, processes[0].log
    assert_whole_checkpoints(folder)


def test_a_main_process_that_is_killed_while_it_saves_ends_the_others(run, tmp_path):
    folder = tmp_path / "run"
    processes = run("two", "run", functools.partial(die_while_saving, folder / ".partial-checkpoint-2"),
                    max_train_steps=400, checkpointing_steps=1)  # fmt: skip
    assert processes[0].wait(60) == -signal.SIGKILL
    assert processes[1].wait(30) == 1, processes[1].log
    assert (folder / ".partial-checkpoint-2").is_dir()
    assert assert_whole_checkpoints(folder) == ["checkpoint-1"]


def die_while_saving(folder: Path, rank: int):
    """Let the main process be killed before the files of a checkpoint are complete."""

    def watch(event: str, arguments: tuple):
        if event == "open" and str(arguments[0]).startswith(str(folder)):
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        sys.addaudithook(watch)


def assert_whole_checkpoints(folder: Path) -> list[str]:
    checkpoints = list_checkpoints(folder)
    for checkpoint in checkpoints:
        check_files(checkpoint, read_progress(checkpoint))
    return [checkpoint.name for checkpoint in checkpoints]


def signal_main(folder: Path, rank: int):
    if rank == 0:
        send_at_line(folder, 3, "SIGTERM")
