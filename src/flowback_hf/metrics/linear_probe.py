# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import numpy as np
import torch

from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel


Place = tuple[int, int]


@torch.no_grad()
def pooled_hidden_states(flow: TarFlowTransformer2DModel, sample: torch.Tensor) -> dict[Place, torch.Tensor]:
    """
    The mean over tokens of a flow's hidden states at every place, from one pass that is told no class.

    Args:
        flow ([`TarFlowTransformer2DModel`]): The flow.
        sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
            What it models, with or without the noise of its training.
    Returns:
        `dict` of `(block, layer)`, numbered from 1 and from the image side, to `torch.Tensor` of shape `(batch_size,
        width)`: float32, on the CPU.
    """
    places = [
        (number, layer)
        for number, block in enumerate(flow.blocks, start=1)
        for layer in range(1, len(block.layers) + 1)
    ]
    hidden_states = flow(sample, output_hidden_states=places).hidden_states
    return {place: hidden_states[place].mean(dim=1).float().cpu() for place in places}


def linear_probe(
    train_features: np.ndarray, train_labels: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> float:
    """
    How well a linear classifier reads the class off features: scikit-learn's logistic regression, on features
    standardized by the training images' mean and deviation.

    Args:
        train_features (`numpy.ndarray` of shape `(num_train_images, width)`), train_labels (`numpy.ndarray` of shape
            `(num_train_images,)`): What it is fitted to.
        features (`numpy.ndarray` of shape `(num_images, width)`), labels (`numpy.ndarray` of shape `(num_images,)`):
            What it is judged by.
    Returns:
        `float`: the accuracy, in [0, 1].
    Raises:
        ImportError: if scikit-learn is missing; says what to install.
        ValueError: if the training images are all of one class.

    Example:
        ```py
        >>> import numpy as np
        >>> from flowback_hf.metrics import linear_probe

        >>> features = np.linspace(-1, 1, 20)[:, None]
        >>> linear_probe(features, features[:, 0] > 0, features[::2], features[::2, 0] > 0)
        1.0
        ```
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError('The linear probe needs scikit-learn: pip install "flowback_hf[eval]".') from error
    if len(np.unique(train_labels)) < 2:
        raise ValueError("A linear probe needs training images of at least two classes, but they are all of one.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(probe.fit(train_features, train_labels).score(features, labels))
