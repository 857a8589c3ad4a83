import contextlib

import numpy as np
import PIL.Image
import pytest

from flowback_hf import ablation, evaluation, metrics
from flowback_hf.evaluation import Level, ProbeCurve, draw_linear_probes, markdown, parts
from flowback_hf.evaluation import report as evaluation_report
from flowback_hf.reporting import figure_file


@pytest.mark.parametrize("module", [evaluation, ablation, metrics])
def test_whatever_is_public_is_documented(module):
    assert all(getattr(module, name).__doc__ for name in module.__all__)


def test_settings_of_an_earlier_run(tmp_path):
    parts.check_settings(tmp_path / "settings.json", {"seed": 0})
    (tmp_path / "settings.json").write_text('{"seed": 0, "model": "m"}')
    parts.check_settings(tmp_path / "settings.json", {"seed": 0, "model": "m"})
    with pytest.raises(ValueError, match=r"other settings: seed \(0 then, 1 now\)"):
        parts.check_settings(tmp_path / "settings.json", {"seed": 1, "model": "m"})


# One figure for the linear probes of an evaluation and of an ablation


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and returns the figure's axis."""
    figures = []

    @contextlib.contextmanager
    def kept_figure_file(*arguments, **options):
        with figure_file(*arguments, **options) as (figure, axes):
            yield figure, axes
            figures.append(figure)

    monkeypatch.setattr(evaluation_report, "figure_file", kept_figure_file)

    def draw(*arguments):
        draw_linear_probes(arguments[0], tmp_path / "probe.png", *arguments[1:])
        return figures[-1].axes[0]

    return draw


NAMES = ["block1_layer1", "block1_layer2", "block2_layer1"]


def test_levels_and_places_of_one_curve(drawn):
    axis = drawn({"linear probe": ProbeCurve(dict(zip(NAMES, [0.1, 0.2, 0.4])))}, {"Bayes": Level(0.5, "0.35", ":")})
    assert axis.get_legend_handles_labels()[1] == ["linear probe", "Bayes"]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines if len(line.get_xdata()) > 1]
    # Places of different blocks are not connected; the level spans the axis.
    assert lines == [([0, 1], [10.0, 20.0]), ([0, 1], [50.0, 50.0])]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "1"]
    assert axis.get_legend().get_title().get_text() == ""


def test_aligned_places_are_full_and_others_open(drawn):
    curves = {
        "none": ProbeCurve(dict(zip(NAMES, [0.1, 0.2, 0.3])), aligned=[], color="0.35"),
        "reverse": ProbeCurve(dict(zip(NAMES, [0.2, 0.3, 0.4])), {NAMES[0]: 0.05}, aligned=[(2, 1)], color="C1"),
    }
    axis = drawn(curves)
    points = {
        (line.get_xdata()[0], round(line.get_ydata()[0])): line.get_markerfacecolor() != "white"
        for line in axis.lines
        if len(line.get_xdata()) == 1 and line.get_marker() == "o"
    }
    assert {place: full for place, full in points.items() if full} == {(2, 40): True} and len(points) == 6
    assert axis.get_legend().get_title().get_text() == "full: aligned here"


def test_the_figure_is_written(tmp_path):
    draw_linear_probes({"linear probe": ProbeCurve(dict(zip(NAMES, [0.1, 0.2, 0.4])))}, tmp_path / "probe.png")
    assert np.asarray(PIL.Image.open(tmp_path / "probe.png").convert("L")).std() > 10


def test_sections_of_the_page_are_those_that_were_measured():
    results = {
        "model": "a/b", "dataset": "digits", "split": "validation", "num_images": 4, "num_images_skipped": 0,
        "num_images_resized": 2, "nll": 1.0, "nll_standard_error": 0.1, "num_noise_draws": 3, "command": "python x",
    }  # fmt: skip
    page = markdown(results)
    assert [line for line in page.splitlines() if line.startswith("#")] == ["# Evaluation of a/b", "## Likelihood"]
    assert "2 were resized and center-cropped." in page and page.endswith("`python x`\n")
    page = markdown(results | {"accuracy/bayes": 0.5, "images_per_second/bayes": 2.0})
    assert "| bayes | 50.0 % | 2.0 |" in page and "Averaged over 3 draws of the training noise." in page
    best = {"best_guidance_scale": 2.0, "num_samples": 5, "num_reference_images": 6, "reference": "r", "features": "f"}
    page = markdown(results | best | {"frechet_distance/guidance_1.0": 4.0, "frechet_distance/guidance_2.0": 3.0})
    assert "| **2.0** | 3 |" in page and "The best scale is the largest one tried." in page
