#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Train the learned inverse of a flow: a network that maps its noise to clean images in one evaluation.

    accelerate launch training/train_reverse.py --model outputs/flow --train_data_dir path/to/images \
        --output_dir outputs/flow_learned

The flags are in `flowback_hf_cli.reverse_training`, the work is done by `flowback_hf.training.ReverseTrainer`.
"""

import argparse
from pathlib import Path

from flowback_hf_cli.command import run_command
from flowback_hf_cli.reverse_training import parse_args
from flowback_hf_cli.training import TrainingArguments


def main(args: argparse.Namespace):
    # Imported after the flags are parsed: it takes seconds.
    from flowback_hf import FlowBackPipeline
    from flowback_hf.data import DataSource, HoldOut, load_splits
    from flowback_hf.hub import check_repository, load_pipeline, publish
    from flowback_hf.models.transformer_reverse import hash_flow
    from flowback_hf.training import (
        ReverseTrainer,
        check_run_folder,
        choose_sampled_guidance_scale,
        choose_validation_guidance_scale,
        decide,
        describe_processes,
        make_accelerator,
        make_reverse_objective,
        make_reverse_source,
    )

    # The flags go into files and trackers from here on, and the token must not.
    hub_token = vars(args).pop("hub_token")
    hub_model_id = args.hub_model_id or Path(args.output_dir).resolve().name
    flow_pipeline = load_pipeline(FlowBackPipeline, args.model, cache_dir=args.cache_dir)
    args.sampled_guidance_scale = choose_sampled_guidance_scale(args, flow_pipeline)
    args.validation_guidance_scale = choose_validation_guidance_scale(args)
    args.flow_hash = hash_flow(flow_pipeline.transformer)  # a run does not go on with another flow in the same folder
    arguments = TrainingArguments.from_args(args)
    accelerator = make_accelerator(arguments)

    # Everything a user can get wrong is found before anything is written.
    settings = vars(args) | describe_processes(arguments, accelerator)
    decide(accelerator, check_run_folder, args.output_dir, settings, args.resume_from_checkpoint)
    # Images that the flow has not seen stay unseen.
    data = args.latents or DataSource.from_args(args).name
    splits = load_splits(args, HoldOut.read(args.model, data) if Path(args.model).is_dir() else None)
    source = make_reverse_source(args, splits, flow_pipeline)
    if args.push_to_hub:
        check_repository(hub_model_id, dict(flow_pipeline.transformer.config), args.hub_private_repo, hub_token)
    objective = make_reverse_objective(args, flow_pipeline, accelerator)

    trainer = ReverseTrainer(
        objective,
        source,
        arguments,
        flow_pipeline,
        pairs=args.pairs,
        num_sampled_pairs=args.num_sampled_pairs,
        sampled_guidance_scale=args.sampled_guidance_scale,
        data_guidance_scale=args.max_guidance_scale,
        settings=vars(args),
        accelerator=accelerator,
    )
    pipeline = trainer.fit()
    if args.push_to_hub and accelerator.is_main_process:
        publish(pipeline, hub_model_id, args.output_dir, args.hub_private_repo, hub_token)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main, parse_args())
