#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Evaluate a trained flow on a data set: likelihood, training-free classification, sample quality over a grid of guidance
scales, and on request a linear probe of its hidden states.

    python pipelines/evaluate_flow.py --model outputs/flow --data_dir path/to/images --output_dir outputs/evaluation \\
        --features facebook/dinov2-base --num_samples 5000 --guidance_scales 1.0 1.5 2.0 3.0 --linear_probe

Writes `evaluation.json` (flat: `accuracy/gradient`, `frechet_distance/guidance_2.0`, ...), `evaluation.md` for a model
card, `guidance_curve.png`, `samples.png`, `linear_probe.png`, the samples themselves in `samples/`, and what was done
so far in `parts/`: the same command goes on where it was interrupted, and one with more parts adds them. `accelerate
launch` shares the work between processes, which must see the same output folder, and changes no result.
"""

import argparse
import importlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from sample import (
    check_settings,
    choose_class_labels,
    draw_first_images,
    image_path,
    load_pipeline,
    make_generators,
    sample_images,
)
from tqdm.auto import tqdm

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.models.transformer_tarflow import GUIDANCE_RULES
from flowback_hf.pipelines.pipeline_flowback_classification import METHODS
from flowback_hf.utils import UNREADABLE, write_atomically


Results = dict[str, float | int | str]
Arrays = dict[str, np.ndarray]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A saved or pushed pipeline.")
    parser.add_argument("--output_dir", type=Path, required=True)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Of the Hub, or a folder that `datasets` loads.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--data_dir", help="An image folder, one folder a class, below train/ and validation/.")
    data.add_argument("--image_column", default="image")
    data.add_argument("--label_column", default="label")
    data.add_argument("--split", default="validation", help="What the flow is evaluated on.")
    data.add_argument("--reference_split", default="train", help="Real images for the samples and the linear probe.")
    data.add_argument("--cache_dir")
    data.add_argument("--max_images", type=int, help="Of --split. Default: all.")
    data.add_argument("--max_reference_images", type=int, default=50_000, help="Of --reference_split.")
    data.add_argument("--strict", action="store_true", help="Refuse images of another size instead of resizing them.")

    classification = parser.add_argument_group("likelihood and classification")
    classification.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    classification.add_argument("--num_noise_draws", type=int, default=1, help="0 classifies clean images.")
    classification.add_argument("--shortlist_size", type=int, default=5)

    samples = parser.add_argument_group("samples")
    samples.add_argument("--features", help="An encoder or classifier of transformers, or inception. Default: none.")
    samples.add_argument("--num_samples", type=int, default=2000, help="For each guidance scale.")
    samples.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0], help="1.0 is off.")
    samples.add_argument("--guidance_rule", choices=GUIDANCE_RULES, help="Default: the pipeline's.")
    samples.add_argument("--guidance_temperature", type=float, default=1.0, help="What guides an unconditional flow.")
    samples.add_argument("--reference", type=Path, help="A reference.npz of an earlier evaluation.")
    samples.add_argument("--write_best_guidance", action="store_true", help="Into the model folder's config.")

    probe = parser.add_argument_group("linear probe")
    probe.add_argument("--linear_probe", action="store_true")
    probe.add_argument("--max_probe_images", type=int, default=10_000, help="Of --reference_split.")

    run = parser.add_argument_group("run")
    run.add_argument("--batch_size", type=int, default=32, help="Of each process.")
    run.add_argument("--seed", type=int, default=0, help="Of all noise.")
    args = parser.parse_args(arguments)
    if (args.dataset_name is None) == (args.data_dir is None):
        parser.error("give one of --dataset_name and --data_dir.")
    at_least = {"max_images": 2, "max_reference_images": 2, "num_samples": 2, "batch_size": 1, "shortlist_size": 1}
    at_least |= {"max_probe_images": 2, "num_noise_draws": 0}
    for name, minimum in at_least.items():
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}, but is {getattr(args, name)}.")
    if min(args.guidance_scales) < 1:
        parser.error(f"--guidance_scales must be at least 1.0, which is off, but are {args.guidance_scales}.")
    if args.write_best_guidance and args.features is None:
        parser.error("--write_best_guidance needs --features, by which guidance is judged.")
    if args.write_best_guidance and not Path(args.model).is_dir():
        parser.error(f"--write_best_guidance needs a --model folder to write to, but {args.model!r} is none.")
    return args


# Data


class LabelledImages:
    """
    Images of a split at the flow's size, with the flow's ids of their classes. What cannot be decoded is left out.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_ids: list[int],
        mode: str,
        image_size: int,
        strict: bool,
    ):
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.label_ids = label_ids
        self.mode = mode
        self.image_size = image_size
        self.strict = strict

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, indices: range) -> tuple[list[PIL.Image.Image], list[int], list[int], Arrays]:
        """Images, class ids, row numbers, and what there is to report of these rows."""
        images, labels, numbers, skipped, num_resized = [], [], [], [], 0
        for index in indices:
            file = self.rows[index][self.image_column]
            name = (file or {}).get("path") or f"row {index}"
            try:
                image = datasets.Image().decode_example(file).convert(self.mode)
            except UNREADABLE:
                skipped.append(name)
                continue
            if image.size != (self.image_size, self.image_size):
                if self.strict:
                    raise ValueError(
                        f"{name} has {image.width}x{image.height} pixels, but the flow's images have {self.image_size}"
                        f"x{self.image_size}: resize it, or leave out --strict."
                    )
                size = (self.image_size, self.image_size)
                image = PIL.ImageOps.fit(image, size, PIL.Image.Resampling.BICUBIC)
                num_resized += 1
            images.append(image)
            labels.append(self.label_ids[index])
            numbers.append(index)
        report = {"skipped": np.array(skipped, dtype=str), "num_resized": np.array([num_resized])}
        return images, labels, numbers, report


