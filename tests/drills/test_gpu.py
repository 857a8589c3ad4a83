"""The day on a GPU, on a CPU with tiny sizes."""

import os
import subprocess
import sys

import pytest

from ..conftest import REPOSITORY


@pytest.mark.drill
def test_the_day_on_a_gpu_runs_whole(tmp_path, drill):
    command = [REPOSITORY / "benchmarks" / "gpu.sh", "--device", "cpu", "--tiny", "--output_dir", tmp_path / "gpu"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert run.returncode == 0, run.stdout
    finished = sorted(path.stem for path in (tmp_path / "gpu").glob("*.done"))
    assert len(finished) == 12
    tables = (tmp_path / "gpu" / "summary.md").read_text()
    assert "| as it is |" in tables and "| eager | reverse 0, two evaluations |" in tables
    assert "| learned inverse, guided |" in tables and "| learned, compiled |" in tables
    drill("The day on a GPU, tiny on a CPU", pieces=len(finished))
