# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What an evaluation shows: a page in Markdown and figures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flowback_hf.evaluation.parts import Results
from flowback_hf.places import Place, parse_place
from flowback_hf.reporting import (
    figure_file,
    markdown_code,
    markdown_table,
    markdown_text,
    shade_blocks,
)


SAMPLE_COLUMNS = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "classifier_reads_label": "read as its label",
    "images_per_second_sampling": "images/s",
}


def by_prefix(results: Results, prefix: str) -> dict[str, Any]:
    """
    The results below a name.

    Example:
        ```py
        >>> from flowback_hf.evaluation import by_prefix

        >>> by_prefix({"accuracy/gradient": 0.9, "nll": 1.2}, "accuracy")
        {'gradient': 0.9}
        ```
    """
    return {name.removeprefix(f"{prefix}/"): value for name, value in results.items() if name.startswith(f"{prefix}/")}


# Figures


def draw_guidance_curve(results: Results, path: Path):
    """Draw the Fréchet distance over guidance scales, and what it is traded for."""
    curves = {
        name: {float(key.removeprefix("guidance_")): value for key, value in by_prefix(results, name).items()}
        for name in ("frechet_distance", "precision", "recall", "classifier_reads_label", "inception_score")
    }
    columns = 3 if curves["inception_score"] else 2
    with figure_file(path, 1, columns, figsize=(9.5, 2.9), layout="constrained") as (figure, [axes]):

        def plot(axis: Any, name: str, label: str, **style: Any):
            points = sorted(curves[name].items())
            axis.plot(*zip(*points), marker="o", markersize=4, label=label, **style)

        distances, best = curves["frechet_distance"], results["best_guidance_scale"]
        plot(axes[0], "frechet_distance", "Fréchet distance", color="C0")
        axes[0].plot(best, distances[best], marker="o", markersize=9, color="C3", fillstyle="none", mew=1.5)
        axes[0].annotate(
            f"{distances[best]:.3g}",
            (best, distances[best]),
            textcoords="offset points",
            xytext=(0, -19),  # below: it is the lowest point
            ha="center",
            color="C3",
        )
        axes[0].set(ylabel="Fréchet distance", ylim=(0, 1.08 * max(distances.values())))
        plot(axes[1], "precision", "precision", color="C0")
        plot(axes[1], "recall", "recall", color="C1")
        if curves["classifier_reads_label"]:
            plot(axes[1], "classifier_reads_label", "read as its label", color="C2")
        axes[1].set(ylabel="share of images", ylim=(0, 1.03))
        axes[1].legend(frameon=False)
        if curves["inception_score"]:
            plot(axes[2], "inception_score", "Inception Score", color="C0")
            axes[2].set(ylabel="Inception Score", ylim=(1, 1.08 * max(curves["inception_score"].values())))
        for axis in axes:
            axis.set_xlabel("guidance scale")
            axis.grid(alpha=0.3)
        figure.suptitle(
            f"{results['num_samples']} samples a point, against {results['num_reference_images']} images of"
            f" {results['reference']}; features of {results['features']}",
            fontsize=9,
        )


@dataclass
class ProbeCurve:
    """
    Accuracies of linear probes, place by place.

    Args:
        accuracies (`dict` of `str` to `float`): In [0, 1], by the name of the place, such as `"block7_layer6"`.
        errors (`dict` of `str` to `float`): Their standard errors, likewise. Places without one get no error bar.
        aligned (`list[Place]`, *optional*): Places to draw with full markers, the others with open ones. Default: all.
        color (defaults to `"C0"`): A color of matplotlib.
    """

    accuracies: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    aligned: list[Place] | None = None
    color: Any = "C0"


class Level(NamedTuple):
    """A horizontal line to compare the curves with: an accuracy in [0, 1], and matplotlib's color and line style."""

    accuracy: float
    color: Any
    line_style: str


