#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Train a class-conditional normalizing flow with reverse representation alignment.

    accelerate launch training/train_rra.py --train_data_dir path/to/images --output_dir outputs/flow --resolution 64

The flags are in `flowback_hf_cli.training`, the work is done by `flowback_hf.training.Trainer`.
"""

import argparse
from pathlib import Path

from flowback_hf_cli.command import run_command
from flowback_hf_cli.training import TrainingArguments, parse_args


def main(args: argparse.Namespace):
    # Imported after the flags are parsed: it takes seconds.
    from flowback_hf.data import load_splits
    from flowback_hf.hub import check_repository, publish
    from flowback_hf.training import (
        Trainer,
        check_run_folder,
        decide,
        describe_processes,
        make_accelerator,
        make_flow,
        make_objective,
        make_source,
        make_teacher,
    )

    # The flags go into files and trackers from here on, and the token must not.
    hub_token = vars(args).pop("hub_token")
    hub_model_id = args.hub_model_id or Path(args.output_dir).resolve().name
    arguments = TrainingArguments.from_args(args)
    accelerator = make_accelerator(arguments)

    # Everything a user can get wrong is found before anything is written.
    settings = vars(args) | describe_processes(arguments, accelerator)
    decide(accelerator, check_run_folder, args.output_dir, settings, args.resume_from_checkpoint)
    splits = load_splits(args)
    labelled = make_flow(args, splits.class_names, splits.flow_sizes)
    flow = labelled.flow
    if args.validation_guidance_scale is None:
        args.validation_guidance_scale = arguments.validation_guidance_scale = labelled.guidance_scale
    source = make_source(args, splits, flow.config, labelled.label_ids)
    if args.push_to_hub:
        check_repository(hub_model_id, dict(flow.config), args.hub_private_repo, hub_token)
    teacher = make_teacher(args, source, flow.config, accelerator)
    objective = make_objective(args, flow, source.teacher_dim if teacher is None else teacher.feature_dim)

    trainer = Trainer(
        objective, source, arguments, teacher, labelled.id2label, vars(args), accelerator, labelled.guidance_rule
    )
    pipeline = trainer.fit()
    if args.push_to_hub and accelerator.is_main_process:
        publish(pipeline, hub_model_id, args.output_dir, args.hub_private_repo, hub_token)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main, parse_args())
