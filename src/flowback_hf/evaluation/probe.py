# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What a linear classifier can read off a flow's hidden states, at every place."""

from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm

from flowback_hf.data.noise import make_generator
from flowback_hf.evaluation.images import LabelledImages
from flowback_hf.evaluation.parts import Arrays, Results, concatenate, map_batches
from flowback_hf.metrics import linear_probe, pooled_hidden_states
from flowback_hf.pipelines.pipeline_flowback_classification import FlowBackClassificationPipeline
from flowback_hf.places import place_name


def evaluate_linear_probe(
    state: PartialState,
    folder: Path,
    classifier: FlowBackClassificationPipeline,
    train_images: LabelledImages,
    images: LabelledImages,
    batch_size: int = 32,
    seed: int = 0,
) -> Results:
    """
    Fit a linear classifier to the hidden states of every layer.

    Args:
        state ([`~accelerate.PartialState`]): The processes that share the work.
        folder (`pathlib.Path`): Where finished batches are kept.
        classifier ([`FlowBackClassificationPipeline`]): The flow, which is told no class.
        train_images, images ([`LabelledImages`]): What the probes are fitted to, and what they are judged by.
        batch_size (`int`, defaults to 32): Images per process and pass.
        seed (`int`, defaults to 0): Decides the training noise of each image.
    Returns:
        `dict`: `linear_probe/block1_layer1` and so on, accuracies in [0, 1]; `linear_probe_best`,
        `linear_probe_best_place` and `num_probe_images`. Empty on processes other than the main one.
    """
    splits = {}
    for name, split_images in {"train": train_images, "test": images}.items():

        def compute(indices: range, split_images: LabelledImages = split_images) -> Arrays:
            pictures, labels, _ = split_images.load(indices)
            if not pictures:
                return {}
            (noisy_sample,) = classifier.add_noise(pictures, generator=make_generator(seed))
            pooled = pooled_hidden_states(classifier.transformer, noisy_sample)
            features = {place_name(place): states.numpy() for place, states in pooled.items()}
            return {"labels": np.array(labels), **features}

        what = f"Hidden states, {name}"
        batches = map_batches(state, folder / name, len(split_images), batch_size, compute, what)
        if state.is_main_process:
            splits[name] = concatenate(batch for batch in batches if batch)
    if not state.is_main_process:
        return {}
    train, test = splits["train"], splits["test"]
    accuracies = {
        place: linear_probe(train[place], train["labels"], test[place], test["labels"])
        for place in tqdm([name for name in train if name != "labels"], desc="Linear probes")
    }
    best = max(accuracies, key=accuracies.get)
    return {
        **{f"linear_probe/{place}": accuracy for place, accuracy in accuracies.items()},
        "linear_probe_best": accuracies[best],
        "linear_probe_best_place": best,
        "num_probe_images": len(train["labels"]),
    }
