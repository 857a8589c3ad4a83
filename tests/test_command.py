"""How the scripts end: a mistake of their user's with a sentence, a bug with its traceback."""

import argparse
import ast
import os
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from flowback_hf_cli.command import add_debug_argument, run_command

from .conftest import REPOSITORY, command_line, end_of_command, load_script


def parse(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_debug_argument(parser)
    return parser.parse_args(line)


def raise_over_two_lines():
    raise ValueError(
        f"`seed` must be at least 0, but is {-1}. Leave it out."
    )  # fmt: skip


def raise_with_a_note():
    try:
        raise OSError("no route to host")
    except OSError as error:
        error.add_note("Try again.")
        raise


def raise_(error: Exception):
    raise error


MISTAKES = {
    "a check": (raise_over_two_lines, "`seed` must be at least 0, but is -1. Leave it out."),
    "no file": (lambda: open("nowhere.json"), "[Errno 2] No such file or directory: 'nowhere.json'"),
    "no package": (lambda: __import__("no_such_package"), "No module named 'no_such_package'"),
    "no extra": (lambda: raise_(ImportError("Install an extra.")), "Install an extra."),
    "the Hub": (lambda: raise_(LocalEntryNotFoundError("Not on the Hub.")), "Not on the Hub."),
    "overflow": (lambda: raise_(OverflowError("Images [0] are not finite.")), "Images [0] are not finite."),
    "a note": (raise_with_a_note, "no route to host\nTry again."),
    "no words": (lambda: raise_(TimeoutError()), "TimeoutError"),
}
BUGS = {
    "an attribute": (lambda: None.count, AttributeError),
    "a key": (lambda: {}["seed"], KeyError),
    "unpacking": (lambda: dict([[1]]), ValueError),
    "shapes": (lambda: np.zeros(2) + np.zeros(3), ValueError),
    "a name that is not in a module": (lambda: exec("from flowback_hf import no_such_name"), ImportError),
    "divergence": (lambda: raise_(FloatingPointError("the loss is nan")), FloatingPointError),
    "memory": (lambda: raise_(RuntimeError("out of memory")), RuntimeError),
}


@pytest.mark.parametrize("make, sentence", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_with_its_sentence(make, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit) as end:
        run_command(lambda args: make(), parse())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"script.py: error: {sentence}\n"


@pytest.mark.parametrize("make, kind", BUGS.values(), ids=BUGS)
def test_a_bug_passes_through(make, kind, capsys):
    with pytest.raises(kind):
        run_command(lambda args: make(), parse())
    assert capsys.readouterr().err == ""


def test_debug_shows_everything_and_is_no_argument_of_the_work():
    with pytest.raises(ValueError, match="`seed` must be at least 0"):
        run_command(lambda args: raise_over_two_lines(), parse("--debug"))
    seen = []
    run_command(lambda args: seen.append(vars(args)), parse("--debug"))
    run_command(lambda args: seen.append(vars(args)), parse())
    assert seen == [{}, {}]


def test_other_ends_keep_their_exit_codes():
    with pytest.raises(SystemExit) as end:
        run_command(lambda args: sys.exit(143), parse())
    assert end.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        run_command(lambda args: raise_(KeyboardInterrupt()), parse())


def test_every_script_ends_so():
    scripts = [path for folder in ("training", "pipelines") for path in (REPOSITORY / folder).glob("*.py")]
    assert len(scripts) >= 12
    for path in scripts:
        *_, last = ast.parse(path.read_text()).body  # if __name__ == "__main__"
        calls = [ast.unparse(node.func) for node in ast.walk(last) if isinstance(node, ast.Call)]
        assert "run_command" in calls and not any(isinstance(node, ast.Try) for node in ast.walk(last)), path


# The scripts themselves; tests/pipelines and tests/evaluation have others. The folder that they run in is empty.

WRONG_MODEL = "`--model` must be a folder that holds a saved pipeline, or its id on the Hub, but 'a/b/c' is neither"
CALLS = {
    "sample": ("pipelines/sample.py", {"model": "a/b/c", "output_dir": "out"}, WRONG_MODEL),
    "evaluate_flow": (
        "pipelines/evaluate_flow.py",
        {"model": "a/b/c", "output_dir": "out", "data_dir": "images"},
        WRONG_MODEL,
    ),
    "train_rra": (
        "training/train_rra.py",
        {"train_data_dir": "nowhere", "output_dir": "out"},
        "`--train_data_dir` must be an existing folder, but is 'nowhere'.",
    ),
    "precompute_features": (
        "training/precompute_features.py",
        {"train_data_dir": "nowhere", "output_dir": "out"},
        "`--train_data_dir` must be an existing folder, but is 'nowhere'.",
    ),
    "precompute_latents": (
        "training/precompute_latents.py",
        {"train_data_dir": "nowhere", "output_dir": "out"},
        "`--train_data_dir` must be an existing folder, but is 'nowhere'.",
    ),
    "prepare_demo": (
        "training/prepare_demo.py",
        {"kind": "digits", "output_dir": "out", "resolution": 8},
        "--resolution 8 was given with --kind digits",
    ),
}


@pytest.mark.parametrize("script, options, sentence", CALLS.values(), ids=CALLS)
def test_every_script_ends_so_and_writes_nothing(script, options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    end = end_of_command(REPOSITORY / script, command_line(**options), monkeypatch)
    assert end.startswith(f"{os.path.basename(script)}: error: {sentence}")
    assert not list(tmp_path.iterdir())


def test_the_quickstart_ends_with_the_code_of_its_stage(tmp_path, monkeypatch):
    quickstart = load_script(REPOSITORY / "training" / "quickstart.py")
    for code, expected in {"sys.exit(2)": 2, "os.kill(os.getpid(), 9)": 1}.items():
        monkeypatch.setattr(
            quickstart, "stages", lambda args: {"a": [sys.executable, "-c", f"import os, sys; {code}"]}
        )
        with pytest.raises(SystemExit) as end:
            quickstart.main(quickstart.parse_args(["--output_dir", str(tmp_path)]))
        assert end.value.code == expected


def test_processes_of_one_run_each_say_it(tmp_path):
    """torchrun ends with 1 and its own report, which names the exit code of the script."""
    script = REPOSITORY / "training" / "prepare_demo.py"  # checks before it imports anything slow
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += command_line(kind="digits", output_dir="out", resolution=8)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "prepare_demo.py: error: --resolution 8 was given with --kind digits" in run.stderr
    assert "exitcode  : 2" in run.stderr and 'File "' + str(script) not in run.stderr
    assert not list(tmp_path.iterdir())