def load_split(args: argparse.Namespace, split: str) -> datasets.Dataset:
    source = {"path": args.dataset_name, "name": args.dataset_config_name}
    if args.data_dir is not None:
        if not Path(args.data_dir).is_dir():
            raise ValueError(f"`--data_dir` must be an existing folder, but is {args.data_dir!r}.")
        source = {"path": "imagefolder", "data_dir": args.data_dir}
    try:
        splits = datasets.load_dataset(**source, cache_dir=args.cache_dir)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{args.data_dir or args.dataset_name!r} holds no images that can be loaded: {error}"
        ) from error
    if split not in splits:
        raise ValueError(f"The data set has no split {split!r}, but {list(splits)}: choose one with --split.")
    if args.image_column not in splits[split].column_names:
        raise ValueError(
            f"`--image_column` must be a column of the data set, one of {splits[split].column_names}, but is"
            f" {args.image_column!r}."
        )
    return splits[split]


def flow_label_ids(rows: datasets.Dataset, label_column: str, pipeline: FlowBackPipeline) -> list[int]:
    """The flow's class id of each row: by name where both have names, else by number."""
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        return [-1] * len(rows)
    if label_column not in rows.column_names:
        raise ValueError(
            f"`--label_column` must be a column of the data set, one of {rows.column_names}, but is {label_column!r}."
        )
    labels, feature = rows[label_column][:], rows.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        labels = [None if label is None or label < 0 else feature.names[label] for label in labels]
    if None in labels:
        raise ValueError(f"The data set's column {label_column!r} has rows without a label: choose another --split.")
    if pipeline.labels and isinstance(labels[0], str):
        # a whole name may itself be a list of synonyms
        known = pipeline.labels | {name: int(label) for label, name in pipeline.config.id2label.items()}
        unknown = sorted(set(labels) - set(known))
        if unknown:
            raise ValueError(
                f"The data set's classes {unknown[:5]} are not among this flow's, which are {list(known)[:5]}, ...:"
                " evaluate it on the classes that it was trained on."
            )
        return [known[label] for label in labels]
    if isinstance(feature, datasets.ClassLabel):
        labels = rows[label_column][:]
        if feature.num_classes != num_classes:
            raise ValueError(
                f"The data set has {feature.num_classes} classes, but the flow has {num_classes} without names"
                " (`id2label`): they cannot be matched."
            )
    if not all(isinstance(label, int) and 0 <= label < num_classes for label in labels):
        raise ValueError(f"The data set's labels must be numbers from 0 to {num_classes - 1}, as the flow's are.")
    return labels


# Work in parts


def write_arrays(path: Path, arrays: Arrays):
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def read_arrays(path: Path) -> Arrays:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def map_batches(
    state: PartialState, folder: Path, num_items: int, batch_size: int, compute: Callable[[range], Arrays], what: str
) -> Iterator[Arrays]:
    """
    `compute(indices)` of every batch, each by one process and kept in `folder`, where an interrupted run finds it.

    Returns an iterator over all batches, in order, for whichever process wants it.
    """
    starts = range(0, num_items, batch_size)
    missing = [start for start in starts if not (folder / f"{start:08d}.npz").exists()]
    state.wait_for_everyone()  # all have looked
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=len(starts), initial=len(starts) - len(missing), desc=what, disable=not state.is_local_main_process
    ) as progress_bar:
        for start in missing[state.process_index :: state.num_processes]:
            write_arrays(folder / f"{start:08d}.npz", compute(range(start, min(start + batch_size, num_items))))
            progress_bar.update(min(state.num_processes, len(starts) - progress_bar.n))
    state.wait_for_everyone()
    return (read_arrays(folder / f"{start:08d}.npz") for start in starts)


