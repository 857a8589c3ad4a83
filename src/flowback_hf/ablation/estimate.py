# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What a step of each variant takes, and how long a grid would take."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from flowback_hf.ablation.grids import RANDOM_TEACHER, Cell, Variant, parse_train_options
from flowback_hf.ablation.runner import Runner, error_message
from flowback_hf.files import read_metrics_log


TIMED_STEPS = 10
# Of a measurement of steps alone, where each variant has several turns.
STEPS_PER_TURN = 40
TURNS = 3


@dataclass
class Costs:
    """
    Seconds that the parts of a cell take.

    Args:
        start_up, validation, evaluation (`float`): Of a start, a validation during training, and an evaluation.
        step (`dict` of `str` to `float`): Of a training step, by variant.
    """

    start_up: float
    validation: float
    evaluation: float
    step: dict[str, float]

    def of_cell(self, variant: Variant) -> float:
        """Seconds of a whole cell; the evaluation of a checkpoint is taken to cost as much as the whole one."""
        train_args = parse_train_options(variant.train)
        max_train_steps = train_args.max_train_steps
        if not max_train_steps:
            raise ValueError("`--settings` must name max_train_steps for an estimate.")
        num_validations = 1 + math.ceil(max_train_steps / train_args.validation_steps)
        num_evaluations = 1
        if variant.checkpoint_guidance_scale is not None:
            num_kept = math.ceil(max_train_steps / train_args.checkpointing_steps)
            num_evaluations = min(num_kept, train_args.checkpoints_total_limit or num_kept)
        training = self.start_up + num_validations * self.validation + max_train_steps * self.step[variant.name]
        return training + num_evaluations * self.evaluation


def print_estimate(cells: Sequence[Cell], runner: Runner, jobs: int, teacher: str):
    """
    Print what a step of each variant takes, and what the cells that are not done would take.

    Args:
        cells (`Sequence[Cell]`): The cells.
        runner ([`~flowback_hf.ablation.Runner`]): Runs what is timed.
        jobs (`int`): How many cells would run side by side.
        teacher (`str`): Stands in for the random teacher, which is as large, and for shuffled features.
    """
    variants = list({cell.variant.name: cell.variant for cell in cells}.values())
    costs = measure(variants, runner, teacher)
    print(
        f"start {costs.start_up:.1f} s, a validation {costs.validation:.1f} s, an evaluation {costs.evaluation:.1f} s"
    )
    for variant in variants:
        minutes = costs.of_cell(variant) / 60
        print(f"{variant.name}: {costs.step[variant.name]:.3f} s a step, {minutes:.1f} min a cell")
    missing = [cell for cell in cells if cell.state["status"] != "done"]
    hours = sum(costs.of_cell(cell.variant) for cell in missing) / 3600
    print(
        f"{len(missing)} of {len(cells)} cells are to be run: {hours:.2f} hours one by one, {hours / jobs:.2f} with"
        f" --jobs {jobs} if they do not slow each other down"
    )


def measure(variants: Sequence[Variant], runner: Runner, teacher: str) -> Costs:
    """
    Time ten steps of each variant.

    Start-up and validations are timed with the first variant. Its evaluation is run in full, on the flow that ten
    steps have left.
    """
    with tempfile.TemporaryDirectory() as folder:
        cell, seconds, step = train(variants[0], TIMED_STEPS, TIMED_STEPS, runner, teacher, Path(folder, "once"))
        _, longer, _ = train(variants[0], TIMED_STEPS, TIMED_STEPS // 5, runner, teacher, Path(folder, "often"))
        validation = max(0.0, longer - seconds) / 4
        start_up = max(0.0, seconds - TIMED_STEPS * step - 2 * validation)
        evaluation = run_timed(runner, runner.scripts.evaluate_command(cell), cell)
        steps = {variants[0].name: step}
        for variant in variants[1:]:
            timed_in = Path(folder, variant.name)
            steps[variant.name] = train(variant, TIMED_STEPS, TIMED_STEPS, runner, teacher, timed_in)[2]
    return Costs(start_up, validation, evaluation, steps)


def time_each_step(variants: Sequence[Variant], runner: Runner, teacher: str) -> dict[str, list[float]]:
    """
    The seconds of a training step of each variant, one for each of its turns.

    Variants take turns, so that what slows the machine down for a while slows all of them.

    Args:
        variants (`Sequence[Variant]`): The variants.
        runner ([`~flowback_hf.ablation.Runner`]): Runs what is timed.
        teacher (`str`): Stands in for the random teacher, which is as large, and for shuffled features.
    """
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(TURNS):
            for variant in tqdm(variants, desc=f"Turn {turn + 1} of {TURNS}"):
                timed_in = Path(folder, f"{variant.name}-{turn}")
                step = train(variant, STEPS_PER_TURN, STEPS_PER_TURN, runner, teacher, timed_in)[2]
                seconds[variant.name].append(step)
    return seconds


def train(
    variant: Variant, num_steps: int, validation_steps: int, runner: Runner, teacher: str, folder: Path
) -> tuple[Cell, float, float]:
    """The cell that was trained for a few steps, the seconds that it took, and those of a step of the second half."""
    own = {"max_train_steps": num_steps, "logging_steps": num_steps // 2}
    own |= {"validation_steps": validation_steps, "checkpointing_steps": num_steps}
    # What may not have been made yet. A shuffled control is given the cost of what it is the control of.
    is_random = Path(variant.train.get("teacher_model_name_or_path") or "").name == RANDOM_TEACHER
    if is_random or variant.shuffle is not None:
        own |= {"teacher_model_name_or_path": teacher, "teacher_features": None}
    timed = Variant(variant.name, variant.train | own, variant.evaluate)
    cell = Cell(timed, 0, folder)
    cell.folder.mkdir()
    seconds = run_timed(runner, runner.scripts.train_command(cell), cell)
    records = read_metrics_log(cell.flow_folder)
    speed = [record["images_per_second"] for record in records if "images_per_second" in record][-1]
    train_args = parse_train_options(variant.train)
    return cell, seconds, train_args.train_batch_size * train_args.gradient_accumulation_steps / speed


def run_timed(runner: Runner, command: list[str], cell: Cell) -> float:
    """The seconds that a command takes. Raises RuntimeError if it fails."""
    start = time.perf_counter()
    if runner.run(command, cell.log_file) != 0:
        raise RuntimeError(f"{cell.variant.name} cannot be timed. {error_message(cell.log_file)}")
    return time.perf_counter() - start
