# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import itertools
import math
import operator
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL, ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import load_image
from diffusers.utils.torch_utils import randn_tensor

from flowback_hf.pipelines.pipeline_flowback import (
    FlowBackLoraLoaderMixin,
    read_pipeline_index,
    scale_latents,
    vae_scale_factor,
)


METHODS = ("gradient", "ascent", "bayes", "shortlist")


def fit_image(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """
    Cut the middle square out of an image and resize it. Training and classification both fit images this way.

    Args:
        image (`PIL.Image.Image`): An image of any size and mode.
        size (`int`): Height and width of the result, in pixels.
    Returns:
        `PIL.Image.Image`: a new image of `size` times `size` pixels in the same mode, interpolated bicubically.

    Example:
        ```py
        >>> import PIL.Image
        >>> from flowback_hf.pipelines.pipeline_flowback_classification import fit_image

        >>> fit_image(PIL.Image.new("RGB", (640, 427)), 64).size
        (64, 64)
        ```
    """
    return PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.BICUBIC)


def apply_noise(sample: torch.Tensor, noise: torch.Tensor, noise_type: str, noise_std: float) -> torch.Tensor:
    """
    Add noise to a sample as in training. Training and classification both add it this way.

    Args:
        sample (`torch.Tensor`): Clean data, in [-1, 1] if they are pixels. Uniform noise needs 8-bit pixels.
        noise (`torch.Tensor` of a shape that broadcasts with `sample`):
            Draws from N(0, 1) for `"gaussian"`, from [0, 1) for `"uniform"`.
        noise_type (`str`):
            `"gaussian"`: `sample + noise_std * noise`. `"uniform"`: `(pixel + noise) / 128 - 1`, where `pixel` is the
            whole number from 0 to 255 that `sample` stands for. This dequantizes the pixels.
        noise_std (`float`): The standard deviation of the Gaussian noise. Uniform noise ignores it.
    Returns:
        `torch.Tensor`: the noisy sample, in the dtype of `sample` and `noise`.
    Raises:
        ValueError: if `noise_type` is another.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf.pipelines.pipeline_flowback_classification import apply_noise

        >>> apply_noise(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5]), "uniform", noise_std=0.0)
        tensor([-0.9961,  0.9961])
        ```
    """
    if noise_type == "gaussian":
        return sample + noise_std * noise
    if noise_type == "uniform":
        # Float32 pixels that were divided by 255 are only nearly whole numbers.
        return (((sample + 1) * 127.5).round() + noise) / 128 - 1
    raise ValueError(f"`noise_type` must be 'gaussian' or 'uniform', but is {noise_type!r}.")


