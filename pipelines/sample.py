#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Sample images from a trained flow: of all classes in turn, or of the classes that you name.

    python pipelines/sample.py --model outputs/flow --class_labels dog 3 --num_images 100 --output_dir outputs/samples

Writes `000000.png`, `000001.png`, ..., `grid.png` with the first images of each class, and `sampling.json`, which says
how they were made. `--npz` adds `samples_100x64x64x3.npz` (`arr_0` the images, `arr_1` their labels), which ADM's
evaluator reads. Image i depends on the seed and on i only: the same command resumes an interrupted run, a larger
`--num_images` extends a finished one, and `accelerate launch` shares the work between processes.
"""

import argparse
import contextlib
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.evaluation import GUIDANCE_RULES, GUIDANCE_SCHEDULES, SOLVERS
from flowback_hf_cli.numbers import COUNT, SEED, Number


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub id of the pipeline to sample from.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder that the images are written to.")
    parser.add_argument(
        "--class_labels",
        nargs="+",
        help="Classes to sample in turn, by name or number; name:7 and id:7 say which is meant. -1 is no class."
        " Default: all classes.",
    )
    parser.add_argument(
        "--num_images", type=COUNT, default=64, help="Images that the folder holds in the end. Default: %(default)s."
    )
    parser.add_argument(
        "--guidance_scale", type=Number(float, at_least=1), help="Guidance scale. 1.0 is off. Default: the pipeline's."
    )
    parser.add_argument("--guidance_rule", choices=GUIDANCE_RULES, help="Guidance rule. Default: the pipeline's.")
    parser.add_argument(
        "--guidance_schedule",
        choices=GUIDANCE_SCHEDULES,
        default="constant",
        help="How guidance changes along the sequence of tokens. Default: %(default)s.",
    )
    parser.add_argument(
        "--guidance_temperature",
        type=Number(float, above=0),
        default=1.0,
        help="Attention temperature that guides an unconditional flow, with a guidance scale above 1.0. Default:"
        " %(default)s.",
    )
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        default="auto",
        help="How the flow is inverted; learned samples with the pipeline's learned inverse. Default: %(default)s.",
    )
    parser.add_argument(
        "--tolerance",
        type=Number(float, at_least=0),
        help="How near the samples of the solver jacobi come to those of sequential, on trained flows. 0 is exact."
        " Default: 1e-5 in float32, 1e-10 in float64.",
    )
    parser.add_argument("--no_denoise", action="store_true", help="Leave the noise of training in the images.")
    parser.add_argument(
        "--batch_size", type=COUNT, default=32, help="Images per process and pass. Default: %(default)s."
    )
    parser.add_argument("--seed", type=SEED, default=0, help="Seed of the noise. Default: %(default)s.")
    parser.add_argument("--npz", action="store_true", help="Also write all images into one file.")
    add_debug_argument(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace):
    from flowback_hf import FlowBackPipeline
    from flowback_hf.evaluation import join_processes, sample_into_folder
    from flowback_hf.hub import load_pipeline

    options = vars(args) | {"denoise": not args.no_denoise}
    del options["no_denoise"]
    state = join_processes()
    pipeline = load_pipeline(FlowBackPipeline, args.model)
    if args.no_denoise and args.solver == "learned" and pipeline.reverse_transformer is not None:
        with contextlib.suppress(OSError):  # without heads, the arguments are refused below
            pipeline.reverse_transformer.load_heads(args.model)
    sample_into_folder(pipeline, **options)
    state.destroy_process_group()


if __name__ == "__main__":
    run_command(main, parse_args())
