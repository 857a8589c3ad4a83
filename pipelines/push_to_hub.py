#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Publish a trained flow: its weights, code, a sample grid, and a model card made from the run's files.

    python pipelines/push_to_hub.py --model outputs/my_flow --hub_model_id my_flow
    python pipelines/push_to_hub.py --model outputs/my_flow --hub_model_id my_flow --space my_flow_page

The second command also publishes the page of `pipelines/app.py`, as a Space.

To look at the repository first, write it to a folder with `--output_dir`. To change the card, edit the `README.md`
that publishing leaves in the run's folder, and publish again. A card that was edited on the Hub is never overwritten.
"""

import argparse
from pathlib import Path
from urllib.parse import urlsplit

from flowback_hf_cli.command import add_debug_argument, run_command


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="Folder of the pipeline, such as an output folder of train_rra.py."
    )
    parser.add_argument(
        "--hub_model_id", help="Name of the repository, with or without its namespace. Default: the folder's name."
    )
    parser.add_argument("--hub_token", help="Token with write access. Default: that of `hf auth login` or HF_TOKEN.")
    parser.add_argument(
        "--hub_private_repo",
        action="store_true",
        help="Create a private repository, and refuse an existing public one. Default: a public repository.",
    )
    parser.add_argument(
        "--license", default="apache-2.0", help="License of the weights, as named on the Hub. Default: %(default)s."
    )
    parser.add_argument(
        "--commit_message", help='Message of the commit. Default: "Upload" and the name of the pipeline\'s class.'
    )
    parser.add_argument(
        "--create_pr", action="store_true", help="Open a pull request. Default: commit the files directly."
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Replace the repository's model even if its configuration differs. Default: refuse to.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="New folder to write the repository to, instead of publishing it. Default: publish.",
    )
    parser.add_argument(
        "--space",
        help="Name of a Space, with or without its namespace, to publish the page of the flow in. Default: no Space.",
    )
    add_debug_argument(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace):
    if not (args.model / "model_index.json").is_file():
        raise ValueError(
            f"`--model` must be the folder of a saved pipeline, but {args.model} has no model_index.json."
        )
    if args.output_dir is not None and args.output_dir.exists():
        raise ValueError(f"`--output_dir` must be a new folder, but {args.output_dir} exists.")
    if args.space is not None and (args.output_dir is not None or args.create_pr):
        raise ValueError("`--space` needs the flow on the Hub, so `--output_dir` and `--create_pr` must be left out.")

    # Imports that take seconds stand below the checks: `--help` and wrong arguments are answered at once.
    from flowback_hf import FlowBackPipeline
    from flowback_hf.files import write_whole
    from flowback_hf.hub import load_pipeline, write_repository
    from flowback_hf.model_card import find_run
    from flowback_hf.space import check_space, push_space

    pipeline = load_pipeline(FlowBackPipeline, args.model)
    repo_id = args.hub_model_id or args.model.resolve().name
    if args.output_dir is not None:
        with write_whole(args.output_dir) as partial:
            write_repository(pipeline, partial, repo_id, find_run(pipeline), args.license)
        print(args.output_dir)
        return
    if args.space is not None:
        check_space(args.space, args.hub_private_repo, args.hub_token)
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
    if args.space is not None:
        print(push_space(args.space, urlsplit(url).path.strip("/"), args.hub_private_repo, args.hub_token))


if __name__ == "__main__":
    run_command(main, parse_args())
