#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Write the tables of README.md and docs/ from what was measured, `benchmarks/results`.

    python benchmarks/tables.py           # rewrite the tables
    python benchmarks/tables.py --check   # change nothing; exit with 1 and name the tables that differ

A page names a table between two comments, and what stands between them is replaced:

    <!-- table: sampling-speed -->
    <!-- end table -->

Below each table stand the file, the command and the machine its figures come from.
"""

import argparse
import copy
import itertools
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks", "results")
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- end table -->)", re.DOTALL)
# The options of training/ablate.py that choose cells.
PART_OF_GRID = re.compile(r" --(?:variants|seeds)(?: (?!--)\S+)+")

TABLES: dict[str, Callable[[], "Table"]] = {}


@dataclass
class Table:
    """
    A table and where its figures come from.

    Args:
        header (`list[str]`): The titles of its columns.
        rows (`list[list[str]]`): Its cells.
        reports (`list[str]`): The files in `benchmarks/results`, without `.json`, that hold its figures.
        origin (`str`): What was done on the machine of the reports.
    """

    header: list[str]
    rows: list[list[str]]
    reports: list[str] = field(default_factory=list)
    origin: str = "Measured"

    def markdown(self, page: Path) -> str:
        """The table and its sources, linked as seen from a page of the repository."""
        from flowback_hf.reporting import markdown_table

        if not self.rows:
            return "Nothing has been measured yet."
        summary = f"{self.origin} on {', '.join(dict.fromkeys(map(describe_machine, self.reports)))}: the commands"
        sources = describe_sources(self.reports, page)
        lines = [markdown_table(self.header, self.rows), ""]
        lines += [f"<details><summary>{summary}</summary>", "", *sources, "", "</details>"]
        return "\n".join(lines)


def table(name: str) -> Callable[[Callable[[], Table]], Callable[[], Table]]:
    """Register the function that makes the table of this name."""

    def register(make: Callable[[], Table]) -> Callable[[], Table]:
        TABLES[name] = make
        return make

    return register


@cache
def read(report: str) -> dict[str, Any]:
    """A file of `benchmarks/results`: the command, the commit, the machine and the results."""
    return json.loads((REPOSITORY / RESULTS / f"{report}.json").read_text())


def describe_machine(report: str) -> str:
    machine = read(report)["machine"]
    return machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"


def describe_sources(reports: list[str], page: Path) -> list[str]:
    """Lines of Markdown: the files, linked as seen from the page, the command, the threads and the commit."""
    links: dict[str, list[str]] = {}
    cells: dict[str, list[str]] = {}
    for report in reports:
        if "row" in read(report):
            cells.setdefault(PART_OF_GRID.sub("", read(report)["command"]), []).append(report)
        else:
            origin = f"`{read(report)['command']}`, {describe_run(report)}, at commit {read(report)['commit']}"
            links.setdefault(origin, []).append(f"[`{report}.json`]({link_to(report, page)})")
    lines = [f"- {', '.join(files)}: {origin}" for origin, files in links.items()]
    return [*(describe_cells(command, of_command, page) for command, of_command in cells.items()), *lines]


def describe_run(report: str) -> str:
    machine = read(report)["machine"]
    return f"with {machine['threads']} thread{'s' * (machine['threads'] > 1)}, torch {machine['torch']}"


def link_to(report: str, page: Path) -> str:
    return os.path.relpath(RESULTS / f"{report}.json", page.parent)


def describe_cells(command: str, reports: list[str], page: Path) -> str:
    """A line of Markdown on cells of an ablation, which ran by the same command, a part of the grid at a time."""
    rows = [read(report)["row"] for report in reports]
    hours = sum(sum(row["seconds"].values()) for row in rows) / 3600
    cells = []
    for variant, own in by_variant(reports).items():
        seeds = [f"seed {read(report)['row']['seed']} at {read(report)['commit']}" for report in own]
        cells.append(", ".join([f"[{variant}]({os.path.dirname(link_to(own[0], page))})", *seeds]))
    return (
        f"- {hours:.1f} hours, {describe_run(reports[0])}: `{command}`, a part at a time (`--variants`, `--seeds`):"
        f" {'; '.join(cells)}"
    )


def by_variant(reports: list[str]) -> dict[str, list[str]]:
    """The records of an ablation's cells, grouped by their variants."""
    grouped: dict[str, list[str]] = {}
    for report in reports:
        grouped.setdefault(read(report)["row"]["variant"], []).append(report)
    return grouped


# How figures are written


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def minutes(value: float) -> str:
    return f"{value / 60:.0f} min"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB"


def mean_and_error(figure: dict[str, Any] | None, digits: int, factor: float = 1, num_seeds: int | None = None) -> str:
    """`mean ± standard error`; names the seeds behind it where fewer than `num_seeds` have the figure."""
    if figure is None:
        return ""
    text = f"{factor * figure['mean']:.{digits}f}"
    if figure["standard_error"] is not None:
        text += f" ± {factor * figure['standard_error']:.{digits}f}"
    if num_seeds is not None and figure["num_seeds"] < num_seeds:
        text += f" ({figure['num_seeds']} of {num_seeds} seeds)"
    return text


# Sampling

SAMPLERS = ["published loop", "GS-Jacobi", "SeJD", "auto", "auto, compiled"]