class Parts:
    """The results of finished parts, one file each, with the settings that they depend on."""

    def __init__(self, folder: Path, state: PartialState):
        self.folder = folder
        self.state = state

    def check(self, name: str, settings: dict[str, Any]):
        """Raises ValueError if this part was begun with other settings."""
        check_settings(self.folder / name / "settings.json", settings)

    def run(self, name: str, settings: dict[str, Any], compute: Callable[[Path], Results]) -> Results:
        """`compute(folder)` on all processes, unless it has been done; the results are the main process's."""
        folder, results_file = self.folder / name, self.folder / name / "results.json"
        if not results_file.exists():
            if self.state.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / "settings.json", json.dumps(settings, indent=2))
            self.state.wait_for_everyone()
            results = compute(folder)
            if self.state.is_main_process:
                write_atomically(results_file, json.dumps(results, indent=2))
            self.state.wait_for_everyone()
        return json.loads(results_file.read_text())

    def forget_batches(self):
        """Deletes what only an unfinished part needs."""
        for path in self.folder.rglob("*.npz"):
            path.unlink()
        for folder in self.folder.glob("*/*/"):
            folder.rmdir()


def concatenate(batches: Iterator[Arrays]) -> Arrays:
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


# Likelihood and classification


def evaluate_likelihood_and_accuracy(
    state: PartialState,
    folder: Path,
    classifier: FlowBackClassificationPipeline,
    images: LabelledImages,
    args: argparse.Namespace,
) -> Results:
    from flowback_hf.metrics import Accuracy, BitsPerDim

    config = classifier.transformer.config
    conditional = config.num_classes is not None
    methods = args.methods if conditional else []
    num_likelihood_draws = max(1, args.num_noise_draws)

    def compute(indices: range) -> Arrays:
        pictures, labels, numbers, report = images.load(indices)
        arrays = {"labels": np.array(labels, dtype=np.int64), **report}
        log_probs = {"log_prob": labels, "log_prob_no_class": None} if conditional else {"log_prob": None}
        for name, class_labels in log_probs.items():
            values = np.zeros((len(pictures), num_likelihood_draws))
            # the generators of one image go on from draw to draw
            generators = make_generators(args.seed, numbers)
            for draw in range(num_likelihood_draws if pictures else 0):
                values[:, draw] = classifier.log_prob(
                    pictures, class_labels, generator=generators, batch_size=args.batch_size
                )
            arrays[name] = values
        for method in methods:
            ranked = np.zeros((0, min(5, config.num_classes)), dtype=np.int64)
            started_at = time.perf_counter()
            if pictures:
                scores = classifier.class_scores(
                    pictures,
                    method,
                    num_noise_draws=args.num_noise_draws,
                    generator=make_generators(args.seed, numbers),
                    batch_size=args.batch_size,
                    shortlist_size=args.shortlist_size,
                )
                ranked = scores.topk(ranked.shape[1]).indices.numpy()
            arrays[f"ranked/{method}"] = ranked
            arrays[f"seconds/{method}"] = np.array([time.perf_counter() - started_at])
        return arrays

    batches = map_batches(state, folder, len(images), args.batch_size, compute, "Likelihood and classification")
    if not state.is_main_process:
        return {}
    arrays = concatenate(batches)
    labels = arrays["labels"]
    if len(labels) < 2:
        raise ValueError(
            f"An evaluation needs at least two images, but {len(labels)} of the {len(images)} of the split"
            f" {args.split!r} can be decoded."
        )
    skipped = arrays["skipped"].tolist()
    num_resized = int(arrays["num_resized"].sum())
    if skipped:
        names = ", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        print(f"{len(skipped)} images cannot be decoded and were skipped: {names}")
    if num_resized:
        print(f"{num_resized} images were resized and center-cropped to {images.image_size}x{images.image_size}.")

    num_dimensions = config.in_channels * config.sample_size**2
    nll = -arrays["log_prob"].mean(axis=1) / num_dimensions
    results = {
        "num_images": len(labels),
        "num_images_skipped": len(skipped),
        "num_images_resized": num_resized,
        "nll": nll.mean(),
        "nll_standard_error": nll.std(ddof=1) / math.sqrt(len(nll)),
    }
    if conditional:
        results["nll_no_class"] = -arrays["log_prob_no_class"].mean() / num_dimensions
    if config.noise_type == "uniform" and classifier.vae is None:
        bits = BitsPerDim(keep_in_memory=True).compute(predictions=arrays["log_prob"], num_dimensions=num_dimensions)
        results |= {"bits_per_dim": bits["bits_per_dim"], "bits_per_dim_standard_error": bits["standard_error"]}
    for method in methods:
        ranked = arrays[f"ranked/{method}"]
        accuracy = Accuracy(keep_in_memory=True).compute(predictions=ranked, references=labels)
        results[f"accuracy/{method}"] = accuracy["accuracy"]
        if "top5_accuracy" in accuracy:
            results[f"top5_accuracy/{method}"] = accuracy["top5_accuracy"]
        if "bayes" in methods:
            results[f"agreement_with_bayes/{method}"] = (ranked[:, 0] == arrays["ranked/bayes"][:, 0]).mean()
        results[f"images_per_second/{method}"] = len(labels) / arrays[f"seconds/{method}"].sum()
    return {name: value if isinstance(value, int | str) else float(value) for name, value in results.items()}


