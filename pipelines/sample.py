#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Sample from a trained flow: any number of images, of all classes in turn or of the named ones.

    python pipelines/sample.py --model outputs/flow --class_labels dog 3 --num_images 100 --output_dir outputs/samples

Writes `000000.png`, `000001.png`, ..., `grid.png` with the first images of each class, and `sampling.json`, which says
how they were made; with `--npz` also `samples_100x64x64x3.npz` (`arr_0` the images, `arr_1` their labels), which ADM's
evaluator reads. Image i depends on the seed and on i alone: an interrupted run goes on where it was, a finished one
can be extended, and `accelerate launch` shares the work between processes without changing it.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from flowback_hf import FlowBackPipeline
from flowback_hf.models.transformer_tarflow import GUIDANCE_RULES, GUIDANCE_SCHEDULES, SOLVERS
from flowback_hf.utils import write_atomically


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A saved or pushed pipeline.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--class_labels", nargs="+", help="Numbers or names, in turn; -1 is none. Default: all.")
    parser.add_argument("--num_images", type=int, default=64, help="In all.")
    parser.add_argument("--guidance_scale", type=float, help="1.0 is off. Default: the pipeline's.")
    parser.add_argument("--guidance_rule", choices=GUIDANCE_RULES, help="Default: the pipeline's.")
    parser.add_argument("--guidance_schedule", choices=GUIDANCE_SCHEDULES, default="constant")
    parser.add_argument("--guidance_temperature", type=float, default=1.0, help="What guides an unconditional flow.")
    parser.add_argument("--solver", choices=SOLVERS, default="auto", help="How the flow is inverted.")
    parser.add_argument("--no_denoise", action="store_true", help="Leave the noise of training in the images.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--npz", action="store_true", help="Also write all images into one file.")
    args = parser.parse_args(arguments)
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}.")
    return args


def load_pipeline(pipeline_class: type[DiffusionPipeline], model: str) -> DiffusionPipeline:
    """A saved or pushed pipeline. Raises ValueError if there is none."""
    try:
        return pipeline_class.from_pretrained(model)
    except OSError as error:
        raise ValueError(
            f"`--model` must be a folder that holds a saved pipeline, or its id on the Hub, but {str(model)!r} is no"
            " such folder and could not be loaded from the Hub."
        ) from error


def make_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """A generator for each image, a function of the seed and the image's number."""
    states = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] for index in indices]
    return [torch.Generator().manual_seed(int(state >> 1)) for state in states]


def check_settings(path: Path, settings: dict[str, Any]):
    """Raises ValueError if the folder of this file holds the results of other settings."""
    if not path.exists():
        return
    earlier = json.loads(path.read_text())
    different = [
        f"{name} ({earlier.get(name)!r} then, {value!r} now)"
        for name, value in settings.items()
        if earlier.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{path.parent} holds what was made with other settings: {', '.join(different)}. Name another folder, or"
            " delete this one."
        )


def image_path(output_dir: Path, index: int) -> Path:
    return output_dir / f"{index:06d}.png"


def sample_images(
    pipeline: FlowBackPipeline,
    class_labels: list[int] | None,
    num_images: int,
    output_dir: Path,
    state: PartialState,
    batch_size: int,
    seed: int,
    **arguments: Any,
) -> dict[str, float]:
    """
    Makes the images that are not there yet, one PNG each; image i is of class `class_labels[i % len(class_labels)]`.

    `arguments` are those of the pipeline's call. Returns how many were made by this process, and in what time.
    """
    missing = [index for index in range(num_images) if not image_path(output_dir, index).exists()]
    state.wait_for_everyone()  # all have looked
    mine = missing[state.process_index :: state.num_processes]
    started_at = time.perf_counter()
    progress_bar = tqdm(
        total=num_images,
        initial=num_images - len(missing),
        desc=f"Sampling into {output_dir.name}",
        disable=not state.is_local_main_process,
    )
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        labels = None if class_labels is None else [class_labels[index % len(class_labels)] for index in indices]
        images = pipeline(
            class_labels=labels,
            num_images_per_prompt=len(indices) if labels is None else 1,
            generator=make_generators(seed, indices),
            **arguments,
        ).images
        for index, image in zip(indices, images):
            path = image_path(output_dir, index)
            partial = path.with_name(f".partial-{path.name}")
            image.save(partial, format="PNG")
            os.replace(partial, path)
        progress_bar.update(min(len(indices) * state.num_processes, num_images - progress_bar.n))
    progress_bar.close()
    seconds = time.perf_counter() - started_at
    state.wait_for_everyone()
    return {"num_made": len(mine), "seconds": seconds}


