import importlib
from pathlib import Path

import pytest

# A tiny run of the training script, for the benchmarks of trained flows.
from ..training.conftest import train_rra  # noqa: F401


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_script(monkeypatch):
    """A function that imports a script of the benchmarks' folder as running one of them does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module
