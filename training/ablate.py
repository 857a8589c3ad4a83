#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Train and evaluate a grid of alignments, each with several seeds, and compare them in one table.

    python training/ablate.py --grid training/ablations/strategies.json \\
        --settings training/ablations/settings/digits.json --data_dir data/digits/images \\
        --teacher data/digits/teacher --judge data/digits/judge --output_dir outputs/strategies --jobs 2

A grid lists values of `alignment`, `alignment_order`, `alignment_blocks` (numbers, or early, late, all),
`alignment_layer` (a number, or shallow, middle, deep), `alignment_weight`, `teacher` (given, or random: the same
network with random weights) and `seeds`; every combination that makes sense is a variant, and a variant with a seed a
cell. The settings hold what all cells share: the arguments of training/train_rra.py (`train`) and of
pipelines/evaluate_flow.py (`evaluate`), which run each cell in a folder of its own, and, if distances over steps are
wanted, the scale at which samples of every checkpoint that a cell keeps are guided (`checkpoint_guidance_scale`).

Writes `results.json`, `results.md` (mean and standard error over seeds), `curves.png`, `distance_against_accuracy.png`
and `linear_probe.png`, anew whenever a cell ends. The same command goes on where it was interrupted: what is finished
is left alone, a killed cell resumes at its last checkpoint, a failed one is tried again.
"""

import argparse
import contextlib
import fcntl
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


FOLDER = Path(__file__).resolve().parent
# The other scripts, as they find each other.
sys.path += [str(FOLDER), str(FOLDER.parent / "pipelines"), str(FOLDER.parent / "benchmarks")]

import evaluate_flow  # noqa: E402
import torch  # noqa: E402
import train_rra  # noqa: E402
from diffusers.utils.logging import disable_progress_bar  # noqa: E402
from reporting import current_commit, describe_machine, markdown_table  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from flowback_hf import AlignedFlowObjective, FlowBackPipeline  # noqa: E402
from flowback_hf.utils import write_atomically  # noqa: E402


AXES = ("alignment", "alignment_order", "alignment_blocks", "alignment_layer", "alignment_weight", "teacher")
TEACHERS = ("given", "random")
# What the script decides, cell by cell; the settings hold the rest.
OWN_TRAIN_ARGUMENTS = {*AXES, "teacher_model_name_or_path", "teacher_features", "train_data_dir", "dataset_name"}
OWN_TRAIN_ARGUMENTS |= {"output_dir", "seed", "resume_from_checkpoint"}
OWN_TRAIN_ARGUMENTS -= {"alignment_weight"}  # the grid's wins over that of the settings
OWN_EVALUATE_ARGUMENTS = {"model", "output_dir", "data_dir", "dataset_name", "features", "seed", "write_best_guidance"}

BASELINE = "none"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, required=True, help="A JSON file, as in training/ablations.")
    parser.add_argument("--settings", type=Path, required=True, help="As training/ablations/settings/digits.json.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data_dir", help="An image folder, one folder a class, below train/ and validation/.")
    parser.add_argument("--dataset_name", help="Of the Hub, or a folder that `datasets` loads, instead.")
    parser.add_argument("--teacher", required=True, help="The vision encoder to align with, of the Hub or a folder.")
    parser.add_argument("--judge", required=True, help="An independent classifier or encoder, for the distances.")
    parser.add_argument("--variants", nargs="+", help="Of the grid's, by their names. Default: all.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Default: the grid's.")
    parser.add_argument("--jobs", type=int, default=1, help="Cells that run side by side.")
    parser.add_argument("--threads", type=int, help="Of each cell. Default: the cores, shared among the jobs.")
    parser.add_argument("--dry_run", action="store_true", help="Print the cells and an estimate of the hours.")
    args = parser.parse_args(arguments)
    args.command = sys.argv[1:] if arguments is None else arguments
    if (args.dataset_name is None) == (args.data_dir is None):
        parser.error("give one of --dataset_name and --data_dir.")
    if args.threads is None:
        args.threads = max(1, (os.cpu_count() or 1) // max(1, args.jobs))
    for name in ("jobs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}.")
    return args


# The grid


@dataclass
class Variant:
    """
    One combination of the grid.

    Args:
        name: What folders, tables and figures call it.
        train: Its arguments of training/train_rra.py, the settings' included, those of a cell not.
        evaluate: Its arguments of pipelines/evaluate_flow.py, likewise.
        checkpoint_guidance_scale: Of the samples of its checkpoints; `None` makes none.
        places: Where it is aligned; of the baseline, where it would be by default.
    """

    name: str
    train: dict[str, Any]
    evaluate: dict[str, Any]
    checkpoint_guidance_scale: float | None = None
    places: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Cell:
    """A variant with a seed, in a folder of its own."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def train_command(self) -> list[str]:
        own = {"seed": self.seed, "output_dir": self.folder / "flow", "resume_from_checkpoint": "latest"}
        return [sys.executable, str(FOLDER / "train_rra.py"), *command_line(self.variant.train | own)]

    @property
    def evaluate_command(self) -> list[str]:
        own = {"seed": self.seed, "model": self.folder / "flow", "output_dir": self.folder / "evaluation"}
        script = FOLDER.parent / "pipelines" / "evaluate_flow.py"
        return [sys.executable, str(script), *command_line(self.variant.evaluate | own)]

    @property
    def checkpoints(self) -> list[Path]:
        """Those whose samples are to be judged: all but the last, which is what the evaluation is of."""
        if self.variant.checkpoint_guidance_scale is None:
            return []
        return train_rra.list_checkpoints(self.folder / "flow")[:-1]

    def checkpoint_folder(self, checkpoint: Path) -> Path:
        return self.folder / "checkpoints" / checkpoint.name

    def checkpoint_command(self, checkpoint: Path) -> list[str]:
        folder = self.checkpoint_folder(checkpoint)
        own = {"seed": self.seed, "model": folder / "flow", "output_dir": folder / "evaluation"}
        own |= {"methods": [], "linear_probe": False, "max_images": 2}  # samples alone
        own |= {"guidance_scales": [self.variant.checkpoint_guidance_scale]}
        own |= {"reference": self.folder / "evaluation" / "reference.npz"}
        script = FOLDER.parent / "pipelines" / "evaluate_flow.py"
        return [sys.executable, str(script), *command_line(self.variant.evaluate | own)]

    @property
    def state(self) -> dict[str, Any]:
        """`status` (done, failed, or None while neither), the `error` of a failed cell, and `seconds` by stage."""
        file = self.folder / "state.json"
        return json.loads(file.read_text()) if file.exists() else {"status": None, "seconds": {}}


