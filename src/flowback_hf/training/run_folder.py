# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The output folder of a run: its settings, the log, and the pipeline."""

import contextlib
import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from filelock import FileLock, Timeout

from flowback_hf import FlowBackPipeline
from flowback_hf.files import (
    METRICS_FILE,
    compare_settings,
    explain_full_disk,
    flush,
    flush_entry,
    move_into,
    read_json,
    read_metrics_log,
    remove,
    replace,
    staged,
    write_json,
    write_text,
    write_whole,
)
from flowback_hf.reporting import figure_file
from flowback_hf.training.adapters import ADAPTER_FILE
from flowback_hf.training.checkpoints import SETTINGS_FILE, checkpoints_to_try, list_checkpoints, read_copy
from flowback_hf.training.sharding import sharding_of
from flowback_hf_cli.training import TrainingArguments


logger = get_logger(__name__, log_level="INFO")

INDEX_FILE = "model_index.json"
LOCK_FILE = ".lock"
OWNER_FILE = ".lock.json"

# What a resumed run may change: how it is run and watched, and how long, which stretches the learning rate's schedule.
RESUMABLE_SETTINGS = {
    "async_checkpointing",
    "cache_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "dataloader_num_workers",
    "ddp_timeout",
    "eval_batch_size",
    "hub_model_id",
    "hub_private_repo",
    "logging_dir",
    "logging_steps",
    "max_train_steps",
    "max_validation_samples",
    "num_train_epochs",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "save_on_signal",
    "tracker_project_name",
    "validation_class_labels",
    "validation_guidance_scale",
    "validation_steps",
}


# How the images of a step are divided. A resumed run may change it if there are as many of them as before.
DIVISION_SETTINGS = ("train_batch_size", "num_processes", "gradient_accumulation_steps", "total_batch_size")

# What may be changed to get a run that diverged to go on: it becomes another branch of the run, which is recorded.
BRANCH_SETTINGS = ("learning_rate", "lr_warmup_steps", "max_grad_norm")
BRANCHES = "branches"

# What aligned runs of earlier versions did, whose settings do not say it.
EARLIER_ALIGNMENT = {"projector_type": "mlp", "normalize_teacher_features": False}


def describe_processes(arguments: TrainingArguments, accelerator: Accelerator) -> dict[str, Any]:
    """
    How a run is divided: `num_processes`, `total_batch_size`, the images that a step takes, and `sharding`, `"fsdp"`
    or `None`.
    """
    num_processes = accelerator.num_processes
    total = arguments.train_batch_size * num_processes * arguments.gradient_accumulation_steps
    sharding = None if sharding_of(accelerator) is None else "fsdp"
    return {"num_processes": num_processes, "total_batch_size": total, "sharding": sharding}


def describe_total_batch_size(settings: dict[str, Any]) -> str:
    """How a run gets its images per step, for a message."""
    batch_size, num_processes = settings["train_batch_size"], settings["num_processes"]
    return (
        f"{batch_size} on {num_processes} process{'es' * (num_processes > 1)} with `--gradient_accumulation_steps`"
        f" {settings['gradient_accumulation_steps']}"
    )


def check_total_batch_size(earlier: dict[str, Any], settings: dict[str, Any]):
    """
    Check that the steps of a resumed run take as many images as before. Learning rate and schedule were chosen for it.

    Raises:
        ValueError: unless they do.
    """
    # Runs of earlier versions do not say on how many processes they ran.
    earlier = {"num_processes": settings["num_processes"], **earlier}
    total = math.prod(earlier[name] for name in DIVISION_SETTINGS[:3])
    if total != settings["total_batch_size"]:
        raise ValueError(
            f"`--train_batch_size` {describe_total_batch_size(settings)} makes steps of"
            f" {settings['total_batch_size']} images, but the run to resume takes {total}"
            f" ({describe_total_batch_size(earlier)}): choose them so that their product is the same."
        )