def draw_linear_probes(curves: dict[str, ProbeCurve], path: Path, levels: dict[str, Level] | None = None):
    """
    Draw what a linear classifier reads off each layer, the paper's Figure 4.

    Args:
        curves (`dict` of `str` to [`ProbeCurve`]): By name, all of the same places.
        path (`pathlib.Path`): The figure.
        levels (`dict` of `str` to [`Level`], *optional*): Accuracies to compare with, by name.
    """
    names = list(next(iter(curves.values())).accuracies)
    places = [parse_place(name) for name in names]
    blocks = [block for block, _ in places]
    with figure_file(path, figsize=(max(5.0, 0.3 * len(places) + 3), 3.5), layout="constrained") as (_, [[axis]]):
        shade_blocks(axis, blocks, list(range(len(places))))
        for title, curve in curves.items():
            for block in dict.fromkeys(blocks):
                draw_block(axis, curve, [number for number in range(len(names)) if blocks[number] == block], names)
            axis.plot([], [], color=curve.color, marker="o", markersize=4, label=title)
        for title, level in (levels or {}).items():
            axis.axhline(100 * level.accuracy, color=level.color, linestyle=level.line_style, label=title)
        axis.set_xticks(range(len(places)), [str(layer) for _, layer in places], fontsize=9)
        axis.set(xlabel="layer, within flow blocks", ylabel="accuracy, %", xlim=(-0.5, len(places) - 0.5))
        axis.grid(axis="y", alpha=0.3)
        marked = any(curve.aligned is not None for curve in curves.values())
        axis.legend(
            frameon=False,
            fontsize=9,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            title="full: aligned here" if marked else None,
        )


def draw_block(axis: Any, curve: ProbeCurve, positions: list[int], names: list[str]):
    """Draw the part of a curve that lies in one flow block: places of different blocks are not connected."""
    values = [100 * curve.accuracies[names[position]] for position in positions]
    errors = [100 * curve.errors.get(names[position], 0.0) for position in positions]
    axis.errorbar(positions, values, yerr=errors if any(errors) else None, color=curve.color, elinewidth=1)
    for position, value in zip(positions, values):
        full = curve.aligned is None or parse_place(names[position]) in curve.aligned
        face = curve.color if full else "white"
        axis.plot(position, value, marker="o", markersize=4, color=curve.color, markerfacecolor=face)


def draw_linear_probe(results: Results, path: Path):
    """Draw an evaluation's linear probes, beside the accuracies of training-free classification."""
    levels = {
        "training-free, one gradient": (results.get("accuracy/gradient"), "C3", "--"),
        "training-free, Bayes": (results.get("accuracy/bayes"), "0.35", ":"),
    }
    levels = {name: Level(*level) for name, level in levels.items() if level[0] is not None}
    draw_linear_probes({"linear probe": ProbeCurve(by_prefix(results, "linear_probe"))}, path, levels)


# The page


def percent(value: float | None) -> str:
    """A share as text; empty if there is none."""
    return "" if value is None else f"{100 * value:.1f} %"


def describe_data(results: Results) -> list[str]:
    lines = [
        f"Data: {markdown_text(results['dataset'])}, {results['num_images']} images of the split"
        f" {markdown_text(repr(results['split']))}."
    ]
    if results["num_images_skipped"]:
        lines += [f"{results['num_images_skipped']} more cannot be used and were skipped."]
    if results["num_images_resized"]:
        lines += [f"{results['num_images_resized']} were resized and center-cropped."]
    return lines


def describe_likelihood(results: Results) -> list[str]:
    noise = "uniform dequantization" if "bits_per_dim" in results else "the noise of training"
    nll = f"{results['nll']:.4f} ± {results['nll_standard_error']:.4f}"
    rows = [["negative log-likelihood, nats per dimension", nll]]
    if "nll_no_class" in results:
        rows.append(["the same without the class", f"{results['nll_no_class']:.4f}"])
    if "bits_per_dim" in results:
        bits = f"{results['bits_per_dim']:.4f} ± {results['bits_per_dim_standard_error']:.4f}"
        rows.append(["bits per dimension", bits])
    return ["", "## Likelihood", "", markdown_table([f"with {noise}", "mean ± standard error"], rows)]


