# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Running the cells of a grid: each trains a flow and evaluates it, as processes with a folder and a log of their own.
"""

import fcntl
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

import torch
from tqdm.auto import tqdm

from flowback_hf.ablation.grids import Cell, Variant, command_line, parse_evaluate_options
from flowback_hf.ablation.statistics import read_checkpoint, read_row
from flowback_hf.data.splits import DataSource, HoldOut
from flowback_hf.files import compare_settings, read_json, write_json, write_whole
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline
from flowback_hf.reporting import current_commit, describe_machine
from flowback_hf.training.checkpoints import checksum_of_file, load_averaged_parameters


# Arguments that training and `precompute_features.py` share.
PRECOMPUTE_ARGUMENTS = ("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "label_column")
PRECOMPUTE_ARGUMENTS += ("cache_dir", "resolution", "patch_size", "in_channels", "mixed_precision")


@dataclass(frozen=True)
class Scripts:
    """Where the scripts are that cells run: `train_rra.py`, `evaluate_flow.py` and `precompute_features.py`."""

    train: Path
    evaluate: Path
    precompute: Path

    def train_command(self, cell: Cell) -> list[str]:
        """The command that trains a cell's flow, from its last checkpoint if it has one."""
        own = {"seed": cell.seed, "output_dir": cell.flow_folder, "resume_from_checkpoint": "latest"}
        return [sys.executable, str(self.train), *command_line(cell.variant.train | own)]

    def evaluate_command(self, cell: Cell) -> list[str]:
        """The command that evaluates a cell's flow."""
        own = {"seed": cell.seed, "model": cell.flow_folder, "output_dir": cell.evaluation_file.parent}
        return [sys.executable, str(self.evaluate), *command_line(cell.variant.evaluate | own)]

    def shuffle_command(self, variant: Variant, teacher: str) -> list[str]:
        """The command that stores the shuffled features that a variant reads."""
        own = {name: value for name, value in variant.train.items() if name in PRECOMPUTE_ARGUMENTS}
        own |= {"teacher_model_name_or_path": teacher, "shuffle": variant.shuffle}
        own |= {"output_dir": variant.train["teacher_features"]}
        return [sys.executable, str(self.precompute), *command_line(own)]

    def checkpoint_command(self, cell: Cell, checkpoint: Path) -> list[str]:
        """The command that evaluates a checkpoint: likelihood, accuracy by one gradient, and samples at one scale."""
        folder = cell.checkpoint_folder(checkpoint)
        own = {"seed": cell.seed, "model": folder / "flow", "output_dir": folder / "evaluation"}
        own |= {"methods": ["gradient"], "linear_probe": False}
        own |= {"guidance_scales": [cell.variant.checkpoint_guidance_scale]}
        own |= {"reference": cell.evaluation_file.with_name("reference.npz")}
        return [sys.executable, str(self.evaluate), *command_line(cell.variant.evaluate | own)]

    def stages(self, cell: Cell) -> Iterator["Stage"]:
        """The stages of a cell, in order. Which checkpoints there are is known only once the flow is trained."""
        # The scripts write these files last.
        yield Stage("train", self.train_command(cell), (cell.flow_folder / "model_index.json").exists())
        yield Stage("evaluate", self.evaluate_command(cell), cell.evaluation_file.exists())
        for checkpoint in cell.checkpoints:
            command, done = self.checkpoint_command(cell, checkpoint), read_checkpoint(cell, checkpoint) is not None
            yield Stage(f"evaluate {checkpoint.name}", command, done, checkpoint)

    def is_done(self, cell: Cell) -> bool:
        """Whether all stages are done: what is done at one guidance scale may be wanted at another."""
        if cell.record_file is not None:
            return cell.record is not None
        return cell.state["status"] == "done" and all(stage.done for stage in self.stages(cell))


class Stage(NamedTuple):
    """
    A process of a cell.

    Args:
        name (`str`): What the log of seconds and errors calls it.
        command (`list[str]`): What is run.
        done (`bool`): Whether it has been run to its end.
        checkpoint (`pathlib.Path`, *optional*): The checkpoint whose pipeline has to be saved first.
    """

    name: str
    command: list[str]
    done: bool
    checkpoint: Path | None = None


