"""What the benchmarks share: a clock, peak memory, and a record of what was run, where, and what came out."""

import gc
import itertools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flowback_hf.files import write_json, write_text
from flowback_hf.reporting import current_commit, describe_machine


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


def write_report(output: Path, arguments: list[str] | None, device: str, results: Any, table: str):
    """Write results as JSON, and their table beside it in Markdown, each with the command, commit and machine."""
    report = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(arguments or sys.argv[1:])]),
        "commit": current_commit(),
        "machine": describe_machine(device),
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    about = f"`{report['command']}`\n\nCommit {report['commit']}; {machine}."
    write_text(output.with_suffix(".md"), f"{about}\n\n{table}\n")
