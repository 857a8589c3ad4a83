# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""How likely a flow finds images, and how well it classifies them."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import PartialState

from flowback_hf.data.noise import make_generator
from flowback_hf.evaluation.images import LabelledImages
from flowback_hf.evaluation.parts import Arrays, Results, concatenate, map_batches
from flowback_hf.metrics import Accuracy, BitsPerDim
from flowback_hf.pipelines.pipeline_flowback_classification import METHODS, FlowBackClassificationPipeline


def evaluate_likelihood(
    state: PartialState,
    folder: Path,
    classifier: FlowBackClassificationPipeline,
    images: LabelledImages,
    methods: list[str] | tuple[str, ...] = METHODS,
    num_noise_draws: int = 1,
    shortlist_size: int = 5,
    batch_size: int = 32,
    seed: int = 0,
) -> Results:
    """
    Measure the likelihood of images and the accuracy of training-free classification.

    The noise of an image depends on the seed and the image only, so batches and processes change no result.

    Args:
        state ([`~accelerate.PartialState`]): The processes that share the work.
        folder (`pathlib.Path`): Where finished batches are kept.
        classifier ([`FlowBackClassificationPipeline`]): The flow.
        images ([`LabelledImages`]): What it is evaluated on.
        methods (`list[str]`, defaults to all): Methods to classify with. An unconditional flow uses none.
        num_noise_draws (`int`, defaults to 1): Draws of the training noise per image. 0 classifies clean images; the
            likelihood then takes one draw.
        shortlist_size (`int`, defaults to 5): Classes that the method `"shortlist"` compares.
        batch_size (`int`, defaults to 32): Images per process and pass.
        seed (`int`, defaults to 0): Decides the noise.
    Returns:
        `dict`: `nll` in nats per dimension, `accuracy/gradient` in [0, 1] and more, on the main process; empty on the
        others.
    Raises:
        ValueError: if fewer than two images can be used.
    """
    methods = list(methods) if classifier.transformer.config.num_classes is not None else []
    compute = make_computation(classifier, images, methods, num_noise_draws, shortlist_size, batch_size, seed)
    batches = map_batches(state, folder, len(images), batch_size, compute, "Likelihood and classification")
    if not state.is_main_process:
        return {}
    arrays = concatenate(batches)
    num_images, skipped, num_resized = len(arrays["labels"]), arrays["skipped"].tolist(), arrays["num_resized"].sum()
    if num_images < 2:
        raise ValueError(
            f"An evaluation needs at least two images, but {num_images} of the {len(images)} of the split"
            f" {images.split!r} can be used."
        )
    if skipped:
        names = ", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        print(f"{len(skipped)} images cannot be used and were skipped: {names}")
    if num_resized:
        print(f"{num_resized} images were resized and center-cropped to {images.image_size}x{images.image_size}.")
    counts = {
        "num_images": num_images,
        "num_images_skipped": len(skipped),
        "num_images_resized": int(num_resized),
    }
    results = counts | summarise_likelihood(classifier, arrays) | summarise_accuracy(methods, arrays)
    return {name: value if isinstance(value, int | str) else float(value) for name, value in results.items()}


def make_computation(
    classifier: FlowBackClassificationPipeline,
    images: LabelledImages,
    methods: list[str],
    num_noise_draws: int,
    shortlist_size: int,
    batch_size: int,
    seed: int,
) -> Callable[[range], Arrays]:
    """The function that computes a batch: log-likelihoods per draw, the five best classes per method, and times."""
    num_classes = classifier.transformer.config.num_classes
    num_likelihood_draws = max(1, num_noise_draws)

    def compute(indices: range) -> Arrays:
        pictures, labels, report = images.load(indices)
        arrays = {"labels": np.array(labels, dtype=np.int64), **report}
        log_probs = {"log_prob": None} if num_classes is None else {"log_prob": labels, "log_prob_no_class": None}
        for name, class_labels in log_probs.items():
            arrays[name] = np.zeros((len(pictures), num_likelihood_draws))
            generator = make_generator(seed)  # every draw takes its seed from it
            for draw in range(num_likelihood_draws if pictures else 0):
                arrays[name][:, draw] = classifier.log_prob(
                    pictures, class_labels, generator=generator, batch_size=batch_size
                )
        for method in methods:
            ranked = np.zeros((0, min(5, num_classes)), dtype=np.int64)
            started_at = time.perf_counter()
            if pictures:
                scores = classifier.class_scores(
                    pictures,
                    method,
                    num_noise_draws=num_noise_draws,
                    generator=make_generator(seed),
                    batch_size=batch_size,
                    shortlist_size=shortlist_size,
                )
                ranked = scores.topk(ranked.shape[1]).indices.numpy()
            arrays[f"ranked/{method}"] = ranked
            arrays[f"seconds/{method}"] = np.array([time.perf_counter() - started_at])
        return arrays

    return compute


def summarise_likelihood(classifier: FlowBackClassificationPipeline, arrays: Arrays) -> Results:
    """Means over images in nats per dimension; with uniform dequantization also in bits."""
    config = classifier.transformer.config
    num_dimensions = config.in_channels * config.sample_size**2
    nll = -arrays["log_prob"].mean(axis=1) / num_dimensions
    results = {"nll": nll.mean(), "nll_standard_error": nll.std(ddof=1) / math.sqrt(len(nll))}
    if "log_prob_no_class" in arrays:
        results["nll_no_class"] = -arrays["log_prob_no_class"].mean() / num_dimensions
    if config.noise_type == "uniform" and classifier.vae is None:
        bits = BitsPerDim(keep_in_memory=True).compute(predictions=arrays["log_prob"], num_dimensions=num_dimensions)
        results |= {"bits_per_dim": bits["bits_per_dim"], "bits_per_dim_standard_error": bits["standard_error"]}
    return results


def summarise_accuracy(methods: list[str], arrays: Arrays) -> Results:
    """Accuracy, agreement with Bayes and speed of each method."""
    results = {}
    for method in methods:
        ranked = arrays[f"ranked/{method}"]
        accuracy = Accuracy(keep_in_memory=True).compute(predictions=ranked, references=arrays["labels"])
        results[f"accuracy/{method}"] = accuracy["accuracy"]
        if "top5_accuracy" in accuracy:
            results[f"top5_accuracy/{method}"] = accuracy["top5_accuracy"]
        if "bayes" in methods:
            results[f"agreement_with_bayes/{method}"] = (ranked[:, 0] == arrays["ranked/bayes"][:, 0]).mean()
        results[f"images_per_second/{method}"] = len(arrays["labels"]) / arrays[f"seconds/{method}"].sum()
    return results
