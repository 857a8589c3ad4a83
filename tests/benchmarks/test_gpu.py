"""The day on a GPU: its commands are those of the scripts, and it goes on where it was. A drill runs it whole."""

import os
import shlex
import subprocess
import time

import pytest

from ..conftest import REPOSITORY
from ..docs.conftest import parse_script_options


PIECES = (
    "tests train_step train_step_compiled flow sampling_1 sampling_16 sampling_64 sampling_learned train_reverse"
    " latent_memory train_loop fsdp2"
)

# In place of Python: notes what it is asked to run. Sampling fails, and loops take too long.
STAND_IN = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    *sampling.py*) echo "no flow"; exit 3;;
    *train_loop.py*) sleep 60;;
esac
"""


def gpu(*options: str, **variables: str) -> subprocess.CompletedProcess:
    command = [REPOSITORY / "benchmarks" / "gpu.sh", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


@pytest.mark.parametrize("sizes", [[], ["--tiny"]])
def test_every_piece_is_a_command_that_its_script_takes(tmp_path, monkeypatch, sizes):
    (tmp_path / "benchmark_flow" / "flow").mkdir(parents=True)
    (tmp_path / "benchmark_flow" / "flow" / "model_index.json").touch()  # the piece `flow` makes it
    monkeypatch.chdir(REPOSITORY)
    listed = gpu("--list", "--output_dir", tmp_path, *sizes)
    assert listed.returncode == 0 and not listed.stderr
    pieces = []
    for line in listed.stdout.splitlines():
        piece, _, command = line.partition(": ")
        pieces.append(piece)
        words = shlex.split(command)
        script = next((word for word in words if word.endswith(".py")), None)
        if script is not None and "pytest" not in words:
            parse_script_options(script, words[words.index(script) + 1 :])
        else:
            assert all((REPOSITORY / word).exists() for word in words if word.startswith("tests/"))
    assert list(dict.fromkeys(pieces)) == PIECES.split()


@pytest.fixture
def stand_in(tmp_path) -> dict[str, str]:
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return {"PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls")}


def test_it_records_failures_and_goes_on_where_it_was(tmp_path, stand_in):
    folder, calls = tmp_path / "gpu", tmp_path / "calls"
    pieces = [word for name in ("tests", "sampling_16", "latent_memory") for word in ("--piece", name)]
    run = gpu("--device", "cpu", "--tiny", "--output_dir", folder, *pieces, **stand_in)
    assert run.returncode == 1
    assert "tests: done in" in run.stdout and "sampling_16: failed, exit code 3" in run.stdout
    assert (folder / "sampling_16.failed").exists() and (folder / "sampling_16.log").read_text() == "no flow\n"
    assert len(calls.read_text().splitlines()) == 4  # the last piece is two commands
    summary = (folder / "summary.md").read_text()
    assert "- sampling_16: failed, exit code 3" in summary and "- flow: not run" in summary

    calls.unlink()
    again = gpu("--device", "cpu", "--tiny", "--output_dir", folder, *pieces, **stand_in)
    assert "tests: finished before" in again.stdout and again.returncode == 1
    (call,) = calls.read_text().splitlines()  # what failed runs again
    assert "sampling.py" in call


def test_a_piece_ends_in_time(tmp_path, stand_in):
    short = tmp_path / "checkout" / "benchmarks" / "gpu.sh"
    short.parent.mkdir(parents=True)
    script = (REPOSITORY / "benchmarks" / "gpu.sh").read_text()
    short.write_text(script.replace("PIECE_SECONDS=540", "PIECE_SECONDS=1"))
    options = ["--device", "cpu", "--piece", "train_loop", "--output_dir", tmp_path / "gpu"]
    run = subprocess.run(["bash", short, *options], capture_output=True, text=True, env=os.environ | stand_in)
    assert run.returncode == 1 and "train_loop: failed, exit code 124, its 1 s are over" in run.stdout


def test_an_interrupted_piece_runs_again(tmp_path, stand_in):
    options = ["--device", "cpu", "--piece", "train_loop", "--output_dir", tmp_path / "gpu"]
    run = subprocess.Popen([REPOSITORY / "benchmarks" / "gpu.sh", *options], env=os.environ | stand_in)
    while not (tmp_path / "calls").exists():  # the piece has begun
        assert run.poll() is None
        time.sleep(0.01)
    run.terminate()
    assert run.wait(timeout=10) == 130
    assert not list((tmp_path / "gpu").glob("train_loop.[df]*"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--piece", "flows"], f"--piece must be one of {PIECES}, but is flows."),
        (["--device", "tpu"], "--device must be cpu or cuda, but is tpu."),
        (["--wheels", "no_such_folder"], "--wheels must be a folder, but no_such_folder is none."),
        (["--piece"], "--piece needs a value."),
        (["--all"], "there is no option --all."),
    ],
)
def test_mistakes_end_before_work(tmp_path, options, message):
    run = gpu("--output_dir", tmp_path / "gpu", *options)
    assert run.returncode == 2 and message in run.stderr
    assert not (tmp_path / "gpu").exists()


def test_one_folder_is_for_one_setting(tmp_path, stand_in):
    options = ["--device", "cpu", "--output_dir", tmp_path / "gpu", "--piece", "tests"]
    assert gpu(*options, "--tiny", **stand_in).returncode == 0
    run = gpu(*options, **stand_in)
    assert run.returncode == 2 and "holds results of --device cpu --tiny: choose another --output_dir" in run.stderr
