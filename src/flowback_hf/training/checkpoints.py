# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Checkpoints of a run: folders named `checkpoint-<step>` that are whole or absent.

A checkpoint holds what Accelerate loads (weights, optimizer, random states) and the averaged weights in
`ema.safetensors` or, of a sharded run, each process's share of these; copies of the run's settings and log; and
`progress.json`: how far the run was, how good its weights were, and the size and checksum of each file.
"""

import contextlib
import functools
import hashlib
import json
import math
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.checkpointing import save_accelerator_state
from accelerate.logging import get_logger
from accelerate.utils import load as load_plain_data
from accelerate.utils import recursively_apply
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from flowback_hf.files import METRICS_FILE, partial_path, read_json, write_json, write_whole
from flowback_hf.training.sharding import describe_shards, ema_name, has_shards, load_shards, save_shards, sharding_of


logger = get_logger(__name__, log_level="INFO")

SETTINGS_FILE = "training_args.json"
PROGRESS_FILE = "progress.json"
EMA_FILE = "ema.safetensors"
# Accelerate's name for the averaged weights in checkpoints of version 0.1.0.
OLD_EMA_FILE = "custom_checkpoint_0.pkl"

# Files of the run's folder that a checkpoint has copies of, for the case that the originals are damaged.
COPIED_FILES = (SETTINGS_FILE, METRICS_FILE)

# Weights are ruined if their nll, in nats per dimension, or the squared error of a learned inverse is this far above
# the lowest of the run. A whole training gains one or two.
SANE_RISE = 1.0

# What the readers of Accelerate, torch and safetensors raise for files that are not what they should be.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, from the oldest to the newest. Other names that begin alike are left out."""
    folders = Path(output_dir).glob("checkpoint-*")
    matches = [(re.fullmatch(r"checkpoint-(\d+)", folder.name), folder) for folder in folders]
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in matches if match)]


# Saving


class BackgroundWriter:
    """
    Writes checkpoints in a thread, one after another, while training goes on.

    Args:
        accelerator (`accelerate.Accelerator`): Knows the processes, all of which must make one of these.
    """

    def __init__(self, accelerator: Accelerator):
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.running: Future | None = None

    def start(self, write: Callable[[], None]):
        """Start to write a checkpoint. The one before must be finished."""
        self.running = self.executor.submit(write)

    def finish(self):
        """Wait until everything is written. Raises what went wrong."""
        if self.running is not None:
            running, self.running = self.running, None
            running.result()

    def check(self):
        """Raise what went wrong so far."""
        if self.running is not None and self.running.done():
            self.finish()


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    global_step: int,
    figures: dict[str, float],
    limit: int | None = None,
    ema: EMAModel | None = None,
    background: BackgroundWriter | None = None,
):
    """
    Save a checkpoint and then delete older ones, but not the last one with sane figures. Called by every process.

    Args:
        accelerator (`accelerate.Accelerator`): What prepared the objective, optimizer, scheduler and data.
        output_dir (`pathlib.Path`): The run's folder.
        global_step (`int`): Optimizer steps so far.
        figures (`dict`): What [`is_sane`] reads: `nll` of the weights and `lowest_nll` of the run, both in nats per
            dimension; of a learned inverse, `reconstruction` and `lowest_reconstruction`.
        limit (`int`, *optional*): How many checkpoints to keep, this one included. Default: all.
        ema ([`~diffusers.training_utils.EMAModel`], *optional*): The averaged weights.
        background ([`BackgroundWriter`], *optional*):
            It writes a copy of everything in the memory of the host, after the checkpoint before is finished. Default:
            write now.
    """
    if background is not None:
        background.finish()
    checkpoint, is_main = output_dir / f"checkpoint-{global_step}", accelerator.is_main_process
    with contextlib.ExitStack() as opened:
        partial = opened.enter_context(write_whole(checkpoint)) if is_main else partial_path(checkpoint)
        accelerator.wait_for_everyone()
        partial.mkdir(exist_ok=True)
        state = describe_state(accelerator, ema, partial)
        if is_main:
            for name in COPIED_FILES:
                shutil.copyfile(output_dir / name, partial / name)
        accelerator.wait_for_everyone()
        if background is not None:
            state = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), state)
        progress = {"global_step": global_step, "figures": figures}
        write = functools.partial(
            write_checkpoint, opened.pop_all(), state, partial, progress, limit, background and background.group
        )
    if background is not None:
        background.start(write)
        return
    write()
    accelerator.wait_for_everyone()