def command_line(options: dict[str, Any]) -> list[str]:
    line = []
    for name, value in options.items():
        if value is False and name == "use_ema":  # the one flag that is on by default
            line.append("--no-use_ema")
        elif value is not None and value is not False:
            line.append(f"--{name}")
            if value is not True:
                line += [str(part) for part in (value if isinstance(value, list) else [value])]
    return line


def read_json(path: Path, option: str, keys: Iterable[str]) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError if it is none, or has other keys."""
    if not path.is_file():
        raise ValueError(f"`--{option}` must be an existing JSON file, but is {str(path)!r}.")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"`--{option}` {path} is not JSON: {error}.") from error
    check_keys(content, f"`--{option}` {path}", keys)
    return content


def check_keys(content: Any, what: str, keys: Iterable[str]):
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold a JSON object, but holds {content!r}.")
    unknown = sorted(set(content) - set(keys))
    if unknown:
        raise ValueError(f"{what} has the unknown keys {unknown}; it may have {sorted(keys)}.")


def read_grid(path: Path) -> dict[str, list]:
    grid = read_json(path, "grid", {*AXES, "seeds"})
    for name in ("alignment", "seeds"):
        if name not in grid:
            raise ValueError(f"`--grid` {path} has no {name!r}, of which every cell has one.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"`--grid` {path} must have a list of values for {name!r}, but has {values!r}.")
    unknown = [teacher for teacher in grid.get("teacher", []) if teacher not in TEACHERS]
    if unknown:
        raise ValueError(f"`--grid` {path} names the teachers {unknown}, but they are {list(TEACHERS)}.")
    return grid


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    settings = {"train": {}, "evaluate": {}, "checkpoint_guidance_scale": None}
    settings |= read_json(path, "settings", settings)
    known = vars(train_rra.parse_args(["--output_dir", "o", "--train_data_dir", "d"])).keys() - OWN_TRAIN_ARGUMENTS
    check_keys(settings["train"], f"'train' of `--settings` {path}", known)
    known = vars(evaluate_flow.parse_args(["--model", "m", "--output_dir", "o", "--data_dir", "d"])).keys()
    check_keys(settings["evaluate"], f"'evaluate' of `--settings` {path}", known - OWN_EVALUATE_ARGUMENTS)
    scale, scales = settings["checkpoint_guidance_scale"], settings["evaluate"].get("guidance_scales", [])
    if scale is not None and scale not in scales:
        raise ValueError(
            f"'checkpoint_guidance_scale' of `--settings` {path} must be one of the evaluation's 'guidance_scales'"
            f" {scales}, at which the last distance is measured, but is {scale}."
        )
    if scale is not None and not settings["train"].get("use_ema", True):
        raise ValueError(
            f"'checkpoint_guidance_scale' of `--settings` {path} needs 'use_ema', whose weights it takes."
        )
    return settings


def resolve_blocks(blocks: str | list[int], num_blocks: int) -> list[int]:
    """Numbers from 1, the image side; early and late are two blocks each, as in the paper."""
    named = {
        "early": list(range(1, min(2, num_blocks) + 1)),
        "late": list(range(max(1, num_blocks - 1), num_blocks + 1)),
        "all": list(range(1, num_blocks + 1)),
    }
    if isinstance(blocks, str):
        if blocks not in named:
            raise ValueError(f"`alignment_blocks` must be numbers or one of {list(named)}, but are {blocks!r}.")
        return named[blocks]
    return blocks


def resolve_layer(layer: str | int, num_layers: int) -> int:
    """From 1: a quarter, half and three quarters up a block, the paper's 2, 4 and 6 of 8."""
    quarters = {"shallow": 1, "middle": 2, "deep": 3}
    if isinstance(layer, str):
        if layer not in quarters:
            raise ValueError(f"`alignment_layer` must be a number or one of {list(quarters)}, but is {layer!r}.")
        return math.ceil(quarters[layer] * num_layers / 4)
    return layer


