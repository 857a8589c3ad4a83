"""What the benchmarks share: the clock, and a record of what was run, where, and what came out."""

import gc
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def synchronise(device: str):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def peak_memory_of(function: Callable[[], Any], device: str) -> int:
    """Bytes of tensors alive at once in a call, more than before it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes), default=0)


def describe_machine(device: str) -> dict:
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
    """Of the code that runs, asked before the first report is written: results are files of the repository, too."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True)
    return git.stdout.strip() if git.returncode == 0 else None


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def write_report(output: Path, arguments: list[str] | None, device: str, results: Any, table: str):
    """JSON, and the table beside it in Markdown, each with the command, the commit and the machine."""
    report = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(arguments or sys.argv[1:])]),
        "commit": current_commit(),
        "machine": describe_machine(device),
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    about = f"`{report['command']}`\n\nCommit {report['commit']}; {machine}."
    output.with_suffix(".md").write_text(f"{about}\n\n{table}\n")
