"""The commands that are thin above the package: they say what is wrong in one line."""

from dataclasses import fields
from pathlib import Path

import pytest

from flowback_hf.models.transformer_tarflow import GUIDANCE_RULES, GUIDANCE_SCHEDULES, SOLVERS
from flowback_hf.pipelines.pipeline_flowback_classification import METHODS
from flowback_hf_cli import evaluation

from ..conftest import end_of_command


REPOSITORY = Path(__file__).parents[2]
SCRIPTS = {
    "pipelines/evaluate_flow.py": ["--model", "nowhere/flow", "--output_dir", "o", "--data_dir", "d"],
    "pipelines/sample.py": ["--model", "nowhere/flow", "--output_dir", "o"],
    "training/ablate.py": "--grid nowhere.json --settings s --output_dir o --data_dir . --teacher t --judge j".split(),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_value_ends_the_script_with_a_message(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = end_of_command(REPOSITORY / script, SCRIPTS[script], monkeypatch)
    assert message.startswith(f"{Path(script).name}: error: `--") and "nowhere" in message
    assert not list(tmp_path.iterdir())


def test_defaults_of_the_flags_are_those_of_the_arguments():
    args = vars(evaluation.parse_args(["--model", "m", "--output_dir", "o", "--data_dir", "d"]))
    defaults = vars(evaluation.EvaluationArguments("m", Path("o"), data_dir="d"))
    assert args.keys() == {field.name for field in fields(evaluation.EvaluationArguments)}
    for name, value in args.items():
        assert (tuple(value) if isinstance(value, list) else value) == defaults[name], name


def test_choices_are_the_librarys():
    assert evaluation.METHODS == METHODS
    assert evaluation.GUIDANCE_RULES == GUIDANCE_RULES
    assert evaluation.GUIDANCE_SCHEDULES == GUIDANCE_SCHEDULES and evaluation.SOLVERS == (*SOLVERS, "learned")
