# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What finished cells have measured, and how variants compare over seeds."""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from flowback_hf.ablation.grids import BASELINE, Cell
from flowback_hf.files import read_json, read_metrics_log
from flowback_hf.places import Place, place_name


Row = dict[str, Any]

# The values of a curve: 1 if larger is better, -1 if smaller is.
SIGNS = {"accuracy": 1, "nll": -1, "distance": -1}

# Metrics of the table, and of the differences from the baseline.
METRICS = (
    "nll",
    "accuracy_gradient",
    "accuracy_bayes",
    "linear_probe_aligned",
    "linear_probe_best",
    "frechet_distance_unguided",
    "frechet_distance_guided",
    "best_guidance_scale",
    "judge_reads_label",
    "times_fewer_steps_accuracy",
    "times_fewer_steps_nll",
    "times_fewer_steps_distance",
    "seconds_per_step",
)


# Cells


def read_row(cell: Cell) -> Row:
    """
    Everything that is known of a cell; of one that is not done, its status and error.

    Two curves show how it learned: `curve`, from the validations of training, and `checkpoint_curve`, from the
    evaluations of its checkpoints, on the images and noise of the final one. The latter is empty without them.
    """
    if cell.record is not None:
        return cell.record["row"]
    state = cell.state
    row = {"variant": cell.variant.name, "seed": cell.seed, "status": state["status"] or "not finished"}
    row |= {"error": state["error"]} if "error" in state else {}
    row |= {"seconds": state["seconds"], "places": cell.variant.places}
    if state["status"] != "done":
        return row
    records = read_metrics_log(cell.flow_folder)
    validations = [record for record in records if "validation_nll" in record]
    row["curve"] = {"step": [record["step"] for record in validations]}
    row["curve"] |= {
        name: [record.get(f"validation_{name}") for record in validations] for name in ("nll", "accuracy")
    }
    evaluation = read_json(cell.evaluation_file)
    row["checkpoint_curve"] = read_checkpoint_curve(cell, evaluation, row["curve"]["step"][-1])
    speed = statistics.median(record["images_per_second"] for record in records if "images_per_second" in record)
    training_args = read_json(cell.flow_folder / "training_args.json")
    images_per_step = training_args["train_batch_size"] * training_args["gradient_accumulation_steps"]
    row["evaluation"] = {name: value for name, value in evaluation.items() if name not in ("model", "command")}
    row["metrics"] = read_metrics(evaluation, cell.variant.places) | {"seconds_per_step": images_per_step / speed}
    return row


def read_checkpoint(cell: Cell, checkpoint: Path) -> dict[str, Any] | None:
    """The evaluation of a checkpoint; `None` if its samples have not been evaluated at the guidance scale."""
    results = read_json(cell.checkpoint_folder(checkpoint) / "evaluation" / "evaluation.json") or {}
    return results if distance_name(cell) in results else None


def distance_name(cell: Cell) -> str:
    return f"frechet_distance/guidance_{cell.variant.checkpoint_guidance_scale}"


def read_checkpoint_curve(cell: Cell, evaluation: dict[str, Any], last_step: int) -> dict[str, list]:
    """Accuracy, nll and distance over checkpoints; empty unless all were evaluated."""
    evaluations = {
        int(checkpoint.name.removeprefix("checkpoint-")): read_checkpoint(cell, checkpoint)
        for checkpoint in cell.checkpoints
    }
    if not evaluations or None in evaluations.values():
        return {"step": [], "accuracy": [], "nll": [], "distance": []}
    evaluations[last_step] = evaluation
    names = {"accuracy": "accuracy/gradient", "nll": "nll", "distance": distance_name(cell)}
    curve = {name: [results.get(key) for results in evaluations.values()] for name, key in names.items()}
    return {"step": list(evaluations), **curve}


def read_metrics(evaluation: dict[str, Any], places: list[Place]) -> dict[str, float]:
    """The metrics of an evaluation; what was not evaluated is missing."""
    best = evaluation["best_guidance_scale"]
    metrics = {
        "nll": evaluation["nll"],
        "accuracy_gradient": evaluation.get("accuracy/gradient"),
        "accuracy_bayes": evaluation.get("accuracy/bayes"),
        "linear_probe_best": evaluation.get("linear_probe_best"),
        "frechet_distance_unguided": evaluation.get("frechet_distance/guidance_1.0"),
        "frechet_distance_guided": evaluation["best_frechet_distance"],
        "best_guidance_scale": best,
        "judge_reads_label": evaluation.get(f"classifier_reads_label/guidance_{best}"),
    }
    probes = [evaluation.get(f"linear_probe/{place_name(place)}") for place in places]
    if None not in probes:
        metrics["linear_probe_aligned"] = statistics.fmean(probes)
    return {name: value for name, value in metrics.items() if value is not None}


# Variants


