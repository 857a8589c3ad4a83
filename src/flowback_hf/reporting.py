# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What stands beside a measured number: a Markdown table, a figure, the machine and the commit."""

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flowback_hf.files import write_whole


# Names of classes and runs are shown as they are: a dollar in them is no formula.
FIGURE_STYLE = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """
    A Markdown table.

    Example:
        ```py
        >>> from flowback_hf.reporting import markdown_table

        >>> print(markdown_table(["solver", "seconds"], [["sequential", 0.25]]))
        | solver | seconds |
        | --- | --- |
        | sequential | 0.25 |
        ```
    """
    header = list(header)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])


def one_line(text: Any) -> str:
    """Replace line breaks, control characters and whatever else cannot be printed by spaces, and join those."""
    return " ".join("".join(each if each.isprintable() else " " for each in str(text)).split())


def markdown_text(text: Any) -> str:
    """
    Escape a text that people chose, such as a class name, so that Markdown and HTML show it as it is, on one line.

    Example:
        ```py
        >>> from flowback_hf.reporting import markdown_text

        >>> print(markdown_text("golden_retriever <script> [link](https://example.com)"))
        golden_retriever \\<script\\> \\[link\\](https\\://example.com)
        ```
    """
    special = r"[\\`*\[\]<>#|~$&@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\."
    return re.sub(special, r"\\\g<0>", one_line(text))


def markdown_code(text: Any) -> str:
    """Return a text that people chose as a code span, which may stand in a table."""
    text = one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}".replace("|", r"\|")


def spreadsheet_text(text: str) -> str:
    """
    Mark a text that a spreadsheet would run as a formula as a text, with an apostrophe before it.

    What has no encoding, such as bytes of a file's name, becomes an escape sequence.
    """
    text = text.encode(errors="backslashreplace").decode()
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def check_matplotlib():
    """Raise ImportError if matplotlib is missing; the message says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "flowback_hf[train]".') from error


@contextlib.contextmanager
def figure_file(
    path: Path, rows: int = 1, columns: int = 1, dpi: int = 150, bbox_inches: str | None = "tight", **options: Any
) -> Iterator[tuple[Any, Any]]:
    """
    Give a matplotlib figure to draw, and write it when the block ends, whole or not at all.

    The caller's own figures, backend and settings of matplotlib stay as they are.

    Args:
        path (`pathlib.Path`): The file to write.
        rows, columns (`int`): How many axes the figure has.
        dpi, bbox_inches: As in `matplotlib.figure.Figure.savefig`.
        **options: As in `matplotlib.figure.Figure`, such as `figsize` and `layout`.
    Yields:
        `matplotlib.figure.Figure`, and its axes as an array of shape `(rows, columns)`.
    Raises:
        ImportError: if matplotlib is missing; says what to install.

    Example:
        ```py
        >>> import tempfile
        >>> from pathlib import Path
        >>> from flowback_hf.reporting import figure_file

        >>> path = Path(tempfile.mkdtemp(), "line.png")
        >>> with figure_file(path, figsize=(4, 3)) as (figure, [[axis]]):
        ...     _ = axis.plot([1, 2, 4])
        >>> path.exists()
        True
        ```
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(**options)
        yield figure, figure.subplots(rows, columns, squeeze=False)
        with write_whole(path) as partial:
            figure.savefig(partial, dpi=dpi, bbox_inches=bbox_inches)


def shade_blocks(axis: Any, blocks: list[int], positions: list[float]):
    """
    Mark the flow blocks on an axis of places: every second one shaded, their numbers above.

    Args:
        axis (`matplotlib.axes.Axes`): Its x axis holds the places.
        blocks (`list[int]`): The flow block of each place.
        positions (`list[float]`): Where each place stands, one unit apart.
    """
    spans = {}
    for block, position in zip(blocks, positions):
        first, _ = spans.get(block, (position, position))
        spans[block] = first, position
    for block, (first, last) in spans.items():
        if block % 2 == 0:
            axis.axvspan(first - 0.5, last + 0.5, color="0.95", zorder=0)
    numbers = axis.secondary_xaxis("top")
    centers = [(first + last) / 2 for first, last in spans.values()]
    numbers.set_xticks(centers, [f"block {block}" for block in spans], fontsize=9)
    numbers.tick_params(length=0)
    numbers.spines["top"].set_visible(False)


def describe_machine(device: str) -> dict[str, Any]:
    """The processor, threads, versions and, of a CUDA device, the card."""
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def cpu_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def current_commit() -> str | None:
    """
    The commit of the code that runs, `-dirty` if files differ from it; `None` outside a clone of this repository.

    It is asked once: reports are files of the repository, too, and would make it dirty.
    """
    folder = str(Path(__file__).parent)
    # An installed package may lie in a folder of somebody else's repository.
    tracked = ["git", "-C", folder, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = ["git", "-C", folder, "describe", "--always", "--dirty"]
    try:
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
