# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What an ablation shows: a table in Markdown, its numbers in JSON, and figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from flowback_hf.ablation.grids import BASELINE, Cell
from flowback_hf.ablation.runner import ablate_command
from flowback_hf.ablation.statistics import Row, choose_curve, mean_and_error, read_row, summarise
from flowback_hf.evaluation.report import ProbeCurve, by_prefix, draw_linear_probes
from flowback_hf.files import write_json, write_text
from flowback_hf.reporting import (
    current_commit,
    describe_machine,
    figure_file,
    markdown_table,
    markdown_text,
)


# Column, metric, factor, digits.
COLUMNS = (
    ("nll", "nll", 1, 4),
    ("accuracy, one gradient, %", "accuracy_gradient", 100, 1),
    ("accuracy, Bayes, %", "accuracy_bayes", 100, 1),
    ("probe at its places, %", "linear_probe_aligned", 100, 1),
    ("best probe, %", "linear_probe_best", 100, 1),
    ("FD unguided", "frechet_distance_unguided", 1, 3),
    ("FD guided", "frechet_distance_guided", 1, 3),
    ("at scale", "best_guidance_scale", 1, 1),
    ("read as its label, %", "judge_reads_label", 100, 1),
    ("× fewer steps, accuracy", "times_fewer_steps_accuracy", 1, 2),
    ("× fewer steps, nll", "times_fewer_steps_nll", 1, 2),
    ("× fewer steps, FD", "times_fewer_steps_distance", 1, 2),
    ("× less time, accuracy", "times_less_time_accuracy", 1, 2),
    ("× less time, nll", "times_less_time_nll", 1, 2),
    ("× less time, FD", "times_less_time_distance", 1, 2),
    ("ms a step", "seconds_per_step", 1000, 0),
)


def write_report(
    cells: Sequence[Cell],
    settings: dict[str, Any],
    output_dir: Path,
    command: Sequence[str] = (),
    threads: int = 1,
    jobs: int = 1,
    step_seconds: Mapping[str, float] = MappingProxyType({}),
):
    """
    Write `results.json`, `results.md` and figures of all cells, finished or not.

    Args:
        cells (`Sequence[Cell]`): The cells of this command.
        settings (`dict`): The content of the settings file.
        output_dir (`pathlib.Path`): Where the files are written.
        command (`Sequence[str]`): The command line that the report says it came from.
        threads, jobs (`int`): Threads of each cell, and cells that run side by side.
        step_seconds (`Mapping` of `str` to `float`): What a step of each variant takes, measured in turn.
    """
    rows = [read_row(cell) for cell in cells]
    baselines = {cell.variant.name: cell.variant.baseline for cell in cells}
    summary = summarise(rows, baselines, step_seconds)
    seconds = sum(sum(row["seconds"].values()) for row in rows)
    machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
    report = {
        "command": ablate_command(command),
        "commit": current_commit(),
        "machine": machine | {"threads": threads, "jobs": jobs},
        "cell_hours": round(seconds / 3600, 3),
        "settings": settings,
        **summary,
        "cells": rows,
    }
    write_json(output_dir / "results.json", report)
    write_text(output_dir / "results.md", markdown(report))
    done = [row for row in rows if row["status"] == "done"]
    if done:
        draw_curves(done, summary, output_dir / "curves.png")
        draw_speed_ups(summary["variants"], output_dir / "speed_ups.png")
        draw_distance_against_accuracy(summary, output_dir / "distance_against_accuracy.png")
        draw_probes(done, output_dir / "linear_probe.png")


# The page


def format_figure(figure: dict[str, Any] | None, factor: float, digits: int, num_done: int | None) -> str:
    """
    A mean with its standard error, and of how many seeds it is, if not of all.

    Example:
        ```py
        >>> from flowback_hf.ablation.report import format_figure

        >>> format_figure({"mean": 0.5, "standard_error": 0.01, "num_seeds": 2}, 100, 1, num_done=3)
        '50.0 ± 1.0 (2 of 3)'
        ```
    """
    if figure is None:
        return ""
    text = f"{factor * figure['mean']:.{digits}f}"
    if figure["standard_error"] is not None:
        text += f" ± {factor * figure['standard_error']:.{digits}f}"
    return text if num_done in (None, figure["num_seeds"]) else f"{text} ({figure['num_seeds']} of {num_done})"


