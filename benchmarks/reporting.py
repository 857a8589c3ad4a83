"""What the benchmarks share: a clock, peak memory, and a record of what was run, where, and what came out."""

import argparse
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

from flowback_hf import TarFlowTransformer2DModel
from flowback_hf.files import write_json, write_text
from flowback_hf.reporting import current_commit, describe_machine


# What the benchmarks count and time is the paper's alignment.
PAPERS_ALIGNMENT = {"projector_type": "mlp", "normalize_teacher_features": False}


def add_flow_sizes(
    parser: argparse.ArgumentParser, sample_size: int, num_blocks: int, num_layers: int, num_heads: int
):
    """Add the flags of a random flow's sizes, with these defaults."""

    def add(name: str, default: int, help: str):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help} Default: %(default)s.")

    add("sample_size", sample_size, "Height and width of the images, in pixels.")
    add("patch_size", 4, "Height and width of a token, in pixels.")
    add("num_blocks", num_blocks, "Flow blocks.")
    add("num_layers", num_layers, "Transformer layers in every flow block.")
    add("num_attention_heads", num_heads, "Attention heads.")
    add("attention_head_dim", 64, "Width of an attention head. The flow is heads times this wide.")


def add_alignment_sizes(parser: argparse.ArgumentParser):
    """Add the flags that say where a flow is aligned, and how large the features and projectors are."""
    parser.add_argument(
        "--aligned_blocks",
        type=int,
        nargs="+",
        default=[7, 8],
        help="Flow blocks to align, counted from 1 at the image. Default: 7 8.",
    )
    parser.add_argument(
        "--aligned_layer",
        type=int,
        default=6,
        help="Layer to align in each of these blocks, counted from 1. Default: %(default)s.",
    )
    parser.add_argument(
        "--teacher_dim", type=int, default=768, help="Width of the teacher's features. Default: %(default)s."
    )
    parser.add_argument(
        "--projector_dim", type=int, default=1024, help="Hidden width of the MLP projectors. Default: %(default)s."
    )


def build_random_flow(args: argparse.Namespace, num_classes: int) -> TarFlowTransformer2DModel:
    """The flow of these sizes, always with the same random weights."""
    torch.manual_seed(0)
    return TarFlowTransformer2DModel(
        sample_size=args.sample_size,
        patch_size=args.patch_size,
        num_blocks=args.num_blocks,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_classes=num_classes,
    )


def add_run_arguments(parser: argparse.ArgumentParser, output: str, device: bool = True, threads: bool = True):
    """Add the flags that say where a benchmark runs and which file it writes."""
    if device:
        parser.add_argument(
            "--device", default="cpu", help="The device to measure, cpu or cuda. Default: %(default)s."
        )
    if threads:
        parser.add_argument("--threads", type=int, help="Threads of the CPU. Default: torch's own choice.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/results") / output,
        help="The JSON file to write, with a table beside it in Markdown. Default: %(default)s.",
    )


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
