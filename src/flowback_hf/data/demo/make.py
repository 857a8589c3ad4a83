# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Demo data that need no download: images of a kind, a small teacher and an independent judge.
"""

import time
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from flowback_hf.alignment.teacher import RepresentationTeacher
from flowback_hf.data.demo.digits import DIGITS
from flowback_hf.data.demo.glyphs import GLYPHS
from flowback_hf.data.demo.icons import ICONS
from flowback_hf.data.demo.kind import JUDGE_SPLIT
from flowback_hf.data.demo.networks import (
    fit_and_measure,
    make_image_processor,
    make_judge,
    make_masked_autoencoder,
    probe_teacher,
    train_masked_autoencoder,
)
from flowback_hf.data.demo.shapes import SHAPES


KINDS = {"digits": DIGITS, "glyphs": GLYPHS, "icons": ICONS, "shapes": SHAPES}


def save_image_folder(folder: Path, images: list[Image.Image], labels: list[int], class_names: list[str]) -> None:
    for class_name in class_names:
        (folder / class_name).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels)):
        image.save(folder / class_names[label] / f"{index:05d}.png")


def save_parquet(file: Path, images: list[Image.Image], labels: list[int], class_names: list[str]) -> None:
    """Write a split as a file that `datasets` and the Hub read, with the class names in it."""
    file.parent.mkdir(exist_ok=True)
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=class_names)})
    datasets.Dataset.from_dict({"image": images, "label": labels}, columns).to_parquet(file)


def make_demo(
    folder: Path,
    kind: str,
    seed: int,
    resolution: int,
    num_images: dict[str, int],
    teacher_epochs: int,
    judge_epochs: int,
    mae_epochs: int | None = None,
) -> dict[str, Any]:
    """
    Write images, a teacher and a judge into a folder.

    The same arguments give the same images and, on the same machine, the same weights, to the bit.

    Args:
        folder (`pathlib.Path`): An empty folder.
        kind (`str`): A key of `KINDS`.
        seed (`int`): Decides images, split and weights.
        resolution (`int`): Height and width of the images, in pixels: 8 for digits, else a multiple of 8.
        num_images (`dict`): Of drawn kinds, for `"train"` and `"validation"`.
        teacher_epochs (`int`), judge_epochs (`int`): How long the two networks are trained.
        mae_epochs (`int`, *optional*): How long a second teacher, without labels, is trained. `None` makes none.
    Returns:
        `dict`: what was made, the networks' accuracies in [0, 1], and the seconds that each stage took.
    """
    start = time.perf_counter()
    kind_of_images = KINDS[kind]
    class_names = kind_of_images.class_names
    splits = kind_of_images.make_splits(seed, resolution, num_images)
    image_processor = make_image_processor(resolution)
    pixel_values, labels = {}, {}
    for split, (images, split_labels) in splits.items():
        if split != JUDGE_SPLIT and kind_of_images.is_parquet:
            save_parquet(folder / "images" / f"{split}.parquet", images, split_labels, class_names)
        elif split != JUDGE_SPLIT:
            save_image_folder(folder / "images" / split, images, split_labels, class_names)
        pixel_values[split] = image_processor(images, return_tensors="pt").pixel_values
        labels[split] = torch.tensor(split_labels)
    images_done = time.perf_counter()

    data = {"pixel_values": pixel_values, "labels": labels, "quarter_turns": kind_of_images.quarter_turns}
    patch_size = resolution // kind_of_images.teacher_grid_size
    teacher = kind_of_images.make_teacher(resolution, patch_size, class_names, seed)
    teacher_accuracy = fit_and_measure(teacher, **data, num_epochs=teacher_epochs, seed=seed, description="teacher")
    teacher.dinov2.save_pretrained(folder / "teacher")
    image_processor.save_pretrained(folder / "teacher")
    teacher_done = time.perf_counter()

    second_teacher, seconds = {}, {}
    if mae_epochs is not None:
        mae = make_masked_autoencoder(resolution, patch_size, seed)
        train_masked_autoencoder(mae, pixel_values["train"], mae_epochs, kind_of_images.quarter_turns, seed)
        mae.vit.save_pretrained(folder / "teacher_mae")
        image_processor.save_pretrained(folder / "teacher_mae")
        teacher_mae = RepresentationTeacher.from_pretrained(folder / "teacher_mae", kind_of_images.teacher_grid_size)
        accuracy = probe_teacher(teacher_mae, pixel_values, labels)
        second_teacher = {"mae_epochs": mae_epochs, "mae_linear_probe_accuracy": accuracy}
        seconds = {"mae": round(time.perf_counter() - teacher_done, 1)}
    mae_done = time.perf_counter()

    # The judge shares neither architecture nor seed with the teacher, so that it does not repeat its mistakes.
    judge = make_judge(class_names, seed + 1)
    if JUDGE_SPLIT in splits:
        data = data | {name: data[name] | {"train": data[name][JUDGE_SPLIT]} for name in ("pixel_values", "labels")}
    judge_accuracy = fit_and_measure(judge, **data, num_epochs=judge_epochs, seed=seed + 1, description="judge")
    judge.save_pretrained(folder / "judge")
    image_processor.save_pretrained(folder / "judge")
    judge_done = time.perf_counter()

    return {
        "kind": kind,
        "class_names": class_names,
        "num_train_images": len(labels["train"]),
        "num_validation_images": len(labels["validation"]),
        "resolution": resolution,
        "seed": seed,
        "teacher_epochs": teacher_epochs,
        "judge_epochs": judge_epochs,
        "teacher_validation_accuracy": teacher_accuracy,
        "judge_validation_accuracy": judge_accuracy,
        **second_teacher,
        "seconds": {
            "images": round(images_done - start, 1),
            "teacher": round(teacher_done - images_done, 1),
            **seconds,
            "judge": round(judge_done - mae_done, 1),
        },
    }
