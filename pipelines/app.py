#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Open a web page for a trained flow: sample, classify, invert and edit images, and map their likelihood.

    python pipelines/app.py                                    # the quickstart's flow
    python pipelines/app.py --model outputs/my_flow --server_port 7870

The page listens on this machine only, unless `--server_name` or `--share` says otherwise. Press Ctrl+C to end.
"""

import argparse
import os
import socket
import tempfile
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.numbers import Number


QUICKSTART = Path("outputs/quickstart/flow")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help=f"Folder or Hub id of the pipeline. Default: {QUICKSTART}, which `make quickstart` trains."
    )
    parser.add_argument(
        "--server_name",
        default="127.0.0.1",
        help="Address to listen on. 0.0.0.0 lets other machines connect. Default: %(default)s, this machine only.",
    )
    parser.add_argument(
        "--server_port",
        type=Number(int, at_least=1, at_most=65535),
        help="Port to listen on. Default: the first free one from 7860.",
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="Also make the page public for a week, through a tunnel of gradio.live. Default: do not.",
    )
    add_debug_argument(parser)
    return parser.parse_args(arguments)


def check_address(server_name: str, server_port: int | None):
    """Raise ValueError if no server can listen there, before a model is loaded for nothing."""
    try:
        socket.create_server((server_name, server_port or 0)).close()
    except OSError as error:
        address = f"`--server_name` {server_name}" + (f" and `--server_port` {server_port}" if server_port else "")
        reason = error.strerror.partition(" (")[0]  # without the address
        raise ValueError(
            f"{address} must be an address to listen on, but this is not possible: {reason}. Choose another."
        ) from error


def main(args: argparse.Namespace):
    if args.model is None and not QUICKSTART.is_dir():
        raise ValueError(f"`--model` is needed, because there is no {QUICKSTART}. `make quickstart` trains that flow.")
    check_address(args.server_name, args.server_port)

    # Imports that take seconds stand below the checks: `--help` and wrong arguments are answered at once.
    from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
    from flowback_hf.hub import load_pipeline
    from flowback_hf.page import FlowPage, launch

    model = args.model or str(QUICKSTART)
    pipeline = load_pipeline(FlowBackPipeline, model)
    page = FlowPage(pipeline, FlowBackClassificationPipeline.from_pipe(pipeline), title=model)
    # A page deletes its files when it ends. In the folder that Gradio shares, they might be another page's as well.
    with tempfile.TemporaryDirectory(prefix="flowback_hf_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        launch(page.build(), server_name=args.server_name, server_port=args.server_port, share=args.share)


if __name__ == "__main__":
    run_command(main, parse_args())
