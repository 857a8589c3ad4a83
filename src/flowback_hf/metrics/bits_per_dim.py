# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import math

import datasets
import evaluate
import numpy as np


class BitsPerDim(evaluate.Metric):
    r"""
    Compute the bits per dimension of 8-bit images from log-likelihoods.

    They are `(-log p(x) / D + log 128) / log 2`, with `x = (pixel + u) / 128 - 1` and `u` uniform in [0, 1). This is
    an upper bound on the bits of a lossless code (Theis et al., A note on the evaluation of generative models,
    https://arxiv.org/abs/1511.01844, section 3.1).

    Args of `compute` and `add_batch`:
        predictions (`(num_images, num_draws)` floats):
            `log p(x)` of each image with each draw of `u`, in nats, summed over dimensions.
        num_dimensions (`int`, `compute` only): D, the number of values in an image.
    Returns (`compute`):
        `dict`: `bits_per_dim`, the mean; `standard_error`, the standard error of that mean over the images, which
        includes the draws' variance, NaN for one image; `num_images`; `num_draws`.

    Example:
        ```py
        >>> import math
        >>> from flowback_hf.metrics import BitsPerDim

        >>> uniform = -192 * math.log(2)  # the log-density of anything in [-1, 1]^192
        >>> BitsPerDim().compute(predictions=[[uniform], [uniform]], num_dimensions=192)["bits_per_dim"]
        8.0
        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Bits per dimension of 8-bit images, dequantized uniformly and scaled to [-1, 1].",
            citation="",
            inputs_description="predictions: log-likelihoods of each image in nats, one for each draw of the noise.",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, predictions: list[list[float]], num_dimensions: int) -> dict[str, float]:
        log_prob = np.asarray(predictions, dtype=np.float64)
        bits = (-log_prob.mean(axis=1) / num_dimensions + math.log(128)) / math.log(2)
        num_images, num_draws = log_prob.shape
        standard_error = float(bits.std(ddof=1) / math.sqrt(num_images)) if num_images > 1 else math.nan
        return {
            "bits_per_dim": float(bits.mean()),
            "standard_error": standard_error,
            "num_images": num_images,
            "num_draws": num_draws,
        }
