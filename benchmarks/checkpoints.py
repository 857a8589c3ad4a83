"""
Seconds that a checkpoint takes: what Accelerate and safetensors write, and what makes sure that it is kept whole.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --sample_size 64 --patch_size 4 --num_blocks 4 --num_layers 8 \\
      --num_attention_heads 8 --attention_head_dim 64 --batch_size 4 --repeats 3 \\
      --output benchmarks/results/checkpoints_100m.json

The defaults are the sizes of the quickstart's flow. Before each measurement, all that is to be written to the disk has
been.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from reporting import add_flow_sizes, add_run_arguments, build_random_flow, seconds_of, write_report
from tqdm.auto import tqdm

from flowback_hf import AlignedFlowObjective
from flowback_hf.files import flush, replace, write_json, write_text
from flowback_hf.reporting import markdown_table
from flowback_hf.training.checkpoints import (
    COPIED_FILES,
    EMA_FILE,
    BackgroundWriter,
    checksum_of_file,
    save_checkpoint,
    save_ema,
)


NUM_SMALL_FILES = 100


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flow_sizes(parser, sample_size=8, num_blocks=4, num_layers=3, num_heads=4)
    parser.set_defaults(patch_size=2, attention_head_dim=16)
    parser.add_argument("--batch_size", type=int, default=64, help="Images in a step. Default: %(default)s.")
    parser.add_argument("--repeats", type=int, default=5, help="Checkpoints of each kind. Default: %(default)s.")
    parser.add_argument(
        "--folder", type=Path, help="Where to write, on the disk to measure. Default: the folder of temporary files."
    )
    add_run_arguments(parser, "checkpoints.json", device=False)
    return parser.parse_args(arguments)


class Run:
    """A run after its first step, whose optimizer has all of its state."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.folder = folder
        self.flow = build_random_flow(args, num_classes=10)
        self.sample = torch.randn(args.batch_size, 3, args.sample_size, args.sample_size)
        self.class_labels = torch.zeros(args.batch_size, dtype=torch.long)
        self.accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(self.flow.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        objective, optimizer, _ = self.accelerator.prepare(
            AlignedFlowObjective(self.flow, "none"), optimizer, scheduler
        )
        self.accelerator.backward(objective(self.sample[:1], self.class_labels[:1]).loss)
        optimizer.step()
        self.ema = EMAModel(self.flow.parameters())
        self.background = BackgroundWriter(self.accelerator)
        for name in COPIED_FILES:
            write_json(folder / name, {})

    def save_plainly(self):
        """The same files, and how long they are."""
        checkpoint, partial = self.folder / "plain", self.folder / ".partial-plain"
        self.accelerator.save_state(str(partial))
        save_ema(self.ema.state_dict(), partial / EMA_FILE)
        sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
        (partial / "progress.json").write_text(str(sizes))
        replace(partial, checkpoint)

    def save(self, background: BackgroundWriter | None = None):
        figures = {"nll": 0.0, "lowest_nll": 0.0}
        save_checkpoint(self.accelerator, self.folder, 1, figures, ema=self.ema, background=background)

    @torch.no_grad()
    def measure_weights(self):
        self.flow.log_prob(self.sample, self.class_labels)

    def measure(self) -> dict[str, float]:
        seconds = {}
        for name, function in {"plain": self.save_plainly, "saved": self.save}.items():
            os.sync()
            seconds[name] = seconds_of(function, "cpu")
        os.sync()
        seconds["background"] = seconds_of(lambda: self.save(self.background), "cpu")
        self.background.finish()
        os.sync()
        self.save_plainly()
        seconds["flush"] = seconds_of(lambda: flush(self.folder / "plain"), "cpu")
        seconds["checksums"] = seconds_of(self.compute_checksums, "cpu")
        seconds["nll"] = seconds_of(self.measure_weights, "cpu")
        return seconds

    def compute_checksums(self):
        for file in (self.folder / "plain").iterdir():
            checksum_of_file(file)


def measure_small_files(folder: Path) -> dict[str, float]:
    """Seconds of a small file, such as a picture or a line of settings."""
    names = [folder / f"{number}.txt" for number in range(NUM_SMALL_FILES)]
    return {
        "plain": seconds_of(lambda: [name.write_text("text") for name in names], "cpu") / NUM_SMALL_FILES,
        "saved": seconds_of(lambda: [write_text(name, "text") for name in names], "cpu") / NUM_SMALL_FILES,
    }


def main(args: argparse.Namespace, arguments: list[str] | None = None):
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Run(args, Path(folder))
        run.measure()
        measured = [run.measure() for _ in tqdm(range(args.repeats))]
        seconds = {name: statistics.median(each[name] for each in measured) for name in measured[0]}
        num_bytes = sum(file.stat().st_size for file in (Path(folder) / "checkpoint-1").iterdir())
        small_files = measure_small_files(Path(folder))
    num_parameters = sum(parameter.numel() for parameter in run.flow.parameters())
    results = {"num_parameters": num_parameters, "num_bytes": num_bytes, "batch_size": args.batch_size}
    results |= {"seconds": seconds, "seconds_small_file": small_files}
    header = ["parameters", "MB", "plain, s", "now, s", "of which fsync", "checksums"]
    header += ["in the background, until training goes on, s", "nll of a batch, s, beside it"]
    row = [f"{num_parameters / 1e6:.1f} M", f"{num_bytes / 1e6:.1f}"]
    row += [f"{seconds[name]:.3f}" for name in ("plain", "saved", "flush", "checksums", "background", "nll")]
    table = markdown_table(header, [row])
    table += "\n\nA small file takes {plain:.2f} ms plainly and {saved:.2f} ms now.".format(
        **{name: 1e3 * value for name, value in small_files.items()}
    )
    print(table)
    write_report(args.output, arguments, "cpu", results, table)


if __name__ == "__main__":
    main(parse_args())