def draw_grid(rows: dict[str, list[PIL.Image.Image]], path: Path):
    """One row of images for each entry, with its name; small images enlarged so that a person can see them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len(images) for images in rows.values())
    label_width = 0.1 * max(len(name) for name in rows) + 0.1
    size = (0.8 * columns + label_width, 0.8 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    figure.subplots_adjust(left=label_width / size[0], right=1, bottom=0, top=1, wspace=0.04, hspace=0.04)
    for row, (name, images) in zip(axes, rows.items()):
        for axis in row:
            axis.axis("off")
        for axis, image in zip(row, images):
            axis.imshow(image.convert("RGB"), interpolation="bicubic")
        row[0].text(-0.08, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    os.replace(partial, path)


def draw_first_images(
    pipeline: FlowBackPipeline,
    output_dir: Path,
    class_labels: list[int] | None,
    num_images: int,
    path: Path,
    max_rows: int = 10,
    columns: int = 8,
):
    """A grid of the first images of each of the first classes."""
    rows = {}
    id2label = {int(label): name for label, name in (pipeline.config.id2label or {}).items()}
    labels = [-1] if class_labels is None else class_labels
    for number, label in enumerate(labels[:max_rows]):
        name = "" if label == -1 else id2label.get(label, str(label)).split(",")[0]
        indices = range(number, num_images, len(labels))[: columns if class_labels else columns * max_rows]
        images = [PIL.Image.open(image_path(output_dir, index)) for index in indices]
        for start in range(0, len(images), columns):
            # a class that is named twice, or none at all, still has its own rows
            rows[f"{name}{' ' * len(rows)}" if name in rows or not name else name] = images[start : start + columns]
    draw_grid(rows, path)


def write_npz(output_dir: Path, class_labels: list[int] | None, num_images: int) -> Path:
    """ADM's format: uint8 images, channels last, and labels, -1 for none."""
    images = [PIL.Image.open(image_path(output_dir, index)).convert("RGB") for index in range(num_images)]
    pixels = np.stack([np.asarray(image) for image in tqdm(images, desc="Writing npz")])
    labels = np.resize(np.array([-1] if class_labels is None else class_labels, dtype=np.int64), num_images)
    path = output_dir / f"samples_{'x'.join(str(size) for size in pixels.shape)}.npz"
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("wb") as file:
        np.savez(file, pixels, labels)
    os.replace(partial, path)
    return path


def choose_class_labels(pipeline: FlowBackPipeline, labels: list[str] | None) -> list[int] | None:
    """Class ids of numbers and names; all classes by default, none for an unconditional flow."""
    num_classes = pipeline.transformer.config.num_classes
    if labels is None:
        return None if num_classes is None else list(range(num_classes))
    numbers_or_names = [int(label) if label.removeprefix("-").isdigit() else label for label in labels]
    # A name wins over a number: digits are called by their names.
    numbers_or_names = [
        label if label in pipeline.labels else number for label, number in zip(labels, numbers_or_names)
    ]
    return pipeline.normalize_class_labels(numbers_or_names)


def main(args: argparse.Namespace):
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which it does not look at by itself
    pipeline = load_pipeline(FlowBackPipeline, args.model).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    class_labels = choose_class_labels(pipeline, args.class_labels)
    arguments = {
        "guidance_scale": pipeline.config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "guidance_rule": pipeline.config.guidance_rule if args.guidance_rule is None else args.guidance_rule,
        "guidance_schedule": args.guidance_schedule,
        "guidance_temperature": args.guidance_temperature,
        "solver": args.solver,
        "denoise": not args.no_denoise,
    }
    pipeline.check_inputs(class_labels, arguments["guidance_scale"])
    # What decides an image; how many and in what batches does not.
    settings = {"model": str(args.model), "class_labels": class_labels, "seed": args.seed, **arguments}
    settings_file = args.output_dir / "sampling.json"
    check_settings(settings_file, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(settings_file, json.dumps(settings, indent=2))
    state.wait_for_everyone()

    made = sample_images(
        pipeline, class_labels, args.num_images, args.output_dir, state, args.batch_size, args.seed, **arguments
    )
    if state.is_main_process:
        draw_first_images(pipeline, args.output_dir, class_labels, args.num_images, args.output_dir / "grid.png")
        print(f"{args.num_images} images are in {args.output_dir}; this run made {made['num_made']}.")
        if args.npz:
            print(f"All of them: {write_npz(args.output_dir, class_labels, args.num_images)}")
    state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