# Samples


def save_reference(
    state: PartialState, folder: Path, extractor: Any, images: LabelledImages, name: str, args: argparse.Namespace
) -> Results:
    """`reference.npz`, the features of real images."""
    from flowback_hf.metrics import ReferenceFeatures

    def compute(indices: range) -> Arrays:
        pictures, *_ = images.load(indices)
        return {"features": extractor(pictures).features.numpy()} if pictures else {}

    batches = map_batches(state, folder, len(images), args.batch_size, compute, "Features of real images")
    if state.is_main_process:
        features = (batch["features"] for batch in batches if batch)
        reference = ReferenceFeatures.from_batches(features, name, extractor.name)
        reference.save(args.output_dir / "reference.npz")
    return {}


def evaluate_samples(
    state: PartialState,
    folder: Path,
    pipeline: FlowBackPipeline,
    extractor: Any,
    reference: Any,
    guidance_scale: float,
    args: argparse.Namespace,
) -> Results:
    from flowback_hf.metrics import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall

    num_classes = pipeline.transformer.config.num_classes
    class_labels = choose_class_labels(pipeline, None)
    samples_dir = sample_folder(args, guidance_scale)
    samples_dir.mkdir(parents=True, exist_ok=True)
    made = sample_images(
        pipeline,
        class_labels,
        args.num_samples,
        samples_dir,
        state,
        args.batch_size,
        args.seed,
        guidance_scale=guidance_scale,
        guidance_rule=args.guidance_rule,
        guidance_temperature=args.guidance_temperature,
    )

    def compute(indices: range) -> Arrays:
        output = extractor([PIL.Image.open(image_path(samples_dir, index)) for index in indices])
        arrays = {"features": output.features.numpy()}
        return arrays if output.logits is None else arrays | {"logits": output.logits.numpy()}

    batches = map_batches(state, folder, args.num_samples, args.batch_size, compute, "Features of samples")
    if not state.is_main_process:
        return {}
    metrics = {
        metric_class.__name__: metric_class(reference)
        for metric_class in (FrechetDistance, KernelDistance, PrecisionRecall)
    }
    inception_score, num_read, num_seen = InceptionScore(extractor.name), 0, 0
    read_as = label_reader(extractor, pipeline)
    for batch in batches:
        for metric in metrics.values():
            metric.add_batch(predictions=batch["features"])
        if "logits" in batch:
            inception_score.add_batch(predictions=batch["logits"])
            if read_as is not None:
                wanted = np.resize(np.roll(class_labels, -num_seen % num_classes), len(batch["logits"]))
                num_read += int((read_as[batch["logits"].argmax(axis=1)] == wanted).sum())
        num_seen += len(batch["features"])

    results = {}
    for metric in metrics.values():
        results |= metric.compute()
    if inception_score.num_images:
        results |= inception_score.compute()
    if read_as is not None:
        results["classifier_reads_label"] = num_read / num_seen
    # What an earlier, interrupted run made was not timed.
    if made["num_made"]:
        results["images_per_second_sampling"] = made["num_made"] * state.num_processes / made["seconds"]
    for name in ("features", "reference", "num_images", "num_reference_images"):
        results.pop(name)  # the same for all scales: said once
    return {f"{name}/guidance_{guidance_scale}": value for name, value in results.items()}


def sample_folder(args: argparse.Namespace, guidance_scale: float) -> Path:
    return args.output_dir / "samples" / f"guidance_{guidance_scale}"