def mean_and_error(values: list[float]) -> dict[str, float | int | None]:
    """
    The mean over seeds and its standard error, which is `None` for one value.

    Example:
        ```py
        >>> from flowback_hf.ablation import mean_and_error

        >>> mean_and_error([1.0, 3.0])
        {'mean': 2.0, 'standard_error': 1.0, 'num_seeds': 2}
        ```
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "num_seeds": len(values)}


def steps_to_reach(steps: list[int], values: list[float], target: float) -> float | None:
    """
    The step at which a curve first reaches a target from below, on straight lines between its points.

    Returns:
        `float`: the step; `None` if the curve never reaches the target.

    Example:
        ```py
        >>> from flowback_hf.ablation import steps_to_reach

        >>> steps_to_reach([0, 100, 200], [0.1, 0.3, 0.7], target=0.5)
        150.0
        ```
    """
    if values[0] >= target:
        return float(steps[0])
    for (step, low), (next_step, high) in itertools.pairwise(zip(steps, values)):
        if high >= target:
            return step + (next_step - step) * (target - low) / (high - low)
    return None


def choose_curve(rows: list[Row]) -> str:
    """Where steps are counted: over checkpoints if they were evaluated, else over the validations of training."""
    return "checkpoint_curve" if any(row["checkpoint_curve"]["step"] for row in rows) else "curve"


def rows_with(rows: list[Row], curve: str, name: str) -> list[Row]:
    """The rows that have this value at every point of this curve."""
    return [row for row in rows if row[curve]["step"] and None not in row[curve].get(name, [None])]


class Reached(NamedTuple):
    """
    When rows reach what their baseline has reached at a point of its training.

    Args:
        target (`float`): The baseline's value there, the mean over its seeds.
        baseline_step (`float`): When the baseline first reaches it, the mean over its seeds.
        steps (`list[float]`): When each row does, `None` if never.
    """

    target: float
    baseline_step: float
    steps: list[float | None]


def reach_baseline(
    rows: list[Row], baseline: list[Row], curve: str, name: str, num_points: int | None = None
) -> Reached:
    """
    Find when rows reach what their baseline has at a point of its training.

    Args:
        rows, baseline (`list[dict]`): Rows of finished cells and of their baseline, as [`read_row`] returns them.
        curve, name (`str`): Which curve of a row, and which value of it.
        num_points (`int`, *optional*):
            How many points of the baseline's curve count, as if its training had ended there. Default: all.
    """
    sign = SIGNS[name]
    target = statistics.fmean(row[curve][name][:num_points][-1] for row in baseline)

    def step_of(row: Row, num_points: int | None = None) -> float | None:
        values = [sign * value for value in row[curve][name][:num_points]]
        return steps_to_reach(row[curve]["step"][:num_points], values, sign * target)

    # A seed of the baseline that ends below their mean has taken the whole run, at least.
    steps = [(row[curve]["step"][:num_points][-1], step_of(row, num_points)) for row in baseline]
    baseline_step = statistics.fmean(last if step is None else step for last, step in steps)
    return Reached(target, baseline_step, [step_of(row) for row in rows])


def add_speed_ups(
    rows: list[Row], baseline: str, curve: str, name: str, step_seconds: Mapping[str, float]
) -> float | None:
    """
    Add to the rows' metrics at which step each reaches the baseline's final value, and how many times fewer that is.

    The final value is the mean over the baseline's seeds. The steps are compared with the baseline's own mean step.

    Args:
        rows (`list[dict]`): Rows of finished cells, as [`read_row`] returns them: the baseline's and those of the
            variants that are compared with it.
        baseline (`str`): The variant that is the baseline.
        curve, name (`str`): Which curve of a row, and which value of it.
        step_seconds (`Mapping`): What a step of each variant takes. Where it is known, times are compared, too.
    Returns:
        `float`: the final value; `None` without a baseline.
    """
    rows = rows_with(rows, curve, name)
    baseline_rows = [row for row in rows if row["variant"] == baseline]
    if not baseline_rows:
        return None
    reached = reach_baseline(rows, baseline_rows, curve, name)
    for row, step in zip(rows, reached.steps):
        if step:
            times = reached.baseline_step / step
            row["metrics"] |= {f"steps_to_baseline_{name}": step, f"times_fewer_steps_{name}": times}
            if baseline in step_seconds and row["variant"] in step_seconds:
                times *= step_seconds[baseline] / step_seconds[row["variant"]]
                row["metrics"][f"times_less_time_{name}"] = times
    return reached.target


def speed_up_curve(rows: list[Row], baseline: list[Row], curve: str, name: str) -> dict[str, list]:
    """
    How many times fewer steps a variant needs, at every point of its baseline's training but the first.

    Points are left out where a seed has not reached the baseline, or had reached it at its own first point: how long
    before is not known.

    Args:
        rows, baseline (`list[dict]`): Rows of finished cells of the variant, and of its baseline.
        curve, name (`str`): Which curve of a row, and which value of it.
    Returns:
        `dict`: the baseline's `step`, and `mean` and `standard_error` over the variant's seeds.
    """
    rows, baseline = rows_with(rows, curve, name), rows_with(baseline, curve, name)
    points = {"step": [], "mean": [], "standard_error": []}
    num_points = min((len(row[curve]["step"]) for row in baseline), default=0) if rows else 0
    for number in range(2, num_points + 1):
        reached = reach_baseline(rows, baseline, curve, name, number)
        if all(step is not None and step > row[curve]["step"][0] for row, step in zip(rows, reached.steps)):
            figure = mean_and_error([reached.baseline_step / step for step in reached.steps])
            points["step"].append(baseline[0][curve]["step"][number - 1])
            points["mean"].append(figure["mean"])
            points["standard_error"].append(figure["standard_error"])
    return points


def summarise(
    rows: list[Row],
    baselines: Mapping[str, str] = MappingProxyType({}),
    step_seconds: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """
    Summarise the cells of each variant.

    Args:
        rows (`list[dict]`): As [`read_row`] returns them. Speed-ups are added to the metrics of finished ones.
        baselines (`Mapping` of `str` to `str`): The baseline of each variant, as [`find_baselines`] returns them.
            Default: `none`.
        step_seconds (`Mapping` of `str` to `float`): What a step of each variant takes, measured in turn.
    Returns:
        `dict`: `baseline_final`, by baseline its final accuracy, nll and distance, and `variants`: by name the numbers
        of cells, the baseline, the mean and standard error of each metric, those of its difference from the baseline,
        and how many times fewer steps it needs over training (`speed_up_curves`).
    """
    done = [row for row in rows if row["status"] == "done"]
    curve = choose_curve(done)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    rows_of = {name: [row for row in done if row["variant"] == name] for name in names}
    baseline_of = {name: baselines.get(name, BASELINE) for name in names}
    baseline_final = {}
    for baseline in dict.fromkeys(baseline_of.values()):
        compared = [row for name in names if baseline_of[name] == baseline for row in rows_of[name]]
        baseline_final[baseline] = {
            name: add_speed_ups(compared, baseline, curve, name, step_seconds) for name in SIGNS
        }
    variants = {}
    for name, own in rows_of.items():
        baseline = rows_of.get(baseline_of[name], [])
        variants[name] = {
            "baseline": baseline_of[name],
            "num_cells": sum(row["variant"] == name for row in rows),
            "num_done": len(own),
            "metrics": {
                metric: mean_and_error([row["metrics"][metric] for row in own if metric in row["metrics"]])
                for metric in dict.fromkeys(metric for row in own for metric in row["metrics"])
            },
            "minus_baseline": paired_differences(own, baseline),
            "speed_up_curves": {value: speed_up_curve(own, baseline, curve, value) for value in SIGNS},
        }
    return {"baseline_final": baseline_final, "variants": variants}


def rank_on_validation(rows: list[Row], candidates: Collection[str]) -> list[dict[str, Any]]:
    """
    Rank variants by what the validations of training say, which the reported figures are not made of.

    The first is the one that needs the fewest steps to reach the final accuracy of `none`, of those that end with no
    higher nll.

    Args:
        rows (`list[dict]`): Rows of finished cells, as [`read_row`] returns them.
        candidates (collection of `str`): Names of the variants that may be picked. Those without a row for every seed
            of `none` are left out, and those that do not reach its accuracy with every seed.
    Returns:
        `list[dict]`: of each variant the `variant`, its mean `times_fewer_steps` and `nll`, and whether it is
        `eligible`: whether its nll is no higher than that of `none`. The best is first.
    """
    rows = rows_with(rows, "curve", "accuracy")
    baseline = [row for row in rows if row["variant"] == BASELINE]
    seeds = {row["seed"] for row in baseline}

    def final_nll(rows: list[Row]) -> float:
        return statistics.fmean(row["curve"]["nll"][-1] for row in rows)

    ranking = []
    for name in candidates:
        own = [row for row in rows if row["variant"] == name and row["seed"] in seeds]
        reached = reach_baseline(own, baseline, "curve", "accuracy") if len(own) == len(seeds) > 0 else None
        if reached is None or not all(reached.steps):
            continue
        times = statistics.fmean(reached.baseline_step / step for step in reached.steps)
        eligible = final_nll(own) <= final_nll(baseline)
        ranking.append({"variant": name, "times_fewer_steps": times, "nll": final_nll(own), "eligible": eligible})
    return sorted(ranking, key=lambda entry: (not entry["eligible"], -entry["times_fewer_steps"]))


def paired_differences(rows: list[Row], baseline: list[Row]) -> dict[str, Any]:
    """
    Mean and standard error of each metric minus the baseline's of the same seed.

    Pairs leave out what a seed does to both. Metrics that a row lacks are left out.
    """
    pairs = [(row["metrics"], other["metrics"]) for row in rows for other in baseline if row["seed"] == other["seed"]]
    names = [name for name in METRICS if pairs and all(name in metrics for pair in pairs for metrics in pair)]
    return {name: mean_and_error([own[name] - other[name] for own, other in pairs]) for name in names}
