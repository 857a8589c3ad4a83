# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is uploaded with the weights of a model that loads without the package: it needs torch and diffusers only.

import difflib
import importlib
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL, ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ON_OVERFLOW = ("warn", "raise")


def scale_latents(latents: torch.Tensor, vae_config: Any) -> torch.Tensor:
    """A VAE's latents to the data of a flow, which is trained on about unit variance."""
    return (latents - (vae_config.shift_factor or 0.0)) * vae_config.scaling_factor


def unscale_latents(sample: torch.Tensor, vae_config: Any) -> torch.Tensor:
    """The inverse of [`scale_latents`]."""
    return sample / vae_config.scaling_factor + (vae_config.shift_factor or 0.0)


def vae_scale_factor(vae: AutoencoderKL) -> int:
    """How many pixels one cell of a VAE's latents covers along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def read_pipeline_index(index: dict[str, Any], module_name: str) -> dict[str, Any]:
    """What `model_index.json` means to a class of this module. A published repository names the modules of code that
    lie in it; who has the package needs none of that code."""
    library = module_name.partition(".")[0]
    if library in LOADABLE_CLASSES and isinstance(index.get("_class_name"), list):
        index["_class_name"] = index["_class_name"][1]
        index["transformer"] = [library, index["transformer"][1]]
    return index


class FlowBackPipeline(DiffusionPipeline):
    r"""
    Class-conditional image generation with a normalizing flow.

    Noise goes through the inverse of every flow block, from the noise's side to the image's; what the flow was trained
    with of Gaussian noise is then removed by one step along its exact score; a latent flow's result is decoded.

    Args:
        transformer ([`TarFlowTransformer2DModel`]): The flow.
        vae ([`~diffusers.AutoencoderKL`], *optional*):
            Of a latent flow: encodes its data and decodes its samples. Noise, guidance and denoising are in the space
            of its latents, on the scale of [`~FlowBackPipeline.encode`].
        id2label (`dict[int, str]`, *optional*): Class names; synonyms are separated by commas.
        guidance_scale (`float`, defaults to 1.0), guidance_rule (`str`, defaults to `"linear"`):
            What a call uses that names none, so that a checkpoint samples as its authors meant.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

        >>> transformer = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        ...     num_classes=2,
        ... )
        >>> pipe = FlowBackPipeline(transformer, id2label={0: "cat", 1: "dog"})
        >>> images = pipe(class_labels=["dog", 0], generator=torch.Generator().manual_seed(0)).images
        >>> [image.size for image in images]
        [(8, 8), (8, 8)]
        ```

    Raises:
        ValueError: if the VAE's latent channels are not the flow's.

    References: Zhai et al., Normalizing Flows are Capable Generative Models, https://arxiv.org/abs/2412.06329;
    Flowing Backwards: Improving Normalizing Flows via Reverse Representation Alignment,
    https://arxiv.org/abs/2511.22345
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        guidance_scale: float = 1.0,
        guidance_rule: str = "linear",
    ):
        super().__init__()
        if vae is not None and vae.config.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"`vae` must have as many latent channels as the flow has channels, but they are"
                f" {vae.config.latent_channels} and {transformer.config.in_channels} (`in_channels`)."
            )
        self.register_modules(transformer=transformer, vae=vae)
        # JSON turns the keys into strings.
        id2label = {int(label_id): label for label_id, label in (id2label or {}).items()}
        self.register_to_config(id2label=id2label or None, guidance_scale=guidance_scale, guidance_rule=guidance_rule)
        self.labels = {name.strip(): label_id for label_id, label in id2label.items() for name in label.split(",")}
        self.image_processor = VaeImageProcessor()
        self._guidance_scale = guidance_scale
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        return read_pipeline_index(super()._dict_from_json_file(json_file), cls.__module__)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs):
        """As diffusers' pipelines do; `push_to_hub=True` publishes as [`~FlowBackPipeline.push_to_hub`] does."""
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        publishing = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub:
            repo_id = publishing.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, **publishing)

    def push_to_hub(
        self,
        repo_id: str,
        run_dir: str | os.PathLike | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        license: str = "apache-2.0",
        force: bool = False,
    ) -> str:
        """
        Publish weights, code and a model card: a repository that loads with the package and without it.

        Args:
            repo_id (`str`): `"name"` in the token's own namespace, or `"organization/name"`.
            run_dir (`str`, *optional*):
                The output folder of `training/train_rra.py` whose files fill the card. By default the folder that the
                pipeline was loaded from, where that is one.
            commit_message (`str`, *optional*): "Upload FlowBackPipeline" if not given.
            private (`bool`, *optional*): Of a new repository. An existing public one is refused if this is true.
            token (`str`, *optional*): Defaults to that of `hf auth login` or the variable `HF_TOKEN`.
            create_pr (`bool`, defaults to `False`): Propose the files instead of committing them.
            license (`str`, defaults to `"apache-2.0"`): Of the weights, in the card's metadata.
            force (`bool`, defaults to `False`): Replace a model of another configuration.
        Returns:
            `str`: the repository's address.
        Raises:
            ValueError: if there is no token, or the repository holds another model and `force` is false.
            ImportError: if the package is not installed, which writes the card.
        """
        try:
            # Not as a statement: diffusers warns of packages that a repository's code imports so.
            hub = importlib.import_module("flowback_hf.hub")
        except ImportError as error:
            raise ImportError("Publishing a flow with its code and card needs the package flowback_hf.") from error
        return hub.push_to_hub(self, repo_id, run_dir, commit_message, private, token, create_pr, license, force)

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels of an image one cell of the sample covers along each side: 1 without a VAE."""
        return 1 if self.vae is None else vae_scale_factor(self.vae)

    @property
    def guidance_scale(self) -> float:
        """The guidance of the running call, read at every flow block; 1.0 is off."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of flow blocks of the last call: a step inverts one of them."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current flow block."""
        return self._interrupt

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Class names to class ids.

        Args:
            label (`str` or `list[str]`): Names, or any of their synonyms, as in `id2label`.
        Returns:
            `list[int]`: one id for each name.
        Raises:
            ValueError: for an unknown name, with the nearest known ones.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                nearest = difflib.get_close_matches(name, self.labels, n=3, cutoff=0.0)
                known = f"The nearest known ones are {nearest}." if nearest else "This pipeline has no `id2label`."
                raise ValueError(f"`class_labels` must be known names, but {name!r} is not one. {known}")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        guidance_rule: str | None = None,
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        solver: str = "auto",
        tolerance: float | None = None,
        denoise: bool = True,
        on_overflow: str = "warn",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            class_labels (`int`, `str`, a list of them or a `torch.Tensor`, *optional*):
                The class of each image by number or name; -1 is no class. `None` samples without one, as an
                unconditional model must.
            guidance_scale (`float`, *optional*, defaults to the pipeline's):
                Classifier-free guidance: at least 1.0, which is off. More makes the class plainer and costs variety.
            guidance_rule (`str`, *optional*, defaults to the pipeline's):
                `"linear"` (TARFlow's) or `"product"` (STARFlow's product of Gaussians).
            guidance_schedule (`str`, defaults to `"constant"`): `"linear"` lets guidance grow along the sequence.
            guidance_temperature (`float`, defaults to 1.0):
                Divides the attention logits of the unguided branch; guides an unconditional model.
            num_images_per_prompt (`int`, defaults to 1): Images per class label.
            generator (`torch.Generator` or one for each image, *optional*):
                Decides the noise. On the CPU, the same seed gives the same image on every device.
            latents (`torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`, *optional*):
                The noise itself. `pipe(latents=model(x, y).sample, class_labels=y, denoise=False)` gives `x` back,
                where `guidance_scale` is 1.0.
            solver (`str`, defaults to `"auto"`), tolerance (`float`, *optional*):
                How the flow is inverted, `"sequential"`, `"jacobi"` or whichever should be faster, and how exactly:
                see [`TarFlowTransformer2DModel.forward`].
            denoise (`bool`, defaults to `True`):
                Removes the Gaussian noise of training: `x + sigma^2 grad log p(x | y)`. Nothing to do for a flow that
                was trained with uniform noise or none.
            on_overflow (`str`, defaults to `"warn"`):
                What to do about images that are not finite: a warning that names them, or `"raise"`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (num_images, height, width, channels) or `"pt"` (num_images, channels, height, width),
                both in [0, 1], or `"latent"`: the flow's data, unclipped, before any VAE.
            return_dict (`bool`, defaults to `True`): Otherwise a tuple `(images,)`.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, block, {"latents": ...})` after each flow block; may return others.
            callback_on_step_end_tensor_inputs (`tuple[str]`): Which tensors it is given: `"latents"`.
        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`.
        Raises:
            ValueError: for any argument out of its range, before any work is done.
            OverflowError: if an image is not finite and `on_overflow` is `"raise"`.
        """
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        guidance_rule = self.config.guidance_rule if guidance_rule is None else guidance_rule
        if class_labels is not None:
            class_labels = self.normalize_class_labels(class_labels)
        self.check_inputs(
            class_labels,
            guidance_scale,
            num_images_per_prompt,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            on_overflow,
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False

        device = self._execution_device
        if class_labels is None:
            num_images = num_images_per_prompt
        else:
            class_labels = torch.tensor(class_labels, device=device).repeat_interleave(num_images_per_prompt)
            num_images = len(class_labels)
        latents = self.prepare_latents(num_images, generator, latents).to(device)

        num_blocks = self.transformer.config.num_blocks
        self._num_timesteps = num_blocks
        with self.progress_bar(total=num_blocks) as progress_bar:
            for step, block in enumerate(range(num_blocks, 0, -1)):
                if self.interrupt:
                    break
                latents = self.transformer(
                    latents,
                    class_labels,
                    blocks=[block],
                    inverse=True,
                    guidance_scale=self.guidance_scale,
                    guidance_rule=guidance_rule,
                    guidance_schedule=guidance_schedule,
                    guidance_temperature=guidance_temperature,
                    solver=solver,
                    tolerance=tolerance,
                ).sample
                if callback_on_step_end is not None:
                    tensors = {"latents": latents}
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, step, block, callback_kwargs)
                    latents = (callback_outputs or {}).get("latents", latents)
                progress_bar.update()

        sample = latents
        noise_std = self.transformer.config.noise_std
        if denoise and self.transformer.config.noise_type == "gaussian" and noise_std > 0:
            sample = self._denoise(sample, class_labels, noise_std)
        self._report_overflow(sample, on_overflow)
        if output_type != "latent":
            if self.vae is not None:
                sample = self._decode(sample)
            sample = self.image_processor.postprocess(sample, output_type=output_type)

        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=sample) if return_dict else (sample,)

    def check_inputs(
        self,
        class_labels: list[int] | None,
        guidance_scale: float,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: Iterable[str] = (),
        on_overflow: str = "warn",
    ):
        """Raises ValueError with one sentence for the first argument of a call that is out of its range."""
        config = self.transformer.config
        if class_labels is not None:
            if config.num_classes is None:
                raise ValueError(f"`class_labels` must be None for an unconditional model, but are {class_labels}.")
            if not class_labels:
                raise ValueError("`class_labels` must name at least one class, but are empty.")
            for label in class_labels:
                if not -1 <= label < config.num_classes:
                    raise ValueError(
                        f"`class_labels` must lie between 0 and {config.num_classes - 1}, or be -1 for no class, but"
                        f" one is {label}."
                    )
        if not guidance_scale >= 1.0:  # NaN is refused too
            raise ValueError(f"`guidance_scale` must be at least 1.0, which is off, but is {guidance_scale}.")
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1, but is {num_images_per_prompt}.")
        num_images = num_images_per_prompt * (1 if class_labels is None else len(class_labels))
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"`generator` must be one generator, or a list of one for each of the {num_images} images, but has"
                f" {len(generator)}."
            )
        expected = (num_images, config.in_channels, config.sample_size, config.sample_size)
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"`latents` must have shape {expected}, but have shape {tuple(latents.shape)}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, but is {output_type!r}.")
        if on_overflow not in ON_OVERFLOW:
            raise ValueError(f"`on_overflow` must be one of {ON_OVERFLOW}, but is {on_overflow!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, but"
                f" holds {unknown}."
            )

    def prepare_latents(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise of shape `(num_images, in_channels, sample_size, sample_size)` in float32, or float64 for a float64
        model, drawn image by image: the images of a seed do not depend on how they are batched."""
        dtype = torch.promote_types(self.transformer.dtype, torch.float32)
        if latents is not None:
            return latents.to(dtype)
        config = self.transformer.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        generators = generator if isinstance(generator, list) else [generator] * num_images
        noise = [
            randn_tensor(shape, generator=g, device=torch.device("cpu") if g is None else g.device, dtype=dtype)
            for g in generators
        ]
        return torch.cat(noise)

    def normalize_class_labels(self, class_labels: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """One flat list of class ids, of names, numbers, nested lists or a tensor."""
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str):
            return self.get_label_ids(class_labels)
        if isinstance(class_labels, Iterable):
            return [label for entry in class_labels for label in self.normalize_class_labels(entry)]
        try:
            return [operator.index(class_labels)]
        except TypeError:
            raise ValueError(f"`class_labels` must be whole numbers or names, but one is {class_labels!r}.") from None

    @torch.no_grad()
    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Images to the data of a latent flow: a draw from the VAE's posterior, on the scale the flow is trained on.

        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
            generator (`torch.Generator`, *optional*): Decides the draw.
        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)` in float32, without the
            noise of training: `(latents - shift_factor) * scaling_factor`. `encode` and decoding are each other's
            inverse as far as the VAE is.
        Raises:
            ValueError: if the pipeline has no VAE, or the images are not `sample_size` times its factor.
        """
        if self.vae is None:
            raise ValueError("`encode` needs a pipeline with a `vae`: the data of this flow are images themselves.")
        size = self.transformer.config.sample_size * self.vae_scale_factor
        if tuple(images.shape[2:]) != (size, size):
            raise ValueError(
                f"`images` must be of {size}x{size} pixels, the flow's {self.transformer.config.sample_size} times the"
                f" VAE's factor {self.vae_scale_factor}, but have shape {tuple(images.shape)}."
            )
        posterior = self.vae.encode(images.to(self._execution_device, self.vae.dtype)).latent_dist
        return scale_latents(posterior.sample(generator).float(), self.vae.config)

    def _decode(self, sample: torch.Tensor) -> torch.Tensor:
        """Data of a latent flow to images in [-1, 1]."""
        latents = unscale_latents(sample, self.vae.config)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    def _denoise(self, sample: torch.Tensor, class_labels: torch.Tensor | None, noise_std: float) -> torch.Tensor:
        """Tweedie's formula on the exact score: `x + sigma^2 grad_x log p(x | y)` (TARFlow, section 3.4)."""
        # A gradient is needed whatever mode the caller is in; inference tensors cannot be saved for one, clones can.
        with torch.inference_mode(False), torch.enable_grad():
            noisy_sample = sample.clone().requires_grad_()
            class_labels = None if class_labels is None else class_labels.clone()
            log_prob = self.transformer.log_prob(noisy_sample, class_labels)
            (score,) = torch.autograd.grad(log_prob.sum(), noisy_sample)
        return sample + noise_std**2 * score

    def _report_overflow(self, sample: torch.Tensor, on_overflow: str):
        overflowed = (~torch.isfinite(sample).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if not overflowed:
            return
        message = (
            f"Images {overflowed} of this call overflowed and are not finite. Try another seed, a smaller"
            " `guidance_scale` or `guidance_rule='product'`."
        )
        if on_overflow == "raise":
            self.maybe_free_model_hooks()
            raise OverflowError(message)
        logger.warning(message)
