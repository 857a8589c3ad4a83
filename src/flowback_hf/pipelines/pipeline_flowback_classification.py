# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is uploaded beside a model's weights, for Modular pipelines. The import from this package is changed there
# into an import of the file that is uploaded with it.

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from flowback_hf.pipelines.pipeline_flowback import (
    FlowBackPipelineMixin,
    apply_noise,
    check_number,
    is_one_image,
    iterate_images,
)


METHODS = ("gradient", "ascent", "bayes", "shortlist")


def image_generator(pixels: torch.Tensor, seed: int) -> torch.Generator:
    """
    Make the generator that draws an image's noise: a function of a seed and of the image, and of nothing else.

    Args:
        pixels (`torch.Tensor`): The image, in [0, 1]. It is rounded to 8 bits, so that arrays, tensors and files of
            one image give the same generator.
        seed (`int`): A number from 0 to 2^63 - 1.
    Returns:
        `torch.Generator`: on the CPU, seeded with a SHA-256 digest of the seed and the 8-bit pixels. PyTorch uses 32
        bits of it: two different images share their noise once in four billion pairs.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf.pipelines.pipeline_flowback_classification import image_generator

        >>> image = torch.rand(3, 8, 8)
        >>> image_generator(image, 0).initial_seed() == image_generator(image.double(), 0).initial_seed()
        True
        ```
    """
    digest = hashlib.sha256(seed.to_bytes(8, "big"))
    digest.update((pixels * 255).round().to(torch.uint8).contiguous().numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:4], "big"))


