# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Checkpoints of a run: folders named `checkpoint-<step>` that are whole or absent.

A checkpoint holds what Accelerate saves (weights, optimizer, scheduler, random states), the averaged weights in
`ema.safetensors`, and `progress.json`, which says how far the run was and how large each file is.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowback_hf.files import partial_path, read_json, write_json, write_whole


logger = get_logger(__name__, log_level="INFO")

PROGRESS_FILE = "progress.json"
EMA_FILE = "ema.safetensors"
# Accelerate's name for the averaged weights in checkpoints of version 0.1.0.
OLD_EMA_FILE = "custom_checkpoint_0.pkl"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, from the oldest to the newest. Other names that begin alike are left out."""
    folders = Path(output_dir).glob("checkpoint-*")
    matches = [(re.fullmatch(r"checkpoint-(\d+)", folder.name), folder) for folder in folders]
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in matches if match)]


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    global_step: int,
    num_batches: int,
    limit: int | None = None,
    ema: EMAModel | None = None,
):
    """
    Save a checkpoint and then delete older ones. Called by every process.

    Args:
        accelerator (`accelerate.Accelerator`): What prepared the objective, optimizer, scheduler and data.
        output_dir (`pathlib.Path`): The run's folder.
        global_step (`int`), num_batches (`int`): Optimizer steps and batches so far.
        limit (`int`, *optional*): How many checkpoints to keep, this one included. Default: all.
        ema ([`~diffusers.training_utils.EMAModel`], *optional*): The averaged weights.
    """
    checkpoint = output_dir / f"checkpoint-{global_step}"
    is_main = accelerator.is_main_process
    with write_whole(checkpoint) if is_main else contextlib.nullcontext(partial_path(checkpoint)) as partial:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if is_main:
            if ema is not None:
                save_ema(ema, partial / EMA_FILE)
            files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
            sizes = {str(file.relative_to(partial)): file.stat().st_size for file in files}
            progress = {"global_step": global_step, "num_batches": num_batches, "file_sizes": sizes}
            write_json(partial / PROGRESS_FILE, progress)
    if is_main:
        for old in list_checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: EMAModel | None = None):
    """
    Load a checkpoint into what an accelerator prepared, and into the averaged weights. Called by every process.

    No file is unpickled in a way that could run code.
    """
    with without_old_ema(checkpoint) as folder:
        accelerator.load_state(str(folder), strict=not has_frozen_parameters(accelerator))
    if ema is not None:
        ema.load_state_dict(read_ema(checkpoint))
        ema.to(accelerator.device)


def leave_out_frozen_parameters(models: list[torch.nn.Module], state_dicts: list[dict[str, Any]], _: str):
    """
    Drop what is not trained from a checkpoint: the flow under an adapter, which is loaded from where it came from.

    Accelerate calls this before it saves.
    """
    for model, state_dict in zip(models, state_dicts):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                del state_dict[name]


def has_frozen_parameters(accelerator: Accelerator) -> bool:
    """Whether checkpoints leave something out."""
    return any(not parameter.requires_grad for model in accelerator._models for parameter in model.parameters())


@contextlib.contextmanager
def without_old_ema(checkpoint: Path) -> Iterator[Path]:
    """
    A view of a checkpoint of version 0.1.0 without its averaged weights, which Accelerate would unpickle, and run what
    code they hold.
    """
    if not (checkpoint / OLD_EMA_FILE).exists():
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as view:
        for file in checkpoint.iterdir():
            if file.name != OLD_EMA_FILE:
                (Path(view) / file.name).symlink_to(file.resolve())
        yield Path(view)


def save_ema(ema: EMAModel, path: Path):
    """Write averaged weights, in the order of the flow's parameters, and the counters of the average."""
    state = ema.state_dict()
    weights = {f"{number:05d}": weight.contiguous() for number, weight in enumerate(state.pop("shadow_params"))}
    save_file(weights, path, metadata={"state": json.dumps(state)})


def read_ema(checkpoint: Path) -> dict[str, Any]:
    """
    Read the averaged weights of a checkpoint.

    Returns:
        `dict`: as [`~diffusers.training_utils.EMAModel.state_dict`] gives it, on the CPU.
    Raises:
        ValueError: if the checkpoint has no averaged weights.
        pickle.UnpicklingError: if those of version 0.1.0 hold anything but tensors and numbers.
    """
    path = checkpoint / EMA_FILE
    if path.exists():
        weights = load_file(path)
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
        return state | {"shadow_params": [weights[name] for name in sorted(weights)]}
    if (checkpoint / OLD_EMA_FILE).exists():
        return torch.load(checkpoint / OLD_EMA_FILE, map_location="cpu", weights_only=True)
    raise ValueError(f"The checkpoint {checkpoint} must hold averaged weights ({EMA_FILE}), but has none.")


@torch.no_grad()
def load_averaged_parameters(checkpoint: Path, parameters: Iterable[torch.nn.Parameter]):
    """Copy the averaged weights of a checkpoint into a flow's parameters. Raises as [`read_ema`]."""
    for parameter, average in zip(parameters, read_ema(checkpoint)["shadow_params"], strict=True):
        parameter.copy_(average)


def read_progress(checkpoint: Path) -> dict[str, Any] | None:
    """Read what a checkpoint says of itself; `None` if one of its files is missing or truncated."""
    try:
        progress = read_json(checkpoint / PROGRESS_FILE)
        whole = all((checkpoint / name).stat().st_size == size for name, size in progress["file_sizes"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return progress if whole else None


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> tuple[Path, dict[str, Any]] | None:
    """
    Find the checkpoint to resume from.

    Args:
        output_dir (`pathlib.Path`): The run's folder.
        resume_from_checkpoint (`str`): The name of a checkpoint, or `"latest"`.
    Returns:
        `tuple` of the folder and its progress: the checkpoint asked for or, if that is not whole, the newest whole one
        before it. `None` if there is none.
    Raises:
        ValueError: if there is no checkpoint of that name.
    """
    candidates = list_checkpoints(output_dir)
    if resume_from_checkpoint != "latest":
        names = [path.name for path in candidates]
        name = Path(resume_from_checkpoint).name
        if name not in names:
            raise ValueError(f"`--resume_from_checkpoint` must be latest or one of {names}, but is {name!r}.")
        candidates = candidates[: names.index(name) + 1]
    for checkpoint in reversed(candidates):
        progress = read_progress(checkpoint)
        if progress is not None:
            return checkpoint, progress
        logger.warning(f"{checkpoint} is truncated or incomplete: falling back to the checkpoint before it.")
    return None
