#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Evaluate a trained flow on a data set: see `--help`, or `flowback_hf_cli/evaluation.py`, which holds the flags."""

import argparse
import sys
from functools import partial

from flowback_hf_cli.command import run_command
from flowback_hf_cli.evaluation import parse_args


def main(args: argparse.Namespace, command: list[str]):
    from flowback_hf import FlowBackPipeline
    from flowback_hf.evaluation import EvaluationArguments, check_extras, evaluate, join_processes, markdown
    from flowback_hf.hub import load_pipeline

    check_extras(args.features is not None, args.linear_probe)
    state = join_processes()
    pipeline = load_pipeline(FlowBackPipeline, args.model)
    results = evaluate(pipeline, EvaluationArguments(**vars(args)), command)
    if results is not None:
        print(markdown(results))
    state.destroy_process_group()


if __name__ == "__main__":
    run_command(partial(main, command=sys.argv[1:]), parse_args())