def label_reader(extractor: Any, pipeline: FlowBackPipeline) -> np.ndarray | None:
    """The flow's class id of each of the classifier's labels; `None` unless they are the same classes."""
    if extractor.id2label is None or not pipeline.labels:
        return None
    names = [extractor.id2label[label] for label in sorted(extractor.id2label)]
    known = pipeline.labels | {name: int(label) for label, name in pipeline.config.id2label.items()}
    if not set(pipeline.config.id2label.values()) <= set(names):
        return None
    return np.array([known.get(name, -1) for name in names])


# The linear probe


def evaluate_linear_probe(
    state: PartialState,
    folder: Path,
    classifier: FlowBackClassificationPipeline,
    train_images: LabelledImages,
    images: LabelledImages,
    args: argparse.Namespace,
) -> Results:
    from flowback_hf.metrics import linear_probe, pooled_hidden_states

    def compute_for(images: LabelledImages) -> Callable[[range], Arrays]:
        def compute(indices: range) -> Arrays:
            pictures, labels, numbers, _ = images.load(indices)
            if not pictures:
                return {}
            sample = classifier.preprocess(pictures)
            (noisy_sample,) = classifier.add_noise(sample, generator=make_generators(args.seed, numbers))
            pooled = pooled_hidden_states(classifier.transformer, noisy_sample)
            features = {f"block{block}_layer{layer}": states.numpy() for (block, layer), states in pooled.items()}
            return {"labels": np.array(labels), **features}

        return compute

    splits = {}
    for name, split_images in {"train": train_images, "test": images}.items():
        batches = map_batches(
            state,
            folder / name,
            len(split_images),
            args.batch_size,
            compute_for(split_images),
            f"Hidden states, {name}",
        )
        splits[name] = concatenate(batch for batch in batches if batch) if state.is_main_process else {}
    places = [place for place in splits["train"] if place != "labels"]
    accuracies = {
        place: linear_probe(
            splits["train"][place], splits["train"]["labels"], splits["test"][place], splits["test"]["labels"]
        )
        for place in tqdm(places, desc="Linear probes", disable=not state.is_main_process)
    }
    if not accuracies:
        return {}
    best = max(accuracies, key=accuracies.get)
    return {
        **{f"linear_probe/{place}": accuracy for place, accuracy in accuracies.items()},
        "linear_probe_best": accuracies[best],
        "linear_probe_best_place": best,
        "num_probe_images": len(splits["train"]["labels"]),
    }


# The report