class FlowBackClassificationPipeline(FlowBackPipelineMixin, DiffusionPipeline):
    r"""
    Classify images with a class-conditional normalizing flow, without training, and compute their likelihoods.

    A flow computes `log p(x | y)` exactly. Bayes' rule then says which class `y` an image most likely has. There are
    four methods:

        "shortlist"  Bayes' rule among the `shortlist_size` classes that "gradient" ranks first; the default. For a
                     flow with no more classes than that, it is "bayes".
        "bayes"      log p(x | k) of every class k: exact, K forwards.
        "gradient"   Algorithm 1 of the paper. With class logits `l = 0` and class embeddings `softmax(l)^T E` in every
                     block, it takes one forward and one backward to compute `g = grad_l log p(x | l)`, whatever the
                     number K of classes.
        "ascent"     Several steps of gradient ascent on `l`.

    The flow was trained on noisy images, so the same kind of noise is added before it sees an image. Results are means
    over `num_noise_draws` draws of this noise. With zero draws, the flow sees the clean image.

    The noise of an image follows from the seed and from the image, see [`image_generator`]. An image therefore has the
    same score wherever it stands in a list, in batches of any size, and in every call with the same seed, up to the
    rounding of matrix products of other sizes. Draws for one image are independent of each other.

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

    def __call__(
        self,
        images: Any,
        top_k: int | None = 5,
        method: str = "shortlist",
        num_noise_draws: int = 1,
        generator: torch.Generator | None = None,
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
            images (a PIL image, array, tensor, path or data set, or many of them):
                Images in any form that [`~FlowBackPipeline.encode`] takes.
            top_k (`int`, *optional*, defaults to 5):
                The number of classes to return for an image, at most all of them. `None` returns all.
            method (`str`, defaults to `"shortlist"`):
                `"shortlist"`, `"bayes"`, `"gradient"` or `"ascent"`; see [`FlowBackClassificationPipeline`].
            num_noise_draws (`int`, defaults to 1): Draws of the training noise to average over. 0 adds no noise.
            generator (`torch.Generator`, *optional*):
                Gives the seed: every call takes one number from it. The noise of each image follows from this number
                and from the image. A second call with the same generator therefore draws other noise. The default is
                a new generator with seed 0 in every call.
            batch_size (`int`, defaults to 32):
                The largest number of samples, or of pairs of sample and class, that the flow sees at once.
            num_steps (`int`, defaults to 10): Steps of `"ascent"`, `l <- l + learning_rate * K * grad_l log p(x | l)`.
            learning_rate (`float`, defaults to 0.05): The learning rate of `"ascent"`, for a gradient in nats.
            tolerance (`float`, defaults to 0.01):
                The gain, in nats, below which `"ascent"` stops for an image. A step that loses is undone, except for
                the last one, whose gain is not measured.
            shortlist_size (`int`, defaults to 5): The number of classes among which `"shortlist"` decides.
            strict (`bool`, defaults to `False`): Refuse images of another size or mode instead of converting them.
        Returns:
            `list[dict]` for one image, a list of such lists for many: `{"label": ..., "score": ...}` from the best
            class down, as transformers' image classification returns. The method decides what a score is:

            - `"bayes"`: p(k | x) under equal priors, in [0, 1]. The scores of all classes sum to 1.
            - `"shortlist"`: the same among the shortlisted classes. The others were not compared: their score is 0,
              and they come last, in the order of their ids.
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
        if top_k is not None:
            check_number("top_k", top_k, int, at_least=1)
        scores = self.class_scores(images, generator=generator, strict=strict, **arguments)
        values, label_ids = scores.sort(dim=1, descending=True, stable=True)
        values, label_ids = values[:, :top_k], label_ids[:, :top_k]
        id2label = self.config.id2label or {}
        id2label = {int(label_id): label for label_id, label in id2label.items()}
        classes = [
            [{"label": id2label.get(k, str(k)), "score": score} for k, score in zip(image_ids, image_values)]
            for image_ids, image_values in zip(label_ids.tolist(), values.tolist())
        ]
        return classes[0] if is_one_image(images, self.num_channels) else classes

    @torch.no_grad()
    def class_scores(
        self,
        images: Any,
        method: str = "shortlist",
        num_noise_draws: int = 1,
        generator: torch.Generator | None = None,
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
        check_number("num_steps", num_steps, int, at_least=1)
        check_number("learning_rate", learning_rate, float, above=0.0)
        check_number("tolerance", tolerance, float, at_least=0.0)
        check_number("shortlist_size", shortlist_size, int, at_least=1)
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
        class_labels: list[int | str] | torch.Tensor | None = None,
        num_noise_draws: int = 1,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
        strict: bool = False,
    ) -> torch.Tensor:
        """
        Compute the log-likelihood of images with the noise of training, as the mean over the draws.

        Args:
            images, num_noise_draws, generator, batch_size, strict: Arguments of a call.
            class_labels (`list` of `int` or `str`, or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                The class of each image, by id or name; -1 means no class. With `None`, no image has one.
        Returns:
            `torch.Tensor` of shape `(num_images,)`: nats, summed over dimensions, on the CPU. For a latent flow, this
            is the density of the VAE's latents, not of pixels.
        Raises:
            ValueError: as a call does, or if a label is unknown, or their number is not that of the images.
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
        class_labels: list[int | str] | torch.Tensor | None = None,
        num_noise_draws: int = 1,
        generator: torch.Generator | None = None,
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
        check_number("num_noise_draws", num_noise_draws, int, at_least=1)  # 0 would not dequantize
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
        generator: torch.Generator | None = None,
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
        if method == "bayes" or shortlist_size >= num_classes:
            candidates = torch.arange(num_classes, device=draws.device).expand(num_images, -1)
        else:
            _, gradient = self.log_prob_and_class_gradient(draws)
            candidates = gradient.topk(shortlist_size, dim=1).indices
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

    # Noise

    def add_noise(
        self,
        images: Any,
        num_noise_draws: int = 1,
        generator: torch.Generator | None = None,
        strict: bool = False,
    ) -> torch.Tensor:
        """
        Turn images into the noisy samples that the flow sees in a call, all of them at once.

        Args:
            images, num_noise_draws, generator, strict: Arguments of a call.
        Returns:
            `torch.Tensor` of shape `(num_noise_draws or 1, num_images, in_channels, sample_size, sample_size)`: what
            [`~FlowBackPipeline.encode`] returns, plus noise. float32, or float64 for a float64 flow.
        Raises:
            ValueError: as a call does.
        """
        _check_noise(num_noise_draws, generator)
        pixels = self._stack_pixels(enumerate(iterate_images(images, self.num_channels)), strict)
        return self._add_noise(pixels, num_noise_draws, _draw_seed(generator), self.transformer.config.noise_type)

    def _batches(
        self,
        images: Any,
        num_noise_draws: int,
        generator: torch.Generator | None,
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
        _check_noise(num_noise_draws, generator)
        check_number("batch_size", batch_size, int, at_least=1)
        images = iterate_images(images, self.num_channels)
        noise_type = self.transformer.config.noise_type if noise_type is None else noise_type
        seed = _draw_seed(generator)
        numbered = enumerate(images)
        with self.progress_bar(total=len(images) if hasattr(images, "__len__") else float("inf")) as progress_bar:
            while batch := list(itertools.islice(numbered, batch_size)):
                yield self._add_noise(self._stack_pixels(batch, strict), num_noise_draws, seed, noise_type)
                progress_bar.update(len(batch))
        self.maybe_free_model_hooks()

    def _add_noise(self, pixels: torch.Tensor, num_noise_draws: int, seed: int, noise_type: str) -> torch.Tensor:
        """Encode pixels in [0, 1] and add the noise that follows from the seed and each image."""
        sample = self._encode_pixels(pixels)
        if num_noise_draws == 0:
            noise = torch.zeros_like(sample)[None] + (0.5 if noise_type == "uniform" else 0.0)
        else:
            draw = torch.randn if noise_type == "gaussian" else torch.rand
            shape = (num_noise_draws, *sample.shape[1:])
            noise = [draw(shape, generator=image_generator(image, seed), dtype=sample.dtype) for image in pixels]
            noise = torch.stack(noise, dim=1).to(sample.device)
        return apply_noise(sample, noise, noise_type, self.transformer.config.noise_std)

    def _with_labels(
        self, batches: Iterable[torch.Tensor], class_labels: list[int | str] | torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield each batch with its labels, and check that there is one for each image."""
        if class_labels is None:
            yield from ((draws, None) for draws in batches)
            return
        labels, done = self.parse_class_labels(class_labels), 0
        for draws in batches:
            batch_labels = labels[done : done + draws.shape[1]]
            done += draws.shape[1]
            if len(batch_labels) < draws.shape[1]:
                raise ValueError(
                    f"`class_labels` must hold one for each image, but holds {len(labels)} for more images."
                )
            yield draws, batch_labels.to(draws.device)
        if done != len(labels):
            raise ValueError(
                f"`class_labels` must hold one for each image, but holds {len(labels)} for {done} images."
            )


def _check_noise(num_noise_draws: int, generator: Any):
    check_number("num_noise_draws", num_noise_draws, int, at_least=0)
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(
            f"`generator` must be one `torch.Generator` or None, but is of type {type(generator).__name__}. The noise"
            " of each image follows from its seed and the image."
        )


def _draw_seed(generator: torch.Generator | None) -> int:
    """Take a call's seed from a generator."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