def markdown(report: dict[str, Any]) -> str:
    """
    The results of an ablation as a page.

    Args:
        report (`dict`): The content of `results.json`.
    Returns:
        `str`: Markdown that shows the figures beside it.
    """
    variants = report["variants"]
    columns = [column for column in COLUMNS if any(column[1] in variant["metrics"] for variant in variants.values())]
    table = [
        [name, variant["num_done"]]
        + [
            format_figure(variant["metrics"].get(key), factor, digits, variant["num_done"])
            for _, key, factor, digits in columns
        ]
        for name, variant in variants.items()
    ]
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [
        f"`{report['command']}`",
        "",
        f"Commit {report['commit']}; {machine}; {report['cell_hours']:.2f} hours, summed over the cells.",
        "",
        markdown_table(["variant", "seeds", *(title for title, *_ in columns)], table),
        "",
        explain_table(report),
        *compare_with_baseline(variants, columns),
        *list_unfinished(report["cells"]),
    ]
    figures = {"curves": "Over steps", "distance_against_accuracy": "Distance and accuracy"}
    if any(has_speed_ups(variant) for variant in variants.values()):
        figures["speed_ups"] = "Times fewer steps"
    if any("linear_probe_best" in variant["metrics"] for variant in variants.values()):
        figures["linear_probe"] = "Linear probe"
    lines += [f"\n![{title}]({name}.png)" for name, title in figures.items()]
    return "\n".join(lines) + "\n"


def explain_table(report: dict[str, Any]) -> str:
    """What the columns mean."""
    finals = [(name, final) for name, final in report["baseline_final"].items() if final["accuracy"] is not None]
    by_distance = [f"{final['distance']:.3f}" for _, final in finals if final["distance"] is not None]
    text = (
        "Mean ± standard error over seeds. Do not read anything into differences smaller than their errors. nll: nats"
        " per dimension. Guided: at the scale with the lowest distance. Probe at its places: a linear classifier on"
        " the hidden states where the variant is aligned; for the baseline, where it would be by default."
    )
    if finals:
        reached = ", ".join(f"{name}: {100 * final['accuracy']:.1f} %, {final['nll']:.4f}" for name, final in finals)
        text += (
            " × fewer steps: the step at which the baseline first reaches its own final accuracy by one gradient and"
            f" nll (the means over seeds, {reached}), divided by the step at which the variant does. A seed that"
            " never reaches it is left out and counted."
        )
    if by_distance:
        scale = report["settings"]["checkpoint_guidance_scale"]
        text += f" The same for its final FD, {', '.join(by_distance)} at guidance {scale}."
        text += " All are measured at checkpoints, as the final flow is, on straight lines between them."
    elif finals:
        text += " They are measured at the validations of training with one draw of noise."
    if any("times_less_time_accuracy" in variant["metrics"] for variant in report["variants"].values()):
        text += (
            " × less time: that times the ratio of what a step takes, from one measurement of all variants in turn."
        )
    return f"{text} ms a step: as each cell ran, which other processes may have slowed down."


def compare_with_baseline(variants: dict[str, Any], columns: list[tuple[str, str, float, int]]) -> list[str]:
    """A table of differences from the baseline, seed by seed."""
    differences = {
        name: variant["minus_baseline"]
        for name, variant in variants.items()
        if name != variant["baseline"] and variant["minus_baseline"] and variant["num_done"] > 1
    }
    if not differences:
        return []
    compared = [column for column in columns if all(column[1] in figures for figures in differences.values())]
    table = [
        [
            f"{name} − {variants[name]['baseline']}",
            *(format_figure(figures[key], factor, digits, None) for _, key, factor, digits in compared),
        ]
        for name, figures in differences.items()
    ]
    intro = "Differences from the baseline with the same seed, which leave out what a seed does to both:"
    return ["", intro, "", markdown_table(["difference", *(title for title, *_ in compared)], table)]