def variant_name(choice: dict[str, Any], grid: dict[str, list]) -> str:
    """The strategy, and the values of whatever else the grid varies."""

    def text(axis: str, value: Any) -> str:
        if axis == "alignment_order":
            return str(value)
        if isinstance(value, list):
            return "blocks" + "+".join(str(number) for number in value)
        prefix = {"alignment_layer": "layer", "alignment_weight": "weight"}.get(axis, "")
        suffix = "-teacher" if axis == "teacher" else ""
        return f"{'' if isinstance(value, str) else prefix}{value}{suffix}"

    varied = [text(axis, value) for axis, value in choice.items() if axis != "alignment" and len(grid[axis]) > 1]
    return "-".join([str(choice["alignment"]), *varied])


def make_variants(grid: dict[str, list], args: argparse.Namespace) -> dict[str, Variant]:
    """Every combination that makes sense, once, by name. Raises ValueError for one that cannot be trained."""
    settings = read_settings(args.settings)
    data = {"dataset_name": args.dataset_name}
    evaluate = settings["evaluate"] | data | {"data_dir": args.data_dir, "features": args.judge}
    shared = settings["train"] | data | {"train_data_dir": args.data_dir}
    flow = make_shapes(parse("train", shared, train_rra.parse_args))
    num_layers = [len(block.layers) for block in flow.blocks]
    axes = [axis for axis in AXES if axis in grid]
    variants, known_arguments = {}, []
    for values in itertools.product(*(grid[axis] for axis in axes)):
        choice = dict(zip(axes, values))
        if choice["alignment"] == BASELINE:
            choice = {"alignment": BASELINE}
        elif choice["alignment"] != "reverse":
            choice.pop("alignment_order", None)
        name = variant_name(choice, grid)
        own = dict(choice)
        if "alignment_blocks" in own:
            own["alignment_blocks"] = resolve_blocks(own["alignment_blocks"], len(num_layers))
        if "alignment_layer" in own:
            own["alignment_layer"] = resolve_layer(own["alignment_layer"], min(num_layers))
        if choice["alignment"] != BASELINE:
            random = own.pop("teacher", "given") == "random"
            own["teacher_model_name_or_path"] = str(args.output_dir / "random_teacher") if random else args.teacher
        if own in known_arguments:  # a block of two layers is as deep in its middle as a quarter up
            continue
        known_arguments.append(own)
        variant = Variant(name, shared | own, evaluate, settings["checkpoint_guidance_scale"])
        variant.places = check_variant(variant, flow)
        variants[name] = variant
    return variants


def make_shapes(train_args: argparse.Namespace) -> torch.nn.Module:
    """The flow without its weights: what it takes to check places."""
    with torch.device("cpu" if train_args.pretrained_model_name_or_path else "meta"):
        return train_rra.make_flow(train_args, None if train_args.unconditional else ["any"], data_sizes={})[0]


def parse(what: str, options: dict[str, Any], parser: Any) -> argparse.Namespace:
    """The script's own parser; what it says becomes one sentence."""
    own = {"output_dir": "o"} | ({"model": "m"} if what == "evaluate" else {})
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            return parser(command_line(options | own))
        except SystemExit as error:
            raise ValueError(stderr.getvalue().strip().splitlines()[-1].partition("error: ")[2]) from error


def check_variant(variant: Variant, flow: torch.nn.Module) -> list[tuple[int, int]]:
    """Its places. Raises ValueError, with its name, for what the scripts or the objective would refuse."""
    try:
        train_args = parse("train", variant.train, train_rra.parse_args)
        parse("evaluate", variant.evaluate, evaluate_flow.parse_args)
        places = train_rra.alignment_places(flow, train_args.alignment_blocks, train_args.alignment_layer)
        arguments = {"strategy": train_args.alignment, "weight": train_args.alignment_weight}
        if train_args.alignment != BASELINE:
            arguments |= {"places": places, "teacher_dim": 1, "projector_dim": 1}
        with torch.device("meta"):
            AlignedFlowObjective(flow, order=train_args.alignment_order, **arguments)
    except ValueError as error:
        raise ValueError(f"The variant {variant.name!r} cannot be run: {error}") from error
    return places


def make_cells(args: argparse.Namespace, grid: dict[str, list]) -> list[Cell]:
    """Seed by seed, so that a run that is not over yet compares all variants."""
    variants = make_variants(grid, args)
    unknown = sorted(set(args.variants or []) - set(variants))
    if unknown:
        raise ValueError(f"`--variants` must be of the grid's, {list(variants)}, but {unknown} are not.")
    chosen = [variant for name, variant in variants.items() if args.variants is None or name in args.variants]
    seeds = grid["seeds"] if args.seeds is None else args.seeds
    return [
        Cell(variant, seed, args.output_dir / "cells" / variant.name / f"seed-{seed}")
        for seed in dict.fromkeys(seeds)
        for variant in chosen
    ]