def by_prefix(results: Results, prefix: str) -> dict[str, float]:
    """`{"gradient": 0.9}` of `accuracy/gradient` and the prefix `accuracy`."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in results.items() if name.startswith(f"{prefix}/")}


def savefig(figure: Any, path: Path):
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=150, bbox_inches="tight")
    os.replace(partial, path)


def import_pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    return plt


def draw_guidance_curve(results: Results, path: Path):
    """Distance over guidance, and what it is traded for."""
    plt = import_pyplot()
    curves = {
        name: {float(key.removeprefix("guidance_")): value for key, value in by_prefix(results, name).items()}
        for name in ("frechet_distance", "precision", "recall", "classifier_reads_label", "inception_score")
    }
    figure, axes = plt.subplots(1, 3 if curves["inception_score"] else 2, figsize=(9.5, 2.9), layout="constrained")

    def plot(axis: Any, name: str, label: str, **style: Any):
        points = sorted(curves[name].items())
        axis.plot(*zip(*points), marker="o", markersize=4, label=label, **style)

    plot(axes[0], "frechet_distance", "Fréchet distance", color="C0")
    best = results["best_guidance_scale"]
    axes[0].plot(
        best, curves["frechet_distance"][best], marker="o", markersize=9, color="C3", fillstyle="none", mew=1.5
    )
    axes[0].annotate(
        f"{curves['frechet_distance'][best]:.3g}",
        (best, curves["frechet_distance"][best]),
        textcoords="offset points",
        xytext=(0, -19),  # below: it is the lowest point
        ha="center",
        color="C3",
    )
    axes[0].set(ylabel="Fréchet distance", ylim=(0, 1.08 * max(curves["frechet_distance"].values())))
    plot(axes[1], "precision", "precision", color="C0")
    plot(axes[1], "recall", "recall", color="C1")
    if curves["classifier_reads_label"]:
        plot(axes[1], "classifier_reads_label", "read as its label", color="C2")
    axes[1].set(ylabel="share of images", ylim=(0, 1.03))
    axes[1].legend(frameon=False)
    if curves["inception_score"]:
        plot(axes[2], "inception_score", "Inception Score", color="C0")
        axes[2].set(ylabel="Inception Score", ylim=(1, 1.08 * max(curves["inception_score"].values())))
    for axis in axes:
        axis.set_xlabel("guidance scale")
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"{results['num_samples']} samples a point, against {results['num_reference_images']} images of"
        f" {results['reference']}; features of {results['features']}",
        fontsize=9,
    )
    savefig(figure, path)
    plt.close(figure)


def draw_linear_probe(results: Results, path: Path):
    """The paper's Figure 4: what a linear classifier reads off each layer, and the training-free accuracy."""
    plt = import_pyplot()
    accuracies = by_prefix(results, "linear_probe")
    places = [tuple(int(part) for part in place.removeprefix("block").split("_layer")) for place in accuracies]
    depths = np.arange(1, len(places) + 1)
    values = 100 * np.array(list(accuracies.values()))
    figure, axis = plt.subplots(figsize=(max(5.0, 0.22 * len(places) + 3), 3.2), layout="constrained")
    blocks = np.array([block for block, _ in places])
    axis.plot([], [], color="C0", marker="o", markersize=4, label="linear probe")
    for block in np.unique(blocks):
        inside = blocks == block
        if block % 2 == 0:
            axis.axvspan(depths[inside][0] - 0.5, depths[inside][-1] + 0.5, color="0.95", zorder=0)
        axis.plot(depths[inside], values[inside], marker="o", markersize=4, color="C0")
    for method, style in {"gradient": "--", "bayes": ":"}.items():
        accuracy = results.get(f"accuracy/{method}")
        if accuracy is not None:
            name = {"gradient": "training-free, one gradient", "bayes": "training-free, Bayes"}[method]
            axis.axhline(
                100 * accuracy, color={"gradient": "C3", "bayes": "0.35"}[method], linestyle=style, label=name
            )
    axis.set_xticks(depths, [str(layer) for _, layer in places], fontsize=9)
    axis.set(xlabel="layer, within flow blocks", ylabel="accuracy, %", xlim=(0.5, len(places) + 0.5))
    blocks_axis = axis.secondary_xaxis("top")
    centers = [depths[blocks == block].mean() for block in np.unique(blocks)]
    blocks_axis.set_xticks(centers, [f"block {block}" for block in np.unique(blocks)], fontsize=9)
    blocks_axis.tick_params(length=0)
    blocks_axis.spines["top"].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    savefig(figure, path)
    plt.close(figure)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def write_markdown(results: Results, output_dir: Path):
    lines = [f"# Evaluation of {results['model']}", ""]
    lines += [f"Data: {results['dataset']}, {results['num_images']} images of the split {results['split']!r}."]
    if results["num_images_skipped"]:
        lines += [f"{results['num_images_skipped']} more cannot be decoded and were skipped."]
    if results["num_images_resized"]:
        lines += [f"{results['num_images_resized']} were resized and center-cropped."]

    lines += ["", "## Likelihood", ""]
    noise = "uniform dequantization" if "bits_per_dim" in results else "the noise of training"
    error = results["nll_standard_error"]
    rows = [["negative log-likelihood, nats per dimension", f"{results['nll']:.4f} ± {error:.4f}"]]
    if "nll_no_class" in results:
        rows.append(["the same without the class", f"{results['nll_no_class']:.4f}"])
    if "bits_per_dim" in results:
        error = results["bits_per_dim_standard_error"]
        rows.append(["bits per dimension", f"{results['bits_per_dim']:.4f} ± {error:.4f}"])
    lines += [markdown_table([f"with {noise}", "mean ± standard error"], rows)]

    methods = by_prefix(results, "accuracy")
    if methods:
        lines += ["", "## Training-free classification", ""]
        columns = {"accuracy": "accuracy", "top5_accuracy": "top 5", "agreement_with_bayes": "agrees with Bayes"}
        columns = {name: title for name, title in columns.items() if by_prefix(results, name)}
        rows = [
            [method]
            + [percent(results.get(f"{name}/{method}")) for name in columns]
            + [f"{results[f'images_per_second/{method}']:.1f}"]
            for method in methods
        ]
        lines += [markdown_table(["method", *columns.values(), "images/s"], rows), ""]
        draws = results["num_noise_draws"]
        noisy = "With one draw of" if draws == 1 else f"The mean over {draws} draws of"
        lines += [f"{noisy} the training noise." if draws else "On clean images."]
        if "shortlist" in methods:
            lines[-1] += f" The shortlist has {results['shortlist_size']} classes."

    scales = [name.removeprefix("guidance_") for name in by_prefix(results, "frechet_distance")]
    if scales:
        columns = {
            "frechet_distance": "Fréchet distance",
            "kernel_distance": "kernel distance",
            "inception_score": "Inception Score",
            "precision": "precision",
            "recall": "recall",
            "classifier_reads_label": "read as its label",
            "images_per_second_sampling": "images/s",
        }
        columns = {name: title for name, title in columns.items() if by_prefix(results, name)}

        def cell(name: str, scale: str) -> str:
            value = results.get(f"{name}/guidance_{scale}")
            if value is None:
                return ""
            return f"{value:.3f}" if name in ("precision", "recall", "classifier_reads_label") else f"{value:.4g}"

        rows = [
            [f"**{scale}**" if float(scale) == results["best_guidance_scale"] else scale]
            + [cell(name, scale) for name in columns]
            for scale in scales
        ]
        lines += ["", "## Samples", "", markdown_table(["guidance scale", *columns.values()], rows), ""]
        lines += [
            f"{results['num_samples']} samples at each scale, against {results['num_reference_images']} images of"
            f" {results['reference']}, in the features of {results['features']}. These numbers compare with others of"
            " the same features, reference and number of samples alone."
        ]
        if len(scales) > 1 and results["best_guidance_scale"] == max(float(scale) for scale in scales):
            lines[-1] += " The best scale is the largest that was tried: a larger one may be better still."
        lines += ["", "![Guidance](guidance_curve.png)", "", "![Samples](samples.png)"]

    if "linear_probe_best" in results:
        lines += ["", "## Linear probe", ""]
        block, layer = results["linear_probe_best_place"].removeprefix("block").split("_layer")
        lines += [
            f"At best {percent(results['linear_probe_best'])}, at layer {layer} of flow block {block}; fitted to"
            f" {results['num_probe_images']} images of the split {results['reference_split']!r}."
        ]
        lines += ["", "![Linear probe](linear_probe.png)"]
    lines += ["", f"`{results['command']}`", ""]
    write_atomically(output_dir / "evaluation.md", "\n".join(lines))


