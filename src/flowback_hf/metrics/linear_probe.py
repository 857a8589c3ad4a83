# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import numpy as np
import torch

from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel
from flowback_hf.places import Place


@torch.no_grad()
def pooled_hidden_states(flow: TarFlowTransformer2DModel, sample: torch.Tensor) -> dict[Place, torch.Tensor]:
    """
    Compute a flow's hidden states at every place, averaged over tokens, in one pass without classes.

    Args:
        flow ([`TarFlowTransformer2DModel`]): The flow.
        sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
            The flow's data, with or without the training noise.
    Returns:
        `dict` of `(block, layer)` to `torch.Tensor` of shape `(batch_size, width)`: the averages, in float32, on the
        CPU. Blocks and layers are numbered from 1, block 1 next to the image.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf import TarFlowTransformer2DModel
        >>> from flowback_hf.metrics import pooled_hidden_states

        >>> flow = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=16
        ... )
        >>> states = pooled_hidden_states(flow, torch.randn(3, 3, 8, 8))
        >>> {place: tuple(features.shape) for place, features in states.items()}
        {(1, 1): (3, 32), (2, 1): (3, 32)}
        ```
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
    Measure how well a linear classifier predicts the class from features.

    The classifier is scikit-learn's logistic regression. Features are standardized by the mean and the standard
    deviation of the training images.

    Args:
        train_features (`numpy.ndarray` of shape `(num_train_images, width)`), train_labels (`numpy.ndarray` of shape
            `(num_train_images,)`): The images to fit the classifier to.
        features (`numpy.ndarray` of shape `(num_images, width)`), labels (`numpy.ndarray` of shape `(num_images,)`):
            The images to measure its accuracy on.
    Returns:
        `float`: the accuracy, in [0, 1].
    Raises:
        ImportError: if scikit-learn is missing. The message says what to install.
        ValueError: if the training images all have the same class.

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
        raise ValueError("A linear probe needs training images of at least two classes, but all have the same class.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(probe.fit(train_features, train_labels).score(features, labels))
