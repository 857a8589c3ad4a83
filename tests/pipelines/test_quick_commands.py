"""What the commands answer before they import anything slow, and how they end on bad input."""

import argparse
import json

import PIL.Image
import pytest

from flowback_hf.pipelines import pipeline_flowback_classification

from ..conftest import REPOSITORY, command_line, end_of_command
from .conftest import CLASS_NAMES


COMMANDS = ["push_to_hub", "convert_tarflow", "report_demo", "classify"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_explained_in_sentences_with_its_default(script, monkeypatch, name):
    module, actions = script(name), []

    def keep_actions(parser, arguments):
        actions.extend(parser._actions)
        raise SystemExit

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", keep_actions)
    with pytest.raises(SystemExit):
        module.parse_args([])
    actions = [action for action in actions if action.dest != "help"]
    assert len(actions) >= 6
    for action in actions:
        assert action.help and action.help[0].isupper() and action.help.endswith("."), action.dest
        assert action.required or " Default: " in action.help, action.dest
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "%(default)s" in action.help, action.dest


def test_the_choices_are_the_packages(script):
    classify = script("classify")
    assert classify.METHODS == pipeline_flowback_classification.METHODS
    for method in classify.METHODS:
        line = ["--model", "flow", "--images", "images", "--method", method]
        assert classify.parse_args(line).method == method


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("push_to_hub", {"model": "nowhere"}, "`--model` must be the folder of a saved pipeline, but nowhere has no"),
        (
            "convert_tarflow",
            {"checkpoint": "nowhere.pth", "output_dir": "out", "sample_size": 8, "noise_std": 0.1},
            "`checkpoint` must be an existing file, or 'user/repository:file' on the Hub, but is 'nowhere.pth'.",
        ),
        (
            "report_demo",
            {"model": "nowhere", "data_dir": "nowhere", "output_dir": "out"},
            "`--data_dir` must be an output folder of training/prepare_demo.py, but nowhere has no demo.json.",
        ),
        ("classify", {"model": "nowhere", "images": "nowhere"}, "`--images` must be existing files or folders, but"),
    ],
    ids=COMMANDS,
)
def test_bad_input_ends_in_one_line(name, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    end = end_of_command(REPOSITORY / "pipelines" / f"{name}.py", command_line(**options), monkeypatch)
    assert end.startswith(f"{name}.py: error: {message}") and not list(tmp_path.iterdir())


# The demo's report


@pytest.fixture
def demo(model_folder, judge, tmp_path):
    """A trained flow's folder and its data set's, as the report reads them."""
    model, data = tmp_path / "flow", tmp_path / "insects"
    model.symlink_to(model_folder, target_is_directory=True)
    data.mkdir()
    (data / "judge").symlink_to(judge, target_is_directory=True)
    (data / "demo.json").write_text(json.dumps({"kind": "insects", "judge_validation_accuracy": 0.9}))
    return model, data


@pytest.fixture
def metrics_file(model_folder):
    path = model_folder / "metrics.jsonl"
    records = [{"step": 0, "validation_nll": 1.5}, {"step": 5, "loss": 0.2}, {"step": 9, "validation_nll": -0.5}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 10, "validati')
    yield path
    path.unlink(missing_ok=True)


def test_the_demo_report(script, demo, metrics_file, tmp_path, capsys):
    report_demo, (model, data) = script("report_demo"), demo
    line = command_line(model=model, data_dir=data, output_dir=tmp_path / "out", images_per_class=4, seed=3)
    report_demo.main(report_demo.parse_args(line))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (report["validation_nll_before"], report["validation_nll_after"]) == (1.5, -0.5)
    assert (report["num_samples"], report["guidance_scale"]) == (12, 1.5)
    assert report["judge_validation_accuracy"] == 0.9
    assert report["judge_reads_label"] in [hits / 12 for hits in range(13)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "samples.png"]
    grid = PIL.Image.open(tmp_path / "out" / "samples.png")
    assert grid.width > grid.height  # three rows of four, with their names on the left


def test_the_demo_report_counts_what_the_judge_reads(script, demo, metrics_file, monkeypatch, tmp_path):
    report_demo, (model, data) = script("report_demo"), demo
    monkeypatch.setattr(report_demo, "classify_with_judge", lambda images, judge_dir: CLASS_NAMES * 2)
    line = command_line(model=model, data_dir=data, output_dir=tmp_path / "out", images_per_class=2)
    report_demo.main(report_demo.parse_args(line))
    # ant, ant, bee, bee, cat, cat read as ant, bee, cat, ant, bee, cat
    assert json.loads((tmp_path / "out" / "report.json").read_text())["judge_reads_label"] == 2 / 6


def test_a_demo_report_of_something_else_is_refused(script, demo, metrics_file, tmp_path):
    report_demo, (model, data) = script("report_demo"), demo
    options = {"model": model, "data_dir": data, "output_dir": tmp_path / "out"}
    metrics_file.unlink()
    with pytest.raises(ValueError, match="`--model` must be an output folder of .*flow has no metrics.jsonl"):
        report_demo.main(report_demo.parse_args(command_line(**options)))
    assert not (tmp_path / "out").exists()
