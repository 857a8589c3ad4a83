# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Files that are written whole or not at all, and settings that are compared with those of an earlier run."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a temporary path to write a file or a folder to, and rename it to `path` when the block ends.

    Whoever looks at `path`, at any moment, sees it whole or as it was before. If the block raises, what it wrote is
    deleted. The temporary name ends as `path` does, for writers that choose a format by the ending.

    Args:
        path (`str` or `os.PathLike`): The file or folder. One that exists is replaced.
    Yields:
        `pathlib.Path`: `.partial-<name>`, in the same folder. Nothing exists there yet.

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
    partial = partial_path(path)
    if partial.is_dir():  # left by a process that was killed; a file is written over
        remove(partial)
    try:
        yield partial
    except BaseException:
        remove(partial)
        raise
    replace(partial, path)


def partial_path(path: Path) -> Path:
    """The temporary name of a file or folder that is being written."""
    return path.with_name(f".partial-{path.name}")


def replace(source: Path, target: Path):
    """Rename a file or folder; what has the new name already is deleted."""
    if target.is_dir():  # a rename does not replace a folder
        shutil.rmtree(target)
    os.replace(source, target)


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
    Read a file with one JSON object a line, such as `metrics.jsonl`.

    Returns:
        `list[dict]`: The objects, in order; none if there is no such file. A line that is not a whole object, as a
        killed process leaves it, is left out.
    """
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


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