def check_sharding(earlier: dict[str, Any], settings: dict[str, Any]):
    """Raise ValueError unless a resumed run and its checkpoints are both sharded, or both not."""
    if earlier.get("sharding") == settings["sharding"]:
        return
    was, cure = ("not sharded", "without FSDP") if settings["sharding"] else ("sharded by FSDP", "with FSDP")
    raise ValueError(
        f"`--resume_from_checkpoint` cannot be combined with this accelerate config: the run to resume was {was}, and"
        f" so are its checkpoints. Go on {cure}, as in training/configs/accelerate."
    )


def check_run_folder(
    folder: str | Path, settings: dict[str, Any], resume_from_checkpoint: str | None
) -> dict[str, Any] | None:
    """
    Check that a run may write to a folder, before anything is written.

    Args:
        folder (`str` or `pathlib.Path`): The output folder.
        settings (`dict`): What `training_args.json` is to hold, with [`describe_processes`].
        resume_from_checkpoint (`str`, *optional*): Whether an earlier run is to go on.
    Returns:
        `dict`: the settings of the run to resume; `None` if there is none.
    Raises:
        ValueError: if the folder holds another run, another model, a run that is not to be resumed, or one whose steps
            took another number of images.
    """
    folder = Path(folder)
    if resume_from_checkpoint is None and (folder / SETTINGS_FILE).exists():
        raise ValueError(
            f"`--output_dir` {folder} already holds a run: add --resume_from_checkpoint latest to go on with it, or"
            " choose another folder."
        )
    earlier = None if resume_from_checkpoint is None else read_earlier_settings(folder, resume_from_checkpoint)
    if earlier is None:
        if any(any(folder.glob(name)) for name in ("checkpoint-*", INDEX_FILE, ADAPTER_FILE)):
            raise ValueError(f"`--output_dir` {folder} already holds another model: choose another folder.")
        return None
    if "flow_hash" in settings:  # runs of learned inverses that began before it was recorded
        earlier = {"flow_hash": settings["flow_hash"], **earlier}
    for name, value in EARLIER_ALIGNMENT.items():
        if name in settings and earlier.get(name) is None:
            earlier = {**earlier, name: settings[name] if settings["alignment"] == "none" else value}
    different = compare_settings(
        earlier, settings, {*RESUMABLE_SETTINGS, *DIVISION_SETTINGS, *BRANCH_SETTINGS, "sharding", BRANCHES}
    )
    if different:
        flags = ", ".join(f"--{difference}" for difference in different).replace("--flow_hash", "the flow's weights")
        raise ValueError(f"`--output_dir` {folder} holds a different run; it differs in {flags}.")
    check_sharding(earlier, settings)
    check_total_batch_size(earlier, settings)
    return earlier


def read_earlier_settings(folder: Path, resume_from_checkpoint: str) -> dict[str, Any] | None:
    """
    Read the settings of the run in a folder: those of the checkpoint that it is resumed from or, if that has none,
    those in the folder itself.

    Raises:
        ValueError: if there are only damaged ones. Says what to do.
    """
    for checkpoint in checkpoints_to_try(folder, resume_from_checkpoint):
        with contextlib.suppress(ValueError):
            settings = json.loads(read_copy(checkpoint, SETTINGS_FILE) or b"")
            if isinstance(settings, dict):
                return settings
    cure = (
        "no checkpoint has a copy: restore it from a backup, or start again in another folder"
        if list_checkpoints(folder)
        else "there is no checkpoint yet: delete the folder and start again"
    )
    try:
        settings = read_json(folder / SETTINGS_FILE)
    except ValueError as error:
        raise ValueError(f"{error} {cure.capitalize()}.") from error
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"{folder / SETTINGS_FILE} is damaged, and {cure}.")
    return settings


