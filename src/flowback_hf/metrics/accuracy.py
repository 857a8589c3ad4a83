# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """
    Compute the share of images whose class is predicted first, or among the first five.

    Args of `compute` and `add_batch`:
        predictions (`(num_images, k)` integers): The predicted class ids of each image, the best first.
        references (`(num_images,)` integers): The true class ids of the images.
    Returns (`compute`):
        `dict`: `accuracy` in [0, 1]; `top5_accuracy` in [0, 1], if `k` is at least 5; `num_images`.

    Example:
        ```py
        >>> from flowback_hf.metrics import Accuracy

        >>> Accuracy().compute(predictions=[[2, 0], [1, 2]], references=[2, 0])
        {'accuracy': 0.5, 'num_images': 2}
        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of images whose class is predicted first, or among the first five.",
            citation="",
            inputs_description="predictions: class ids for each image, the best first; references: true class ids.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        results = {"accuracy": float(hits[:, 0].mean())}
        if hits.shape[1] >= 5:
            results["top5_accuracy"] = float(hits[:, :5].any(axis=1).mean())
        return results | {"num_images": len(hits)}