def check_output_dir(args: argparse.Namespace, grid: dict[str, list], cells: list[Cell]):
    """Raises ValueError if the folder holds another grid's cells, cells of another config, or running ones."""
    axes = {name: values for name, values in grid.items() if name != "seeds"}
    grid_file = args.output_dir / "grid.json"
    if not grid_file.exists() and (args.output_dir / "cells").exists():
        raise ValueError(f"`--output_dir` {args.output_dir} holds cells without their grid: choose another folder.")
    if grid_file.exists() and json.loads(grid_file.read_text()) != axes:
        raise ValueError(
            f"`--output_dir` {args.output_dir} holds another grid's cells ({grid_file}): choose another folder."
        )
    for cell in cells:
        config_file = cell.folder / "cell.json"
        if config_file.exists():
            earlier, now = json.loads(config_file.read_text()), cell_config(cell)
            different = [
                f"{name} ({earlier[stage].get(name)!r} then, {now[stage].get(name)!r} now)"
                for stage in now
                for name in dict.fromkeys([*now[stage], *earlier[stage]])
                if earlier[stage].get(name) != now[stage].get(name)
            ]
            if different:
                raise ValueError(
                    f"The cell {cell.folder} ran with another config: {', '.join(different)}. Choose another"
                    " --output_dir, or delete the cell."
                )
        if (cell.folder / "log.txt").exists():
            with (cell.folder / "log.txt").open("a") as log, refused_while_running(cell):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)


def cell_config(cell: Cell) -> dict[str, dict[str, Any]]:
    return {"train": cell.variant.train, "evaluate": cell.variant.evaluate}


@contextlib.contextmanager
def refused_while_running(cell: Cell):
    try:
        yield
    except BlockingIOError as error:
        raise ValueError(f"The cell {cell.folder} is being run by another process: wait for it, or end it.") from error


def make_random_teacher(teacher: str, folder: Path):
    """The teacher's network with weights as they are before training, always the same ones."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    if folder.exists():
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.from_pretrained(teacher))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".random_teacher-", dir=folder.parent) as partial:
        unfinished = Path(partial) / folder.name
        model.save_pretrained(unfinished)
        AutoImageProcessor.from_pretrained(teacher).save_pretrained(unfinished)
        unfinished.rename(folder)


# Running


def stages(cell: Cell) -> Iterator[tuple[str, list[str], bool]]:
    """The name and command of each stage of a cell, which follows from the one before, and whether it is done."""
    # The scripts write these files last.
    yield "train", cell.train_command, (cell.folder / "flow" / "model_index.json").exists()
    yield "evaluate", cell.evaluate_command, (cell.folder / "evaluation" / "evaluation.json").exists()
    for checkpoint in cell.checkpoints:
        done = read_distance(cell, checkpoint) is not None
        if not done:
            save_checkpoint_pipeline(cell, checkpoint)
        yield f"evaluate {checkpoint.name}", cell.checkpoint_command(checkpoint), done


def save_checkpoint_pipeline(cell: Cell, checkpoint: Path):
    """A checkpoint's averaged weights as the pipeline that the run would have saved there."""
    pipeline = FlowBackPipeline.from_pretrained(cell.folder / "flow")
    averaged = torch.load(checkpoint / "custom_checkpoint_0.pkl", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(pipeline.transformer.parameters(), averaged["shadow_params"], strict=True):
            parameter.copy_(value)
    pipeline.save_pretrained(cell.checkpoint_folder(checkpoint) / "flow")


class Runner:
    """Runs the stages of cells as processes with so many threads each, and ends them if it is itself ended."""

    def __init__(self, threads: int):
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.processes: set[subprocess.Popen] = set()
        self.stopped = False

    def run_cell(self, cell: Cell):
        """Trains and evaluates, whatever of it is not done; `state.json` says how it went."""
        state = cell.state | {"status": None}
        state.pop("error", None)
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(cell.folder / "cell.json", json.dumps(cell_config(cell), indent=2))
        for stage, command, done in stages(cell):
            if done:
                continue
            start = time.perf_counter()
            returncode = self.run(command, cell)
            if self.stopped:
                return
            state["seconds"][stage] = round(time.perf_counter() - start, 1)
            if returncode != 0:
                state |= {"status": "failed", "error": f"{stage}: {error_message(cell.folder / 'log.txt')}"}
                break
        else:
            state["status"] = "done"
        write_atomically(cell.folder / "state.json", json.dumps(state, indent=2))

    def run(self, command: list[str], cell: Cell) -> int:
        with (cell.folder / "log.txt").open("a") as log:
            # The process inherits the lock with the file: it is held for as long as it lives, whoever else is killed.
            with refused_while_running(cell):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.write(f"{shlex.join(command)}\n")
            log.flush()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment)
            self.processes.add(process)
            try:
                if self.stopped:
                    process.terminate()
                return process.wait()
            except BaseException:  # an end that was asked for
                process.terminate()
                raise
            finally:
                self.processes.discard(process)

    def stop(self):
        self.stopped = True
        for process in list(self.processes):
            process.terminate()


def error_message(log: Path) -> str:
    """Of the last process: its exception, else whatever it said last; progress bars may come after both."""
    output = log.read_text(errors="replace").rpartition(f"{sys.executable} ")[2]
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines()]
    exceptions = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return next(reversed(exceptions or [line for line in lines if line]), "no output")


def run_cells(cells: list[Cell], args: argparse.Namespace):
    runner = Runner(args.threads)
    # What is done at one guidance scale may be wanted at another.
    missing = [c for c in cells if c.state["status"] != "done" or not all(done for *_, done in stages(c))]
    progress_bar = tqdm(total=len(cells), initial=len(cells) - len(missing), desc="Cells")
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(runner.run_cell, cell): cell for cell in missing}
        try:
            for future in as_completed(futures):
                future.result()
                cell = futures[future]
                if cell.state["status"] == "failed":
                    progress_bar.write(f"{cell.variant.name}, seed {cell.seed}, failed. {cell.state['error']}")
                write_report(cells, args)
                progress_bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    progress_bar.close()


