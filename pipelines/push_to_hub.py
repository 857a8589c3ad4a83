#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Publish a trained flow: weights, code, a sample grid and a model card made from the run's own files.

    python pipelines/push_to_hub.py --model outputs/my_flow --hub_model_id my_flow

`--output_dir` writes the repository to a folder instead, to be looked at first. To change the card, edit the
`README.md` that is left in the run's folder and push again; one that was edited on the Hub is never overwritten.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from flowback_hf import FlowBackPipeline
from flowback_hf.hub import find_run, write_repository


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="An output folder of train_rra.py, or a pipeline's.")
    parser.add_argument("--hub_model_id", help="Of the repository. Default: the folder's name.")
    parser.add_argument("--hub_token", help="Default: that of `hf auth login` or HF_TOKEN.")
    parser.add_argument("--hub_private_repo", action="store_true")
    parser.add_argument("--license", default="apache-2.0", help="Of the weights.")
    parser.add_argument("--commit_message")
    parser.add_argument("--create_pr", action="store_true", help="Propose the files instead of committing them.")
    parser.add_argument("--force", action="store_true", help="Replace a model of another configuration.")
    parser.add_argument("--output_dir", type=Path, help="Write the repository there, a new folder, and push nothing.")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace):
    if not (args.model / "model_index.json").is_file():
        raise ValueError(
            f"`--model` must be the folder of a saved pipeline, but {args.model} has no model_index.json."
        )
    if args.output_dir is not None and args.output_dir.exists():
        raise ValueError(f"`--output_dir` must be a new folder, but {args.output_dir} exists.")
    pipeline = FlowBackPipeline.from_pretrained(args.model)
    repo_id = args.hub_model_id or args.model.resolve().name
    if args.output_dir is not None:
        partial = args.output_dir.with_name(f".{args.output_dir.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_repository(pipeline, partial, repo_id, find_run(pipeline, None), args.license)
        os.replace(partial, args.output_dir)
        print(args.output_dir)
        return
    url = pipeline.push_to_hub(
        repo_id,
        commit_message=args.commit_message,
        private=args.hub_private_repo,
        token=args.hub_token,
        create_pr=args.create_pr,
        license=args.license,
        force=args.force,
    )
    print(url)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"push_to_hub.py: error: {error}")
