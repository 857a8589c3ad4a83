import importlib
import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState

from .pages import REPOSITORY


SCRIPT_FOLDERS = [REPOSITORY / name for name in ("training", "pipelines", "benchmarks")]


@contextmanager
def as_command(script: str, options: list[str]) -> Iterator[None]:
    """What Python sets up for a script, in this process: starting one for each command would take minutes."""
    argv, path, modules = sys.argv, list(sys.path), set(sys.modules)
    environment, threads = dict(os.environ), torch.get_num_threads()
    sys.argv = [script, *options]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in sys.modules.keys() - modules:  # scripts of two folders may have one name
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().parent in SCRIPT_FOLDERS:
                del sys.modules[name]


def run_script(script: str, options: list[str]):
    with as_command(script, options):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            assert not error.code, f"{script} ended with {error.code!r}"


def parse_script_options(script: str, options: list[str]):
    """Let a script parse its options; an error in them ends with `SystemExit`."""
    with as_command(script, options):
        runpy.run_path(script, run_name="parsed")["parse_args"]()


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory) -> Path:
    """A folder like a clone after a quickstart, but with a teacher, a judge and a flow of a few steps."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("training", "pipelines", "src", "docs", "model_cards", "Makefile", "setup.py", "README.md"):
        (clone / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "benchmarks", clone / "benchmarks")  # scripts write results there

    folder = Path.cwd()
    os.chdir(clone)
    try:
        digits, flow = "outputs/quickstart/digits", "outputs/quickstart/flow"
        epochs = ["--teacher_epochs", "1", "--judge_epochs", "1"]
        run_script("training/prepare_demo.py", ["--kind", "digits", "--output_dir", digits, *epochs])
        options = ["--train_data_dir", f"{digits}/images", "--teacher_model_name_or_path", f"{digits}/teacher"]
        options += ["--output_dir", flow, "--model_config", "training/configs/demo_digits.json"]
        options += ["--max_train_steps", "3", "--max_validation_samples", "20", "--projector_dim", "8"]
        options += ["--lr_warmup_steps", "1", "--cache_dir", "outputs/cache"]
        run_script("training/train_rra.py", options)
        shutil.rmtree("outputs/cache")
        for label in "07":  # "path/to/images" of the pages: a flat folder of two classes
            images = sorted(Path(digits, "images", "train", label).iterdir())[:20]
            Path("path/to/images", label).mkdir(parents=True)
            for image in images:
                shutil.copy(image, Path("path/to/images", label))
    finally:
        os.chdir(folder)
    return clone


@pytest.fixture
def clone(quickstart, tmp_path, monkeypatch) -> Path:
    """A copy of the quickstart's folder as the current one, which finds neither the Hub nor other caches."""
    folder = tmp_path / "clone"
    shutil.copytree(quickstart, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets_cache")
    return folder


@pytest.fixture
def settings_of_torch():
    """The pages switch on compiling: it is skipped here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()