# Results


def read_row(cell: Cell) -> dict[str, Any]:
    """Everything there is to know of a cell."""
    state = cell.state
    row = {"variant": cell.variant.name, "seed": cell.seed, "status": state["status"] or "not finished"}
    row |= {"error": state["error"]} if "error" in state else {}
    row |= {"seconds": state["seconds"], "places": cell.variant.places}
    if state["status"] != "done":
        return row
    records = [json.loads(line) for line in (cell.folder / "flow" / "metrics.jsonl").read_text().splitlines()]
    validations = [record for record in records if "validation_nll" in record]
    row["curve"] = {"step": [record["step"] for record in validations]}
    row["curve"] |= {
        name: [record.get(f"validation_{name}") for record in validations] for name in ("nll", "accuracy")
    }
    evaluation = json.loads((cell.folder / "evaluation" / "evaluation.json").read_text())
    row["distance_curve"] = read_distance_curve(cell, evaluation, row["curve"]["step"][-1])
    speed = statistics.median(record["images_per_second"] for record in records if "images_per_second" in record)
    training_args = json.loads((cell.folder / "flow" / "training_args.json").read_text())
    images_per_step = training_args["train_batch_size"] * training_args["gradient_accumulation_steps"]
    row["evaluation"] = {name: value for name, value in evaluation.items() if name not in ("model", "command")}
    row["metrics"] = read_metrics(evaluation, cell.variant.places) | {"seconds_per_step": images_per_step / speed}
    return row


def read_distance(cell: Cell, checkpoint: Path) -> float | None:
    """The Fréchet distance of a checkpoint's samples at the guidance scale; `None` if it has not been measured."""
    file = cell.checkpoint_folder(checkpoint) / "evaluation" / "evaluation.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    return results.get(f"frechet_distance/guidance_{cell.variant.checkpoint_guidance_scale}")


def read_distance_curve(cell: Cell, evaluation: dict[str, Any], last_step: int) -> dict[str, list]:
    """Distances over steps, at one guidance scale; empty where not all were measured."""
    distances = {
        int(checkpoint.name.removeprefix("checkpoint-")): read_distance(cell, checkpoint)
        for checkpoint in cell.checkpoints
    }
    if not distances or None in distances.values():
        return {"step": [], "distance": []}
    distances[last_step] = evaluation[f"frechet_distance/guidance_{cell.variant.checkpoint_guidance_scale}"]
    return {"step": list(distances), "distance": list(distances.values())}


def read_metrics(evaluation: dict[str, Any], places: list[tuple[int, int]]) -> dict[str, float]:
    """The figures of the table; what was not evaluated is missing."""
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
    probes = [evaluation.get(f"linear_probe/block{block}_layer{layer}") for block, layer in places]
    if None not in probes:
        metrics["linear_probe_aligned"] = statistics.fmean(probes)
    return {name: value for name, value in metrics.items() if value is not None}


def mean_and_error(values: list[float]) -> dict[str, float | int | None]:
    """The mean, and its standard error where there is more than one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "num_seeds": len(values)}


def steps_to_reach(steps: list[int], values: list[float], target: float) -> float | None:
    """Where a rising curve first reaches the target, between two points by their line; `None` if it never does."""
    if values[0] >= target:
        return float(steps[0])
    for (step, low), (next_step, high) in itertools.pairwise(zip(steps, values)):
        if high >= target:
            return step + (next_step - step) * (target - low) / (high - low)
    return None


def add_speed_ups(rows: list[dict[str, Any]], curve: str, name: str, sign: int) -> float | None:
    """
    Into the rows' metrics: the step at which each reaches what the baseline has in the end (its seeds' mean), and how
    many times fewer that is than the baseline's own mean step. The target; `None` if there is no baseline to beat.
    """
    rows = [row for row in rows if row[curve]["step"] and None not in row[curve][name]]
    baseline = [row for row in rows if row["variant"] == BASELINE]
    if not baseline:
        return None
    target = statistics.fmean(row[curve][name][-1] for row in baseline)
    reached = [
        steps_to_reach(row[curve]["step"], [sign * value for value in row[curve][name]], sign * target) for row in rows
    ]
    # A seed of the baseline that ends below their mean has taken the whole run, at least.
    baseline_steps = statistics.fmean(
        row[curve]["step"][-1] if step is None else step for row, step in zip(rows, reached) if row in baseline
    )
    for row, step in zip(rows, reached):
        if step:
            row["metrics"][f"steps_to_baseline_{name}"] = step
            row["metrics"][f"times_fewer_steps_{name}"] = baseline_steps / step
    return target


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of each variant, and how many times fewer steps it takes to where the baseline ends."""
    done = [row for row in rows if row["status"] == "done"]
    baseline_final = {
        "accuracy": add_speed_ups(done, "curve", "accuracy", sign=1),
        "distance": add_speed_ups(done, "distance_curve", "distance", sign=-1),
    }
    variants = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in done if row["variant"] == name]
        variants[name] = {
            "num_cells": sum(row["variant"] == name for row in rows),
            "num_done": len(own),
            "metrics": {
                metric: mean_and_error([row["metrics"][metric] for row in own if metric in row["metrics"]])
                for metric in dict.fromkeys(metric for row in own for metric in row["metrics"])
            },
            "minus_baseline": paired_differences(own, [row for row in done if row["variant"] == BASELINE]),
        }
    return {"baseline_final": baseline_final, "variants": variants}