def sampling_table(report: str) -> Table:
    rows = []
    for case in sorted(read(report)["results"]["sampling"], key=lambda case: case["guidance_scale"]):
        row = [str(case["batch_size"]), f"{case['guidance_scale']:g}"]
        for name in SAMPLERS:
            sampler = case["samplers"][name]
            times = sampler["times_faster_than_published_loop"]
            text = seconds(sampler["median_seconds"])
            row.append(text if name == "published loop" else f"{text} ({times:.1f}×)")
        limit = max(case["floor"], key=case["floor"].get)
        rows.append([*row, f"{seconds(case['floor'][limit])} ({limit})"])
    columns = [f"`{name}`" if name == "auto" else name for name in SAMPLERS]
    return Table(["batch", "guidance", *columns, "floor"], rows, [report])


@table("sampling-speed")
def sampling_speed() -> Table:
    return sampling_table("sampling")


@table("sampling-batch-1")
def sampling_batch_1() -> Table:
    return sampling_table("sampling_batch_1")


@table("sampling-cold")
def sampling_cold() -> Table:
    rows = []
    for case in read("sampling_cold")["results"]:
        first, later = seconds(case["first_seconds"]), seconds(case["median_seconds"])
        times = f"{case['times_faster_than_published_loop']:.1f}×"
        rows.append([str(case["batch_size"]), case["sampler"], first, later, times])
    rows.sort(key=lambda row: int(row[0]))  # stable: the order in which batch sizes were met is in the command
    return Table(["batch", "sampler", "first call", "later calls", "later, × faster"], rows, ["sampling_cold"])


@table("sampling-memory")
def sampling_memory() -> Table:
    rows, reports = [], ["sampling", "sampling_batch_1"]
    for report in reports:
        memory = read(report)["results"]["memory"]
        for solver, peak in memory["peak_bytes"].items():
            cache_bytes, batch = mebibytes(memory["cache_bytes"]), str(memory["batch_size"])
            rows.append([batch, solver, mebibytes(peak), cache_bytes])
    return Table(["batch", "solver", "peak memory", "of which keys and values"], rows, reports)


# Training


@table("checkpoints")
def checkpoints() -> Table:
    rows, reports = [], ["checkpoints", "checkpoints_100m"]
    for report in reports:
        results = read(report)["results"]
        taken = results["seconds"]
        row = [f"{results['num_parameters'] / 1e6:.1f} million", mebibytes(results["num_bytes"])]
        row += [seconds(taken[name]) for name in ("plain", "saved", "background")]
        rows.append([*row, f"{seconds(taken['nll'])} ({results['batch_size']} images)"])
    header = [
        "parameters",
        "size",
        "only written",
        "checked and flushed",
        "training waits with `--async_checkpointing`",
    ]
    return Table([*header, "nll of a batch"], rows, reports)


@table("train-loop")
def train_loop() -> Table:
    names = {"as it is": "the trainer's", "reading every step": "reading the loss at every step"}
    names |= {"one batch": "the same batch in every step, without a loader"}
    rows = []
    for loop in read("train_loop")["results"]["loops"]:
        row = [names[loop["loop"]], f"{loop['median_seconds']:.3f} s", f"{loop['times_as_it_is']:.3f}"]
        rows.append([*row, f"{loop['reads_per_step']:.1f}"])
    return Table(["loop", "a step", "relative to the trainer's", "reads of the device per step"], rows, ["train_loop"])


@table("loader")
def loader() -> Table:
    cases = read("loader")["results"]["speeds"]
    speeds = {(case["format"], case["source"], case["num_workers"]): case["images_per_second"] for case in cases}
    numbers = sorted({case["num_workers"] for case in cases})
    rows = []
    for kind, source in dict.fromkeys((case["format"], case["source"]) for case in cases):
        figures = [speeds[kind, source, number] for number in numbers]
        first = speeds[kind, "files", 0]
        rows.append([kind.upper(), source, *(f"{figure:,.0f} ({figure / first:.2f}×)" for figure in figures)])
    header = ["format", "source", *(f"{number} workers" if number != 1 else "1 worker" for number in numbers)]
    return Table([*header[:2], *(f"images/s, {name}" for name in header[2:])], rows, ["loader"])


@table("loader-parts")
def loader_parts() -> Table:
    parts = read("loader")["results"]["microseconds"]
    rows = []
    for kind, taken in parts.items():
        floats = taken["convert"] + taken["collate"]
        cells = [taken["decode"], taken["resize"], floats, taken["convert later"]]
        rows.append([kind.upper(), *(f"{1e-3 * cell:.3f} ms" for cell in cells)])
    header = ["format", "decode", "resize", "to a batch of floats", "to a batch of 8-bit integers, and that to floats"]
    return Table(header, rows, ["loader"])


@table("icons-training")
def icons_training() -> Table:
    training = read("demo_samples_icons")["results"]["training"]
    row = [f"{training['num_steps']:,}", str(training["batch_size"]), seconds(training["seconds_per_step"])]
    header = ["steps", "images per step", "a step, median", "all steps"]
    return Table(header, [[*row, minutes(training["wall_seconds"])]], ["demo_samples_icons"])


@table("icons-samples")
def icons_samples() -> Table:
    rows = []
    for case in read("demo_samples_icons")["results"]["images"]:
        distance = case["distance_to_nearest_training_image"]
        row = [case["name"], f"{case['num_images']:,}", percent(case["judge_reads_label"])]
        rows.append([*row, f"{distance['median']:.3f}", f"{distance['smallest']:.3f}"])
    header = ["images", "number", "read as their class", "nearest training image, median", "smallest"]
    return Table(header, rows, ["demo_samples_icons"])


# Alignment


