"""Runs that are killed, and resumed with the same command."""

import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from .runs import SCRIPT, assert_same_run, start


# As many tests as make a hundred kills.
PIECES = [pytest.param(seed, 10, marks=pytest.mark.drill) for seed in range(1, 11)]
FILE_EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copyfile",
)


@pytest.mark.parametrize("seed, num_kills", [(0, 2), *PIECES])
def test_kills_at_random_moments(whole_run, line, tmp_path, drill, seed, num_kills):
    """From the start of the script to its end, again and again, until it has been killed so many times."""
    rng, folder = random.Random(seed), tmp_path / "run"
    seconds = whole_run.seconds
    kills = failed_restarts = ended = 0
    while kills < num_kills or ended == 0:
        process = start(tmp_path / "log", line(folder))
        if kills < num_kills:
            process.process.join(rng.uniform(0, seconds))
        else:
            process.wait()
        if process.process.exitcode is None:
            process.kill()
            kills += 1
            continue
        failed_restarts += process.wait() != 0
        assert not failed_restarts, process.log
        assert_same_run(folder, whole_run.folder)
        ended += 1
        shutil.rmtree(folder)
    drill("Kills at random moments", kills=kills, runs_that_ended=ended, failed_restarts=0, lost_runs=0)


def kill_at_file_operation(folder: Path, number: int):
    """Let this process die just before its n-th change to the files of a folder."""
    count = 0

    def watch(event: str, arguments: tuple):
        nonlocal count
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.mark.parametrize(
    "numbers", [(30,), *(pytest.param(range(first, 1000, 4), marks=pytest.mark.drill) for first in range(1, 5))]
)
def test_kills_at_every_file_operation(whole_run, line, tmp_path, drill, numbers):
    kills = 0
    for number in numbers:
        folder = tmp_path / str(number)
        process = start(tmp_path / "log", line(folder), functools.partial(kill_at_file_operation, folder, number))
        if process.wait() == 0:
            break
        assert process.wait() == -signal.SIGKILL, process.log
        kills += 1
        process = start(tmp_path / "log", line(folder))
        assert process.wait() == 0, process.log
        assert_same_run(folder, whole_run.folder)
        shutil.rmtree(folder)
    assert kills > 0
    drill("Kills at every file operation", kills=kills, failed_restarts=0, lost_runs=0)


def kill_in_a_write(folder: Path, last_step: int, num_bytes: int):
    """
    Let the kernel kill this process in the middle of a write: the first that makes a file longer than this. It also
    hits the writers in C++ and Rust.
    """

    def watch(event: str, arguments: tuple):
        if event == "os.mkdir" and str(arguments[0]).endswith(f".partial-checkpoint-{last_step}"):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    sys.addaudithook(watch)


@pytest.mark.parametrize(
    "shares",
    [(0.6,), *(pytest.param([i / 40 for i in range(j, 40, 2)], marks=pytest.mark.drill) for j in (0, 1))],
)
def test_kills_in_the_middle_of_a_write(whole_run, line, tmp_path, drill, shares):
    """Every share of the largest file of the second checkpoint: in torch's and safetensors' writers."""
    sizes = {file.name: file.stat().st_size for file in (whole_run.folder / "checkpoint-4").iterdir()}
    kills = Counter()
    for share in shares:
        folder = tmp_path / str(share)
        num_bytes = int(share * max(sizes.values()))
        process = start(tmp_path / "log", line(folder), functools.partial(kill_in_a_write, folder, 4, num_bytes))
        assert process.wait() == -signal.SIGXFSZ, process.log
        # The weights are written before the optimizer's state.
        kills["in_torch" if (folder / ".partial-checkpoint-4" / "optimizer.bin").exists() else "in_safetensors"] += 1
        process = start(tmp_path / "log", line(folder))
        assert process.wait() == 0, process.log
        assert_same_run(folder, whole_run.folder)
        shutil.rmtree(folder)
    drill("Kills in the middle of a write", kills=kills.total(), **kills, lost_runs=0)


@pytest.mark.parametrize("num_kills", [pytest.param(6, marks=pytest.mark.drill)])
def test_kills_while_the_script_starts(whole_run, line, tmp_path, drill, num_kills):
    """A process of its own from the first import on, which the others are not."""

    folder = tmp_path / "run"
    for number in range(num_kills):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *line(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(1.5 * number + 0.2)
        process.kill()
        process.wait()
    process = start(tmp_path / "log", line(folder))
    assert process.wait() == 0, process.log
    assert_same_run(folder, whole_run.folder)
    drill("Kills while the script starts", kills=num_kills, lost_runs=0)
