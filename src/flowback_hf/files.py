# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Files that are written whole or not at all, and settings that are compared with those of an earlier run."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


METRICS_FILE = "metrics.jsonl"


@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a temporary path to write a file or a folder to, and rename it to `path` when the block ends.

    Whoever looks at `path`, at any moment, sees it whole or as it was before, even after a power cut; a folder that is
    replaced is away for a moment. The temporary name ends as `path` does, for writers that choose a format by the
    ending.

    Args:
        path (`str` or `os.PathLike`): The file or folder. One that exists is replaced.
    Yields:
        `pathlib.Path`: `.partial-<name>`, in the same folder. Nothing exists there yet.
    Raises:
        OSError: if the disk is full. What the block wrote is deleted, as after every other error.

    Example:
        ```py
        >>> import tempfile
        >>> from pathlib import Path
        >>> from flowback_hf.files import write_whole

        >>> path = Path(tempfile.mkdtemp(), "notes.txt")
        >>> with write_whole(path) as partial:
        ...     _ = partial.write_text("whole")
        >>> path.read_text(), partial.exists()
        ('whole', False)
        ```
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path  # a link stays, and what it leads to is replaced
    with staged(path) as partial:
        yield partial
    replace(partial, path)
    flush_entry(path.parent)


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """
    Give a temporary path to write to, as [`write_whole`], which is left there for the caller to rename.

    When the block ends, what it wrote is on the disk.
    """
    partial = partial_path(path)
    if partial.exists() and not partial.is_symlink():  # left by a process that was killed
        remove(partial)
    try:
        with explain_full_disk(path):
            yield partial
            flush(partial)
    except BaseException:
        remove(partial)
        raise


def partial_path(path: Path) -> Path:
    """The temporary name of a file or folder that is being written."""
    return path.with_name(f".partial-{path.name}")


def replace(source: Path, target: Path):
    """Rename a file or folder. What has the new name already is deleted, and never seen half."""
    earlier = target.with_name(f".replaced-{target.name}")
    if os.path.lexists(earlier):  # left by a process that was killed
        remove(earlier)
    if not target.is_dir():
        os.replace(source, target)
        return
    # A rename replaces neither a folder nor a link to one.
    os.replace(target, earlier)
    os.replace(source, target)
    remove(earlier)


def flush(path: Path):
    """Wait until a file, or a folder and all that is in it, is on the disk. Renaming it before risks an empty file."""
    if path.is_dir():
        for child in path.iterdir():
            flush(child)
    flush_entry(path)


def flush_entry(path: Path):
    """Wait until a file is on the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_full_disk(path: Path):
    """
    Raise an OSError that says so if the block fails because there is no room for `path`.

    torch and safetensors report a full disk in words of their own, or as what failed after it. Only another attempt to
    write tells.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(path.parent, error):
            raise
        raise OSError(
            f"There is no room for {path}: the disk is full, or your quota is used up. What was there before is"
            " intact. Make room and repeat the command."
        ) from error


def is_disk_full(folder: Path, error: Exception) -> bool:
    """Whether a folder has no room left, after `error` was raised by something that wrote to it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    probe = folder / ".partial-probe"
    try:
        probe.write_bytes(bytes(1 << 16))
        flush_entry(probe)
    except OSError as probe_error:
        return is_disk_full(folder, probe_error)
    finally:
        remove(probe)
    return False


def move_into(staging: Path, folder: Path, index_file: str):
    """
    Move all that is in a folder into another one, where it replaces what has the same names.

    The file that makes the other folder complete, its index, is the first to go there and the last to come.
    """
    remove(folder / index_file)
    flush_entry(folder)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == index_file):
        if path.name == index_file:
            flush_entry(folder)
        replace(path, folder / path.name)
    staging.rmdir()
    flush_entry(folder)


def remove(path: Path):
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str):
    """Write a text file, whole or not at all."""
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any):
    """Write a JSON file, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> Any | None:
    """Read a JSON file; `None` if there is none. Raises ValueError if it holds something else."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from error


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Read a file with one JSON object a line.

    Returns:
        `list[dict]`: The objects, in order; none if there is no such file. A line that is not a whole object, as a
        killed process or a damaged disk leaves it, is left out.
    """
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            records.append(json.loads(line.decode("utf-8")))
    return [record for record in records if isinstance(record, dict)]


def read_metrics_log(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` of a run, as [`read_json_lines`]. Lines without the number of their step are left out."""
    records = read_json_lines(Path(run_dir) / METRICS_FILE)
    return [record for record in records if isinstance(record.get("step"), int)]


def compare_settings(earlier: dict[str, Any], now: dict[str, Any], may_differ: Collection[str] = ()) -> list[str]:
    """
    Compare the settings of two runs.

    Args:
        earlier, now (`dict`): Values by name. A name that only one of them has counts as `None` in the other.
        may_differ (collection of `str`): Names that are not compared.
    Returns:
        `list[str]`: one description of each difference, such as `"seed (0 then, 1 now)"`; empty if there is none.

    Example:
        ```py
        >>> from flowback_hf.files import compare_settings

        >>> compare_settings({"seed": 0, "jobs": 1}, {"seed": 1, "jobs": 2}, may_differ=["jobs"])
        ['seed (0 then, 1 now)']
        ```
    """
    names = [name for name in dict.fromkeys([*now, *earlier]) if name not in may_differ]
    return [
        f"{name} ({earlier.get(name)!r} then, {now.get(name)!r} now)"
        for name in names
        if earlier.get(name) != now.get(name)
    ]