@table("alignment-orders")
def alignment_orders() -> Table:
    columns = [("detach", None), *(("reverse", order) for order in (0, 1, 3, 8, "exact"))]
    rows = []
    for flow in read("reverse_orders")["results"]:
        gradients = {(gradient["strategy"], gradient["order"]): gradient for gradient in flow["gradients"]}
        row = [flow["flow"].replace("_", " "), str(flow["num_tokens"])]
        for column in columns:
            error, cosine = gradients[column]["relative_error"], gradients[column]["worst_block_cosine"]
            row.append(f"{percent(error, 0)} ({cosine:.2f})" if error > 5e-3 else f"{error:.0e}")
        rows.append(row)
    titles = [strategy if order is None else f"order {order}" for strategy, order in columns]
    titles[-1] = "exact"
    return Table(["flow", "tokens", *titles], rows, ["reverse_orders"])


def step_rows(report: str) -> list[dict[str, Any]]:
    return read(report)["results"]["steps"]


@table("alignment-cost")
def alignment_cost() -> Table:
    rows = []
    for step in step_rows("train_step"):
        time = f"{step['times_none']:.2f} ({step['min_times_none']:.2f} to {step['max_times_none']:.2f})"
        rows.append([f"`{step['step']}`", seconds(step["median_seconds"]), time, f"{step['memory_times_none']:.3f}"])
    return Table(["step", "time", "time / `none`", "peak memory / `none`"], rows, ["train_step"])


@table("alignment-cost-compiled")
def alignment_cost_compiled() -> Table:
    modes = {
        "eager": "no layer",
        "compiled": "every layer",
        "compiled below": "every layer below the aligned blocks",
    }
    rows = []
    for step in step_rows("train_step_compiled"):
        row = [modes[step["mode"]], f"`{step['step']}`", seconds(step["median_seconds"]), f"{step['times_none']:.2f}"]
        rows.append(row)
    return Table(["compiled", "step", "time", "time / `none`"], rows, ["train_step_compiled"])


# The ablation: (title, metric, factor, digits)

COLUMNS = [
    ("nll", "nll", 1, 4),
    ("accuracy, one gradient, %", "accuracy_gradient", 100, 1),
    ("accuracy, Bayes, %", "accuracy_bayes", 100, 1),
    ("linear probe, %", "linear_probe_aligned", 100, 1),
    ("FD, unguided", "frechet_distance_unguided", 1, 2),
    ("FD, guided", "frechet_distance_guided", 1, 2),
]
DIGITS_REPORTS = ["ablation_digits", "ablation_digits_exact", "ablation_digits_places", "ablation_digits_teachers"]
DIGITS_REPORTS = [f"{report}/results" for report in DIGITS_REPORTS]


def rows_of(variants: dict[str, Any], columns: list[tuple[str, str, int, int]]) -> list[list[str]]:
    rows = []
    for name, variant in variants.items():
        num_seeds = variant["num_done"]
        row = [f"`{name}`", str(num_seeds)]
        for _, metric, factor, digits in columns:
            row.append(mean_and_error(variant["metrics"].get(metric), digits, factor, num_seeds))
        rows.append(row)
    return rows


def ablation_table(reports: list[str], columns: list[tuple[str, str, int, int]]) -> Table:
    rows = [row for report in reports for row in rows_of(read(report)["variants"], columns)]
    return Table(["variant", "seeds", *(title for title, *_ in columns)], rows, reports)


@table("ablation-digits")
def ablation_digits() -> Table:
    return ablation_table(DIGITS_REPORTS, COLUMNS)


@table("ablation-projectors")
def ablation_projectors() -> Table:
    return ablation_table(["ablation_digits_projectors/results"], COLUMNS)


@table("ablation-shapes")
def ablation_shapes() -> Table:
    return ablation_table(["ablation_shapes/results"], COLUMNS)


@table("ablation-steps")
def ablation_steps() -> Table:
    columns = [
        ("× fewer steps to the baseline's accuracy", "times_fewer_steps_accuracy", 1, 2),
        ("× fewer steps to its FD", "times_fewer_steps_distance", 1, 2),
    ]
    return ablation_table(DIGITS_REPORTS[:1], columns)


GLYPHS_COLUMNS = [
    *COLUMNS,
    ("× fewer steps, accuracy", "times_fewer_steps_accuracy", 1, 2),
    ("× fewer, nll", "times_fewer_steps_nll", 1, 2),
    ("× fewer, FD", "times_fewer_steps_distance", 1, 2),
    ("× less time, accuracy", "times_less_time_accuracy", 1, 2),
    ("× less, nll", "times_less_time_nll", 1, 2),
    ("× less, FD", "times_less_time_distance", 1, 2),
]


def read_glyphs_grid(name: str) -> dict[str, Any]:
    from flowback_hf.ablation.grids import read_grid

    return read_grid(REPOSITORY / "training" / "ablations" / f"{name}.json")


def glyphs_reports(grid_name: str, confirmation: bool = False) -> list[str]:
    """The records of all finished cells of a grid: those of its fresh seeds, or all others."""
    folder = REPOSITORY / RESULTS / "ablation_glyphs"
    fresh = {f"seed-{seed}" for seed in read_glyphs_grid("glyphs")["confirmation_seeds"]}
    variants = read_glyphs_grid(grid_name)["variants"]
    files = [file for name in variants for file in sorted((folder / name).glob("seed-*.json"))]
    files = [file for file in files if (file.stem in fresh) == confirmation]
    return [str(file.relative_to(REPOSITORY / RESULTS).with_suffix("")) for file in files]