def write_checkpoint(
    opened: contextlib.ExitStack,
    state: dict[str, Any],
    partial: Path,
    progress: dict[str, Any],
    limit: int | None,
    group: torch.distributed.ProcessGroup | None,
):
    """
    Write a state into a temporary folder and give it its name. Called by every process.

    Args:
        opened (`contextlib.ExitStack`): In the main process, what renames the folder when it is closed.
        state (`dict`): What [`describe_state`] returned, or a copy of it.
        partial (`pathlib.Path`): The folder.
        progress (`dict`): What `progress.json` is to hold, except for sizes and checksums.
        limit (`int`, *optional*): How many checkpoints to keep.
        group (`torch.distributed.ProcessGroup`, *optional*): The processes, for sharded states. Default: all.
    """
    is_main = PartialState().is_main_process
    with opened:
        if "shards" in state:
            save_shards(state["shards"], partial, group)
        elif is_main:
            save_whole_state(state, partial)
        if is_main:
            write_progress(partial, progress)
    if is_main and limit is not None:
        delete_old_checkpoints(partial.parent, limit)


def describe_state(accelerator: Accelerator, ema: EMAModel | None, folder: Path) -> dict[str, Any]:
    """
    All that a run resumes from, as references to what it uses: this process's share of it or, without sharding, all of
    it in the main process. Called by every process.

    What Accelerate's hooks save, they write into the folder.
    """
    models, is_sharded = accelerator._models, sharding_of(accelerator) is not None
    weights = [] if is_sharded else [accelerator.get_state_dict(model, unwrap=False) for model in models]
    for hook in accelerator._save_model_state_pre_hook.values():
        hook(models, weights, str(folder))
    if is_sharded:
        return {"shards": describe_shards(accelerator, ema)}
    if not accelerator.is_main_process:
        return {}
    return {
        "weights": weights,
        "optimizers": [optimizer.state_dict() for optimizer in accelerator._optimizers],
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
    }


def save_whole_state(state: dict[str, Any], folder: Path):
    """Write what [`describe_state`] returned, in files that Accelerate loads, and the averaged weights."""
    optimizers, scaler = state["optimizers"], state["scaler"]
    save_accelerator_state(
        str(folder),
        state["weights"],
        [SimpleNamespace(state_dict=lambda saved=saved: saved) for saved in optimizers],
        schedulers=[],
        dataloaders=[],
        process_index=0,
        step=0,
        scaler=None if scaler is None else SimpleNamespace(state_dict=lambda: scaler),
    )
    if state["ema"] is not None:
        save_ema(state["ema"], folder / EMA_FILE)


def save_ema(state: dict[str, Any], path: Path):
    """Write averaged weights, in the order of the flow's parameters, and the counters of the average."""
    weights = {f"{number:05d}": weight.contiguous() for number, weight in enumerate(state["shadow_params"])}
    counters = {name: value for name, value in state.items() if name != "shadow_params"}
    save_file(weights, path, metadata={"state": json.dumps(counters)})


def leave_out_frozen_parameters(models: list[torch.nn.Module], state_dicts: list[dict[str, Any]], _: str):
    """
    Drop what is not trained from a checkpoint: the flow under an adapter, which is loaded from where it came from.

    Accelerate calls this before it saves.
    """
    for model, state_dict in zip(models, state_dicts):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                del state_dict[name]