def write_best_guidance(model_dir: Path, guidance_scale: float, guidance_rule: str):
    path = model_dir / "model_index.json"
    index = json.loads(path.read_text()) | {"guidance_scale": guidance_scale, "guidance_rule": guidance_rule}
    write_atomically(path, json.dumps(index, indent=2) + "\n")


def write_report(results: Results, pipeline: FlowBackPipeline, args: argparse.Namespace):
    write_atomically(args.output_dir / "evaluation.json", json.dumps(results, indent=2) + "\n")
    if args.features is not None:
        draw_guidance_curve(results, args.output_dir / "guidance_curve.png")
        best_folder = sample_folder(args, results["best_guidance_scale"])
        class_labels = choose_class_labels(pipeline, None)
        draw_first_images(pipeline, best_folder, class_labels, args.num_samples, args.output_dir / "samples.png")
        if args.write_best_guidance:
            write_best_guidance(Path(args.model), results["best_guidance_scale"], args.guidance_rule)
    if args.linear_probe:
        draw_linear_probe(results, args.output_dir / "linear_probe.png")
    write_markdown(results, args.output_dir)
    print((args.output_dir / "evaluation.md").read_text())


def check_extras(args: argparse.Namespace):
    """Raises ImportError for what this evaluation needs and is not there."""
    needed = []
    if args.features is not None:
        needed += ["matplotlib", "torchmetrics"]
    if args.linear_probe:
        needed += ["matplotlib", "sklearn"]
    for module in needed:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f'This evaluation needs {module}: pip install "flowback_hf[eval]".') from error