def glyphs_table(grid_name: str, confirmation: bool = False) -> Table:
    """What the cells of a grid have learned, and how fast."""
    from flowback_hf.ablation.grids import find_baselines
    from flowback_hf.ablation.run import read_step_seconds
    from flowback_hf.ablation.statistics import summarise

    reports = glyphs_reports(grid_name, confirmation)
    # `summarise` adds to rows, and what `read` returns is kept.
    rows = copy.deepcopy([read(report)["row"] for report in reports])
    times = REPOSITORY / RESULTS / "ablation_glyphs" / f"step_seconds-{grid_name}.json"
    variants = summarise(rows, find_baselines(read_glyphs_grid(grid_name)), read_step_seconds(times))["variants"]
    if reports and times.exists():
        reports.append(str(times.relative_to(REPOSITORY / RESULTS).with_suffix("")))
    measured = {metric for variant in variants.values() for metric in variant["metrics"]}
    columns = [column for column in GLYPHS_COLUMNS if column[1] in measured]
    table_rows = [
        [*row[:1], f"`{variant['baseline']}`", *row[1:]]
        for row, variant in zip(rows_of(variants, columns), variants.values())
    ]
    return Table(["variant", "baseline", "seeds", *(title for title, *_ in columns)], table_rows, reports)


@table("ablation-glyphs")
def ablation_glyphs() -> Table:
    return glyphs_table("glyphs")


@table("ablation-glyphs-samples")
def ablation_glyphs_samples() -> Table:
    """Samples without guidance and at each cell's best scale, and the accuracy of a shortlist."""
    reports = glyphs_reports("glyphs")
    metrics = {"precision": "precision, %", "recall": "recall, %", "classifier_reads_label": "read as the class, %"}
    rows = []
    for name, own in by_variant(reports).items():
        evaluations = [read(report)["row"]["evaluation"] for report in own]
        best = [evaluation["best_guidance_scale"] for evaluation in evaluations]
        row = [f"`{name}`", str(len(evaluations)), ", ".join(f"{scale:g}" for scale in sorted(set(best)))]
        for scales in ([1.0] * len(best), best):
            for metric in metrics:
                values = [each[f"{metric}/guidance_{scale}"] for each, scale in zip(evaluations, scales)]
                row.append(mean_and_error(over_seeds(values), 1, 100))
        row.append(mean_and_error(over_seeds([each["accuracy/shortlist"] for each in evaluations]), 1, 100))
        rows.append(row)
    header = ["variant", "seeds", "best guidance", *metrics.values()]
    header += [f"{title.removesuffix(', %')}, guided, %" for title in metrics.values()]
    return Table([*header, "accuracy, shortlist, %"], rows, reports)


@table("ablation-glyphs-further")
def ablation_glyphs_further() -> Table:
    """What the baseline has to go on for, to where each variant ends: its steps over the variant's."""
    from flowback_hf.ablation.statistics import reach_baseline

    header = ["variant", "seeds", "× steps of the baseline, accuracy", "nll", "FD, unguided"]
    reports = glyphs_reports("glyphs")
    cells = {name: [read(report)["row"] for report in own] for name, own in by_variant(reports).items()}
    longer = cells.pop("none-long", None)
    if longer is None:
        return Table(header, [], [])
    rows = []
    for name, own in cells.items():
        last_step = own[0]["checkpoint_curve"]["step"][-1]
        row = [f"`{name}`", str(len(own))]
        for value in ("accuracy", "nll", "distance"):
            (step,) = reach_baseline(longer, own, "checkpoint_curve", value).steps
            row.append("not reached" if step is None else f"{step / last_step:.2f}")
        rows.append(row)
    return Table(header, rows, reports)


@table("ablation-glyphs-confirmation")
def ablation_glyphs_confirmation() -> Table:
    return glyphs_table("glyphs", confirmation=True)


@table("ablation-glyphs-why")
def ablation_glyphs_why() -> Table:
    return glyphs_table("glyphs_why")


def differences_table(cells: list[dict[str, Any]], pairs: list[tuple[str, str]], reports: list[str]) -> Table:
    """Each variant less another of the same seed: what the seed does to both cancels."""
    metrics: dict[str, dict[int, dict[str, float]]] = {}
    for cell in cells:
        if cell["status"] == "done":
            metrics.setdefault(cell["variant"], {})[cell["seed"]] = cell["metrics"]
    rows = []
    for name, other in pairs:
        seeds = sorted(metrics.get(name, {}).keys() & metrics.get(other, {}).keys())
        if not seeds:
            continue
        row = [f"`{name}` − `{other}`", str(len(seeds))]
        for _, metric, factor, digits in COLUMNS:
            differences = [factor * (metrics[name][seed][metric] - metrics[other][seed][metric]) for seed in seeds]
            text = f"{statistics.mean(differences):+.{digits}f}"
            if len(seeds) > 1:
                text += f" ± {statistics.stdev(differences) / len(seeds) ** 0.5:.{digits}f}"
            row.append(text)
        rows.append(row)
    return Table(["difference", "seeds", *(title for title, *_ in COLUMNS)], rows, reports)


@table("ablation-glyphs-differences")
def ablation_glyphs_differences() -> Table:
    reports = glyphs_reports("glyphs")
    cells = [read(report)["row"] for report in reports]
    names = dict.fromkeys(cell["variant"] for cell in cells)
    pairs = [(name, "none") for name in names if not name.startswith("none")]
    pairs += [(name, "reverse-0-late") for name in names if not name.startswith("none") and name != "reverse-0-late"]
    others = ("reverse-0-late-conv", "forward-late", "detach-late-irepa", "forward-late-irepa")
    pairs += [("reverse-0-late-irepa", other) for other in others]
    pairs.append(("reverse-0-late-irepa-layer1", "reverse-0-late-irepa"))
    return differences_table(cells, pairs, reports)