def paired_differences(rows: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of what each metric is more than the baseline's of the same seed: what seeds do to both
    falls out."""
    pairs = [(row["metrics"], other["metrics"]) for row in rows for other in baseline if row["seed"] == other["seed"]]
    metrics = [key for _, key, *_ in COLUMNS if pairs and all(key in metrics for pair in pairs for metrics in pair)]
    return {key: mean_and_error([own[key] - other[key] for own, other in pairs]) for key in metrics}


# Column, figure of the summary, factor, digits.
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
    ("× fewer steps, FD", "times_fewer_steps_distance", 1, 2),
    ("ms a step", "seconds_per_step", 1000, 0),
)


def format_figure(figure: dict[str, Any] | None, factor: float, digits: int, num_done: int | None) -> str:
    if figure is None:
        return ""
    text = f"{factor * figure['mean']:.{digits}f}"
    if figure["standard_error"] is not None:
        text += f" ± {factor * figure['standard_error']:.{digits}f}"
    return text if num_done in (None, figure["num_seeds"]) else f"{text} ({figure['num_seeds']} of {num_done})"


def write_report(cells: list[Cell], args: argparse.Namespace):
    """Of all cells of this command, finished or not."""
    rows = [read_row(cell) for cell in cells]
    summary = summarise(rows)
    seconds = sum(sum(row["seconds"].values()) for row in rows)
    report = {
        "command": shlex.join(["python", "training/ablate.py", *args.command]),
        "commit": current_commit(),
        "machine": describe_machine("cuda" if torch.cuda.is_available() else "cpu")
        | {"threads": args.threads, "jobs": args.jobs},
        "cell_hours": round(seconds / 3600, 3),
        "settings": json.loads(args.settings.read_text()),
        **summary,
        "cells": rows,
    }
    write_atomically(args.output_dir / "results.json", json.dumps(report, indent=2) + "\n")
    write_atomically(args.output_dir / "results.md", markdown(report))
    done = [row for row in rows if row["status"] == "done"]
    if done:
        draw_curves(done, summary, args.output_dir / "curves.png")
        draw_distance_against_accuracy(summary, args.output_dir / "distance_against_accuracy.png")
        draw_linear_probe(done, args.output_dir / "linear_probe.png")


def markdown(report: dict[str, Any]) -> str:
    columns = [
        column for column in COLUMNS if any(column[1] in variant["metrics"] for variant in report["variants"].values())
    ]
    table = [
        [name, str(variant["num_done"])]
        + [
            format_figure(variant["metrics"].get(key), factor, digits, variant["num_done"])
            for _, key, factor, digits in columns
        ]
        for name, variant in report["variants"].items()
    ]
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [
        f"`{report['command']}`",
        "",
        f"Commit {report['commit']}; {machine}; {report['cell_hours']:.2f} hours, summed over the cells.",
        "",
        markdown_table(["variant", "seeds", *(title for title, *_ in columns)], table),
        "",
        "Mean ± standard error over seeds; a difference within its error is none. nll: nats per dimension. Guided: at"
        " the scale with the lowest distance. Probe at its places: a linear classifier on the hidden states where the"
        " variant is aligned, of the baseline where it would be by default.",
    ]
    finals = report["baseline_final"]
    differences = {
        name: variant["minus_baseline"]
        for name, variant in report["variants"].items()
        if name != BASELINE and variant["minus_baseline"] and variant["num_done"] > 1
    }
    if finals["accuracy"] is not None:
        lines[-1] += (
            " × fewer steps: the step at which the baseline first reaches its own final accuracy"
            f" ({100 * finals['accuracy']:.1f} %, the mean over seeds; by one gradient with one draw of noise at each"
            " validation, lines between them) over that at which the variant does; a seed that never does is left"
            " out and counted."
        )
    if finals["distance"] is not None:
        scale = report["settings"]["checkpoint_guidance_scale"]
        lines[-1] += f" The same for its final FD, {finals['distance']:.3f} at guidance {scale}, over checkpoints."
    if differences:
        compared = [column for column in columns if all(column[1] in figures for figures in differences.values())]
        table = [
            [name, *(format_figure(figures[key], factor, digits, None) for _, key, factor, digits in compared)]
            for name, figures in differences.items()
        ]
        lines += ["", "The same less the baseline's, seed by seed, which what a seed does to both does not blur:", ""]
        lines += [markdown_table(["variant", *(title for title, *_ in compared)], table)]
    unfinished = [row for row in report["cells"] if row["status"] != "done"]
    if unfinished:
        cells = [[r["variant"], str(r["seed"]), r["status"], r.get("error", "").replace("|", "/")] for r in unfinished]
        lines += ["", markdown_table(["cell without result", "seed", "status", "error"], cells)]
    figures = {"curves": "Over steps", "distance_against_accuracy": "Distance and accuracy"}
    if any("linear_probe_best" in variant["metrics"] for variant in report["variants"].values()):
        figures["linear_probe"] = "Linear probe"
    lines += [f"\n![{title}]({name}.png)" for name, title in figures.items()]
    return "\n".join(lines) + "\n"


# Figures


def colors_of(names: Iterable[str]) -> dict[str, Any]:
    """The baseline is grey; the others keep their order's colors."""
    import matplotlib

    palette = matplotlib.colormaps["tab10" if len(list(names)) <= 11 else "tab20"].colors
    others = [name for name in names if name != BASELINE]
    return {BASELINE: "0.35"} | {name: palette[number % len(palette)] for number, name in enumerate(others)}


def mean_curves(
    rows: list[dict[str, Any]], curve: str, name: str
) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """By variant: steps, means and standard errors over seeds."""
    curves = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row[curve] for row in rows if row["variant"] == variant]
        own = [points for points in own if points["step"] and None not in points[name]]
        if own:
            points = [mean_and_error(list(values)) for values in zip(*(points[name] for points in own))]
            means, errors = [point["mean"] for point in points], [point["standard_error"] or 0.0 for point in points]
            curves[variant] = (own[0]["step"], means, errors)
    return curves