def main(args: argparse.Namespace, command: list[str] | None = None):
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which it does not look at by itself
    datasets.utils.logging.set_verbosity_error()
    if state.num_processes > 1 and not state.is_main_process:
        datasets.utils.logging.disable_progress_bar()

    # Everything a user can get wrong is found before anything is written.
    check_extras(args)
    pipeline = load_pipeline(FlowBackPipeline, args.model).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)  # a backward to the classes then keeps less
    classifier = FlowBackClassificationPipeline.from_pipe(pipeline)
    classifier.set_progress_bar_config(disable=True)
    args.guidance_rule = pipeline.config.guidance_rule if args.guidance_rule is None else args.guidance_rule
    config = pipeline.transformer.config
    if config.num_classes is None and args.linear_probe:
        raise ValueError("`--linear_probe` needs classes, but this flow is unconditional.")
    if (
        config.num_classes is None
        and args.guidance_temperature == 1.0
        and args.features
        and max(args.guidance_scales) > 1
    ):
        raise ValueError(
            "An unconditional flow guides itself: give --guidance_temperature, or --guidance_scales 1.0, which is off."
        )
    channels = config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels

    def images_of(split: str, max_images: int | None) -> LabelledImages:
        rows = load_split(args, split)
        # Class folders lie side by side: the first rows alone would be of few classes.
        rows = rows.shuffle(seed=0).select(range(min(max_images or len(rows), len(rows))))
        label_ids = flow_label_ids(rows, args.label_column, pipeline)
        mode = {1: "L", 3: "RGB"}[channels]
        return LabelledImages(rows, args.image_column, label_ids, mode, classifier.image_size, args.strict)

    images = images_of(args.split, args.max_images)
    dataset = Path(args.data_dir).resolve().name if args.data_dir else args.dataset_name
    if args.data_dir and dataset == "images":
        dataset = Path(args.data_dir).resolve().parent.name
    model = "/".join(Path(args.model).resolve().parts[-2:]) if Path(args.model).is_dir() else args.model

    parts = Parts(args.output_dir / "parts", state)
    common = {"model": str(args.model), "data": args.data_dir or args.dataset_name, "seed": args.seed}
    common |= {"batch_size": args.batch_size, "strict": args.strict}
    settings = {
        "likelihood": {
            **common,
            "split": args.split,
            "num_images": len(images),
            "methods": args.methods,
            "num_noise_draws": args.num_noise_draws,
            "shortlist_size": args.shortlist_size,
        }
    }
    extractor = reference = None
    if args.features is not None:
        from flowback_hf.metrics import ReferenceFeatures, load_feature_extractor

        try:
            extractor = load_feature_extractor(args.features, cache_dir=args.cache_dir).to(state.device)
        except OSError as error:
            raise ValueError(f"`--features` {args.features!r} cannot be loaded: {error}") from error
        if args.reference is not None:
            reference = ReferenceFeatures.load(args.reference, extractor.name)
        else:
            reference_images = images_of(args.reference_split, args.max_reference_images)
            settings["reference"] = {
                **common,
                "features": extractor.name,
                "split": args.reference_split,
                "num_images": len(reference_images),
            }
        for scale in args.guidance_scales:
            settings[f"samples_guidance_{scale}"] = {
                **common,
                "features": extractor.name,
                "reference": str(args.reference or args.reference_split),
                "num_samples": args.num_samples,
                "guidance_scale": scale,
                "guidance_rule": args.guidance_rule,
                "guidance_temperature": args.guidance_temperature,
            }
            pipeline.check_inputs(None, scale)
    if args.linear_probe:
        probe_images = images_of(args.reference_split, args.max_probe_images)
        settings["linear_probe"] = {
            **common,
            "split": args.split,
            "num_images": len(images),
            "num_probe_images": len(probe_images),
        }
    for name, part_settings in settings.items():
        parts.check(name, part_settings)
    state.wait_for_everyone()

    results: Results = {
        "model": model,
        "dataset": dataset,
        "split": args.split,
        "reference_split": args.reference_split,
        "num_noise_draws": args.num_noise_draws,
        "shortlist_size": args.shortlist_size,
        "seed": args.seed,
    }
    results |= parts.run(
        "likelihood",
        settings["likelihood"],
        lambda folder: evaluate_likelihood_and_accuracy(state, folder, classifier, images, args),
    )
    if extractor is not None:
        if reference is None:
            name = f"{dataset}, {args.reference_split}"
            parts.run(
                "reference",
                settings["reference"],
                lambda folder: save_reference(state, folder, extractor, reference_images, name, args),
            )
            reference = ReferenceFeatures.load(args.output_dir / "reference.npz", extractor.name)
        for scale in args.guidance_scales:
            results |= parts.run(
                f"samples_guidance_{scale}",
                settings[f"samples_guidance_{scale}"],
                lambda folder: evaluate_samples(state, folder, pipeline, extractor, reference, scale, args),
            )
        distances = {scale: results[f"frechet_distance/guidance_{scale}"] for scale in args.guidance_scales}
        best = min(distances, key=distances.get)
        results |= {
            "best_guidance_scale": best,
            "best_frechet_distance": distances[best],
            "guidance_rule": args.guidance_rule,
            "features": extractor.name,
            "reference": reference.name,
            "num_reference_images": reference.num_images,
            "num_samples": args.num_samples,
        }
    if args.linear_probe:
        results |= parts.run(
            "linear_probe",
            settings["linear_probe"],
            lambda folder: evaluate_linear_probe(state, folder, classifier, probe_images, images, args),
        )
    options = sys.argv[1:] if command is None else command
    results["command"] = shlex.join(["python", "pipelines/evaluate_flow.py", *options])
    if state.is_main_process:
        write_report(results, pipeline, args)
        parts.forget_batches()
    state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
