# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is uploaded beside a model's weights, so that the model loads without the package. It therefore imports
# torch and diffusers only.

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
    """
    Scale a VAE's latents to about unit variance, which is what a latent flow is trained on.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): What the VAE's encoder returns.
        vae_config: The VAE's config, with `scaling_factor` and `shift_factor`.
    Returns:
        `torch.Tensor` of the same shape and dtype: `(latents - shift_factor) * scaling_factor`.
    """
    return (latents - (vae_config.shift_factor or 0.0)) * vae_config.scaling_factor


def unscale_latents(sample: torch.Tensor, vae_config: Any) -> torch.Tensor:
    """Undo [`scale_latents`]: turn a latent flow's data into what the VAE decodes."""
    return sample / vae_config.scaling_factor + (vae_config.shift_factor or 0.0)


def vae_scale_factor(vae: AutoencoderKL) -> int:
    """Return how many pixels one cell of a VAE's latents covers along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def read_pipeline_index(index: dict[str, Any], module_name: str) -> dict[str, Any]:
    """
    Make this package's classes load a published repository.

    The `model_index.json` of a published repository names code files in that repository. Those who have the package
    need none of that code: the names are replaced by those of the package's classes.

    Args:
        index (`dict`): The content of `model_index.json`. It is changed in place.
        module_name (`str`): The module of the class that loads. Inside a repository's own code nothing is replaced.
    Returns:
        `dict`: `index`.
    """
    library = module_name.partition(".")[0]
    if library in LOADABLE_CLASSES and isinstance(index.get("_class_name"), list):
        index["_class_name"] = index["_class_name"][1]
        index["transformer"] = [library, index["transformer"][1]]
    return index


def read_whole_number(text: str) -> int | None:
    """Return the whole number that a text consists of; `None` if it is something else."""
    return int(text) if text.removeprefix("-").isdecimal() else None


class FlowBackPipeline(DiffusionPipeline):
    r"""
    Generate images with a normalizing flow, of given classes or unconditionally.

    A call draws noise and inverts the flow blocks one by one, from the noise to the image. If the flow was trained
    with Gaussian noise, one step along its exact score then removes that noise. If the flow has a VAE, the VAE decodes
    the result.

    Args:
        transformer ([`TarFlowTransformer2DModel`]): The flow.
        vae ([`~diffusers.AutoencoderKL`], *optional*):
            The VAE of a latent flow. It encodes the flow's data and decodes its samples. Noise, guidance and denoising
            then work on its latents, on the scale of [`~FlowBackPipeline.encode`].
        id2label (`dict[int, str]`, *optional*): Class names by class id. Commas separate synonyms.
        guidance_scale (`float`, defaults to 1.0), guidance_rule (`str`, defaults to `"linear"`):
            Defaults for calls that do not set them. They are saved with the pipeline, so that a checkpoint samples as
            its authors intended.

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
        ValueError: if the VAE's latents and the flow's data differ in their number of channels.

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
                f"`vae` must have as many latent channels as the flow has `in_channels`, but they are"
                f" {vae.config.latent_channels} and {transformer.config.in_channels}."
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
        """
        Save the pipeline to a folder, as every diffusers pipeline does.

        Args:
            save_directory (`str`): The folder. It is created if it does not exist.
            push_to_hub (`bool`, defaults to `False`):
                Also publish with [`~FlowBackPipeline.push_to_hub`], to the repository `repo_id` or, without one, to a
                repository with the folder's name.
            args, kwargs:
                Arguments of [`~diffusers.DiffusionPipeline.save_pretrained`], such as `max_shard_size`, and `repo_id`,
                `commit_message`, `private`, `token` and `create_pr` of [`~FlowBackPipeline.push_to_hub`].
        """
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
        Publish weights, code and a model card. The repository loads with this package and without it.

        Args:
            repo_id (`str`): `"name"` in the token's own namespace, or `"organization/name"`.
            run_dir (`str`, *optional*):
                An output folder of `training/train_rra.py`, whose files fill the card. By default, the folder that the
                pipeline was loaded from, if it is such a folder.
            commit_message (`str`, *optional*): The message of the commit. By default, "Upload FlowBackPipeline".
            private (`bool`, *optional*): Create a private repository. If true, an existing public one is refused.
            token (`str`, *optional*): A token with write access. By default, that of `hf auth login` or `HF_TOKEN`.
            create_pr (`bool`, defaults to `False`): Open a pull request with the files instead of committing them.
            license (`str`, defaults to `"apache-2.0"`): The license of the weights, for the card's metadata.
            force (`bool`, defaults to `False`): Replace the repository's model even if its configuration differs.
        Returns:
            `str`: the repository's address.
        Raises:
            ValueError: if there is no token, if the token may not write there, or if the repository holds another
                model and `force` is false.
            ImportError: if the package flowback_hf, which writes the card, is not installed.
        """
        try:
            # An import statement here would make diffusers warn those who load this file without the package.
            hub = importlib.import_module("flowback_hf.hub")
        except ImportError as error:
            raise ImportError("Publishing a flow with its code and card needs the package flowback_hf.") from error
        return hub.push_to_hub(self, repo_id, run_dir, commit_message, private, token, create_pr, license, force)

    @property
    def vae_scale_factor(self) -> int:
        """The number of pixels that one cell of the sample covers along each side. It is 1 without a VAE."""
        return 1 if self.vae is None else vae_scale_factor(self.vae)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call, which reads it before every flow block. 1.0 is off."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the last call. A step inverts one flow block."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop. Set `pipe._interrupt = True` in a callback to stop after its block."""
        return self._interrupt

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Look up the class ids of labels that are strings. The command line and Python read labels alike.

        A known name is a name, and any other whole number is a class id. A string that is the name of one class and
        the id of another is refused: `"name:7"` is the class that is called 7, and `"id:7"` is class 7, as is the
        number 7 in Python.

        Args:
            label (`str` or `list[str]`): Names or synonyms from `id2label`, or class ids, or `"-1"` for no class.
        Returns:
            `list[int]`: one id for each label. Their range is not checked.
        Raises:
            ValueError: if a label is neither a known name nor a whole number, or if it can be read in two ways. The
                message suggests the most similar known names, or shows how to write either class.

        Example:
            ```py
            >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

            >>> flow = TarFlowTransformer2DModel(8, 4, 3, num_blocks=1, num_layers=1, num_classes=3)
            >>> pipe = FlowBackPipeline(flow, id2label={0: "cat, house cat", 1: "2", 2: "dog"})
            >>> pipe.get_label_ids(["house cat", "0", "name:2", "id:2"])
            [0, 0, 1, 2]
            ```
        """
        return [self._get_label_id(name) for name in ([label] if isinstance(label, str) else label)]

    def _get_label_id(self, label: str) -> int:
        kind, _, rest = label.partition(":")
        if label in self.labels:
            label_id = self.labels[label]
            other = read_whole_number(label)
            if other is not None and other != label_id and 0 <= other < (self.transformer.config.num_classes or 0):
                raise ValueError(
                    f"`class_labels` must name one class, but {label!r} is the name of class {label_id} and the number"
                    f" of class {other}. Write 'name:{label}' for the former or 'id:{label}' for the latter."
                )
            return label_id
        if kind == "name" and rest in self.labels:
            return self.labels[rest]
        label_id = read_whole_number(rest if kind == "id" else label)
        if label_id is None:
            nearest = difflib.get_close_matches(label, self.labels, n=3, cutoff=0.0)
            known = f"The nearest known ones are {nearest}." if nearest else "This pipeline has no `id2label`."
            raise ValueError(f"`class_labels` must be known names or numbers, but {label!r} is not one. {known}")
        return label_id

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
        Generate images.

        Args:
            class_labels (`int`, `str`, a list of them or a `torch.Tensor`, *optional*):
                The class of each image, by id or name; -1 means no class. A string is read as
                [`~FlowBackPipeline.get_label_ids`] says. With `None`, images are sampled without a class. An
                unconditional flow takes `None` only.
            guidance_scale (`float`, *optional*, defaults to the pipeline's):
                The strength of classifier-free guidance, at least 1.0, which turns it off. More guidance makes classes
                more distinct and images less varied.
            guidance_rule (`str`, *optional*, defaults to the pipeline's):
                `"linear"` (TARFlow's) or `"product"` (STARFlow's product of Gaussians).
            guidance_schedule (`str`, defaults to `"constant"`): With `"linear"`, guidance grows along the sequence.
            guidance_temperature (`float`, defaults to 1.0):
                Divides the attention logits of the unguided branch. An unconditional flow is guided by it.
            num_images_per_prompt (`int`, defaults to 1): Images per class label.
            generator (`torch.Generator` or one for each image, *optional*):
                Draws the noise. With a generator on the CPU, a seed gives the same images on every device.
            latents (`torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`, *optional*):
                The noise itself. With `guidance_scale` 1.0, `pipe(latents=model(x, y).sample, class_labels=y,
                denoise=False)` returns `x`.
            solver (`str`, defaults to `"auto"`), tolerance (`float`, *optional*):
                How to invert a block and how exactly; see [`TarFlowTransformer2DModel.forward`].
            denoise (`bool`, defaults to `True`):
                Remove the Gaussian noise of training: `x + sigma^2 grad log p(x | y)`. Flows that were trained with
                uniform noise or none are never denoised.
            on_overflow (`str`, defaults to `"warn"`): Warn of images that are not finite, or `"raise"` an error.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`; `"np"`, (num_images, height, width, channels), or `"pt"`, (num_images, channels, height,
                width), both in [0, 1]; or `"latent"`: the flow's data, neither clipped nor decoded.
            return_dict (`bool`, defaults to `True`): If false, return the tuple `(images,)`.
            callback_on_step_end (`Callable`, *optional*):
                Called after each flow block as `callback(pipe, step, block, {"latents": ...})`. If it returns a dict
                with `"latents"`, these replace the current ones.
            callback_on_step_end_tensor_inputs (`tuple[str]`): Names of the tensors it receives: `"latents"`.
        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images.
        Raises:
            ValueError: if an argument is out of its range, before any work is done.
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
        images = self._to_output_type(sample, output_type)

        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
        """
        Check the arguments of a call.

        Args:
            class_labels (`list[int]`, *optional*): Class ids, as [`~FlowBackPipeline.normalize_class_labels`] returns.
            guidance_scale, num_images_per_prompt, generator, latents, output_type: Arguments of a call.
            callback_on_step_end_tensor_inputs, on_overflow: Arguments of a call.
        Raises:
            ValueError: for the first argument that is out of its range, in one sentence.
        """
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
        """
        Draw the noise to start from, or convert given noise.

        The noise is drawn image by image, so that the images of a seed do not depend on how they are batched.

        Args:
            num_images (`int`): The number of images.
            generator (`torch.Generator` or one for each image, *optional*): Draws the noise, on its own device.
            latents (`torch.Tensor`, *optional*): The noise, if it is given.
        Returns:
            `torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`: float32, or float64 for a
            float64 flow.
        """
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
        """
        Turn class labels of any accepted form into one flat list of class ids.

        Args:
            class_labels (`int`, `str`, a nested list of them or a `torch.Tensor`):
                Class ids, or strings as in [`~FlowBackPipeline.get_label_ids`].
        Returns:
            `list[int]`: the class ids. Their range is not checked.
        Raises:
            ValueError: as [`~FlowBackPipeline.get_label_ids`], or if a label is neither a whole number nor a string.
        """
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
        Encode images as the data of a latent flow: draw from the VAE's posterior and scale the draw.

        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in [-1, 1].
            generator (`torch.Generator`, *optional*): Decides the draw.
        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`: `(latents - shift_factor) *
            scaling_factor` in float32, without the noise of training. Decoding undoes `encode`, up to what the VAE
            loses.
        Raises:
            ValueError: if the pipeline has no VAE, or if the images' height and width are not `sample_size *
                vae_scale_factor`.
        """
        if self.vae is None:
            raise ValueError("`encode` needs a pipeline with a `vae`. This pipeline has none: its flow models pixels.")
        size = self.transformer.config.sample_size * self.vae_scale_factor
        if tuple(images.shape[2:]) != (size, size):
            raise ValueError(
                f"`images` must have {size}x{size} pixels (`sample_size` {self.transformer.config.sample_size} times"
                f" the VAE's factor {self.vae_scale_factor}), but have shape {tuple(images.shape)}."
            )
        posterior = self.vae.encode(images.to(self._execution_device, self.vae.dtype)).latent_dist
        return scale_latents(posterior.sample(generator).float(), self.vae.config)

    def _to_output_type(self, sample: torch.Tensor, output_type: str) -> Any:
        """Turn the flow's data into what a call returns: decode latents, then convert pixels in [-1, 1]."""
        if output_type == "latent":
            return sample
        if self.vae is not None:
            latents = unscale_latents(sample, self.vae.config)
            sample = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(sample, output_type=output_type)

    def _denoise(self, sample: torch.Tensor, class_labels: torch.Tensor | None, noise_std: float) -> torch.Tensor:
        """Apply Tweedie's formula with the exact score: `x + sigma^2 grad_x log p(x | y)` (TARFlow, section 3.4)."""
        # The caller may be in inference mode, whose tensors autograd does not save. It does save clones of them.
        with torch.inference_mode(False), torch.enable_grad():
            noisy_sample = sample.clone().requires_grad_()
            class_labels = None if class_labels is None else class_labels.clone()
            log_prob = self.transformer.log_prob(noisy_sample, class_labels)
            (score,) = torch.autograd.grad(log_prob.sum(), noisy_sample)
        return sample + noise_std**2 * score

    def _report_overflow(self, sample: torch.Tensor, on_overflow: str):
        """Name the images that are not finite, in a warning or an OverflowError."""
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
