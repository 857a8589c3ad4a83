# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Work that is shared between processes, done in parts, and resumed where it was interrupted."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from flowback_hf.files import compare_settings, read_json, write_json, write_whole
from flowback_hf.models.transformer_reverse import hash_flow
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline


Results = dict[str, float | int | str]
Arrays = dict[str, np.ndarray]


def join_processes() -> PartialState:
    """The processes that share the work: those that `accelerate launch` started, or only this one."""
    # PartialState does not read this variable by itself. The others wait while the main process fits probes for hours.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))


def check_settings(path: Path, settings: dict[str, Any], cure: str = "Name another folder, or delete this one."):
    """
    Raise ValueError if the file `path` holds other settings: its folder then has results of something else.

    Args:
        path (`pathlib.Path`): The file, which need not exist.
        settings (`dict`): What it is to hold.
        cure (`str`): The end of the message, which says what to do.
    """
    earlier = read_json(path)
    if earlier is None:
        return
    # Files of earlier versions do not say which weights the model had.
    different = compare_settings({"model_hash": settings.get("model_hash"), **earlier}, settings)
    if different:
        raise ValueError(f"{path.parent} holds what was made with other settings: {', '.join(different)}. {cure}")


def hash_networks(pipeline: FlowBackPipeline, solver: str = "auto") -> str | None:
    """A hash of the weights that decide a pipeline's results; `None` if they are not comparable, see [`hash_flow`]."""
    networks = [pipeline.transformer, *([pipeline.reverse_transformer] if solver == "learned" else [])]
    hashes = [hash_flow(network) for network in networks]
    return None if None in hashes else "-".join(digest[:16] for digest in hashes)


def write_arrays(path: Path, arrays: Arrays):
    """Write named arrays into an `.npz` file, whole or not at all."""
    with write_whole(path) as partial:
        np.savez(partial, **arrays)


def read_arrays(path: Path) -> Arrays:
    """Read what [`write_arrays`] wrote."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def concatenate(batches: Iterator[Arrays]) -> Arrays:
    """Join batches of the same named arrays along their first dimension."""
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def map_batches(
    state: PartialState, folder: Path, num_items: int, batch_size: int, compute: Callable[[range], Arrays], what: str
) -> Iterator[Arrays]:
    """
    Compute arrays for every batch of items, each batch in one process.

    Every batch is kept in a file of `folder`. What an interrupted run finished is not computed again.

    Args:
        state ([`~accelerate.PartialState`]): The processes. All of them must call this.
        folder (`pathlib.Path`): Where the batches are kept. All processes must see it.
        num_items, batch_size (`int`): How many items there are, and how many make a batch.
        compute (`Callable`): Returns named arrays of the items whose numbers it is given.
        what (`str`): The title of the progress bar.
    Returns:
        iterator over the arrays of all batches, in order.

    Example:
        ```py
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from accelerate import PartialState
        >>> from flowback_hf.evaluation.parts import concatenate, map_batches

        >>> state, folder = PartialState(cpu=True), Path(tempfile.mkdtemp())
        >>> batches = map_batches(state, folder, 5, 2, lambda indices: {"square": np.square(indices)}, "Squares")
        >>> concatenate(batches)["square"].tolist()
        [0, 1, 4, 9, 16]
        ```
    """
    starts = range(0, num_items, batch_size)
    missing = [start for start in starts if not (folder / f"{start:08d}.npz").exists()]
    state.wait_for_everyone()  # all have looked
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=len(starts), initial=len(starts) - len(missing), desc=what, disable=not state.is_local_main_process
    ) as progress_bar:
        for start in missing[state.process_index :: state.num_processes]:
            write_arrays(folder / f"{start:08d}.npz", compute(range(start, min(start + batch_size, num_items))))
            progress_bar.update(min(state.num_processes, len(starts) - progress_bar.n))
    state.wait_for_everyone()
    return (read_arrays(folder / f"{start:08d}.npz") for start in starts)


class Parts:
    """
    The results of finished parts, a folder each, with the settings that they depend on.

    Args:
        folder (`pathlib.Path`): Holds a folder for each part, which all processes must see.
        state ([`~accelerate.PartialState`]): The processes.
    """

    def __init__(self, folder: Path, state: PartialState):
        self.folder = folder
        self.state = state

    def check(self, name: str, settings: dict[str, Any]):
        """Raise ValueError if this part was begun with other settings."""
        output_dir = self.folder.parent
        check_settings(
            self.folder / name / "settings.json",
            settings,
            f"Name another folder, or delete {output_dir / 'parts'} and {output_dir / 'samples'}/guidance_*.",
        )

    def run(self, name: str, settings: dict[str, Any], compute: Callable[[Path], Results]) -> Results:
        """
        Run a part on all processes, unless it is done.

        Args:
            name (`str`): Its name, which is that of its folder.
            settings (`dict`): What its results depend on.
            compute (`Callable`): Is given the folder and returns the results. The main process's are kept.
        Returns:
            `dict`: the results.
        """
        folder, results_file = self.folder / name, self.folder / name / "results.json"
        if not results_file.exists():
            if self.state.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "settings.json", settings)
            self.state.wait_for_everyone()
            results = compute(folder)
            if self.state.is_main_process:
                write_json(results_file, results)
            self.state.wait_for_everyone()
        return read_json(results_file)

    def forget_batches(self):
        """Delete what only an unfinished part needs."""
        for path in self.folder.rglob("*.npz"):
            path.unlink()
        for folder in self.folder.glob("*/*/"):
            folder.rmdir()
