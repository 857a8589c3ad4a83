"""
Small runs of training/train_rra.py, each in a process of its own.

They are forked from a process that has imported everything: a start takes a tenth of a second instead of ten, so that
hundreds can be killed.
"""

import functools
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

# Most of these only so that the process which all others are forked from has imported them.
import flowback_hf.conversion  # noqa: F401
import flowback_hf.data  # noqa: F401
import flowback_hf.hub  # noqa: F401
import flowback_hf.training  # noqa: F401
from flowback_hf.files import read_json_lines

from ..conftest import REPOSITORY


SCRIPT = REPOSITORY / "training" / "train_rra.py"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])

# What differs between two runs that are the same.
TIMINGS = ("images_per_second",)


@dataclass
class Process:
    """
    A run in a process of its own.

    Args:
        process (`multiprocessing.Process`): The process.
        log_file (`pathlib.Path`): What it prints.
    """

    process: multiprocessing.Process
    log_file: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def sentence(self) -> str:
        """What it said went wrong."""
        return next(line for line in reversed(self.log.splitlines()) if "error: " in line)

    def wait(self, timeout: float = 600) -> int:
        """Wait for the exit code; -9 if it was killed."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.log}"
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()


def start(log_file: Path, line: list[str], before: Callable[[], None] | None = None, script: Path = SCRIPT) -> Process:
    """
    Start a script, by default that of training.

    Args:
        log_file (`pathlib.Path`): Where to write what it prints.
        line (`list[str]`): Its command line.
        before (`Callable`, *optional*): Called in its process first. A function of a module, or a partial of one.
    """
    process = FORKS.Process(target=run_script, args=(log_file, script, line, before))
    process.start()
    return Process(process, log_file)


def start_group(
    folder: Path, lines: list[list[str]], prepare: Callable[[int], None] | None = None, script: Path = SCRIPT
) -> list[Process]:
    """
    Start one run of several processes on the CPU, as a launcher does.

    Args:
        folder (`pathlib.Path`): Where to write what each prints.
        lines (`list[list[str]]`): The command line of each process.
        prepare (`Callable`, *optional*): Called in each process first, with its number.
        script (`pathlib.Path`): What to run. Default: the script of training.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(folder / f"log-{rank}", line, functools.partial(join_group, rank, len(lines), port, prepare), script)
        for rank, line in enumerate(lines)
    ]


def join_group(rank: int, num_processes: int, port: int, prepare: Callable[[int], None] | None):
    """Tell this process which one of a group it is."""
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    if prepare is not None:
        prepare(rank)


def run_script(log_file: Path, script: Path, line: list[str], before: Callable[[], None] | None):
    os.setsid()  # a group of its own, as a shell gives it, for signals to all of its processes
    with log_file.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # the platform's own, as in a process that a shell starts
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    sys.argv = [str(script), *line]
    if before is not None:
        before()
    runpy.run_path(str(script), run_name="__main__")


def send_at_line(folder: Path, number: int, name: str, after: tuple[float, ...] = (0.0,)):
    """
    Let this process get signals when it writes the n-th line of its log, each so many seconds after the one before.
    Call it in that process.
    """
    count = 0

    def watch(event: str, arguments: tuple):
        nonlocal count
        if event == "open" and str(arguments[0]) == str(folder / "metrics.jsonl") and arguments[1] == "a":
            count += 1
            if count == number:
                for seconds in after:
                    time.sleep(seconds)
                    os.kill(os.getpid(), signal.Signals[name])

    sys.addaudithook(watch)


def wait_until(condition: Callable[[], bool], process: Process, timeout: float = 600):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.process.is_alive(), process.log
        assert time.monotonic() < deadline, process.log
        time.sleep(0.002)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights that a finished run left: the pipeline's, and those of its last checkpoint."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [folder / "transformer" / "diffusion_pytorch_model.safetensors", *last.glob("*.safetensors")]
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def log_of(folder: Path) -> list[dict]:
    """The log of a run, without what depends on the machine's speed."""
    records = read_json_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def assert_same_run(folder: Path, expected: Path):
    """A run ended as another one, to the bit, and left the same files."""
    weights, expected_weights = state_of(folder), state_of(expected)
    assert weights.keys() == expected_weights.keys()
    different = [name for name, tensor in expected_weights.items() if not torch.equal(tensor, weights[name])]
    assert not different
    assert log_of(folder) == log_of(expected)
    assert names_in(folder) == names_in(expected)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_one_sentence(process: Process, pattern: str):
    """A mistake of the user's: exit code 2, one sentence, no traceback."""
    assert process.wait() == 2 and "Traceback" not in process.log, process.log
    assert re.search(pattern, process.sentence), process.log
