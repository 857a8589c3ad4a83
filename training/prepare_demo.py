#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Make a demo data set, a small teacher and an independent judge, with nothing downloaded.

    python training/prepare_demo.py --kind digits --output_dir data/digits
    python training/prepare_demo.py --kind icons --output_dir data/icons
    python training/prepare_demo.py --kind shapes --output_dir data/shapes --resolution 32 \\
        --num_train_images 8000 --num_validation_images 1000 --seed 0
    python training/prepare_demo.py --kind glyphs --output_dir data/glyphs

`digits` are the 1,797 handwritten digits of scikit-learn (8x8 pixels, greyscale). The others are drawn, as many and as
large as asked for. `icons` are upright silhouettes of one color on a soft background of another (RGB), which a small
flow can learn. `shapes` are light shapes of any hue, place, size and rotation, on dark cluttered backgrounds (RGB).
`glyphs` are the capital letters in twenty typefaces that come with matplotlib, lighter or darker than the
cluttered background (greyscale).

The output folder then holds:

    images/{train,validation}/<class name>/<number>.png
        an image folder: datasets.load_dataset("imagefolder", data_dir="output_dir/images")
    images/{train,validation,test}.parquet
        of glyphs instead: datasets.load_dataset("output_dir/images")
    teacher/
        a transformers `Dinov2Model` trained to classify the training images, and its image processor
    teacher_mae/
        with --mae_epochs: a transformers `ViTMAEModel` trained on the training images without their labels
    judge/
        a `ResNetForImageClassification` trained on the same images from another seed, and its image processor; that of
        glyphs is trained on images that are not saved
    demo.json
        what was made: class names, numbers of images, resolution, seed, validation accuracies, seconds per stage

`teacher_validation_accuracy` is that of the teacher's own head, and `mae_linear_probe_accuracy` that of a linear
classifier on the mean of the second teacher's patch tokens.

The same arguments give the same images and, on the same machine, the same weights, to the bit.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument, run_command
from flowback_hf_cli.numbers import COUNT, SEED


