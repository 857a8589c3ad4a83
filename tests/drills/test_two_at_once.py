"""Two runs that are started with the same command."""

import json
import signal

import pytest

from flowback_hf.training import list_checkpoints

from .runs import assert_one_sentence, assert_same_run, start, wait_until


@pytest.mark.parametrize(
    "number, delay", [(0, 0.0), *(pytest.param(i, 0.1 * i, marks=pytest.mark.drill) for i in range(1, 16))]
)
def test_two_runs_at_once(whole_run, line, tmp_path, drill, number, delay):
    """One of them trains, as if it were alone, and the other is told which process does."""
    folder = tmp_path / "run"
    first = start(tmp_path / "first", line(folder))
    first.process.join(delay)
    second = start(tmp_path / "second", line(folder))
    refused = [process for process in (first, second) if process.wait() != 0]
    assert len(refused) < 2, first.log + second.log
    for process in refused:
        other = first if process is second else second
        assert_one_sentence(process, rf"`--output_dir` .*run is in use by process {other.pid} on \S+: wait until it")
    assert_same_run(folder, whole_run.folder)
    drill("Two runs at once", pairs=1, refused=len(refused), mixed=0)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.drill)])
def test_the_lock_of_a_killed_run_is_taken_over(whole_run, line, tmp_path, drill, num_workers):
    """Processes that load data outlive it by seconds. They do not hold the lock."""
    folder = tmp_path / "run"
    process = start(tmp_path / "log", line(folder, dataloader_num_workers=num_workers))
    wait_until(lambda: list_checkpoints(folder), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert json.loads((folder / ".lock.json").read_text())["pid"] == process.pid
    process = start(tmp_path / "log", line(folder))
    assert process.wait() == 0, process.log
    assert_same_run(folder, whole_run.folder)
    drill("Locks of killed runs", taken_over=1)