def save_checkpoint_pipeline(cell: Cell, checkpoint: Path):
    """Save a checkpoint's averaged weights as the pipeline that the run would have saved there."""
    pipeline = FlowBackPipeline.from_pretrained(cell.flow_folder)
    load_averaged_parameters(checkpoint, pipeline.transformer.parameters())
    folder = cell.checkpoint_folder(checkpoint) / "flow"
    pipeline.save_pretrained(folder)
    # Its evaluation asks what the run held out.
    source = DataSource.from_args(parse_evaluate_options(cell.variant.evaluate))
    hold_out = HoldOut.read(cell.flow_folder, source.name)
    if hold_out is not None:
        hold_out.write(folder)


class Runner:
    """
    Runs the stages of cells as processes, and ends them if it is itself ended.

    Args:
        scripts ([`Scripts`]): What the stages run.
        threads (`int`): Threads of each process.
        command (`Sequence[str]`): The command line that records say they came from.
        checksums (`dict` of `str` to `str`): Those of the files that cells depend on, for their records.
    """

    def __init__(
        self,
        scripts: Scripts,
        threads: int,
        command: Sequence[str] = (),
        checksums: Mapping[str, str] = MappingProxyType({}),
    ):
        self.scripts = scripts
        self.threads = threads
        self.command = command
        self.checksums = checksums
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.processes: set[subprocess.Popen] = set()
        self.stopped = False

    def run_cell(self, cell: Cell):
        """Train and evaluate a cell, as far as it is not done. `state.json` says how it went."""
        state = cell.state | {"status": None}
        state.pop("error", None)
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_json(cell.folder / "cell.json", cell.config)
        for stage in self.scripts.stages(cell):
            if stage.done:
                continue
            if stage.checkpoint is not None:
                save_checkpoint_pipeline(cell, stage.checkpoint)
            start = time.perf_counter()
            returncode = self.run(stage.command, cell.log_file)
            if self.stopped:
                return
            state["seconds"][stage.name] = round(time.perf_counter() - start, 1)
            if returncode != 0:
                state |= {"status": "failed", "error": f"{stage.name}: {error_message(cell.log_file)}"}
                break
        else:
            state["status"] = "done"
        write_json(cell.folder / "state.json", state)
        if state["status"] == "done" and cell.record_file is not None:
            self.write_record(cell)

    def write_record(self, cell: Cell):
        """Keep the results of a finished cell, and what they depend on."""
        cell.record_file.parent.mkdir(parents=True, exist_ok=True)
        machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
        record = {
            "config": cell.recorded_config,
            "checksums": dict(self.checksums),
            "command": ablate_command(self.command),
            "commit": current_commit(),
            "machine": machine | {"threads": self.threads},
            "row": read_row(cell),
        }
        write_json(cell.record_file, record)

    def store_shuffled_features(self, cells: Sequence[Cell], teacher: str):
        """
        Store the shuffled features that cells which are not done read, each kind once for all seeds.

        Raises:
            RuntimeError: if they cannot be stored.
        """
        needed = [
            cell.variant for cell in cells if cell.variant.shuffle is not None and not self.scripts.is_done(cell)
        ]
        for variant in {variant.train["teacher_features"]: variant for variant in needed}.values():
            folder = Path(variant.train["teacher_features"]).parent
            folder.mkdir(parents=True, exist_ok=True)
            if self.run(self.scripts.shuffle_command(variant, teacher), folder / "log.txt") != 0:
                error = error_message(folder / "log.txt")
                raise RuntimeError(f"The features of {variant.name} cannot be stored. {error}")

    def run(self, command: list[str], log_file: Path) -> int:
        """Run a command, whose output is added to a log. Returns its exit status."""
        with log_file.open("a") as log:
            # The process inherits the lock with the file: it is held for as long as it lives, whoever else is killed.
            lock(log)
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

    def run_cells(self, cells: Sequence[Cell], jobs: int, on_finish: Callable[[Cell], Any]):
        """
        Run all cells that are not done.

        Args:
            cells (`Sequence[Cell]`): The cells.
            jobs (`int`): How many run side by side.
            on_finish (`Callable`): Is called with each cell that has ended, done or failed.
        """
        missing = [cell for cell in cells if not self.scripts.is_done(cell)]
        progress_bar = tqdm(total=len(cells), initial=len(cells) - len(missing), desc="Cells")
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(self.run_cell, cell): cell for cell in missing}
            try:
                for future in as_completed(futures):
                    future.result()
                    cell = futures[future]
                    if cell.state["status"] == "failed":
                        progress_bar.write(f"{cell.variant.name}, seed {cell.seed}, failed. {cell.state['error']}")
                    on_finish(cell)
                    progress_bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        progress_bar.close()

    def stop(self):
        """End all processes, and start no more."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()


def ablate_command(arguments: Sequence[str]) -> str:
    """The command line of `training/ablate.py` for reports and records."""
    return shlex.join(["python", "training/ablate.py", *arguments])


def lock(log: TextIO):
    """Lock an open log. Raises ValueError if another process writes it."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        folder = Path(log.name).parent
        raise ValueError(f"{folder} is being run by another process: wait for it, or end it.") from error


