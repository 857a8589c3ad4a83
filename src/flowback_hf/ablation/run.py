# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""A whole ablation: the grid is checked, its cells are run, and their results compared."""

from collections.abc import Sequence
from pathlib import Path

from diffusers.utils.logging import disable_progress_bar

from flowback_hf.ablation.estimate import print_estimate
from flowback_hf.ablation.grids import (
    RANDOM_TEACHER,
    make_cells,
    make_variants,
    name_choices,
    read_grid,
    read_settings,
)
from flowback_hf.ablation.report import write_report
from flowback_hf.ablation.runner import (
    Runner,
    Scripts,
    check_output_dir,
    check_records,
    checksum_of_path,
    make_random_teacher,
)
from flowback_hf.data.splits import DataSource, held_out_split
from flowback_hf.files import read_json, write_json


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
        variant_names (`Sequence[str]`, *optional*): Which variants are run. Default: all.
        seeds (`Sequence[int]`, *optional*): Default: the grid's.
        jobs (`int`, defaults to 1): Cells that run side by side.
        threads (`int`, defaults to 1): Threads of each cell.
        dry_run (`bool`, defaults to `False`): Only print the cells and how long they would take.
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
    variants = make_variants(grid, settings, source, teacher, judge, output_dir, other_teacher)
    cells = make_cells(variants, grid["seeds"] if seeds is None else seeds, output_dir, variant_names, records_dir)
    # Variants that are named can be added later: each cell's folder says what it was.
    axes = {name: values for name, values in grid.items() if name not in ("seeds", "variants")}
    check_output_dir(output_dir, axes, cells)
    if any(cell.variant.shuffle for cell in cells) and held_out_split(source.open()) is None:
        raise ValueError(
            f"`{source.option}` must have a validation split for shuffled features, which are stored once: without"
            " one, each seed holds other images out."
        )
    inputs = {"dataset": source.name, "teacher": teacher, "judge": judge}
    inputs |= {} if other_teacher is None else {"other_teacher": other_teacher}
    local = {name: Path(path) for name, path in inputs.items() if records_dir is not None and Path(path).exists()}
    checksums = {name: checksum_of_path(path) for name, path in local.items()}
    check_records(cells, checksums)
    for cell in cells:
        print(f"{cell.variant.name}, seed {cell.seed}: {cell.state['status'] or 'to be run'}")
    runner = Runner(scripts, threads, command, checksums)
    if dry_run:
        print_estimate(cells, runner, jobs, teacher)
        return

    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "grid.json", axes)
    if any(choice.get("teacher") == "random" for choice in name_choices(grid).values()):
        make_random_teacher(teacher, output_dir / RANDOM_TEACHER)

    runner.store_shuffled_features(cells, teacher)

    def report():
        write_report(cells, read_json(settings_file), output_dir, command, threads, jobs)

    runner.run_cells(cells, jobs, on_finish=lambda cell: report())
    report()
    print((output_dir / "results.md").read_text(encoding="utf-8"))
