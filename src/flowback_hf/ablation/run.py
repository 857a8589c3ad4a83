# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""A whole ablation: the grid is checked, its cells are run, and their results compared."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar

from flowback_hf.ablation.estimate import print_estimate, time_each_step
from flowback_hf.ablation.grids import (
    AXES,
    BASELINE,
    RANDOM_TEACHER,
    Cell,
    make_cells,
    make_variants,
    read_grid,
    read_settings,
)
from flowback_hf.ablation.report import write_report
from flowback_hf.ablation.runner import (
    Runner,
    Scripts,
    ablate_command,
    check_output_dir,
    check_records,
    checksum_of_path,
    make_random_teacher,
)
from flowback_hf.ablation.statistics import rank_on_validation, read_row
from flowback_hf.data.splits import DataSource, held_out_split
from flowback_hf.files import read_json, write_json
from flowback_hf.reporting import current_commit, describe_machine


def run_ablation(
    scripts: Scripts,
    grid_file: Path,
    settings_file: Path,
    source: DataSource,
    teacher: str,
    judge: str,
    output_dir: Path,
    variant_names: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    threads: int = 1,
    dry_run: bool = False,
    time_steps: bool = False,
    confirm: bool = False,
    command: Sequence[str] = (),
    records_dir: Path | None = None,
    other_teacher: str | None = None,
):
    """
    Train and evaluate the cells of a grid, and compare them in one report.

    Finished cells are kept, an interrupted one resumes at its last checkpoint, and a failed one is tried again.

    Args:
        scripts ([`Scripts`]): Where the scripts are that cells run.
        grid_file, settings_file (`pathlib.Path`): See [`read_grid`] and [`read_settings`].
        source ([`~flowback_hf.data.DataSource`]): The data set.
        teacher (`str`): The vision encoder to align with: a Hub id or a folder.
        judge (`str`): The independent classifier or encoder that samples are compared by.
        output_dir (`pathlib.Path`): Where cells and report are written.
        variant_names (`Sequence[str]`, *optional*): Which variants are run. Default: all; see also `confirm`.
        seeds (`Sequence[int]`, *optional*): Default: the grid's.
        jobs (`int`, defaults to 1): Cells that run side by side.
        threads (`int`, defaults to 1): Threads of each cell.
        dry_run (`bool`, defaults to `False`): Only print the cells and how long they would take.
        time_steps (`bool`, defaults to `False`):
            Only time a step of each variant, in turn. Later reports then compare times, too.
        confirm (`bool`, defaults to `False`):
            Run `none`, the variant that its seeds show to be best on the validation split, and those of
            `variant_names` with the grid's `confirmation_seeds`. Their report goes to `confirmation/`.
        command (`Sequence[str]`): The command line that the report says it came from.
        records_dir (`pathlib.Path`, *optional*):
            A small record of each finished cell is kept here. Cells with a record never run again, also where
            `output_dir` is new.
        other_teacher (`str`, *optional*): The encoder of variants whose teacher is `"other"`.
    Raises:
        ValueError: if something in the arguments is impossible. Nothing has been written then.
    """
    disable_progress_bar()  # of loading checkpoints, which takes no time
    if source.is_image_folder and not Path(source.name).is_dir():
        raise ValueError(f"`{source.option}` must be an existing folder, but is {source.name!r}.")
    grid, settings = read_grid(grid_file), read_settings(settings_file)
    confirmation_seeds = grid.get("confirmation_seeds", [])
    if confirm and not confirmation_seeds:
        raise ValueError(f"`--confirm` needs 'confirmation_seeds', but `--grid` {grid_file} has none.")
    variants = make_variants(grid, settings, source, teacher, judge, output_dir, other_teacher)
    inputs = {"dataset": source.name, "teacher": teacher, "judge": judge}
    inputs |= {} if other_teacher is None else {"other_teacher": other_teacher}
    local = {name: Path(path) for name, path in inputs.items() if records_dir is not None and Path(path).exists()}
    checksums = {name: checksum_of_path(path) for name, path in local.items()}
    if confirm:
        cells = make_cells(variants, grid["seeds"], output_dir, records_dir=records_dir)
        check_records(cells, checksums)
        variant_names = list(dict.fromkeys([BASELINE, pick_variant(cells), *(variant_names or [])]))
        seeds = confirmation_seeds
    elif set(seeds or []) & set(confirmation_seeds):
        raise ValueError(f"The seeds {confirmation_seeds} are for --confirm, which runs what the others picked.")
    cells = make_cells(variants, grid["seeds"] if seeds is None else seeds, output_dir, variant_names, records_dir)
    # Variants that are named can be added later: each cell's folder says what it was.
    axes = {name: values for name, values in grid.items() if name in AXES}
    check_output_dir(output_dir, axes, cells)
    check_records(cells, checksums)
    missing = [cell for cell in cells if cell.state["status"] != "done"]
    if any(cell.variant.shuffle for cell in missing) and held_out_split(source.open()) is None:
        raise ValueError(
            f"`{source.option}` must have a validation split for shuffled features, which are stored once: without"
            " one, each seed holds other images out."
        )
    for cell in cells:
        print(f"{cell.variant.name}, seed {cell.seed}: {cell.state['status'] or 'to be run'}")
    runner = Runner(scripts, threads, command, checksums)
    if dry_run:
        print_estimate(cells, runner, jobs, teacher)
        return
    step_seconds_file = (output_dir if records_dir is None else records_dir) / f"step_seconds-{grid_file.stem}.json"
    if time_steps:
        measure_steps(cells, runner, teacher, step_seconds_file)
        return

    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "grid.json", axes)
    random_teacher = output_dir / RANDOM_TEACHER
    if any(cell.variant.train.get("teacher_model_name_or_path") == str(random_teacher) for cell in missing):
        make_random_teacher(teacher, random_teacher)
    runner.store_shuffled_features(cells, teacher)
    report_dir = output_dir / "confirmation" if confirm else output_dir
    report_dir.mkdir(exist_ok=True)

    def report():
        step_seconds = read_step_seconds(step_seconds_file)
        write_report(cells, read_json(settings_file), report_dir, command, threads, jobs, step_seconds)

    runner.run_cells(cells, jobs, on_finish=lambda cell: report())
    report()
    print((report_dir / "results.md").read_text(encoding="utf-8"))


