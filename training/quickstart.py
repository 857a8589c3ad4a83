#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Go the whole way on a laptop: prepare the handwritten digits with a teacher and a judge, train a flow with reverse
alignment, reload the saved pipeline, sample from it and let the judge read the samples. Each stage is a process.

    python training/quickstart.py --output_dir outputs/quickstart

Leaves `digits/`, `flow/` (the pipeline), `samples.png` and `report.json` in the output folder. `make quickstart` calls
it. A run that was interrupted goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.numbers import COUNT, SEED, Number


FOLDER = Path(__file__).resolve().parent


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/quickstart"),
        help="The folder to write everything to. Default: %(default)s.",
    )
    parser.add_argument("--max_train_steps", type=COUNT, default=1200, help="Optimizer steps. Default: %(default)s.")
    parser.add_argument("--seed", type=SEED, default=0, help="Seed of the training. Default: %(default)s.")
    parser.add_argument(
        "--setup_seconds",
        type=Number(int, at_least=0),
        default=0,
        help="Seconds that the set-up took, for the report. Default: %(default)s.",
    )
    add_debug_argument(parser)
    return parser.parse_args(arguments)


def stages(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each stage."""
    digits, flow = args.output_dir / "digits", args.output_dir / "flow"
    prepare = [sys.executable, FOLDER / "prepare_demo.py", "--kind", "digits", "--output_dir", digits]
    train = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--quiet"]
    train += ["--mixed_precision", "no", "--dynamo_backend", "no", FOLDER / "train_rra.py"]
    train += ["--train_data_dir", digits / "images", "--teacher_model_name_or_path", digits / "teacher"]
    train += ["--output_dir", flow, "--model_config", FOLDER / "configs" / "demo_digits.json", "--seed", args.seed]
    train += ["--max_train_steps", args.max_train_steps, "--train_batch_size", 64, "--learning_rate", 2e-3]
    train += ["--lr_warmup_steps", 50, "--ema_decay", 0.99, "--alignment_weight", 0.3]
    # With digits, the MLP is at least as good as the default projector: docs/ablation.md.
    train += ["--projector_type", "mlp", "--projector_dim", 128, "--no-normalize_teacher_features"]
    train += ["--validation_steps", 300, "--validation_guidance_scale", 2.0, "--eval_batch_size", 297]
    train += ["--resume_from_checkpoint", "latest"]
    report = [sys.executable, FOLDER.parent / "pipelines" / "report_demo.py", "--model", flow, "--data_dir", digits]
    report += ["--output_dir", args.output_dir]
    commands = {"train": train, "sample and judge": report}
    if not (digits / "demo.json").exists():
        commands = {"prepare": prepare, **commands}
    return {name: [str(part) for part in command] for name, command in commands.items()}


def main(args: argparse.Namespace):
    args.output_dir.mkdir(parents=True, exist_ok=True)
    seconds = {"set up": args.setup_seconds}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(args.output_dir / "datasets_cache")}
    for name, command in stages(args).items():
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        exit_code = subprocess.run(command, env=environment).returncode
        if exit_code != 0:
            sys.exit(max(1, exit_code))  # the stage has said why; a killed one has a negative code
        seconds[name] = round(time.perf_counter() - start, 1)

    report_file = args.output_dir / "report.json"
    report = json.loads(report_file.read_text()) | {"seconds": seconds}
    report_file.write_text(json.dumps(report, indent=2))
    print(f"\n== {report_file}\n{json.dumps(report, indent=2)}")
    print(f"\nThe pipeline is in {args.output_dir / 'flow'}. Look at {args.output_dir / 'samples.png'}.")


if __name__ == "__main__":
    run_command(main, parse_args())
