# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Sampling into a folder: numbered images, grids of them, and the file that ADM's evaluator reads.

Image i depends on the seed and on i only. Batches and processes do not change it, an interrupted run goes on where it
was, and a finished one can be extended.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from accelerate import PartialState
from tqdm.auto import tqdm

from flowback_hf.data.noise import make_generator
from flowback_hf.evaluation.parts import check_settings, hash_networks, join_processes
from flowback_hf.files import write_json, write_whole
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline
from flowback_hf.reporting import figure_file
from flowback_hf_cli.numbers import check_number


def image_path(output_dir: Path, index: int) -> Path:
    """Where the image with a number, from 0, is."""
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
    Sample the images that a folder lacks, one PNG file each.

    Args:
        pipeline ([`FlowBackPipeline`]): The flow.
        class_labels (`list[int]`, *optional*): Class ids; image i is of class `class_labels[i % len(class_labels)]`.
            `None` for an unconditional flow.
        num_images (`int`): How many images the folder will hold.
        output_dir (`pathlib.Path`): The folder, which exists.
        state ([`~accelerate.PartialState`]): The processes that share the work.
        batch_size (`int`): Images per process and pass.
        seed (`int`): Decides the noise, together with the number of the image.
        arguments: As in the pipeline's call, such as `guidance_scale`.
    Returns:
        `dict`: `num_made`, how many images this process made, and `seconds`, how long that took.
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
            generator=[make_generator(seed, index) for index in indices],
            **arguments,
        ).images
        for index, image in zip(indices, images):
            with write_whole(image_path(output_dir, index)) as partial:
                image.save(partial)
        progress_bar.update(min(len(indices) * state.num_processes, num_images - progress_bar.n))
    progress_bar.close()
    seconds = time.perf_counter() - started_at
    state.wait_for_everyone()
    return {"num_made": len(mine), "seconds": seconds}


def sample_into_folder(
    pipeline: FlowBackPipeline,
    model: str,
    output_dir: Path,
    class_labels: list[str] | None = None,
    num_images: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    npz: bool = False,
    guidance_scale: float | None = None,
    guidance_rule: str | None = None,
    **arguments: Any,
):
    """
    Sample images into a folder of their own, with a grid and a record of how they were made.

    Writes `000000.png`, `000001.png`, ..., `grid.png`, `sampling.json` and, with `npz`, `samples_<shape>.npz`.

    Args:
        pipeline ([`FlowBackPipeline`]): The flow, on any device.
        model (`str`): Its name, for the record.
        output_dir (`pathlib.Path`): The folder. It may hold images that were made with the same settings.
        class_labels (`list[str]`, *optional*): Class names or numbers, in turn; -1 is no class. Default: all classes.
        num_images (`int`, defaults to 64): How many images the folder will hold.
        batch_size (`int`, defaults to 32): Images per process and pass.
        seed (`int`, defaults to 0): Decides the noise, together with the number of the image.
        npz (`bool`, defaults to `False`): Also write all images into one file.
        guidance_scale (`float`, *optional*): 1.0 is off. Default: the pipeline's.
        guidance_rule (`str`, *optional*): Default: the pipeline's.
        arguments: Others of the pipeline's call.
    Raises:
        ValueError: if a class or another argument is impossible, or if the folder holds images of other settings.

    Example:
        ```py
        >>> import tempfile
        >>> from pathlib import Path
        >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
        >>> from flowback_hf.evaluation import sample_into_folder

        >>> flow = TarFlowTransformer2DModel(8, 4, 3, num_blocks=2, num_layers=1, num_classes=2)
        >>> folder = Path(tempfile.mkdtemp())
        >>> sample_into_folder(FlowBackPipeline(flow), "random", folder, num_images=2)
        2 images are in ...; this run made 2.
        >>> sorted(path.name for path in folder.iterdir())
        ['000000.png', '000001.png', 'grid.png', 'sampling.json']
        ```
    """
    state = join_processes()
    pipeline = pipeline.to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    class_labels = choose_class_labels(pipeline, class_labels)
    arguments = {"guidance_scale": guidance_scale, "guidance_rule": guidance_rule, **arguments}
    check_number("num_images", num_images, int, at_least=1)
    check_number("batch_size", batch_size, int, at_least=1)
    check_number("seed", seed, int, at_least=0)
    pipeline.check_inputs(class_labels, **arguments)
    scale = pipeline.config.guidance_scale if guidance_scale is None else guidance_scale
    temperature = arguments.get("guidance_temperature", 1.0)
    if scale <= 1.0 and temperature != 1.0:
        raise ValueError(
            f"`guidance_temperature` is {temperature}, but guidance is off: give a `guidance_scale` above 1.0."
        )
    # What decides an image; how many and in what batches does not.
    model_hash = hash_networks(pipeline, arguments.get("solver", "auto"))
    settings = {"model": model, "model_hash": model_hash, "class_labels": class_labels, "seed": seed, **arguments}
    settings |= {
        name: pipeline.config[name] for name in ("guidance_scale", "guidance_rule") if arguments[name] is None
    }
    check_settings(output_dir / "sampling.json", settings)
    if not (output_dir / "sampling.json").exists() and image_path(output_dir, 0).exists():
        raise ValueError(
            f"{output_dir} holds images, but no sampling.json that says how they were made. Name another folder."
        )
    state.wait_for_everyone()
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "sampling.json", settings)
    state.wait_for_everyone()

    made = sample_images(pipeline, class_labels, num_images, output_dir, state, batch_size, seed, **arguments)
    if state.is_main_process:
        draw_first_images(pipeline, output_dir, class_labels, num_images, output_dir / "grid.png")
        print(f"{num_images} images are in {output_dir}; this run made {made['num_made']}.")
        if npz:
            print(f"One file with all of them: {write_npz(output_dir, class_labels, num_images)}")


