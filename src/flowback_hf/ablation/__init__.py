"""Ablations: grids of alignments, run cell by cell and compared over seeds."""

from flowback_hf.ablation.grids import (
    Cell,
    Variant,
    command_line,
    make_cells,
    make_variants,
    read_grid,
    read_settings,
    resolve_blocks,
    resolve_layer,
)
from flowback_hf.ablation.report import markdown, write_report
from flowback_hf.ablation.run import run_ablation
from flowback_hf.ablation.runner import Runner, Scripts
from flowback_hf.ablation.statistics import mean_and_error, read_row, steps_to_reach, summarise


__all__ = [
    "Cell",
    "Runner",
    "Scripts",
    "Variant",
    "command_line",
    "make_cells",
    "make_variants",
    "markdown",
    "mean_and_error",
    "read_grid",
    "read_row",
    "read_settings",
    "resolve_blocks",
    "resolve_layer",
    "run_ablation",
    "steps_to_reach",
    "summarise",
    "write_report",
]