def describe_classification(results: Results) -> list[str]:
    methods = by_prefix(results, "accuracy")
    if not methods:
        return []
    columns = {"accuracy": "accuracy", "top5_accuracy": "top 5", "agreement_with_bayes": "agrees with Bayes"}
    columns = {name: title for name, title in columns.items() if by_prefix(results, name)}
    rows = [
        [method]
        + [percent(results.get(f"{name}/{method}")) for name in columns]
        + [f"{results[f'images_per_second/{method}']:.1f}"]
        for method in methods
    ]
    draws = results["num_noise_draws"]
    noisy = "With one draw of" if draws == 1 else f"Averaged over {draws} draws of"
    note = f"{noisy} the training noise." if draws else "On clean images."
    if "shortlist" in methods:
        note += describe_shortlist(results)
    table = markdown_table(["method", *columns.values(), "images/s"], rows)
    return ["", "## Training-free classification", "", table, "", note]


def describe_shortlist(results: Results) -> str:
    size, num_classes = results["shortlist_size"], results.get("num_classes")
    if num_classes is not None and num_classes <= size:
        return f" The shortlist holds all {num_classes} classes: it is Bayes' rule."
    return f" The shortlist has {size} classes."


def describe_samples(results: Results) -> list[str]:
    scales = [name.removeprefix("guidance_") for name in by_prefix(results, "frechet_distance")]
    if not scales:
        return []
    columns = {name: title for name, title in SAMPLE_COLUMNS.items() if by_prefix(results, name)}

    def cell(name: str, scale: str) -> str:
        value = results.get(f"{name}/guidance_{scale}")
        if value is None:
            return ""
        return f"{value:.3f}" if name in ("precision", "recall", "classifier_reads_label") else f"{value:.4g}"

    rows = [
        [f"**{scale}**" if float(scale) == results["best_guidance_scale"] else scale]
        + [cell(name, scale) for name in columns]
        for scale in scales
    ]
    note = (
        f"{results['num_samples']} samples at each scale, against {results['num_reference_images']} images of"
        f" {markdown_text(results['reference'])}, in the features of {markdown_text(results['features'])}. Compare"
        " these numbers only with others of the same features, reference and number of samples."
    )
    if len(scales) > 1 and results["best_guidance_scale"] == max(float(scale) for scale in scales):
        note += " The best scale is the largest one tried. A larger one may be better still."
    table = markdown_table(["guidance scale", *columns.values()], rows)
    figures = ["", "![Guidance](guidance_curve.png)", "", "![Samples](samples.png)"]
    return ["", "## Samples", "", table, "", note, *figures]


def describe_linear_probe(results: Results) -> list[str]:
    if "linear_probe_best" not in results:
        return []
    block, layer = parse_place(results["linear_probe_best_place"])
    note = (
        f"The best probe reaches {percent(results['linear_probe_best'])}, at layer {layer} of flow block {block}. The"
        f" probes were fitted to {results['num_probe_images']} images of the split"
        f" {markdown_text(repr(results['reference_split']))}."
    )
    return ["", "## Linear probe", "", note, "", "![Linear probe](linear_probe.png)"]


def markdown(results: Results) -> str:
    """
    The results of an evaluation as a page.

    Args:
        results (`dict`): The content of `evaluation.json`.
    Returns:
        `str`: Markdown that shows the figures beside it.
    """
    lines = [f"# Evaluation of {markdown_text(results['model'])}", ""]
    for describe in (
        describe_data,
        describe_likelihood,
        describe_classification,
        describe_samples,
        describe_linear_probe,
    ):
        lines += describe(results)
    return "\n".join([*lines, "", markdown_code(results["command"]), ""])