def choose_class_labels(pipeline: FlowBackPipeline, labels: list[str] | None) -> list[int] | None:
    """
    The class ids that names or numbers stand for.

    Args:
        pipeline ([`FlowBackPipeline`]): The flow and the names of its classes.
        labels (`list[str]`, *optional*): Names or numbers, as in [`FlowBackPipeline.get_label_ids`].
    Returns:
        `list[int]`: class ids, by default of all classes; `None` for an unconditional flow.
    Raises:
        ValueError: if a label is unknown, or can be read in two ways.
    """
    num_classes = pipeline.transformer.config.num_classes
    if labels is None:
        return None if num_classes is None else list(range(num_classes))
    return pipeline.normalize_class_labels(labels)


def draw_grid(rows: dict[str, list[PIL.Image.Image]], path: Path):
    """
    Draw rows of images, each with its name. Small images are enlarged, so that a person can see them.

    Args:
        rows (`dict` of `str` to `list[PIL.Image.Image]`): Images by the name of their row.
        path (`pathlib.Path`): The figure.
    """
    columns = max(len(images) for images in rows.values())
    label_width = 0.1 * max(len(name) for name in rows) + 0.1
    size = (0.8 * columns + label_width, 0.8 * len(rows))
    with figure_file(path, len(rows), columns, figsize=size, bbox_inches=None) as (figure, axes):
        figure.subplots_adjust(left=label_width / size[0], right=1, bottom=0, top=1, wspace=0.04, hspace=0.04)
        for row, (name, images) in zip(axes, rows.items()):
            for axis in row:
                axis.axis("off")
            for axis, image in zip(row, images):
                axis.imshow(image.convert("RGB"), interpolation="bicubic")
            row[0].text(-0.08, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=11)


def draw_first_images(
    pipeline: FlowBackPipeline,
    output_dir: Path,
    class_labels: list[int] | None,
    num_images: int,
    path: Path,
    max_rows: int = 10,
    columns: int = 8,
):
    """
    Draw the first images of each of the first classes of a folder.

    Args:
        pipeline ([`FlowBackPipeline`]): Knows the names of the classes.
        output_dir (`pathlib.Path`): The folder, as [`sample_images`] fills it.
        class_labels (`list[int]`, *optional*), num_images (`int`): What it was filled with.
        path (`pathlib.Path`): The figure.
        max_rows, columns (`int`, default to 10 and 8): How many classes, and images of each, are drawn at most.
    """
    rows = {}
    id2label = {int(label): name for label, name in (pipeline.config.id2label or {}).items()}
    labels = [-1] if class_labels is None else class_labels
    for number, label in enumerate(labels[:max_rows]):
        name = "" if label == -1 else id2label.get(label, str(label)).split(",")[0]
        indices = range(number, num_images, len(labels))[: columns if class_labels else columns * max_rows]
        images = [PIL.Image.open(image_path(output_dir, index)) for index in indices]
        for start in range(0, len(images), columns):
            # A class that is named twice, or none at all, still has its own rows.
            rows[f"{name}{' ' * len(rows)}" if name in rows or not name else name] = images[start : start + columns]
    draw_grid(rows, path)


def write_npz(output_dir: Path, class_labels: list[int] | None, num_images: int) -> Path:
    """
    Write the images of a folder into one file in the format of ADM's evaluator.

    Args:
        output_dir (`pathlib.Path`): The folder, as [`sample_images`] fills it.
        class_labels (`list[int]`, *optional*), num_images (`int`): What it was filled with.
    Returns:
        `pathlib.Path`: the file. `arr_0` are uint8 images `(num_images, height, width, 3)`, `arr_1` their labels, -1
        for none.
    """
    images = [PIL.Image.open(image_path(output_dir, index)).convert("RGB") for index in range(num_images)]
    pixels = np.stack([np.asarray(image) for image in tqdm(images, desc="Writing npz")])
    labels = np.resize(np.array([-1] if class_labels is None else class_labels, dtype=np.int64), num_images)
    path = output_dir / f"samples_{'x'.join(str(size) for size in pixels.shape)}.npz"
    with write_whole(path) as partial:
        np.savez(partial, pixels, labels)
    return path