def draw_curves(rows: list[dict[str, Any]], summary: dict[str, Any], path: Path):
    """Accuracy, distance and nll of every variant over steps, and what the baseline ends with."""
    plt = evaluate_flow.import_pyplot()
    colors = colors_of(summary["variants"])
    panels = {
        "accuracy": ("curve", 100, "accuracy by one gradient, %"),
        "distance": ("distance_curve", 1, "Fréchet distance"),
        "nll": ("curve", 1, "validation nll, nats per dimension"),
    }
    curves = {name: mean_curves(rows, curve, name) for name, (curve, *_) in panels.items()}
    panels = {name: panel for name, panel in panels.items() if curves[name]}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1.5, 3.8), layout="constrained", squeeze=False
    )
    for axis, (name, (_, factor, label)) in zip(axes[0], panels.items()):
        for variant, (steps, means, errors) in curves[name].items():
            lower = [factor * (mean - error) for mean, error in zip(means, errors)]
            upper = [factor * (mean + error) for mean, error in zip(means, errors)]
            values = [factor * mean for mean in means]
            axis.plot(steps, values, color=colors[variant], marker="o", markersize=3, label=variant)
            axis.fill_between(steps, lower, upper, color=colors[variant], alpha=0.15, linewidth=0)
        final = summary["baseline_final"].get(name)
        if final is not None:
            axis.axhline(factor * final, color=colors[BASELINE], linestyle="--", linewidth=1)
        axis.set(xlabel="step", ylabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
    # What comes before the first third is far above all that follows.
    later = [
        mean for steps, means, _ in curves["nll"].values() for step, mean in zip(steps, means) if 3 * step >= steps[-1]
    ]
    margin = 0.05 * (max(later) - min(later))
    if margin:
        axes[0, -1].set_ylim(min(later) - margin, max(later) + margin)

    def legend_entry(variant: str) -> str:
        times = summary["variants"][variant]["metrics"].get("times_fewer_steps_accuracy")
        return variant if times is None or variant == BASELINE else f"{variant} ({times['mean']:.1f}×)"

    handles, labels = axes[0, -1].get_legend_handles_labels()
    axes[0, -1].legend(
        handles,
        [legend_entry(variant) for variant in labels],
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        title="(× fewer steps to the\nbaseline's final accuracy)",
    )
    evaluate_flow.savefig(figure, path)
    plt.close(figure)


def draw_distance_against_accuracy(summary: dict[str, Any], path: Path):
    """The paper's Figure 1d: lower right is better."""
    plt = evaluate_flow.import_pyplot()
    colors = colors_of(summary["variants"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
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
    evaluate_flow.savefig(figure, path)
    plt.close(figure)


def draw_linear_probe(rows: list[dict[str, Any]], path: Path):
    """The paper's Figure 4: what a linear classifier reads off each layer, variant by variant; aligned places full."""
    probes = [(row, evaluate_flow.by_prefix(row["evaluation"], "linear_probe")) for row in rows]
    probes = [(row, probe) for row, probe in probes if probe]
    if not probes:
        return
    plt = evaluate_flow.import_pyplot()
    names = list(dict.fromkeys(row["variant"] for row, _ in probes))
    colors = colors_of(names)
    keys = list(probes[0][1])
    places = [tuple(int(part) for part in key.removeprefix("block").split("_layer")) for key in keys]
    blocks = [block for block, _ in places]
    figure, axis = plt.subplots(figsize=(max(6.5, 0.35 * len(places) + 3), 3.8), layout="constrained")
    for block in dict.fromkeys(blocks):
        inside = [number for number, other in enumerate(blocks) if other == block]
        if block % 2 == 0:
            axis.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color="0.95", zorder=0)
        for name in names:
            own = [(row, probe) for row, probe in probes if row["variant"] == name]
            aligned = [] if name == BASELINE else [tuple(place) for place in own[0][0]["places"]]
            points = [mean_and_error([100 * probe[keys[number]] for _, probe in own]) for number in inside]
            axis.errorbar(
                inside,
                [point["mean"] for point in points],
                yerr=[point["standard_error"] or 0 for point in points],
                color=colors[name],
                elinewidth=1,
                label=name if block == blocks[0] else None,
            )
            for number, point in zip(inside, points):
                face = colors[name] if places[number] in aligned else "white"
                axis.plot(number, point["mean"], marker="o", markersize=5, color=colors[name], markerfacecolor=face)
    axis.set_xticks(range(len(places)), [str(layer) for _, layer in places], fontsize=8)
    axis.set(xlabel="layer, within flow blocks", ylabel="linear probe, %", xlim=(-0.5, len(places) - 0.5))
    blocks_axis = axis.secondary_xaxis("top")
    centers = {
        block: statistics.fmean(number for number, other in enumerate(blocks) if other == block) for block in blocks
    }
    blocks_axis.set_xticks(list(centers.values()), [f"block {block}" for block in centers], fontsize=9)
    blocks_axis.tick_params(length=0)
    blocks_axis.spines["top"].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="full: aligned here")
    evaluate_flow.savefig(figure, path)
    plt.close(figure)


# The estimate


def estimate_hours(cells: list[Cell], args: argparse.Namespace):
    """
    Prints what a step of each variant takes, from ten of them, and what the whole grid would take.

    Validations and start-up are timed with the first variant, whose evaluation is run in full on the flow that ten
    steps have left; one of a checkpoint is taken to cost as much as the whole one.
    """
    runner = Runner(args.threads)
    timed_steps = 10
    with tempfile.TemporaryDirectory() as folder:

        def train(variant: Variant, validation_steps: int) -> tuple[Cell, float, float]:
            own = {"max_train_steps": timed_steps, "logging_steps": timed_steps // 2}
            own |= {"validation_steps": validation_steps, "checkpointing_steps": timed_steps}
            if variant.train.get("teacher_model_name_or_path") == str(args.output_dir / "random_teacher"):
                own["teacher_model_name_or_path"] = args.teacher  # as large, and there
            timed = Variant(variant.name, variant.train | own, variant.evaluate)
            cell = Cell(timed, 0, Path(folder) / f"{variant.name}-{validation_steps}")
            cell.folder.mkdir()
            seconds = run_timed(runner, cell.train_command, cell)
            records = [json.loads(line) for line in (cell.folder / "flow" / "metrics.jsonl").read_text().splitlines()]
            speed = [record["images_per_second"] for record in records if "images_per_second" in record][-1]
            train_args = parse("train", variant.train, train_rra.parse_args)
            return cell, seconds, train_args.train_batch_size * train_args.gradient_accumulation_steps / speed

        variants = list({cell.variant.name: cell.variant for cell in cells}.values())
        cell, seconds, step = train(variants[0], timed_steps)
        _, longer, _ = train(variants[0], timed_steps // 5)
        validation = max(0.0, longer - seconds) / 4
        start_up = max(0.0, seconds - timed_steps * step - 2 * validation)
        evaluation = run_timed(runner, cell.evaluate_command, cell)
        steps = {variants[0].name: step} | {variant.name: train(variant, timed_steps)[2] for variant in variants[1:]}

    print(f"start {start_up:.1f} s, a validation {validation:.1f} s, an evaluation {evaluation:.1f} s")
    cell_seconds = {}
    for variant in variants:
        train_args = parse("train", variant.train, train_rra.parse_args)
        max_train_steps = train_args.max_train_steps or 0
        if not max_train_steps:
            raise ValueError("`--settings` must name max_train_steps for an estimate.")
        num_validations = 1 + math.ceil(max_train_steps / train_args.validation_steps)
        num_evaluations = 1
        if variant.checkpoint_guidance_scale is not None:
            num_kept = math.ceil(max_train_steps / train_args.checkpointing_steps)
            num_evaluations = min(num_kept, train_args.checkpoints_total_limit or num_kept)
        cell_seconds[variant.name] = start_up + num_validations * validation + max_train_steps * steps[variant.name]
        cell_seconds[variant.name] += num_evaluations * evaluation
        print(f"{variant.name}: {steps[variant.name]:.3f} s a step, {cell_seconds[variant.name] / 60:.1f} min a cell")
    missing = [cell for cell in cells if cell.state["status"] != "done"]
    total = sum(cell_seconds[cell.variant.name] for cell in missing)
    print(
        f"{len(missing)} of {len(cells)} cells are to be run: {total / 3600:.2f} hours one by one,"
        f" {total / 3600 / args.jobs:.2f} with --jobs {args.jobs} if they do not slow each other down"
    )


def run_timed(runner: Runner, command: list[str], cell: Cell) -> float:
    start = time.perf_counter()
    if runner.run(command, cell) != 0:
        raise RuntimeError(f"{cell.variant.name} cannot be timed. {error_message(cell.folder / 'log.txt')}")
    return time.perf_counter() - start


def main(args: argparse.Namespace):
    disable_progress_bar()  # of loading checkpoints, which takes no time
    # Everything a user can get wrong is found before anything runs.
    if args.data_dir is not None and not Path(args.data_dir).is_dir():
        raise ValueError(f"`--data_dir` must be an existing folder, but is {args.data_dir!r}.")
    grid = read_grid(args.grid)
    cells = make_cells(args, grid)
    check_output_dir(args, grid, cells)
    for cell in cells:
        print(f"{cell.variant.name}, seed {cell.seed}: {cell.state['status'] or 'to be run'}")
    if args.dry_run:
        estimate_hours(cells, args)
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    axes = {name: values for name, values in grid.items() if name != "seeds"}
    write_atomically(args.output_dir / "grid.json", json.dumps(axes, indent=2))
    if "random" in grid.get("teacher", []):
        make_random_teacher(args.teacher, args.output_dir / "random_teacher")
    run_cells(cells, args)
    write_report(cells, args)
    print((args.output_dir / "results.md").read_text())


if __name__ == "__main__":
    # An end that is asked for ends the cells, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main(parse_args())