def list_unfinished(rows: list[Row]) -> list[str]:
    """A table of cells without results."""
    unfinished = [row for row in rows if row["status"] != "done"]
    if not unfinished:
        return []
    cells = [[row["variant"], row["seed"], row["status"], markdown_text(row.get("error", ""))] for row in unfinished]
    return ["", markdown_table(["cell without result", "seed", "status", "error"], cells)]


# Figures


def colors_of(names: Iterable[str]) -> dict[str, Any]:
    """A color for each variant; the baseline is grey."""
    import matplotlib

    palette = matplotlib.colormaps["tab10" if len(list(names)) <= 11 else "tab20"].colors
    others = [name for name in names if name != BASELINE]
    return {BASELINE: "0.35"} | {name: palette[number % len(palette)] for number, name in enumerate(others)}


def mean_curves(rows: list[Row], curve: str, name: str) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """Steps, means and standard errors over seeds, by variant."""
    curves = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row[curve] for row in rows if row["variant"] == variant]
        own = [points for points in own if points["step"] and None not in points.get(name, [None])]
        if own:
            points = [mean_and_error(list(values)) for values in zip(*(points[name] for points in own))]
            means, errors = [point["mean"] for point in points], [point["standard_error"] or 0.0 for point in points]
            curves[variant] = (own[0]["step"], means, errors)
    return curves


def draw_curves(rows: list[Row], summary: dict[str, Any], path: Path):
    """Draw accuracy, distance and nll of every variant over steps, and what the baseline ends with."""
    colors = colors_of(summary["variants"])
    panels = {
        "accuracy": (100, "accuracy by one gradient, %"),
        "distance": (1, "Fréchet distance"),
        "nll": (1, "nll, nats per dimension"),
    }
    curves = {name: mean_curves(rows, choose_curve(rows), name) for name in panels}
    panels = {name: panel for name, panel in panels.items() if curves[name]}
    size = (4.6 * len(panels) + 1.5, 3.8)
    with figure_file(path, 1, len(panels), figsize=size, layout="constrained") as (_, axes):
        for axis, (name, (factor, label)) in zip(axes[0], panels.items()):
            for variant, (steps, means, errors) in curves[name].items():
                lower = [factor * (mean - error) for mean, error in zip(means, errors)]
                upper = [factor * (mean + error) for mean, error in zip(means, errors)]
                values = [factor * mean for mean in means]
                axis.plot(steps, values, color=colors[variant], marker="o", markersize=3, label=variant)
                axis.fill_between(steps, lower, upper, color=colors[variant], alpha=0.15, linewidth=0)
            for baseline, final in summary["baseline_final"].items():
                if final[name] is not None:
                    axis.axhline(factor * final[name], color=colors[baseline], linestyle="--", linewidth=1)
            axis.set(xlabel="step", ylabel=label, xlim=(0, None))
            axis.grid(alpha=0.3)
        zoom_in(axes[0, -1], curves["nll"])
        handles, labels = axes[0, -1].get_legend_handles_labels()
        axes[0, -1].legend(
            handles,
            [legend_entry(variant, summary) for variant in labels],
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            title="(× fewer steps to the\nbaseline's final accuracy)",
        )


def zoom_in(axis: Any, curves: dict[str, tuple[list[int], list[float], list[float]]]):
    """Show the last two thirds of falling curves: what comes before is far above all that follows."""
    later = [mean for steps, means, _ in curves.values() for step, mean in zip(steps, means) if 3 * step >= steps[-1]]
    margin = 0.05 * (max(later) - min(later))
    if margin:
        axis.set_ylim(min(later) - margin, max(later) + margin)


def legend_entry(variant: str, summary: dict[str, Any]) -> str:
    times = summary["variants"][variant]["metrics"].get("times_fewer_steps_accuracy")
    is_baseline = variant == summary["variants"][variant]["baseline"]
    if times is None or is_baseline:
        return variant
    num_done = summary["variants"][variant]["num_done"]
    of_seeds = "" if times["num_seeds"] == num_done else f", {times['num_seeds']} of {num_done} seeds"
    return f"{variant} ({times['mean']:.1f}×{of_seeds})"


