# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""How near samples come to real images: features of both, and distances between them."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from accelerate import PartialState

from flowback_hf.data.classes import match_class_names
from flowback_hf.evaluation.images import LabelledImages
from flowback_hf.evaluation.parts import Arrays, Results, map_batches
from flowback_hf.evaluation.sampling import choose_class_labels, image_path, sample_images
from flowback_hf.metrics import (
    FrechetDistance,
    ImageFeatureExtractor,
    InceptionFeatureExtractor,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    ReferenceFeatures,
    load_feature_extractor,
)
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline


FeatureExtractor = ImageFeatureExtractor | InceptionFeatureExtractor


def load_extractor(name: str, cache_dir: str | None = None) -> FeatureExtractor:
    """The encoder that `--features` names. Raises ValueError if it cannot be loaded."""
    try:
        return load_feature_extractor(name, cache_dir=cache_dir)
    except OSError as error:
        raise ValueError(f"`--features` {name!r} cannot be loaded: {error}") from error


def save_reference(
    state: PartialState,
    folder: Path,
    extractor: FeatureExtractor,
    images: LabelledImages,
    name: str,
    path: Path,
    batch_size: int = 32,
):
    """
    Compute the features of real images and save what samples are compared with.

    Args:
        state ([`~accelerate.PartialState`]): The processes that share the work.
        folder (`pathlib.Path`): Where finished batches are kept.
        extractor ([`~flowback_hf.metrics.ImageFeatureExtractor`]): The encoder.
        images ([`LabelledImages`]): The real images.
        name (`str`): What they are called in reports, such as `"digits, train"`.
        path (`pathlib.Path`): The `.npz` file, which [`~flowback_hf.metrics.ReferenceFeatures.load`] reads.
        batch_size (`int`, defaults to 32): Images per process and pass.
    """

    def compute(indices: range) -> Arrays:
        pictures = images.load(indices).images
        return {"features": extractor(pictures).features.numpy()} if pictures else {}

    batches = map_batches(state, folder, len(images), batch_size, compute, "Features of real images")
    if state.is_main_process:
        features = (batch["features"] for batch in batches if batch)
        ReferenceFeatures.from_batches(features, name, extractor.name).save(path)


def evaluate_samples(
    state: PartialState,
    folder: Path,
    pipeline: FlowBackPipeline,
    extractor: FeatureExtractor,
    reference: ReferenceFeatures,
    samples_dir: Path,
    num_samples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    **guidance: Any,
) -> Results:
    """
    Sample images of all classes in turn, and measure how near they come to real ones.

    Args:
        state ([`~accelerate.PartialState`]): The processes that share the work.
        folder (`pathlib.Path`): Where finished batches of features are kept.
        pipeline ([`FlowBackPipeline`]): The flow.
        extractor ([`~flowback_hf.metrics.ImageFeatureExtractor`]): The encoder of the reference.
        reference ([`~flowback_hf.metrics.ReferenceFeatures`]): Features of real images.
        samples_dir (`pathlib.Path`): Where the samples are, or will be.
        num_samples (`int`, defaults to 2000): How many samples.
        batch_size (`int`, defaults to 32): Images per process and pass.
        seed (`int`, defaults to 0): Decides the noise.
        guidance: `guidance_scale`, `guidance_rule`, `guidance_schedule`, `guidance_temperature` and `solver` of the
            pipeline's call.
    Returns:
        `dict`: `frechet_distance`, `kernel_distance`, `precision` and `recall`; with a classifier as the encoder,
        `inception_score`; if it knows the flow's classes, `classifier_reads_label`, the share of samples that it takes
        for what they should be; `images_per_second_sampling`. Empty on processes other than the main one.
    """
    class_labels = choose_class_labels(pipeline, None)
    samples_dir.mkdir(parents=True, exist_ok=True)
    made = sample_images(pipeline, class_labels, num_samples, samples_dir, state, batch_size, seed, **guidance)

    def compute(indices: range) -> Arrays:
        output = extractor([PIL.Image.open(image_path(samples_dir, index)) for index in indices])
        arrays = {"features": output.features.numpy()}
        return arrays if output.logits is None else arrays | {"logits": output.logits.numpy()}

    batches = map_batches(state, folder, num_samples, batch_size, compute, "Features of samples")
    if not state.is_main_process:
        return {}
    metrics = [metric_class(reference) for metric_class in (FrechetDistance, KernelDistance, PrecisionRecall)]
    inception_score, num_read, num_seen = InceptionScore(extractor.name), 0, 0
    read_as = label_reader(extractor, pipeline)
    for batch in batches:
        for metric in metrics:
            metric.add_batch(predictions=batch["features"])
        if "logits" in batch:
            inception_score.add_batch(predictions=batch["logits"])
            if read_as is not None:
                wanted = np.resize(np.roll(class_labels, -num_seen % len(class_labels)), len(batch["logits"]))
                num_read += int((read_as[batch["logits"].argmax(axis=1)] == wanted).sum())
        num_seen += len(batch["features"])

    results = {}
    for metric in metrics:
        results |= metric.compute()
    if inception_score.num_images:
        results |= inception_score.compute()
    if read_as is not None:
        results["classifier_reads_label"] = num_read / num_seen
    # What an earlier, interrupted run made was not timed.
    if made["num_made"]:
        results["images_per_second_sampling"] = made["num_made"] * state.num_processes / made["seconds"]
    for name in ("features", "reference", "num_images", "num_reference_images"):
        results.pop(name)  # the same at every guidance scale: the whole evaluation says it once
    return results


def label_reader(extractor: FeatureExtractor, pipeline: FlowBackPipeline) -> np.ndarray | None:
    """
    The flow's class id of each label of a classifier.

    Returns:
        `np.ndarray` of shape `(num_labels,)`: -1 where the flow has no such class. `None` unless the encoder is a
        classifier that knows all classes of the flow.
    """
    if extractor.id2label is None or not pipeline.labels:
        return None
    names = [extractor.id2label[label] for label in sorted(extractor.id2label)]
    try:
        label_ids = match_class_names(names, pipeline.config.id2label)
    except ValueError:  # classes of the flow have the same name
        return None
    if not {int(label) for label in pipeline.config.id2label} <= set(label_ids):
        return None
    return np.array([-1 if label is None else label for label in label_ids])