class FlowBackClassificationPipeline(DiffusionPipeline, FlowBackLoraLoaderMixin):
    r"""
    Classify images with a class-conditional normalizing flow, without training, and compute their likelihoods.

    A flow computes `log p(x | y)` exactly. Bayes' rule then says which class `y` an image most likely has. There are
    four methods:

        "gradient"   Algorithm 1 of the paper. With class logits `l = 0` and class embeddings `softmax(l)^T E` in every
                     block, it takes one forward and one backward to compute `g = grad_l log p(x | l)`, whatever the
                     number K of classes.
        "ascent"     Several steps of gradient ascent on `l`.
        "bayes"      log p(x | k) of every class k: exact, K forwards.
        "shortlist"  Bayes' rule among the `shortlist_size` classes that "gradient" ranks first (not in the paper).

    The flow was trained on noisy images, so the same kind of noise is added before it sees an image. Results are means
    over `num_noise_draws` draws of this noise. `generator` decides the draws; without one, every call uses the same.
    With zero draws, the flow sees the clean image.

    `pipe.transformer.requires_grad_(False)` saves a third of the memory that a gradient needs.

    Args:
        transformer ([`TarFlowTransformer2DModel`]): The flow.
        vae ([`~diffusers.AutoencoderKL`], *optional*): The VAE of a latent flow. It encodes the images.
        id2label (`dict[int, str]`, *optional*): Class names by class id. Without them, labels are numbers.
        guidance_scale (`float`, defaults to 1.0), guidance_rule (`str`, defaults to `"linear"`):
            Defaults of [`FlowBackPipeline`], which loads from the same repository. Classification does not use them.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf import FlowBackClassificationPipeline, TarFlowTransformer2DModel

        >>> transformer = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        ...     num_classes=3,
        ... )
        >>> pipe = FlowBackClassificationPipeline(transformer, id2label={0: "cat", 1: "dog", 2: "cow"})
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = torch.rand(4, 3, 8, 8)
        >>> [len(classes) for classes in pipe(images, method="bayes", top_k=2)]
        [2, 2, 2, 2]
        >>> pipe.log_prob(images).shape
        torch.Size([4])
        ```

    References: Flowing Backwards: Improving Normalizing Flows via Reverse Representation Alignment,
    https://arxiv.org/abs/2511.22345 (Algorithm 1); Zhai et al., Normalizing Flows are Capable Generative Models,
    https://arxiv.org/abs/2412.06329
    """

    model_cpu_offload_seq = "vae->transformer"
    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        guidance_scale: float = 1.0,
        guidance_rule: str = "linear",
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        # JSON turns the keys into strings.
        id2label = {int(label_id): label for label_id, label in (id2label or {}).items()}
        self.register_to_config(id2label=id2label or None, guidance_scale=guidance_scale, guidance_rule=guidance_rule)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        return read_pipeline_index(super()._dict_from_json_file(json_file), cls.__module__)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "FlowBackClassificationPipeline":
        """
        Make a classifier from a loaded [`FlowBackPipeline`]. Both share one flow; nothing is copied.

        Args:
            pipeline ([`FlowBackPipeline`]): The pipeline whose components and class names are used.
            kwargs: Arguments of [`~diffusers.DiffusionPipeline.from_pipe`].
        Returns:
            [`FlowBackClassificationPipeline`]: the classifier.
        """
        # Without these arguments, diffusers would accept only the annotated classes themselves, not their subclasses,
        # and cast the shared flow to float32.
        components = {"transformer": pipeline.transformer, "vae": pipeline.vae}
        return super().from_pipe(pipeline, **{**components, "dtype": pipeline.transformer.dtype, **kwargs})

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the images that the flow takes, or its VAE if it has one."""
        return self.transformer.config.sample_size * (1 if self.vae is None else vae_scale_factor(self.vae))

    def __call__(
        self,
        images: Any,
        top_k: int = 5,
        method: str = "gradient",
        num_noise_draws: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 32,
        num_steps: int = 10,
        learning_rate: float = 0.05,
        tolerance: float = 0.01,
        shortlist_size: int = 5,
        strict: bool = False,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        r"""
        Classify images.

        Args:
            images (a PIL image, array, tensor or path, or many of them):
                Many images may come as a list, a column of a `datasets` data set, any other iterable, or an array or
                tensor with a leading batch dimension. Arrays are `(height, width[, channels])`, tensors `(channels,
                height, width)`. Both hold floats in [0, 1] or uint8, as do the `"np"` and `"pt"` outputs of
                [`FlowBackPipeline`]. An image of another size is center-cropped and resized, with a warning.
            top_k (`int`, defaults to 5): The number of classes to return for an image, at most all of them.
            method (`str`, defaults to `"gradient"`):
                `"gradient"`, `"ascent"`, `"bayes"` or `"shortlist"`; see [`FlowBackClassificationPipeline`].
            num_noise_draws (`int`, defaults to 1): Draws of the training noise to average over. 0 adds no noise.
            generator (`torch.Generator` or one for each image, *optional*):
                Draws the noise, image by image, so that batching does not change it. The default is a new generator
                with seed 0.
            batch_size (`int`, defaults to 32):
                The largest number of samples, or of pairs of sample and class, that the flow sees at once.
            num_steps (`int`, defaults to 10): Steps of `"ascent"`, `l <- l + learning_rate * K * grad_l log p(x | l)`.
            learning_rate (`float`, defaults to 0.05): The learning rate of `"ascent"`, for a gradient in nats.
            tolerance (`float`, defaults to 0.01):
                The gain, in nats, below which `"ascent"` stops for an image. A step that loses is undone.
            shortlist_size (`int`, defaults to 5): The number of classes among which `"shortlist"` decides.
            strict (`bool`, defaults to `False`): Refuse images of another size or mode instead of converting them.
        Returns:
            `list[dict]` for one image, a list of such lists for many: `{"label": ..., "score": ...}` from the best
            class down, as transformers' image classification returns. The method decides what a score is:

            - `"bayes"`: p(k | x) under equal priors, in [0, 1]. The scores of all classes sum to 1.
            - `"shortlist"`: the same among the shortlisted classes, 0 for the others.
            - `"ascent"`: the weights softmax(l) of the class embeddings. They sum to 1 but are not probabilities.
            - `"gradient"`: `K g_k`, the first-order estimate of `log p(x | k) - log p(x | no class)`, in nats. It may
              be negative.
        Raises:
            ValueError: if an argument is out of its range or the flow is unconditional, before any work is done; or if
                an image cannot be used, with its number.
        """
        arguments = {
            "method": method,
            "num_noise_draws": num_noise_draws,
            "batch_size": batch_size,
            "num_steps": num_steps,
            "learning_rate": learning_rate,
            "tolerance": tolerance,
            "shortlist_size": shortlist_size,
        }
        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, but is {top_k}.")
        scores = self.class_scores(images, generator=generator, strict=strict, **arguments)
        values, label_ids = scores.topk(min(top_k, scores.shape[1]))
        id2label = self.config.id2label or {}
        id2label = {int(label_id): label for label_id, label in id2label.items()}
        classes = [
            [{"label": id2label.get(k, str(k)), "score": score} for k, score in zip(image_ids, image_values)]
            for image_ids, image_values in zip(label_ids.tolist(), values.tolist())
        ]
        return classes[0] if _is_one_image(images) else classes

    @torch.no_grad()
    def class_scores(
        self,
        images: Any,
        method: str = "gradient",
        num_noise_draws: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 32,
        num_steps: int = 10,
        learning_rate: float = 0.05,
        tolerance: float = 0.01,
        shortlist_size: int = 5,
        strict: bool = False,
    ) -> torch.Tensor:
        """
        Compute the scores of all classes. A call returns the best of them.

        Args:
            images, method, num_noise_draws, generator, batch_size, strict: Arguments of a call.
            num_steps, learning_rate, tolerance, shortlist_size: Arguments of a call.
        Returns:
            `torch.Tensor` of shape `(num_images, num_classes)`: the scores, on the CPU, in float32, or float64 for a
            float64 flow. A call's docstring says what each method's scores are.
        Raises:
            ValueError: as a call does.
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}, but is {method!r}.")
        if self.transformer.config.num_classes is None:
            raise ValueError("This flow is unconditional (`num_classes` is None). It has no classes to choose from.")
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, but is {num_steps}.")
        if not learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, but is {learning_rate}.")
        if not tolerance >= 0:
            raise ValueError(f"`tolerance` must not be negative, but is {tolerance}.")
        if shortlist_size < 1:
            raise ValueError(f"`shortlist_size` must be at least 1, but is {shortlist_size}.")
        scores = []
        for draws in self._batches(images, num_noise_draws, generator, batch_size, strict):
            if method == "gradient":
                scores.append(self.log_prob_and_class_gradient(draws)[1])
            elif method == "ascent":
                scores.append(self._ascend(draws, num_steps, learning_rate, tolerance))
            else:
                scores.append(self._posterior(draws, method, shortlist_size, batch_size))
        return torch.cat(scores).cpu()

    @torch.no_grad()
    def log_prob(
        self,
        images: Any,
        class_labels: list[int] | torch.Tensor | None = None,
        num_noise_draws: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 32,
        strict: bool = False,
    ) -> torch.Tensor:
        """
        Compute the log-likelihood of images with the noise of training, as the mean over the draws.

        Args:
            images, num_noise_draws, generator, batch_size, strict: Arguments of a call.
            class_labels (`list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                The class of each image; -1 means no class. With `None`, no image has one.
        Returns:
            `torch.Tensor` of shape `(num_images,)`: nats, summed over dimensions, on the CPU. For a latent flow, this
            is the density of the VAE's latents, not of pixels.
        Raises:
            ValueError: as a call does, or if the labels do not fit the flow or the number of images.
        """
        batches = self._batches(images, num_noise_draws, generator, batch_size, strict)
        return torch.cat(
            [
                torch.stack([self.transformer.log_prob(draw, labels) for draw in draws]).mean(dim=0)
                for draws, labels in self._with_labels(batches, class_labels)
            ]
        ).cpu()

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Any,
        class_labels: list[int] | torch.Tensor | None = None,
        num_noise_draws: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 32,
        strict: bool = False,
    ) -> torch.Tensor:
        r"""
        Compute the bits per dimension of uniformly dequantized 8-bit images.

        They are `(-log p(x) / D + log 128) / log 2`, with `x = (pixel + u) / 128 - 1` and `u` uniform in [0, 1). This
        is an upper bound on the bits of the 8-bit image.

        Use it for density models, which are trained with uniform noise. A flow that was trained with Gaussian noise
        models noisier images: judge it by [`~FlowBackClassificationPipeline.log_prob`].

        Args:
            images, num_noise_draws, generator, batch_size, strict: Arguments of a call. At least one draw is needed.
            class_labels: As in [`~FlowBackClassificationPipeline.log_prob`].
        Returns:
            `torch.Tensor` of shape `(num_images,)`: means over the draws, on the CPU.
        Raises:
            ValueError: as a call does, or if the flow is a latent flow, which has no density of pixels.
        """
        if self.vae is not None:
            raise ValueError(
                "Bits per dimension are defined for pixels, but this flow models a VAE's latents. Use `log_prob`."
            )
        if num_noise_draws < 1:
            raise ValueError(f"`num_noise_draws` must be at least 1 to dequantize, but is {num_noise_draws}.")
        batches = self._batches(images, num_noise_draws, generator, batch_size, strict, noise_type="uniform")
        bits = []
        for draws, labels in self._with_labels(batches, class_labels):
            log_prob = torch.stack([self.transformer.log_prob(draw, labels) for draw in draws]).mean(dim=0)
            bits.append((-log_prob / draws[0][0].numel() + math.log(128)) / math.log(2))
        return torch.cat(bits).cpu()

    def out_of_distribution_score(
        self,
        images: Any,
        reference_log_prob: torch.Tensor,
        num_noise_draws: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 32,
        strict: bool = False,
    ) -> torch.Tensor:
        """
        Measure how far an image's likelihood without a class lies from those of typical images.

        The score is `|log p(x) - mean| / standard deviation`, with the mean and the standard deviation of typical
        images. It takes one forward.

        A flow assigns plain images a higher likelihood than its training images, and strange images a lower one. This
        distance detects both. A threshold on the likelihood itself would miss the plain ones.

        Args:
            images, num_noise_draws, generator, batch_size, strict: Arguments of a call.
            reference_log_prob (`torch.Tensor` of shape `(num_typical_images,)`):
                What [`~FlowBackClassificationPipeline.log_prob`] returns for typical images with as many noise draws.
                A few hundred images that the flow was not trained on are enough.
        Returns:
            `torch.Tensor` of shape `(num_images,)`: scores of at least 0, in standard deviations, on the CPU.
        Raises:
            ValueError: as a call does, or if the reference does not vary.

        Reference: Nalisnick et al., Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality,
        https://arxiv.org/abs/1906.02994, applied to single images
        """
        reference_log_prob = torch.as_tensor(reference_log_prob)
        deviation = reference_log_prob.std() if reference_log_prob.numel() > 1 else torch.tensor(math.nan)
        if reference_log_prob.ndim != 1 or not (deviation > 0 and torch.isfinite(deviation)):
            raise ValueError(
                "`reference_log_prob` must hold the finite log-likelihoods of at least two different images, but has"
                f" shape {tuple(reference_log_prob.shape)} and standard deviation {deviation:.3g}."
            )
        log_prob = self.log_prob(images, None, num_noise_draws, generator, batch_size, strict)
        return (log_prob - reference_log_prob.mean()).abs() / deviation

    # Methods

    def log_prob_and_class_gradient(
        self, draws: torch.Tensor, logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute `log p(x | l)` of noisy samples and its gradient in the class logits `l`. `"gradient"` ranks by it.

        The number K of classes hardly changes the cost: it enters only one matrix product a block, with the block's
        class table. The gradient is multiplied by K. At `l = 0` it is then a first-order (Taylor) estimate, in nats,
        of each class's gain over the mean of all classes, and does not shrink as K grows.

        Args:
            draws (`torch.Tensor` of shape `(num_noise_draws, batch_size, in_channels, sample_size, sample_size)`):
                Noisy samples from [`~FlowBackClassificationPipeline.add_noise`].
            logits (`torch.Tensor` of shape `(batch_size, num_classes)`, *optional*): Class logits, zeros by default.
        Returns:
            `tuple` of `torch.Tensor`: the log-likelihoods in nats, `(batch_size,)`, and `K` times the gradient,
            `(batch_size, num_classes)`, both as means over the draws.
        """
        if logits is None:
            logits = draws.new_zeros(draws.shape[1], self.transformer.config.num_classes)
        log_prob, gradient = torch.zeros_like(logits[:, 0]), torch.zeros_like(logits)
        for draw in draws:
            # The caller may be in inference mode, whose tensors autograd does not save. It does save clones of them.
            with torch.inference_mode(False), torch.enable_grad():
                leaf = logits.clone().requires_grad_()
                draw_log_prob = self.transformer.log_prob(draw.clone(), leaf.softmax(dim=1))
                (draw_gradient,) = torch.autograd.grad(draw_log_prob.sum(), leaf)
            log_prob += draw_log_prob.detach() / len(draws)
            gradient += draw_gradient * (logits.shape[1] / len(draws))
        return log_prob, gradient

    def _ascend(self, draws: torch.Tensor, num_steps: int, learning_rate: float, tolerance: float) -> torch.Tensor:
        """Return the class weights that gradient ascent reaches. Each image stops when its steps gain too little."""
        logits = draws.new_zeros(draws.shape[1], self.transformer.config.num_classes)
        log_prob, gradient = self.log_prob_and_class_gradient(draws, logits)
        logits += learning_rate * gradient
        climbing = torch.arange(len(logits), device=logits.device)
        previous_gradient = gradient
        for _ in range(num_steps - 1):
            next_log_prob, gradient = self.log_prob_and_class_gradient(draws[:, climbing], logits[climbing])
            gain = next_log_prob - log_prob[climbing]
            fallen = climbing[gain < 0]
            logits[fallen] -= learning_rate * previous_gradient[gain < 0]
            log_prob[climbing] = next_log_prob
            pays = gain >= tolerance
            climbing, previous_gradient = climbing[pays], gradient[pays]
            if len(climbing) == 0:
                break
            logits[climbing] += learning_rate * previous_gradient
        return logits.softmax(dim=1)

    def _posterior(self, draws: torch.Tensor, method: str, shortlist_size: int, batch_size: int) -> torch.Tensor:
        """Return p(k | x) under equal priors on the candidates: all classes, or those the gradient ranks first."""
        num_images, num_classes = draws.shape[1], self.transformer.config.num_classes
        if method == "bayes":
            candidates = torch.arange(num_classes, device=draws.device).expand(num_images, -1)
        else:
            _, gradient = self.log_prob_and_class_gradient(draws)
            candidates = gradient.topk(min(shortlist_size, num_classes), dim=1).indices
        # All pairs of image and class in one list, so that no chunk holds more than `batch_size` of them.
        image_numbers = torch.arange(num_images, device=draws.device).repeat_interleave(candidates.shape[1])
        pairs = zip(image_numbers.split(batch_size), candidates.flatten().split(batch_size))
        log_prob = torch.cat(
            [
                torch.stack([self.transformer.log_prob(draw[numbers], labels) for draw in draws]).mean(dim=0)
                for numbers, labels in pairs
            ]
        ).view(num_images, -1)
        posterior = log_prob.new_zeros(num_images, num_classes)
        return posterior.scatter(1, candidates, log_prob.softmax(dim=1))

    # Images

    def preprocess(self, images: Any, strict: bool = False) -> torch.Tensor:
        """
        Turn images into the data that the flow models, without noise.

        Args:
            images, strict: Arguments of a call.
        Returns:
            `torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`: pixels in [-1, 1], or the
            mode of the VAE's posterior on the scale of [`FlowBackPipeline.encode`]. float32, or float64 for a float64
            flow.
        Raises:
            ValueError: if something is not an image, with its number; with `strict`, also for another size or mode.
        """
        images = [images] if _is_one_image(images) else images
        pixels = [self._to_pixels(image, number, strict) for number, image in enumerate(images)]
        if not pixels:
            raise ValueError("`images` must hold at least one image, but are empty.")
        return self._encode(torch.stack(pixels))

    def _to_pixels(self, image: Any, number: int, strict: bool) -> torch.Tensor:
        """Turn one image into pixels in [0, 1], of shape `(channels, image_size, image_size)`."""
        size = self.image_size
        channels = self.transformer.config.in_channels if self.vae is None else self.vae.config.in_channels
        if isinstance(image, (str, os.PathLike)):
            path = os.fspath(image)
            try:
                image = load_image(path)
            # These are raised for a missing file, a file that is not an image, and a truncated image.
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"Image {number}, {path!r}, cannot be read: {error}") from error
            if channels == 1:
                image = image.convert("L")
        if not hasattr(image, "convert"):
            pixels = _array_to_pixels(image, number)
            if tuple(pixels.shape) == (channels, size, size):
                return pixels
            if strict:
                raise ValueError(
                    f"Image {number} must have {channels} channels of {size}x{size} pixels, but has shape"
                    f" {tuple(pixels.shape)} (channels first). Convert it, or leave out `strict`."
                )
            array = VaeImageProcessor.pt_to_numpy(pixels[None])
            (image,) = VaeImageProcessor.numpy_to_pil(array)
        mode = {1: "L", 3: "RGB"}[channels]
        if strict and (image.mode != mode or image.size != (size, size)):
            raise ValueError(
                f"Image {number} must be {size}x{size} pixels of mode {mode}, but is {image.width}x{image.height} of"
                f" mode {image.mode}. Convert it, or leave out `strict`."
            )
        image = image.convert(mode)
        if image.size != (size, size):
            warnings.warn(
                f"Images that are not {size}x{size} pixels are resized and center-cropped; `strict=True` refuses them."
            )
            image = fit_image(image, size)
        return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy([image]))[0]

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn pixels in [0, 1] into the data that the flow models."""
        device, dtype = self._execution_device, torch.promote_types(self.transformer.dtype, torch.float32)
        sample = VaeImageProcessor.normalize(pixels.to(device, dtype))
        if self.vae is not None:
            latents = self.vae.encode(sample.to(self.vae.dtype)).latent_dist.mode()
            sample = scale_latents(latents.to(dtype), self.vae.config)
        return sample

    def _batches(
        self,
        images: Any,
        num_noise_draws: int,
        generator: torch.Generator | list[torch.Generator] | None,
        batch_size: int,
        strict: bool,
        noise_type: str | None = None,
    ) -> Iterator[torch.Tensor]:
        """
        Yield noisy samples of at most `batch_size` images, `(num_noise_draws or 1, images, in_channels, sample_size,
        sample_size)`.

        It checks the arguments before the first batch, shows a progress bar, and frees the offloading hooks at the
        end.
        """
        if num_noise_draws < 0:
            raise ValueError(f"`num_noise_draws` must not be negative, but is {num_noise_draws}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but is {batch_size}.")
        images = [images] if _is_one_image(images) else images
        num_images = len(images) if hasattr(images, "__len__") else None
        if num_images == 0:
            raise ValueError("`images` must hold at least one image, but are empty.")
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"`generator` must be one generator, or a list of one for each image, but has {len(generator)} for"
                f" {'an unknown number of' if num_images is None else num_images} images."
            )
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        generators = iter(generator if isinstance(generator, list) else itertools.repeat(generator))
        numbered = enumerate(images)
        with self.progress_bar(total=num_images or float("inf")) as progress_bar:
            while pixels := [self._to_pixels(x, i, strict) for i, x in itertools.islice(numbered, batch_size)]:
                sample = self._encode(torch.stack(pixels))
                yield self.add_noise(
                    sample, num_noise_draws, list(itertools.islice(generators, len(sample))), noise_type
                )
                progress_bar.update(len(sample))
        self.maybe_free_model_hooks()

    def add_noise(
        self,
        sample: torch.Tensor,
        num_noise_draws: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise_type: str | None = None,
    ) -> torch.Tensor:
        """
        Add the noise of training, drawn image by image, so that batching does not change it.

        Args:
            sample (`torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`):
                Clean data from [`~FlowBackClassificationPipeline.preprocess`].
            num_noise_draws (`int`, defaults to 1):
                Draws for each image. 0 adds nothing, or one half to whole pixels if the noise is uniform.
            generator: As in a call.
            noise_type (`str`, *optional*): `"gaussian"` or `"uniform"`; see [`apply_noise`]. By default, the flow's.
        Returns:
            `torch.Tensor` of shape `(num_noise_draws or 1, num_images, in_channels, sample_size, sample_size)`.
        """
        noise_type = self.transformer.config.noise_type if noise_type is None else noise_type
        if num_noise_draws == 0:
            noise = torch.zeros_like(sample)[None] + (0.5 if noise_type == "uniform" else 0.0)
        else:
            generator = torch.Generator().manual_seed(0) if generator is None else generator
            generators = generator if isinstance(generator, list) else [generator] * len(sample)
            shape = (num_noise_draws, *sample.shape[1:])
            draw = randn_tensor if noise_type == "gaussian" else _rand_tensor
            noise = [draw(shape, generator=g, device=g.device, dtype=sample.dtype) for g in generators]
            noise = torch.stack(noise, dim=1).to(sample.device)
        return apply_noise(sample, noise, noise_type, self.transformer.config.noise_std)

    def _with_labels(
        self, batches: Iterable[torch.Tensor], class_labels: list[int] | torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield each batch with its labels, and check that there is one for each image."""
        num_classes = self.transformer.config.num_classes
        if class_labels is None:
            yield from ((draws, None) for draws in batches)
            return
        labels = [operator.index(label) for label in class_labels]
        if num_classes is None:
            raise ValueError("`class_labels` must be None for an unconditional flow.")
        if not all(-1 <= label < num_classes for label in labels):
            raise ValueError(
                f"`class_labels` must lie between 0 and {num_classes - 1}, or be -1 for no class, but are {labels}."
            )
        done = 0
        for draws in batches:
            batch_labels = labels[done : done + draws.shape[1]]
            done += draws.shape[1]
            if len(batch_labels) < draws.shape[1]:
                raise ValueError(
                    f"`class_labels` must hold one for each image, but holds {len(labels)} for more images."
                )
            yield draws, torch.tensor(batch_labels, device=draws.device)
        if done != len(labels):
            raise ValueError(
                f"`class_labels` must hold one for each image, but holds {len(labels)} for {done} images."
            )


def _rand_tensor(shape: tuple, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=device, dtype=dtype)


def _is_one_image(images: Any) -> bool:
    """Tell one image, in any accepted form, from several."""
    if isinstance(images, (str, os.PathLike)) or hasattr(images, "convert"):
        return True
    return hasattr(images, "ndim") and images.ndim < 4


def _array_to_pixels(image: Any, number: int) -> torch.Tensor:
    """Turn an array (height, width[, channels]) or a tensor (channels, height, width) into the latter, in [0, 1]."""
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu()
    elif hasattr(image, "__array__"):
        pixels = torch.as_tensor(image)
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.movedim(-1, 0)
    else:
        raise ValueError(
            f"Image {number} must be a PIL image, an array, a tensor or a path, but is of type {type(image).__name__}."
        )
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"Image {number} must have 1 or 3 channels, but its shape is {tuple(image.shape)}.")
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    if not pixels.is_floating_point() or not ((pixels >= 0) & (pixels <= 1)).all():
        raise ValueError(
            f"Image {number} must hold floats in [0, 1] or uint8, but holds {pixels.dtype} from {pixels.min():.3g} to"
            f" {pixels.max():.3g}."
        )
    return pixels