def error_message(log: Path) -> str:
    """
    What the last process of a log died of: its exception or error, or else whatever it said last.

    Progress bars may come after both.
    """
    output = log.read_text(errors="replace").rpartition(f"{sys.executable} ")[2]
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines()]
    error = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b|\w+\.py: error: ")
    errors = [line for line in lines if error.match(line)]
    return next(reversed(errors or [line for line in lines if line]), "no output")


def check_output_dir(output_dir: Path, axes: dict[str, list], cells: Sequence[Cell]):
    """
    Raise ValueError if the output folder holds another grid's cells, cells of another config, or running ones.

    Args:
        output_dir (`pathlib.Path`): The folder.
        axes (`dict`): The grid without its seeds.
        cells (`Sequence[Cell]`): The cells that are to be run.
    """
    grid_file = output_dir / "grid.json"
    if not grid_file.exists() and (output_dir / "cells").exists():
        raise ValueError(f"`--output_dir` {output_dir} holds cells without their grid: choose another folder.")
    if grid_file.exists() and read_json(grid_file) != axes:
        raise ValueError(
            f"`--output_dir` {output_dir} holds another grid's cells ({grid_file}): choose another folder."
        )
    for cell in cells:
        earlier = read_json(cell.folder / "cell.json")
        if earlier is not None:
            different = [
                text for stage in cell.config for text in compare_settings(earlier[stage], cell.config[stage])
            ]
            if different:
                raise ValueError(
                    f"The cell {cell.folder} ran with another config: {', '.join(different)}. Choose another"
                    " --output_dir, or delete the cell."
                )
        if cell.log_file.exists():
            with cell.log_file.open("a") as log:
                lock(log)


def checksum_of_path(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of all files of a folder."""
    if path.is_file():
        return checksum_of_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{checksum_of_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_records(cells: Sequence[Cell], checksums: Mapping[str, str]):
    """
    Raise ValueError if a cell's record is of another config or of other files.

    Args:
        cells (`Sequence[Cell]`): The cells.
        checksums (`dict` of `str` to `str`): Those of the data set and networks that are here, by name.
    """
    for cell in cells:
        if cell.record is None:
            continue
        earlier = cell.record["config"] | {"checksums": cell.record["checksums"]}
        now = cell.recorded_config | {"checksums": checksums}
        # A table can be written where the data set is not, and only some variants have another teacher.
        missing = earlier["checksums"].keys() ^ checksums.keys()
        different = [text for part in now for text in compare_settings(earlier[part], now[part], may_differ=missing)]
        if different:
            raise ValueError(
                f"The record {cell.record_file} is of another config or other files: {', '.join(different)}. Choose"
                " another --records_dir, or delete the record."
            )


def make_random_teacher(teacher: str, folder: Path):
    """
    Save a teacher's network with the weights that it has before training, which are always the same.

    Args:
        teacher (`str`): A Hub id or a folder.
        folder (`pathlib.Path`): Where the random teacher is saved. One that exists is kept.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    from flowback_hf.alignment.teacher import refuse_unreadable

    if folder.exists():
        return
    with torch.random.fork_rng(), refuse_unreadable(teacher):
        torch.manual_seed(0)
        model = AutoModel.from_config(
            AutoConfig.from_pretrained(teacher, trust_remote_code=False), trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(teacher, trust_remote_code=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