def has_speed_ups(variant: dict[str, Any]) -> bool:
    """Whether a variant of a summary has reached its baseline somewhere."""
    return any(points["step"] for points in variant["speed_up_curves"].values())


def draw_speed_ups(variants: dict[str, Any], path: Path):
    """
    Draw how many times fewer steps each variant needs to be where its baseline is, over the baseline's steps.

    Args:
        variants (`dict`): Those of [`summarise`]. Without any that reaches its baseline, nothing is drawn.
        path (`pathlib.Path`): Where the figure is saved.
    """
    shown = {name: own for name, own in variants.items() if name != own["baseline"] and has_speed_ups(own)}
    if not shown:
        return
    colors = colors_of(variants)
    titles = {"accuracy": "accuracy by one gradient", "nll": "nll", "distance": "Fréchet distance"}
    panels = [name for name in titles if any(own["speed_up_curves"][name]["step"] for own in shown.values())]
    size = (4.6 * len(panels) + 1.5, 3.8)
    with figure_file(path, 1, len(panels), figsize=size, layout="constrained") as (_, axes):
        for axis, name in zip(axes[0], panels):
            for variant, own in shown.items():
                points = own["speed_up_curves"][name]
                means, errors = points["mean"], [error or 0.0 for error in points["standard_error"]]
                lower, upper = ([mean + sign * error for mean, error in zip(means, errors)] for sign in (-1, 1))
                axis.plot(points["step"], means, color=colors[variant], marker="o", markersize=3, label=variant)
                axis.fill_between(points["step"], lower, upper, color=colors[variant], alpha=0.15, linewidth=0)
            axis.axhline(1, color=colors[BASELINE], linestyle="--", linewidth=1)
            axis.set(xlabel="step of the baseline", ylabel="× fewer steps", title=titles[name], xlim=(0, None))
            axis.grid(alpha=0.3)
        drawn = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels())}
        axes[0, -1].legend(drawn.values(), drawn, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_distance_against_accuracy(summary: dict[str, Any], path: Path):
    """Draw the Fréchet distance over accuracy, the paper's Figure 1d: lower right is better."""
    colors = colors_of(summary["variants"])
    with figure_file(path, 1, 2, figsize=(10, 3.6), layout="constrained") as (_, [axes]):
        for axis, guidance in zip(axes, ("unguided", "guided")):
            for name, variant in summary["variants"].items():
                accuracy = variant["metrics"].get("accuracy_gradient")
                distance = variant["metrics"].get(f"frechet_distance_{guidance}")
                if accuracy is None or distance is None:
                    continue
                axis.errorbar(
                    100 * accuracy["mean"],
                    distance["mean"],
                    xerr=100 * (accuracy["standard_error"] or 0) or None,
                    yerr=distance["standard_error"],
                    color=colors[name],
                    marker="o",
                    markersize=6,
                    elinewidth=1,
                    linestyle="none",
                    label=name,
                )
            axis.set(xlabel="accuracy by one gradient, %", ylabel="Fréchet distance", title=guidance)
            axis.grid(alpha=0.3)
        axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_probes(rows: list[Row], path: Path):
    """Draw the linear probes of every variant that has any; its aligned places have full markers."""
    probed = [row for row in rows if by_prefix(row["evaluation"], "linear_probe")]
    names = list(dict.fromkeys(row["variant"] for row in probed))
    colors = colors_of(names)
    curves = {}
    for name in names:
        own = [row for row in probed if row["variant"] == name]
        probes = [by_prefix(row["evaluation"], "linear_probe") for row in own]
        points = {place: mean_and_error([probe[place] for probe in probes]) for place in probes[0]}
        curves[name] = ProbeCurve(
            {place: point["mean"] for place, point in points.items()},
            {place: point["standard_error"] or 0.0 for place, point in points.items()},
            [] if name == BASELINE else [tuple(place) for place in own[0]["places"]],
            colors[name],
        )
    if curves:
        draw_linear_probes(curves, path)
