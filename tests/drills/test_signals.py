"""Runs that are asked to end."""

import functools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flowback_hf.files import read_metrics_log
from flowback_hf.training import list_checkpoints
from flowback_hf.training.run_folder import OWNER_FILE

from ..conftest import start_two_processes
from .runs import SCRIPT, assert_same_run, send_at_line, start, wait_until


SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.drill) for name in SIGNALS)])
def test_a_signal_saves_the_running_step(whole_run, line, tmp_path, drill, name):
    folder = tmp_path / "run"
    command = line(folder, save_on_signal="SIGUSR1")
    process = start(tmp_path / "log", command, functools.partial(send_at_line, folder, 2, name))
    assert process.wait() == 128 + signal.Signals[name], process.log
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1"]
    assert f"{name}: saved up to step 1" in process.log and "Traceback" not in process.log
    process = start(tmp_path / "log", line(folder))
    assert process.wait() == 0, process.log
    (folder / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    assert_same_run(folder, whole_run.folder)
    drill("Signals", signals=1, steps_lost=0, failed_restarts=0)


def test_a_second_signal_ends_at_once(line, tmp_path, drill):
    folder = tmp_path / "run"
    process = start(
        tmp_path / "log", line(folder), functools.partial(send_at_line, folder, 2, "SIGTERM", after=(0, 1.1))
    )
    assert process.wait() == -signal.SIGTERM and not list_checkpoints(folder), process.log
    drill("A second signal", signals=2, checkpoints=0)


def test_a_signal_that_comes_twice_is_one(line, tmp_path, drill):
    """From a scheduler, and from a launcher that has received it, too."""
    folder = tmp_path / "run"
    before = functools.partial(send_at_line, folder, 2, "SIGTERM", after=(0, 0.1))
    process = start(tmp_path / "log", line(folder), before)
    assert process.wait() == 128 + signal.SIGTERM, process.log
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1"]
    drill("A signal that comes twice", signals=2, checkpoints=1)


def test_a_process_whose_launcher_has_died_saves_and_ends(line, tmp_path, drill):
    """What SIGUSR1 leaves of torchrun, which does not handle it."""
    folder = tmp_path / "run"
    launcher = start(tmp_path / "log", line(folder, max_train_steps=400, validation_steps=400), go_on_in_a_child)
    wait_until(lambda: len(read_metrics_log(folder)) > 3, launcher)
    os.kill(launcher.pid, signal.SIGUSR1)
    assert launcher.wait() == -signal.SIGUSR1
    deadline = time.monotonic() + 60
    while (folder / OWNER_FILE).exists():
        assert time.monotonic() < deadline, launcher.log
        time.sleep(0.01)
    assert f"SIGHUP: saved up to step {last_step(folder)}" in launcher.log and "Traceback" not in launcher.log
    assert list_checkpoints(folder)[-1].name == f"checkpoint-{last_step(folder)}"
    drill("Launchers killed", launchers=1, steps_lost=0)


def go_on_in_a_child():
    """Let this process be the launcher of another one, in which everything else happens."""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    while os.fork():
        signal.pause()


@pytest.mark.parametrize("number", [pytest.param(number, marks=pytest.mark.drill) for number in range(10)])
def test_a_signal_to_all_processes(line, tmp_path, drill, number):
    """As schedulers and Ctrl-C send it. The step, and what it loads, comes to its end."""
    folder = tmp_path / "run"
    process = start(
        tmp_path / "log", line(folder, dataloader_num_workers=1, max_train_steps=400, validation_steps=400)
    )
    wait_until(lambda: len(read_metrics_log(folder)) > 3, process)
    time.sleep(0.1 * number)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.log
    assert list_checkpoints(folder)[-1].name == f"checkpoint-{last_step(folder)}"
    drill("Signals to all processes of a run", signals=1, steps_lost=0)


def last_step(folder: Path) -> int:
    return read_metrics_log(folder)[-1]["step"]


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.drill) for seed in range(20)])
def test_signals_at_random_moments(whole_run, line, tmp_path, drill, seed):
    """A run that is sent signals, and resumed, until it has ended, and then is as good as any."""
    rng, folder = random.Random(seed), tmp_path / "run"
    num_signals, lost, log = 0, 0, tmp_path / "log"
    while True:
        process = start(log, line(folder, save_on_signal="SIGUSR1"))
        process.process.join(rng.uniform(0, 1.5 * whole_run.seconds))
        if process.process.exitcode is None:
            name = rng.choice(SIGNALS[:2])
            os.kill(process.pid, signal.Signals[name])
            num_signals += 1
            process.wait()
            # Before training begins, nothing can be lost, and the signal does what it does to every script.
            assert process.wait() in (0, 128 + signal.Signals[name], -signal.Signals[name], 1), process.log
            if process.wait() == 128 + signal.Signals[name]:
                lost += f"checkpoint-{last_step(folder)}" != list_checkpoints(folder)[-1].name
        if process.wait() == 0:
            break
    for extra in ("checkpoint-1", "checkpoint-3"):
        if (folder / extra).exists():
            (folder / extra).rename(tmp_path / extra)
    assert_same_run(folder, whole_run.folder)
    drill("Signals", signals=num_signals, steps_lost=lost, failed_restarts=0)


@pytest.mark.drill
@pytest.mark.parametrize("how", ["handed on", "to all", "ended"])
def test_a_signal_that_its_launcher_does_not_expect(line, tmp_path, monkeypatch, drill, how):
    """
    torchrun with two processes: told to hand SIGUSR1 on, as the SLURM script tells it; ignoring it, while its
    processes get it, too; and ended by it.
    """
    if how == "handed on":
        monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGUSR1,SIGTERM")
    folder, log_file = tmp_path / "run", tmp_path / "log"
    command = line(folder, save_on_signal="SIGUSR1", max_train_steps=4000, validation_steps=4000, train_batch_size=2)
    ignore = functools.partial(signal.signal, signal.SIGUSR1, signal.SIG_IGN) if how == "to all" else None
    with log_file.open("w") as log:
        launcher = start_two_processes(SCRIPT, command, stdout=log, stderr=log, preexec_fn=ignore)
        deadline = time.monotonic() + 120
        while len(read_metrics_log(folder)) < 5:
            assert launcher.poll() is None and time.monotonic() < deadline, log_file.read_text()
            time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
    processes = [int(pid) for pid in children.stdout.split()]
    assert len(processes) == 2
    for pid in [launcher.pid, *(processes if how == "to all" else [])]:
        os.kill(pid, signal.SIGUSR1)
    assert launcher.wait(60) == (-signal.SIGUSR1 if how == "ended" else 1)
    while (folder / OWNER_FILE).exists():
        assert time.monotonic() < deadline, log_file.read_text()
        time.sleep(0.05)
    name = "SIGHUP" if how == "ended" else "SIGUSR1"
    assert f"{name}: saved up to step {last_step(folder)}" in log_file.read_text()
    (checkpoint,) = list_checkpoints(folder)[-1:]
    assert checkpoint.name == f"checkpoint-{last_step(folder)}"
    drill("SIGUSR1 to a real launcher", signals=1, steps_lost=0, orphans=0)
