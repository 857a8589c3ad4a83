"""The flags of training, which are defined where nothing slow is imported."""

import argparse
from dataclasses import fields

from diffusers.optimization import SchedulerType

from flowback_hf.alignment import objective, teacher
from flowback_hf.models import transformer_tarflow
from flowback_hf.training import TrainingArguments
from flowback_hf_cli import training


def test_choices_are_those_of_the_package():
    assert training.STRATEGIES == objective.STRATEGIES
    assert training.PROJECTOR_TYPES == objective.PROJECTOR_TYPES
    assert training.POSITION_EMBEDDINGS == transformer_tarflow.POSITION_EMBEDDINGS
    assert training.ACTIVATION_FNS == transformer_tarflow.ACTIVATION_FNS
    assert training.NOISE_TYPES == transformer_tarflow.NOISE_TYPES
    # Piecewise constant schedules need rules, for which there is no flag.
    kinds = [kind for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    assert training.LR_SCHEDULERS == tuple(kind.value for kind in kinds)


def test_the_trainers_arguments_are_flags_with_the_same_defaults():
    args = training.parse_args(["--output_dir", "run", "--train_data_dir", "images"])
    assert TrainingArguments.from_args(args) == TrainingArguments("run")
    assert len(fields(TrainingArguments)) > 30


def actions_of(module, monkeypatch):
    found = []

    def keep_actions(parser, arguments):
        found.extend(parser._actions)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", keep_actions)
        try:
            module.parse_args([])
        except SystemExit:
            return [action for action in found if action.dest != "help"]


def test_every_flag_is_explained_in_sentences_with_its_default(train_rra, monkeypatch):
    actions = actions_of(train_rra, monkeypatch)
    line = ["--output_dir", "run", "--train_data_dir", "images", "--debug"]
    assert len(actions) == len(vars(training.parse_args(line)))
    for action in actions:
        assert action.help[0].isupper() and action.help.endswith("."), action.dest
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "Default: %(default)s" in action.help, action.dest
    (teacher_action,) = [action for action in actions if action.dest == "teacher_model_name_or_path"]
    assert f"Default: {teacher.DEFAULT_TEACHER}." in teacher_action.help