def write_progress(checkpoint: Path, progress: dict[str, Any]):
    """Write `progress.json`, with the sizes and checksums of all other files and a checksum of its own."""
    files = {str(file.relative_to(checkpoint)): file for file in sorted(checkpoint.rglob("*")) if file.is_file()}
    progress = progress | {
        "file_sizes": {name: file.stat().st_size for name, file in files.items()},
        "file_checksums": {name: checksum_of_file(file) for name, file in files.items()},
    }
    write_json(checkpoint / PROGRESS_FILE, progress | {"checksum": checksum_of_progress(progress)})


def checksum_of_file(file: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum_of_progress(progress: dict[str, Any]) -> str:
    """The SHA-256 of everything in `progress.json` but itself."""
    rest = {name: value for name, value in progress.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def delete_old_checkpoints(output_dir: Path, limit: int):
    """Delete all checkpoints but the newest ones and the last one with sane figures."""
    checkpoints = list_checkpoints(output_dir)
    sane = [checkpoint for checkpoint in checkpoints if has_sane_figures(checkpoint)]
    for old in checkpoints[:-limit]:
        if old not in sane[-1:]:
            shutil.rmtree(old)


# Whether a checkpoint is whole, and good


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """
    Read what a checkpoint says of itself.

    Raises:
        ValueError: if `progress.json` is missing or damaged. Says how.
    """
    progress = read_json(checkpoint / PROGRESS_FILE)
    if progress is None:
        raise ValueError(f"there is no {PROGRESS_FILE}")
    needed = {"global_step": int, "file_sizes": dict}
    if not isinstance(progress, dict) or any(not isinstance(progress.get(key), needed[key]) for key in needed):
        raise ValueError(f"{PROGRESS_FILE} is damaged")
    # Checkpoints of version 0.1.0 have no checksums.
    if "file_checksums" in progress and progress.get("checksum") != checksum_of_progress(progress):
        raise ValueError(f"{PROGRESS_FILE} is damaged")
    return progress


def check_files(checkpoint: Path, progress: dict[str, Any], names: Iterable[str] | None = None):
    """
    Check files of a checkpoint against its `progress.json`.

    Args:
        checkpoint (`pathlib.Path`): The folder.
        progress (`dict`): What [`read_progress`] read.
        names (iterable of `str`, *optional*): The files to check. Default: all.
    Raises:
        ValueError: if one is missing, has another size or another checksum. Says which.
    """
    sizes, checksums = progress["file_sizes"], progress.get("file_checksums", {})
    for name in sizes if names is None else names:
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != sizes[name]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes instead of {sizes[name]}")
        if name in checksums and checksum_of_file(file) != checksums[name]:
            raise ValueError(f"{name} is damaged: its checksum is another one than when it was saved")


def read_copy(checkpoint: Path, name: str) -> bytes | None:
    """Read a checkpoint's copy of a file of the run's folder; `None` if it has none that is intact."""
    try:
        progress = read_progress(checkpoint)
        check_files(checkpoint, progress, [name] if name in progress["file_sizes"] else [])
        return (checkpoint / name).read_bytes()
    except (OSError, ValueError):
        return None


def is_sane(progress: dict[str, Any]) -> bool:
    """
    Whether the weights of a checkpoint were good, as far as its figures tell: the value on a batch is finite, and not
    much above the lowest that the run had logged. Checkpoints of version 0.1.0 have no figures and do not count as
    sane.
    """
    figures = progress.get("figures")
    if figures is None:
        return False
    (lowest,) = (name for name in figures if name.startswith("lowest_"))
    value = figures[lowest.removeprefix("lowest_")]
    return math.isfinite(value) and value <= figures[lowest] + SANE_RISE


def has_sane_figures(checkpoint: Path) -> bool:
    try:
        return is_sane(read_progress(checkpoint))
    except (OSError, ValueError):
        return False


def find_sane_checkpoint(output_dir: Path) -> Path | None:
    """The last checkpoint that is whole and has sane figures; `None` if there is none."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        with contextlib.suppress(OSError, ValueError):
            progress = read_progress(checkpoint)
            check_files(checkpoint, progress)
            if is_sane(progress):
                return checkpoint
    return None


def checkpoints_to_try(output_dir: Path, resume_from_checkpoint: str) -> list[Path]:
    """
    The checkpoints that a run may be resumed from, the best one first: the one asked for, then those before it.

    Args:
        output_dir (`pathlib.Path`): The run's folder.
        resume_from_checkpoint (`str`): The name of a checkpoint, or `"latest"`.
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
    return candidates[::-1]


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> tuple[Path, dict[str, Any]] | None:
    """
    Find the checkpoint to resume from.

    Args:
        output_dir (`pathlib.Path`): The run's folder.
        resume_from_checkpoint (`str`): The name of a checkpoint, or `"latest"`.
    Returns:
        `tuple` of the folder and its progress: the checkpoint asked for or, if that is damaged, the newest whole one
        before it. `None` if the run has no checkpoints yet.
    Raises:
        ValueError: if there is no checkpoint of that name, or if all are damaged.
    """
    damage = []
    for checkpoint in checkpoints_to_try(output_dir, resume_from_checkpoint):
        try:
            progress = read_progress(checkpoint)
            check_files(checkpoint, progress)
        except (OSError, ValueError) as error:
            damage.append(f"{checkpoint} ({error})")
            logger.warning(f"{checkpoint} is not used, because {error}: falling back to the checkpoint before it.")
            continue
        return checkpoint, progress
    if damage:
        raise ValueError(
            f"`--resume_from_checkpoint` {resume_from_checkpoint} finds no checkpoint that is whole:"
            f" {', '.join(damage)}. Restore one of them from a backup, or delete these folders to start at step 0."
        )
    return None


# Loading


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: EMAModel | None = None):
    """
    Load a checkpoint into what an accelerator prepared, and into the averaged weights. Called by every process.

    No file is unpickled in a way that could run code. The random states are those of as many processes as saved it;
    others go without, as a run draws nothing from them.

    Raises:
        ValueError: if a file holds something else than it should. Says which, if it is one that could run code.
    """
    if sharding_of(accelerator) is not None:
        for hook in accelerator._load_model_state_pre_hook.values():
            hook(accelerator._models, str(checkpoint))
        load_shards(describe_shards(accelerator, ema), checkpoint)
        if ema is not None:
            ema.optimization_step = read_progress(checkpoint)["global_step"]
        return
    random_states = checkpoint / f"random_states_{accelerator.process_index}.pkl"
    try:
        # Accelerate trains on without the random states if it cannot read them.
        if random_states.exists():
            load_plain_data(random_states)
        with without_old_ema(checkpoint) as folder:
            accelerator.load_state(str(folder), strict=not has_frozen_parameters(accelerator))
        # Batches that were accumulated, a multiple of a number that may have changed.
        accelerator.step = 0
        if ema is not None:
            ema.load_state_dict(read_ema(checkpoint))
            ema.to(accelerator.device)
    except UNREADABLE as error:
        names = [path.name for path in sorted(checkpoint.iterdir()) if could_run_code(path)]
        reason = f"its {names[0]} holds more than numbers, and reading it could run code" if names else error
        raise ValueError(
            f"{checkpoint} was not loaded: {reason}. Delete this folder to resume from the checkpoint before it."
        ) from error


def could_run_code(path: Path) -> bool:
    """Whether a file of a checkpoint is a pickle that holds other things than tensors, numbers and texts."""
    if path.suffix not in (".bin", ".pkl"):
        return False
    try:
        load_plain_data(path)
    except pickle.UnpicklingError:
        return True
    except UNREADABLE:
        return False
    return False


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
    """
    Copy the averaged weights of a checkpoint into a flow's parameters.

    Raises:
        ValueError: if the checkpoint is damaged, or as [`read_ema`].
    """
    check_files(checkpoint, read_progress(checkpoint))
    if has_shards(checkpoint):
        state = {ema_name(number): parameter.data for number, parameter in enumerate(parameters)}
        load_shards(state, checkpoint, by_one_process=True)
        return
    for parameter, average in zip(parameters, read_ema(checkpoint)["shadow_params"], strict=True):
        parameter.copy_(average)