NUM_CLASSES = {"digits": 10, "glyphs": 26, "icons": 10, "shapes": 10}
DEFAULTS = {
    "digits": {"resolution": 8, "teacher_epochs": 30, "judge_epochs": 40},
    "glyphs": {
        "resolution": 16,
        "num_train_images": 60000,
        "num_validation_images": 2080,
        "teacher_epochs": 10,
        "judge_epochs": 10,
    },
    "icons": {
        "resolution": 16,
        "num_train_images": 16000,
        "num_validation_images": 1000,
        "teacher_epochs": 3,
        "judge_epochs": 2,
    },
    "shapes": {
        "resolution": 32,
        "num_train_images": 8000,
        "num_validation_images": 1000,
        "teacher_epochs": 10,
        "judge_epochs": 4,
    },
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def defaults(name: str) -> str:
        return ", ".join(f"{values[name]} for {kind}" for kind, values in DEFAULTS.items() if name in values)

    parser.add_argument("--kind", choices=tuple(DEFAULTS), required=True, help="What the images show.")
    parser.add_argument("--output_dir", type=Path, required=True, help="A new or an empty folder to write to.")
    parser.add_argument(
        "--seed", type=SEED, default=0, help="Seed of the images, the split and the weights. Default: %(default)s."
    )
    parser.add_argument(
        "--resolution",
        type=COUNT,
        help=f"Height and width of drawn images, a multiple of 8 pixels. Default: {defaults('resolution')}.",
    )
    for split, name in {"train": "training", "validation": "validation"}.items():
        flag = f"num_{split}_images"
        help = f"How many {name} images to draw. Default: {defaults(flag)}."
        parser.add_argument(f"--{flag}", type=COUNT, help=help)
    for network in ("teacher", "judge"):
        flag = f"{network}_epochs"
        help = f"Passes over the training images for the {network}. Default: {defaults(flag)}."
        parser.add_argument(f"--{flag}", type=COUNT, help=help)
    parser.add_argument(
        "--mae_epochs",
        type=COUNT,
        help="Also train a second teacher, a masked autoencoder that needs no labels, for this many passes. Default:"
        " none.",
    )
    add_debug_argument(parser)
    return parser.parse_args(arguments)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise a ValueError for what cannot be made, before any work begins."""
    if arguments.kind == "digits":
        for name in ("resolution", "num_train_images", "num_validation_images"):
            if getattr(arguments, name) is not None:
                raise ValueError(
                    f"--{name} {getattr(arguments, name)} was given with --kind digits, whose images are fixed "
                    f"(8x8 pixels, 1500 for training, 297 for validation); leave it out or use a kind that is drawn."
                )
    if arguments.resolution is not None and (arguments.resolution < 8 or arguments.resolution % 8 != 0):
        raise ValueError(f"--resolution must be a positive multiple of 8, not {arguments.resolution}.")
    for name in ("num_train_images", "num_validation_images"):
        number = getattr(arguments, name)
        least = NUM_CLASSES[arguments.kind]
        if number is not None and number < least:
            raise ValueError(f"--{name} must be at least {least}, one image per class, not {number}.")
    if arguments.mae_epochs is not None and importlib.util.find_spec("sklearn") is None:
        raise ValueError('--mae_epochs needs scikit-learn: pip install "flowback_hf[demo]".')
    if arguments.output_dir.exists():
        if not arguments.output_dir.is_dir():
            raise ValueError(f"--output_dir {arguments.output_dir} is a file; name a new or an empty folder.")
        if any(arguments.output_dir.iterdir()):
            raise ValueError(f"--output_dir {arguments.output_dir} is not empty; name a new or an empty folder.")


def print_report(report: dict, output_dir: Path) -> None:
    print(f"{output_dir}: {report['kind']} at {report['resolution']}x{report['resolution']}, seed {report['seed']}")
    print(f"  classes: {', '.join(report['class_names'])}")
    print(f"  images: {report['num_train_images']} train, {report['num_validation_images']} validation")
    for name in ("teacher", "judge"):
        accuracy, epochs = report[f"{name}_validation_accuracy"], report[f"{name}_epochs"]
        print(f"  {name}: {accuracy:.1%} validation accuracy (epochs: {epochs})")
    if "mae_epochs" in report:
        accuracy, epochs = report["mae_linear_probe_accuracy"], report["mae_epochs"]
        print(f"  teacher_mae: {accuracy:.1%} validation accuracy of a linear probe (epochs: {epochs})")
    print(f"  seconds: {', '.join(f'{stage} {seconds}' for stage, seconds in report['seconds'].items())}")


def main(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    for name, default in DEFAULTS[arguments.kind].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)

    # Imported after the flags are checked: it takes seconds.
    import torch

    from flowback_hf.data.demo.make import make_demo
    from flowback_hf.files import write_json

    # The networks are tiny, and one thread adds up in the same order however many cores a machine has.
    torch.set_num_threads(1)
    output_dir = arguments.output_dir.resolve()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Everything is made in a folder that is removed whatever happens, and moved only when it is complete.
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as temporary_dir:
        unfinished_dir = Path(temporary_dir) / output_dir.name
        unfinished_dir.mkdir()
        report = make_demo(
            unfinished_dir,
            arguments.kind,
            arguments.seed,
            arguments.resolution,
            {"train": arguments.num_train_images, "validation": arguments.num_validation_images},
            arguments.teacher_epochs,
            arguments.judge_epochs,
            arguments.mae_epochs,
        )
        write_json(unfinished_dir / "demo.json", report)
        if output_dir.exists():
            output_dir.rmdir()
        unfinished_dir.rename(output_dir)
    print_report(report, arguments.output_dir)


if __name__ == "__main__":
    run_command(main, parse_args())
