"""The SLURM script, with stand-ins for what a cluster has."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from flowback_hf_cli.training import parse_args

from ..conftest import REPOSITORY


SCRIPTS = sorted((REPOSITORY / "training" / "configs" / "slurm").glob("*.sh"))

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-1; echo node-2; else echo "$@" >> "$FOLDER/scontrol"; fi',
    # Slurm sends a signal to all processes of a job's steps, launchers included.
    "scancel": '[ "$*" = "--signal=USR1 40123" ] && kill -USR1 -- -"$(cat "$FOLDER/step")"',
    "srun": """setsid bash -c 'echo $$ > "$FOLDER/step"; SLURM_NODEID=1 exec "$@"' step "$@" & wait $!""",
}


@pytest.fixture
def submit(tmp_path):
    """A function that runs a script as a job on two nodes, of which it is the second, with another launcher."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def run(accelerate: str, *line: str, **environment: str) -> subprocess.Popen:
        for name, lines in {**STAND_INS, "accelerate": accelerate}.items():
            (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
            (folder / name).chmod(0o755)
        slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node-[1-2]",
                 "SLURM_JOB_ID": "40123"}  # fmt: skip
        path = f"{folder}:{os.environ['PATH']}"
        environment = {**os.environ, **slurm, "PATH": path, "FOLDER": str(tmp_path), **environment}
        return subprocess.Popen(["bash", str(SCRIPTS[0]), *line], env=environment, cwd=REPOSITORY)

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_is_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_its_flags_are_those_of_the_launcher_and_of_training(submit, tmp_path):
    job = submit(
        'printf "%q " "$@" > "$FOLDER/line"', "--train_data_dir", "a b", "--output_dir", "run", CONFIG="c.yaml"
    )
    assert job.wait(20) == 0 and not (tmp_path / "scontrol").exists()
    command, *line = shlex.split((tmp_path / "line").read_text())
    assert command == "launch"
    launch = launch_command_parser().parse_args(line)
    assert (launch.config_file, launch.num_machines, launch.num_processes) == ("c.yaml", 2, 8)
    assert (launch.machine_rank, launch.main_process_ip, launch.main_process_port) == (1, "node-1", 20123)
    assert Path(launch.training_script).name == "train_rra.py"
    args = parse_args(launch.training_script_args)
    assert (args.train_data_dir, args.save_on_signal, args.resume_from_checkpoint) == ("a b", "SIGUSR1", "latest")


# Ignores the signal, as `trap` has told it, and hands nothing on.
LAUNCHER = """"$PYTHON" -c '
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FOLDER"])
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
(folder / "trains").touch()
try:
    time.sleep(60)
finally:
    time.sleep(0.3)
    (folder / "saved").touch()
' & wait $!"""


def test_a_signal_before_the_end_reaches_the_run_and_the_job_is_queued_again(submit, tmp_path):
    """What the launcher has started saves for a while and ends with 138."""
    job = submit(LAUNCHER, PYTHON=sys.executable)
    deadline = time.monotonic() + 20
    while not (tmp_path / "trains").exists():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 138
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 40123\n"


def test_a_run_that_fails_is_not_queued_again(submit, tmp_path):
    assert submit("exit 1").wait(20) == 1
    assert not (tmp_path / "scontrol").exists()
