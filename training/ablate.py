#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Train and evaluate a grid of alignments, each with several seeds, and compare them in one table.

    python training/ablate.py --grid training/ablations/strategies.json \\
        --settings training/ablations/settings/digits.json --data_dir data/digits/images \\
        --teacher data/digits/teacher --judge data/digits/judge --output_dir outputs/strategies --jobs 2

A grid lists values of `alignment`, `alignment_order`, `alignment_blocks` (numbers, or early, late, all),
`alignment_layer` (a number, or shallow, middle, deep), `alignment_weight`, `teacher` (given; random: the same network
with random weights; other: that of --other_teacher; shuffled-class, shuffled-all: each image has the features of an
image of its class or of any) and `seeds`. Every combination that makes sense is a variant. A variant with a seed is a
cell. A grid may instead name its variants one by one (`variants`), each with any arguments of training/train_rra.py.
The settings hold what all cells share: arguments of training/train_rra.py (`train`) and of
pipelines/evaluate_flow.py (`evaluate`), which run each cell in a folder of its own, and, to evaluate every kept
checkpoint, too, the guidance scale of its samples (`checkpoint_guidance_scale`).

Writes `results.json`, `results.md` (mean and standard error over seeds), `curves.png`, `speed_ups.png`,
`distance_against_accuracy.png` and `linear_probe.png` whenever a cell ends. The same command resumes an interrupted
run: finished cells are kept, a killed one goes on from its last checkpoint, and a failed one is tried again. With
--records_dir, a finished cell also leaves a small record, and cells with a record never run again, whatever the output
folder holds.

A named variant may name its `baseline`, another variant that is not aligned; the others are compared with `none`.
--time_steps times a step of each variant, so that reports compare times, too. --confirm repeats the best variant,
those of --variants and the baseline with the grid's `confirmation_seeds`, which were not used to pick it.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.data import check_one_source
from flowback_hf_cli.numbers import COUNT, SEED


FOLDER = Path(__file__).resolve().parent


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, required=True, help="JSON file of the grid, as in training/ablations.")
    parser.add_argument(
        "--settings",
        type=Path,
        required=True,
        help="JSON file of what all cells share, as in training/ablations/settings.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder that cells and results are written to.")
    parser.add_argument(
        "--data_dir", help="Image folder with one folder per class, either directly or in train/ and validation/."
    )
    parser.add_argument(
        "--dataset_name", help="Hub id, folder that `datasets` loads, or parquet file of the data set."
    )
    parser.add_argument("--teacher", required=True, help="Hub id or folder of the vision encoder to align with.")
    parser.add_argument(
        "--other_teacher", help="Hub id or folder of the encoder of variants whose teacher is `other`."
    )
    parser.add_argument(
        "--judge", required=True, help="Independent classifier or encoder whose features compare samples and images."
    )
    parser.add_argument(
        "--records_dir",
        type=Path,
        help="Folder of small records of finished cells, which do not run again. Default: none are kept.",
    )
    parser.add_argument("--variants", nargs="+", help="Names of the variants to run. Default: all of the grid.")
    parser.add_argument("--seeds", type=SEED, nargs="+", help="Seeds to run. Default: the grid's.")
    parser.add_argument("--jobs", type=COUNT, default=1, help="Cells that run side by side. Default: %(default)s.")
    parser.add_argument(
        "--threads", type=COUNT, help="Threads of each cell. Default: the cores, shared among the jobs."
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Print the cells and an estimate of the hours, and run nothing else."
    )
    parser.add_argument(
        "--time_steps",
        action="store_true",
        help="Time a step of each variant in turn, on a machine that does nothing else, and run nothing else. Reports"
        " then compare times, too.",
    )
    parser.add_argument(
        "--confirm",
        action="store_true",
        help="Run the baseline, the variant that is best on the validation split, and those of --variants with the"
        " grid's confirmation_seeds.",
    )
    add_debug_argument(parser)
    args = parser.parse_args(arguments)
    args.command = sys.argv[1:] if arguments is None else arguments
    check_one_source(parser, args, "dataset_name", "data_dir")
    if args.confirm and args.seeds:
        parser.error("--confirm takes the grid's confirmation_seeds: leave --seeds out.")
    if args.threads is None:
        args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    return args


def main(args: argparse.Namespace):
    # Imported after the flags are parsed: it takes seconds.
    from flowback_hf.ablation import Scripts, run_ablation
    from flowback_hf.data import DataSource

    is_folder = args.data_dir is not None
    option, name = ("--data_dir", args.data_dir) if is_folder else ("--dataset_name", args.dataset_name)
    run_ablation(
        Scripts(
            train=FOLDER / "train_rra.py",
            evaluate=FOLDER.parent / "pipelines" / "evaluate_flow.py",
            precompute=FOLDER / "precompute_features.py",
        ),
        args.grid,
        args.settings,
        DataSource(option, name, is_folder),
        args.teacher,
        args.judge,
        args.output_dir,
        variant_names=args.variants,
        seeds=args.seeds,
        jobs=args.jobs,
        threads=args.threads,
        dry_run=args.dry_run,
        time_steps=args.time_steps,
        confirm=args.confirm,
        command=args.command,
        records_dir=args.records_dir,
        other_teacher=args.other_teacher,
    )


if __name__ == "__main__":
    # An end that is asked for ends the cells, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command(main, parse_args())