@table("ablation-glyphs-confirmation-differences")
def ablation_glyphs_confirmation_differences() -> Table:
    reports = glyphs_reports("glyphs", confirmation=True)
    cells = [read(report)["row"] for report in reports]
    names = [name for name in dict.fromkeys(cell["variant"] for cell in cells) if name != "none"]
    pairs = [(name, "none") for name in names] + list(itertools.combinations(names, 2))
    return differences_table(cells, pairs, reports)


@table("ablation-differences")
def ablation_differences() -> Table:
    cells = [cell for report in DIGITS_REPORTS for cell in read(report)["cells"]]
    names = dict.fromkeys(cell["variant"] for cell in cells if cell["status"] == "done")
    pairs = [(name, "none") for name in names if name != "none"]
    pairs += [("reverse-0", "forward"), ("reverse-1", "forward"), ("reverse-0", "detach"), ("reverse-1", "detach")]
    pairs += [("reverse-1", "reverse-0"), ("reverse-exact", "reverse-0"), ("reverse-early-middle", "reverse-0")]
    pairs += [("reverse-random-teacher", "reverse-0")]
    return differences_table(cells, pairs, DIGITS_REPORTS)


# Classification

CLASSIFICATION_METHODS = {"gradient": "one gradient", "ascent": "ascent", "shortlist": "shortlist", "bayes": "Bayes"}


@table("classification-cost")
def classification_cost() -> Table:
    rows = []
    for case in read("classification")["results"]:
        gradient, kept, bayes = case["gradient_median_ms"], case["gradient_kib"], case["bayes_ms"]
        row = [str(case["num_classes"]), f"{gradient:.1f} ms", f"{kept / 1024:.1f} MiB", f"{bayes / 1000:,.2f} s"]
        rows.append([*row, f"{case['bayes_times_slower']:.1f}×"])
    header = ["classes", "one gradient", "kept for its backward", "Bayes", "Bayes / one gradient"]
    return Table(header, rows, ["classification"])


@table("classification-accuracy-digits")
def classification_accuracy_digits() -> Table:
    return classification_accuracy(["classification_accuracy_digits"])


@table("classification-accuracy-shapes")
def classification_accuracy_shapes() -> Table:
    return classification_accuracy(["classification_accuracy_shapes_none", "classification_accuracy_shapes_reverse"])


@table("classification-accuracy-glyphs")
def classification_accuracy_glyphs() -> Table:
    """Means over the seeds of an alignment, a report each."""
    reports = [file.stem for file in sorted((REPOSITORY / RESULTS).glob("classification_accuracy_glyphs_*.json"))]
    rows, header = [], []
    for report in reports:
        results = read(report)["results"]
        header = classification_header(results)
        for draws in dict.fromkeys(case["num_noise_draws"] for case in results["methods"]):
            cases = [case for case in results["methods"] if case["num_noise_draws"] == draws]
            of_methods = [[c["accuracy"] for c in cases if c["method"] == method] for method in CLASSIFICATION_METHODS]
            accuracies = [mean_and_error(over_seeds(accuracy), 1, 100) for accuracy in of_methods]
            name = report.removeprefix("classification_accuracy_glyphs_")
            rows.append([f"`{name}`", str(len(of_methods[0])), str(draws), *accuracies])
    return Table(["flow", "seeds", "noise draws", *(f"{name}, %" for name in header)], rows, reports)


def classification_header(results: dict[str, Any]) -> list[str]:
    header = [CLASSIFICATION_METHODS["gradient"], f"ascent, {results['num_steps']} steps"]
    return [*header, f"shortlist of {results['shortlist_size']}", CLASSIFICATION_METHODS["bayes"]]


def classification_accuracy(reports: list[str]) -> Table:
    """Accuracy by method, of reports with the same options."""
    rows, header = [], []
    for report in reports:
        results = read(report)["results"]
        header = classification_header(results)
        cases: dict[tuple[str, int], dict[str, float]] = {}
        for case in results["methods"]:
            cases.setdefault((case["flow"], case["num_noise_draws"]), {})[case["method"]] = case["accuracy"]
        for (flow, draws), accuracy in cases.items():
            row = [flow.replace("_", ", "), str(results["num_images"]), str(draws)]
            rows.append([*row, *(percent(accuracy[method]) for method in CLASSIFICATION_METHODS)])
    return Table(["flow", "images", "noise draws", *header], rows, reports)


# Editing

EDITING_REPORTS = ["editing_digits", "editing_icons"]


def editing_table(kind: str, columns: list[tuple[str, str, int, int]]) -> Table:
    """The methods of one kind, of each data set; a column has a title, a key, a factor and a number of digits."""
    rows = []
    for report in EDITING_REPORTS:
        results = read(report)["results"]
        for method in results[kind]:
            figures = [mean_and_error(method[key], digits, factor) for _, key, factor, digits in columns]
            rows.append([results["data"], method["method"], *figures])
    return Table(["data", "method", *(title for title, *_ in columns)], rows, EDITING_REPORTS)


@table("editing-latents")
def editing_latents() -> Table:
    rows = []
    for report in EDITING_REPORTS:
        results = read(report)["results"]
        rows.append(
            [results["data"], *(f"{results['latents_std'][name]:.2f}" for name in ("clean", "noise added first"))]
        )
    return Table(["standard deviation of latents", "clean images", "`add_noise=True`"], rows, EDITING_REPORTS)


