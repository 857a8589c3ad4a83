"""
Makes the trained flow whose sampling the benchmarks time: 256 tokens, width 256, 4 blocks of 4 layers, on shapes at
64x64 pixels. Kept: a second call does nothing, and one that was interrupted goes on where it was. The second command
is for a GPU and makes one of the paper's size.

    python benchmarks/prepare_flow.py
    python benchmarks/prepare_flow.py --num_blocks 8 --num_layers 8 --num_attention_heads 16 --learning_rate 1e-4 \\
      --output_dir outputs/benchmark_flow_paper
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


TRAINING = Path(__file__).resolve().parents[1] / "training"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/benchmark_flow"),
        help="The folder to write the images and the flow to. Default: %(default)s.",
    )
    parser.add_argument("--num_blocks", type=int, default=4, help="Flow blocks. Default: %(default)s.")
    parser.add_argument(
        "--num_layers", type=int, default=4, help="Transformer layers in every flow block. Default: %(default)s."
    )
    parser.add_argument(
        "--num_attention_heads", type=int, default=4, help="Attention heads, each 64 wide. Default: %(default)s."
    )
    parser.add_argument(
        "--learning_rate", type=float, default=1e-3, help="Largest learning rate. Default: %(default)s."
    )
    parser.add_argument("--max_train_steps", type=int, default=600, help="Optimizer steps. Default: %(default)s.")
    parser.add_argument("--train_batch_size", type=int, default=16, help="Images in a step. Default: %(default)s.")
    parser.add_argument(
        "--num_train_images", type=int, default=4000, help="Training images to draw. Default: %(default)s."
    )
    return parser.parse_args(arguments)


def commands(args: argparse.Namespace) -> list[list[str]]:
    shapes = args.output_dir / "shapes"
    prepare = [TRAINING / "prepare_demo.py", "--kind", "shapes", "--resolution", 64, "--output_dir", shapes]
    # The flow is trained without alignment, and nobody looks at its samples: teacher and judge are not needed.
    prepare += ["--num_train_images", args.num_train_images, "--num_validation_images", 200]
    prepare += ["--teacher_epochs", 1, "--judge_epochs", 1]
    train = [TRAINING / "train_rra.py", "--train_data_dir", shapes / "images"]
    train += ["--output_dir", args.output_dir / "flow", "--alignment", "none", "--resolution", 64, "--patch_size", 4]
    train += ["--num_blocks", args.num_blocks, "--num_layers", args.num_layers]
    train += ["--num_attention_heads", args.num_attention_heads, "--mixed_precision", "bf16"]
    train += ["--max_train_steps", args.max_train_steps, "--train_batch_size", args.train_batch_size]
    train += ["--learning_rate", args.learning_rate, "--lr_warmup_steps", 50, "--ema_decay", 0.99]
    train += ["--validation_steps", 300, "--checkpointing_steps", 100, "--checkpoints_total_limit", 1]
    train += ["--resume_from_checkpoint", "latest"]
    prepared, trained = shapes / "demo.json", args.output_dir / "flow" / "model_index.json"
    todo = [command for command, result in ((prepare, prepared), (train, trained)) if not result.exists()]
    return [[sys.executable, *map(str, command)] for command in todo]


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    cache = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(args.output_dir / "datasets_cache")}
    for command in commands(args):
        subprocess.run(command, check=True, env={**os.environ, **cache})
    print(f"The flow is in {args.output_dir / 'flow'}.")


if __name__ == "__main__":
    main()