def describe_branch(earlier: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What makes a resumed run another branch of the run: descriptions as [`compare_settings`] gives them."""
    return compare_settings(
        {name: earlier.get(name) for name in BRANCH_SETTINGS}, {name: settings.get(name) for name in BRANCH_SETTINGS}
    )


def set_aside_later_checkpoints(folder: Path, last_step: int):
    """Rename the checkpoints after the step that a run goes on from, which `latest` would otherwise find."""
    for checkpoint in list_checkpoints(folder):
        if int(checkpoint.name.removeprefix("checkpoint-")) > last_step:
            aside = folder / f"abandoned-{checkpoint.name}"
            replace(checkpoint, aside)
            logger.warning(f"{checkpoint} comes after the step that the run goes on from: it is now {aside}.")
    flush_entry(folder)


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """
    Hold the lock of a run's folder. The operating system gives it back when this process ends, however it ends.

    Raises:
        ValueError: if another process holds it. Says which one, and where it runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / OWNER_FILE
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=1, cancel_check=owner.exists)  # whoever has just taken it needs a moment to say so
    except Timeout as error:
        raise ValueError(
            f"`--output_dir` {folder} is in use by {describe_owner(owner)}: wait until it ends, or choose another"
            " folder."
        ) from error
    try:
        write_json(owner, {"host": socket.gethostname(), "pid": os.getpid()})
        yield
    finally:
        remove(owner)
        remove(folder / LOCK_FILE)  # before another process can hold it; one that waits for it opens it again
        lock.release()


def describe_owner(owner: Path) -> str:
    """Who holds a lock, for a message."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        holder = read_json(owner)
        return f"process {holder['pid']} on {holder['host']}"
    return "another process"


def save_pipeline(pipeline: FlowBackPipeline, folder: Path):
    """
    Write a pipeline into a run's folder.

    `model_index.json` is the first to go and the last to come: a folder that has one holds all of one pipeline.
    """
    with staged(folder / "pipeline") as staging:
        pipeline.save_pretrained(staging)
    move_into(staging, folder, INDEX_FILE)


class MetricsLog:
    """
    `metrics.jsonl`, one JSON object a line, and the loss curve drawn from it.

    Args:
        folder (`pathlib.Path`): The run's folder.
        checkpoint (`pathlib.Path`, *optional*):
            Where a resumed run goes on. The log becomes what it was then: the steps after it are done again.
        last_step (`int`): The checkpoint's step.
    """

    def __init__(self, folder: Path, checkpoint: Path | None = None, last_step: int = 0):
        self.path = folder / METRICS_FILE
        copy = None if checkpoint is None else read_copy(checkpoint, METRICS_FILE)
        if copy is None:  # a new run, or a checkpoint of version 0.1.0
            self.records = [record for record in read_metrics_log(folder) if 0 < last_step >= record["step"]]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
            return
        if not self.path.exists() or not self.path.read_bytes().startswith(copy):
            logger.warning(f"{self.path} was damaged: it is restored from {checkpoint}.")
        with write_whole(self.path) as partial:
            partial.write_bytes(copy)
        self.records = read_metrics_log(folder)

    def write(self, record: dict[str, Any]):
        """Append a line."""
        self.records.append(record)
        with explain_full_disk(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def flush(self):
        """Wait until all lines are on the disk."""
        flush(self.path)

    def lowest(self, name: str) -> float:
        """The lowest value of a figure in all lines, in training or validation; infinite if there is none."""
        keys = (name, f"validation_{name}")
        return min((record[key] for record in self.records for key in keys if key in record), default=math.inf)

    def draw(self, path: Path):
        """Draw the losses over the steps: the likelihood and the alignment, or the distances of a learned inverse."""
        panels = {
            "nats per dimension": ("nll", "validation_nll"),
            "mean of -cos": ("alignment",),
            "mean squared error": ("reconstruction", "validation_reconstruction", "hidden"),
            "mean of 1 - cos": ("perceptual",),
        }
        recorded = {key for record in self.records for key in record}
        panels = {label: keys for label, keys in panels.items() if recorded.intersection(keys)}
        size = (6 * len(panels), 4)
        with figure_file(path, 1, len(panels), dpi=100, figsize=size, layout="constrained") as (_, [axes]):
            for axis, (label, keys) in zip(axes, panels.items()):
                for key in keys:
                    points = [(record["step"], record[key]) for record in self.records if key in record]
                    if points:
                        marker = "o" if "validation" in key else None
                        axis.plot(*zip(*points), label=key.replace("_", " "), marker=marker)
                axis.set(xlabel="step", ylabel=label)
                axis.legend()
                axis.grid(alpha=0.3)