DISTANCES = [("distance in pixels", "pixel_distance", 1, 3), ("in features", "feature_distance", 1, 2)]


@table("editing-swaps")
def editing_swaps() -> Table:
    return editing_table("swaps", [("read as the target, %", "read_as_wanted", 100, 1), *DISTANCES])


@table("editing-variations")
def editing_variations() -> Table:
    return editing_table("variations", [("read as the class, %", "read_as_wanted", 100, 1), *DISTANCES])


@table("editing-interpolations")
def editing_interpolations() -> Table:
    columns = [
        ("largest step / mean step", "largest_over_mean_step", 1, 2),
        ("judge's confidence half-way, %", "confidence_in_the_middle", 100, 1),
    ]
    return editing_table("interpolations", columns)


@table("editing-maps")
def editing_maps() -> Table:
    return editing_table("maps", [("AUROC", "auroc", 1, 3)])


# The learned inverse


def learned_records(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Of a comparison, of each variant, in the order of the benchmark, its records by name."""
    from learned_inverse import EXACT, VARIANTS

    records = {}
    for variant in (EXACT, *VARIANTS):
        files = sorted((REPOSITORY / RESULTS / f"learned_inverse_{name}").glob(f"{variant}-seed*.json"))
        names = [str(file.relative_to(REPOSITORY / RESULTS).with_suffix("")) for file in files]
        if names:
            records[variant] = {name: read(name)["results"] for name in names}
    return records


def over_seeds(values: list[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_error": error}


LEARNED_COLUMNS = [
    ("Fréchet distance", "frechet_distance", 1, 2),
    ("precision, %", "precision", 100, 0),
    ("recall, %", "recall", 100, 0),
    ("read as the class, %", "classifier_reads_label", 100, 1),
    ("nearest training image", "nearest_training_image", 1, 2),
]
LEARNED_HEADER = ["sampler", "seeds", "guidance", *(title for title, *_ in LEARNED_COLUMNS)]


def learned_quality_rows(name: str) -> tuple[list[list[str]], list[str]]:
    """A row for each variant and guidance scale of a comparison, and the reports with their figures."""
    rows, reports = [], []
    for variant, records in learned_records(name).items():
        reports += records
        for scale in next(iter(records.values()))["evaluated_guidance_scales"]:
            row = [f"`{variant}`", str(len(records)), f"{scale:g}"]
            for _, key, factor, digits in LEARNED_COLUMNS:
                figures = [results[f"{key}/guidance_{scale}"] for results in records.values()]
                row.append(mean_and_error(over_seeds(figures), digits, factor))
            rows.append(row)
    return rows, reports


@table("learned-quality")
def learned_quality() -> Table:
    return Table(LEARNED_HEADER, *learned_quality_rows("digits"))


@table("learned-quality-glyphs")
def learned_quality_glyphs() -> Table:
    """Of a flow that was aligned, and of one that was not."""
    rows, reports = [], []
    for flow in ("none", "reverse"):
        flow_rows, flow_reports = learned_quality_rows(f"glyphs_{flow}")
        rows += [[f"`{flow}`", *row] for row in flow_rows]
        reports += flow_reports
    return Table(["flow", *LEARNED_HEADER], rows, reports)


@table("learned-training")
def learned_training() -> Table:
    rows = []
    for step in read("reverse_step")["results"]:
        row = [step["step"], f"{step['num_trained_parameters'] / 1e6:.1f} million", seconds(step["median_seconds"])]
        rows.append([*row, f"{step['times_flow']:.2f}", f"{step['peak_bytes'] / 2**30:.2f} GiB"])
    return Table(
        ["step of", "trained parameters", "time", "relative to the flow's", "peak memory"], rows, ["reverse_step"]
    )


@table("learned-speed")
def learned_speed() -> Table:
    cases = read("sampling_learned")["results"]["sampling"]
    rows = []
    for case in sorted(cases, key=lambda case: (case["guidance_scale"], case["batch_size"])):
        taken = {name: timing["median_seconds"] for name, timing in case["samplers"].items()}
        learned = taken["learned, compiled"]
        row = [str(case["batch_size"]), f"{case['guidance_scale']:g}"]
        rows.append([*row, *(f"{each:.3f} s ({each / learned:.1f}×)" for each in taken.values())])
    columns = [f"`{name}`" if name in ("auto", "learned") else name for name in cases[0]["samplers"]]
    return Table(["batch", "guidance", *columns], rows, ["sampling_learned"])


@table("learned-certificate")
def learned_certificate() -> Table:
    certificate = read("learned_guesses_digits")["results"]["certificate"]
    row = [f"{certificate[name]:.2f}" for name in ("rank_correlation", "rank_correlation_within_classes")]
    header = ["rank correlation of certificate and true error", "within classes", "relative error of the estimates"]
    return Table(header, [[*row, percent(certificate["relative_error"], 0)]], ["learned_guesses_digits"])


@table("learned-guesses")
def learned_guesses() -> Table:
    results, rows = read("learned_guesses_digits")["results"], []
    for case in results["cases"]:
        row = [f"{case['guidance_scale']:g}", f"{case['tolerance']:g}"]
        for guess in ("latents", "heads"):
            row.append(f"{case[guess]['sweeps']:.1f} ({seconds(case[guess]['seconds'])})")
        rows.append([*row, f"{results['token_by_token']} ({seconds(case['token_by_token_seconds'])})"])
    header = ["guidance", "tolerance", "sweeps from the noise", "sweeps from the heads' estimates", "token by token"]
    return Table(header, rows, ["learned_guesses_digits"])


# Sizes


@table("model-sizes")
def model_sizes() -> Table:
    from model_sizes import table as size_table

    sizes = size_table(read("model_sizes")["results"])
    header, _, *rows = [line.strip("| ").split(" | ") for line in sizes.splitlines()]
    return Table(header, rows, ["model_sizes"], "Computed")


@table("latent-memory")
def latent_memory() -> Table:
    reports = ["latent_train_step", "latent_train_step_checkpointing"]
    plain, checkpointed = ({case["config"]: case["predicted"] for case in read(name)["results"]} for name in reports)
    rows = []
    for config, counted in plain.items():
        sizes = [counted["states_gib"], counted["memory_gib"], checkpointed[config]["memory_gib"]]
        rows.append([f"`{config}`", *(f"{size:.1f} GiB" for size in sizes)])
    header = ["config", "weights, gradients, Adam, EMA", "all, batch of 32", "all, with `--gradient_checkpointing`"]
    return Table(header, rows, reports, "Computed")


# Scale, by arithmetic


def scale_flows() -> list[dict[str, Any]]:
    return read("scale_model")["results"]["flows"]


def scale_cases(flow: dict[str, Any], batch_size: int) -> list[dict[str, Any]]:
    return [case for case in flow["cases"] if case["batch_size"] == batch_size]


@table("scale-assumptions")
def scale_assumptions() -> Table:
    assumed = read("scale_model")["results"]["assumptions"]
    h100 = "[NVIDIA H100](https://www.nvidia.com/en-us/data-center/h100/)"
    dgx = "[DGX H100](https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html)"
    written = "[checkpoints of 100 M parameters](../benchmarks/results/checkpoints_100m.md), on a virtual machine"
    rows = [
        ["matrix products, bfloat16", "{peak_tflops:,.0f} TFLOP/s", "peak_tflops", f"{h100}, dense"],
        ["share of them that is reached", "{matrix_share:.0%}", "matrix_share", "a guess"],
        ["memory of a GPU", "{memory_gb:.0f} GB", "memory_gb", h100],
        ["its bandwidth", "{memory_gb_per_second:,.0f} GB/s", "memory_gb_per_second", h100],
        ["NVLink, one way", "{nvlink_gb_per_second:.0f} GB/s", "nvlink_gb_per_second", f"half of {h100}'s both ways"],
        ["InfiniBand per GPU", "{infiniband_gb_per_second:.0f} GB/s", "infiniband_gb_per_second", f"a port of {dgx}"],
        ["share of these bandwidths that is reached", "{bandwidth_share:.0%}", "bandwidth_share", "a guess"],
        ["what a process writes", "{writer_gb_per_second:.2f} GB/s", "writer_gb_per_second", written],
        ["what the disk of a node writes", "{disk_gb_per_second:.0f} GB/s", "disk_gb_per_second", "a guess"],
        [
            "images that a CPU core loads",
            "{images_per_core:.0f} per second",
            "images_per_core",
            "a trial: JPEGs of 500×375",
        ],
    ]
    rows = [[what, value.format(**assumed), f"`--{option}`", source] for what, value, option, source in rows]
    return Table(["", "assumed", "option", "source"], rows, ["scale_model"], "Computed")


@table("scale-memory")
def scale_memory() -> Table:
    rows = []
    for flow in scale_flows():
        for case in scale_cases(flow, 32):
            parts = {name: size / 2**30 for name, size in case["memory_bytes"].items()}
            row = [f"`{flow['config']}`", case["sharding"], str(case["num_gpus"])]
            row += [f"{part:.1f}" for part in parts.values()]
            checkpointing = ", with checkpointing" if case["gradient_checkpointing"] else ""
            rows.append([*row, f"{sum(parts.values()):.1f}{checkpointing if case['fits'] else ', does not fit'}"])
    header = ["config", "", "GPUs", "states", "validation", "teacher", "sending", "activations", "GiB on each GPU"]
    return Table(header, rows, ["scale_model"], "Computed")


@table("scale-steps")
def scale_steps() -> Table:
    rows = []
    for flow in scale_flows():
        for case in flow["cases"]:
            if not case["fits"]:
                continue
            sent = sum(size for name, size in case["traffic_bytes"].items() if name != "num_gathers")
            row = [f"`{flow['config']}`", case["sharding"], str(case["num_gpus"]), str(case["batch_size"])]
            row += [f"{sent / 1e9:.1f} GB"]
            row += [f"{1000 * case['seconds'][name]:.0f}" for name in ("compute", "network", "memory")]
            row += [f"{1000 * case['step_seconds']:.0f} ms", case["bottleneck"]]
            rows.append([*row, f"{case['num_gpus'] * case['images_per_second_per_gpu']:,.0f}"])
    header = [
        "config",
        "",
        "GPUs",
        "images per GPU",
        "gathered and reduced",
        "compute, ms",
        "network, ms",
        "memory, ms",
    ]
    return Table([*header, "step", "bottleneck", "images/s, all GPUs"], rows, ["scale_model"], "Computed")


@table("scale-alignment")
def scale_alignment() -> Table:
    """What alignment adds to a step, in operations and all-gathers."""
    rows = []
    for flow in scale_flows():
        plain, aligned, teacher = flow["step_flops_not_aligned"], flow["step_flops"], flow["teacher"]["flops"]
        (fsdp, *_) = [case for case in flow["cases"] if case["sharding"] == "FSDP2"]
        row = [f"`{flow['config']}`", f"{plain / 1e9:,.0f} G"]
        row += [f"{percent(aligned / plain - 1)}", f"{percent(teacher / plain)}"]
        rows.append([*row, str(flow["num_gathers_not_aligned"]), str(fsdp["traffic_bytes"]["num_gathers"])])
    header = ["config", "FLOPs of a step, per image", "alignment adds", "the teacher adds"]
    return Table([*header, "all-gathers without alignment", "with it"], rows, ["scale_model"], "Computed")


@table("scale-checkpoints")
def scale_checkpoints() -> Table:
    rows = []
    for flow in scale_flows():
        for case in scale_cases(flow, 32):
            if case["fits"]:
                row = [f"`{flow['config']}`", f"{flow['checkpoint_bytes'] / 1e9:.1f} GB", case["sharding"]]
                row += [
                    str(case["num_gpus"]),
                    f"{case['checkpoint_seconds']:.1f} s",
                    percent(case["checkpoint_share"]),
                ]
                cores = case["loader_cores_per_gpu"]
                rows.append([*row, f"{case['images_per_second_per_gpu']:.0f}", f"{cores:.1f}"])
    header = ["config", "checkpoint", "", "GPUs", "written in", "share of the time", "images/s per GPU"]
    return Table([*header, "loader cores per GPU"], rows, ["scale_model"], "Computed")


# The page


@table("app")
def app() -> Table:
    results = read("app")["results"]
    rows = [
        [name.removeprefix("/").replace("_", " "), *(seconds(each) for each in times.values())]
        for name, times in results["seconds"].items()
    ]
    rows.append(["from the command to the page", seconds(results["start_seconds"]), "", ""])
    rows.append(["examples and layout, once the flow is loaded", seconds(results["build_seconds"]), "", ""])
    header = ["", "first request", f"median of {results['repeats']}", "longest"]
    return Table(header, rows, ["app"])


# The README


@table("measured")
def measured() -> Table:
    sampling = next(case for case in read("sampling_learned")["results"]["sampling"] if case["batch_size"] == 1)
    sampling = {name: timing["median_seconds"] for name, timing in sampling["samplers"].items()}
    steps = {step["step"]: step["times_none"] for step in step_rows("train_step")}
    ten, thousand = read("classification")["results"]
    variants = by_variant(glyphs_reports("glyphs"))
    not_aligned, aligned = variants["none"], variants["reverse-0-late-irepa"]
    distance = [
        mean_and_error(over_seeds([read(report)["row"]["metrics"]["frechet_distance_guided"] for report in cells]), 2)
        for cells in (not_aligned, aligned)
    ]
    rows = [
        [
            "one guided sample of 256 tokens",
            f"{seconds(sampling['published loop'])} (published loop)",
            f"{seconds(sampling['auto, compiled'])} (compiled)",
            "sampling_learned",
            "learned_inverse",
        ],
        [
            "the same in one evaluation",
            f"{seconds(sampling['published loop'])} (published loop)",
            f"{seconds(sampling['learned'])} (learned inverse)",
            "sampling_learned",
            "learned_inverse",
        ],
        [
            "a training step with reverse alignment, over one without",
            f"{steps['reverse exact, sequential graph']:.1f}× (sequential graph)",
            f"{steps['reverse 0']:.2f}× (order 0)",
            "train_step",
            "alignment",
        ],
        [
            f"classify an image, {thousand['num_classes']} classes",
            f"{thousand['bayes_ms'] / 1000:.1f} s (Bayes)",
            f"{thousand['gradient_median_ms'] / 1000:.2f} s (one gradient)",
            "classification",
            "classification",
        ],
        [
            f"Fréchet distance of letters over clutter, {len(aligned)} seeds",
            f"{distance[0]} (not aligned)",
            f"{distance[1]} (aligned)",
            None,
            "ablation",
        ],
    ]
    reports = [*dict.fromkeys(row[3] for row in rows[:-1]), *not_aligned, *aligned]
    rows = [[*row[:3], f"[docs/{row[4]}.md](docs/{row[4]}.md)"] for row in rows]
    return Table(["", "baseline", "here", "details"], rows, reports)


# Pages


def pages() -> list[Path]:
    """The pages that may hold tables, relative to the repository."""
    files = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    return [file.relative_to(REPOSITORY) for file in files]


def render(page: Path, text: str) -> tuple[str, list[str]]:
    """
    The text of a page with its tables written again, and the names of those that changed.

    Raises:
        ValueError: if the page names a table that does not exist.
    """
    changed = []

    def replace(match: re.Match) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"{page} names a table {name!r}, but there are only {', '.join(sorted(TABLES))}.")
        written = f"{TABLES[name]().markdown(page)}\n"
        if written != match["table"]:
            changed.append(name)
        return f"{match[1]}{written}{match[4]}"

    return MARKED.sub(replace, text), changed


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Compare only, and exit with 1 if a table differs.")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> int:
    different = []
    for page in pages():
        text = (REPOSITORY / page).read_text()
        rendered, changed = render(page, text)
        different += [f"{page}: {name}" for name in changed]
        if changed and not args.check:
            (REPOSITORY / page).write_text(rendered)
    report(different, args.check)
    return int(args.check and bool(different))


def report(different: Iterable[str], check: bool):
    for name in different:
        print(f"{name} {'differs; run `python benchmarks/tables.py`' if check else 'was rewritten'}")


if __name__ == "__main__":
    sys.exit(main(parse_args()))