def pick_variant(cells: Sequence[Cell]) -> str:
    """
    The variant that is to be confirmed, by [`rank_on_validation`], of those that are aligned and compared with `none`.

    Args:
        cells (`Sequence[Cell]`): The cells of the grid with its own seeds, finished or not.
    Raises:
        ValueError: if a cell of `none` is missing, or no variant can be picked.
    """
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    done = [row for row in map(read_row, cells) if row["status"] == "done"]
    if sum(row["variant"] == BASELINE for row in done) < len(seeds):
        raise ValueError(f"`--confirm` needs finished cells of {BASELINE!r} with the seeds {seeds}.")
    variants = {cell.variant.name: cell.variant for cell in cells}.values()
    aligned = [variant for variant in variants if variant.train["alignment"] != BASELINE]
    ranking = rank_on_validation(done, [variant.name for variant in aligned if variant.baseline == BASELINE])
    for entry in ranking:
        note = "" if entry["eligible"] else f", higher than that of {BASELINE}"
        times, nll = entry["times_fewer_steps"], entry["nll"]
        print(f"{entry['variant']}: {times:.2f} times fewer steps, nll {nll:.4f}{note} (validation split)")
    if not ranking or not ranking[0]["eligible"]:
        raise ValueError(
            f"`--confirm` has nothing to confirm: no variant with all the seeds {seeds} reaches the accuracy of"
            f" {BASELINE!r} on the validation split without a higher nll."
        )
    return ranking[0]["variant"]


def measure_steps(cells: Sequence[Cell], runner: Runner, teacher: str, file: Path):
    """Time a step of each variant, in turn, and write and print what it takes."""
    variants = list({cell.variant.name: cell.variant for cell in cells}.values())
    seconds = time_each_step(variants, runner, teacher)
    machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
    report = {
        "command": ablate_command(runner.command),
        "commit": current_commit(),
        "machine": machine | {"threads": runner.threads},
        "results": {name: {"median_seconds": statistics.median(own), "seconds": own} for name, own in seconds.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, report)
    for name, own in report["results"].items():
        print(f"{name}: {own['median_seconds']:.4f} s a step")


def read_step_seconds(file: Path) -> dict[str, float]:
    """The median seconds of a step of each variant that [`measure_steps`] has timed; empty if it has not."""
    report = read_json(file) or {"results": {}}
    return {name: own["median_seconds"] for name, own in report["results"].items()}
