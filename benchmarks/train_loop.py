"""
Seconds of a step in the trainer's loop, and how often the host reads the device in it: as it is, reading the loss
after every step, and with the same batch in every step, which needs no loader. They run in turns. The difference
between the first and the last is the loader's share of the step.

    python benchmarks/train_loop.py
    python benchmarks/train_loop.py --device cuda --num_attention_heads 16 --mixed_precision bf16 --batch_size 32

The images are JPEGs, which the loader decodes and resizes. Only steps of the second half of a run are timed. A CPU has
one read more in each step, where class labels are checked: a GPU's are not.
"""

import argparse
import gc
import io
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import PIL.Image
import torch
from reporting import add_flow_sizes, add_run_arguments, build_random_flow, write_report

from flowback_hf import AlignedFlowObjective
from flowback_hf.data import ImageSource, Splits
from flowback_hf.files import read_metrics_log
from flowback_hf.reporting import markdown_table
from flowback_hf.training import Trainer, TrainingArguments


LOOPS = ("as it is", "reading every step", "one batch")
NUM_DISTINCT_IMAGES = 64
# What makes the host wait for the device.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flow_sizes(parser, sample_size=64, num_blocks=8, num_layers=8, num_heads=4)
    parser.add_argument("--image_size", type=int, default=256, help="Size of the JPEGs. Default: %(default)s.")
    parser.add_argument("--batch_size", type=int, default=4, help="Images in a step. Default: %(default)s.")
    parser.add_argument(
        "--num_steps",
        type=int,
        default=20,
        help="Timed steps of each run, after as many others. Default: %(default)s.",
    )
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each loop. Default: %(default)s.")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="Default: %(default)s.")
    parser.add_argument(
        "--num_workers", type=int, help="Processes that load data. Default: 2 on a GPU, none on a CPU."
    )
    parser.add_argument(
        "--folder", type=Path, help="Where runs write and are removed. Default: the folder of temporary files."
    )
    add_run_arguments(parser, "train_loop.json")
    args = parser.parse_args(arguments)
    if min(args.num_steps, args.repeats, args.batch_size) < 1:
        parser.error("--num_steps, --repeats and --batch_size must be at least 1")
    return args


class WatchedLoader:
    """
    Loads what another loader does, and remembers how many reads there were at each batch.

    Args:
        loader (`torch.utils.data.DataLoader`): The other one.
        reads (`list`): What has been read so far.
        repeats_batch (`bool`): Whether to load the first batch only, and repeat it.
    """

    def __init__(self, loader: torch.utils.data.DataLoader, reads: list[str], repeats_batch: bool):
        self.loader, self.reads, self.counts = loader, reads, []
        self.batches = itertools.repeat(next(iter(loader)), len(loader)) if repeats_batch else loader

    def set_epoch(self, epoch: int):
        self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        for batch in self.batches:
            self.counts.append(len(self.reads))
            yield batch


def draw_images(args: argparse.Namespace, num_images: int) -> datasets.Dataset:
    """Rows of JPEGs as detailed as photographs: noise of all scales."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(min(num_images, NUM_DISTINCT_IMAGES)):
        image = PIL.Image.new("RGB", (args.image_size, args.image_size))
        for size in (4, 16, 64):
            layer = PIL.Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
            image = PIL.Image.blend(image, layer.resize(image.size, PIL.Image.Resampling.BICUBIC), 0.5)
        file = io.BytesIO()
        image.save(file, "JPEG")
        files.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["class"])})
    images = [files[number % len(files)] for number in range(num_images)]
    return datasets.Dataset.from_dict({"image": images, "label": [0] * num_images}, features)


@contextmanager
def count_reads(device: str) -> Iterator[list[str]]:
    """The reads of tensors on a device, in a list that grows."""
    reads = []

    def counting(name: str):
        method = getattr(torch.Tensor, name)

        def read(tensor, *arguments, **options):
            if tensor.device.type == device:
                reads.append(name)
            return method(tensor, *arguments, **options)

        return read

    with ExitStack() as patches:
        for name in READS:
            patches.enter_context(mock.patch.object(torch.Tensor, name, counting(name)))
        yield reads


def run_loop(loop: str, images: datasets.Dataset, args: argparse.Namespace) -> tuple[float, float]:
    """Train for twice `num_steps`. Returns seconds and reads of a step, the means of the second half."""
    gc.collect()  # an earlier run's weights, whose owners refer to each other
    flow = build_random_flow(args, num_classes=1)
    source = ImageSource(Splits(images, images.select(range(args.batch_size)), ["class"]), flow.config, label_ids=[0])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, count_reads(torch.device(args.device).type) as reads:
        arguments = TrainingArguments(
            f"{folder}/run",
            train_batch_size=args.batch_size,
            max_train_steps=2 * args.num_steps,
            mixed_precision=args.mixed_precision,
            dataloader_num_workers=args.num_workers,
            logging_steps=1 if loop == "reading every step" else args.num_steps,
            validation_steps=2 * args.num_steps,
            checkpointing_steps=2 * args.num_steps,
        )
        trainer = Trainer(AlignedFlowObjective(flow, "none"), source, arguments, id2label={0: "class"})
        trainer.train_dataloader = WatchedLoader(trainer.train_dataloader, reads, repeats_batch=loop == "one batch")
        trainer.fit()
        logged = [
            args.batch_size / record["images_per_second"]
            for record in read_metrics_log(arguments.output_dir)
            if record["step"] > args.num_steps and "images_per_second" in record
        ]
    counts = trainer.train_dataloader.counts[args.num_steps :]
    return statistics.mean(logged), (counts[-1] - counts[0]) / max(len(counts) - 1, 1)


def measure(images: datasets.Dataset, args: argparse.Namespace) -> list[dict]:
    runs = {loop: [] for loop in LOOPS}
    for _ in range(args.repeats):
        for loop in LOOPS:
            runs[loop].append(run_loop(loop, images, args))
    medians = {loop: statistics.median(seconds for seconds, _ in pairs) for loop, pairs in runs.items()}
    return [
        {
            "loop": loop,
            "median_seconds": medians[loop],
            "min_seconds": min(seconds for seconds, _ in pairs),
            "max_seconds": max(seconds for seconds, _ in pairs),
            "times_as_it_is": medians[loop] / medians["as it is"],
            "images_per_second": args.batch_size / medians[loop],
            "reads_per_step": pairs[0][1],
        }
        for loop, pairs in runs.items()
    ]


def results_table(results: list[dict]) -> str:
    rows = [
        [
            result["loop"],
            f"{result['median_seconds']:.4f} ({result['min_seconds']:.4f} to {result['max_seconds']:.4f})",
            f"{result['times_as_it_is']:.3f}",
            f"{result['images_per_second']:.1f}",
            f"{result['reads_per_step']:.1f}",
        ]
        for result in results
    ]
    return markdown_table(["loop", "seconds a step (range)", "of as it is", "images/s", "reads a step"], rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # An epoch has as many steps as a run: workers do not start again while steps are timed.
    results = measure(draw_images(args, 2 * args.num_steps * args.batch_size), args)
    loader_share = 1 - next(result["times_as_it_is"] for result in results if result["loop"] == "one batch")
    text = f"{results_table(results)}\n\nThe loader's share of the step: {loader_share:.1%}."
    print(text)
    write_report(args.output, arguments, args.device, {"loops": results, "loader_share": loader_share}, text)


if __name__ == "__main__":
    main()
