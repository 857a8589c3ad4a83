# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is uploaded beside a model's weights, so that the model loads without the package. It therefore imports
# torch, diffusers and Pillow only, which diffusers requires.

import contextlib
import difflib
import importlib
import itertools
import math
import numbers
import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.models import AutoencoderKL, ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import is_peft_available, load_image, logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ON_OVERFLOW = ("warn", "raise")


# Copied from flowback_hf_cli.numbers.check_number
def check_number(
    name: str,
    value: Any,
    kind: type,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
):
    """Raise ValueError unless a value is a number of a kind, `int` or (finite) `float`, within these bounds."""
    is_kind = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if (
        is_kind
        and -math.inf < value < math.inf  # NaN is refused, too
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    ):
        return
    bounds = {" of at least": at_least, " above": above, " at most": at_most, " below": below}
    expected = " and".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    raise ValueError(f"`{name}` must be a {'whole' if kind is int else 'finite'} number{expected}, but is {value!r}.")


def check_generator(generator: torch.Generator | list[torch.Generator] | None, num_images: int):
    """Raise ValueError unless it is a generator, a list of one for each image, or None."""
    generators = generator if isinstance(generator, list) else [generator] * num_images
    if len(generators) != num_images:
        raise ValueError(
            f"`generator` must be one generator, or a list of one for each of the {num_images} images, but has"
            f" {len(generator)}."
        )
    for each in generators:
        if not isinstance(each, torch.Generator | None):
            raise ValueError(f"`generator` must be a `torch.Generator`, a list of them or None, but is {each!r}.")


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


def apply_noise(sample: torch.Tensor, noise: torch.Tensor, noise_type: str, noise_std: float) -> torch.Tensor:
    """
    Add noise to a sample as in training. Training, classification and editing all add it this way.

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
        >>> from flowback_hf.pipelines.pipeline_flowback import apply_noise

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
        for name in ("transformer", "reverse_transformer"):
            if index.get(name, [None, None])[1] is not None:
                index[name] = [library, index[name][1]]
    return index


def read_whole_number(text: str) -> int | None:
    """Return the whole number that a text consists of; `None` if it is something else."""
    return int(text) if text.removeprefix("-").isdecimal() else None


def classes_by_name(id2label: dict[int, str]) -> dict[str, list[int]]:
    """
    The ids of the classes that have a name: the whole name, or a synonym in it. If it is the whole name of a class,
    those that have it as a synonym are left out.
    """
    whole_names: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for label_id, name in id2label.items():
        whole_names.setdefault(name, []).append(int(label_id))
        for synonym in dict.fromkeys(part.strip() for part in name.split(",")):
            synonyms.setdefault(synonym, []).append(int(label_id))
    return synonyms | whole_names


def fit_image(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """
    Cut the middle square out of an image and resize it. Training and classification both fit images this way.

    Args:
        image (`PIL.Image.Image`): An image of any size and mode, with pixels.
        size (`int`): Height and width of the result, in pixels.
    Returns:
        `PIL.Image.Image`: a new image of `size` times `size` pixels in the same mode, interpolated bicubically.

    Example:
        ```py
        >>> import PIL.Image
        >>> from flowback_hf.pipelines.pipeline_flowback import fit_image

        >>> fit_image(PIL.Image.new("RGB", (640, 427)), 64).size
        (64, 64)
        ```
    """
    return PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.BICUBIC)


@contextlib.contextmanager
def reading_image() -> Iterator[None]:
    """Raise ValueError with an end of a sentence about the image, whatever its reader raises for a damaged file."""
    try:
        yield
    except PIL.UnidentifiedImageError:
        raise ValueError("cannot be read: it is not an image") from None
    except Exception as error:  # PIL's readers raise errors of any kind
        raise ValueError(f"cannot be read: {error}") from error


def open_image(image: str | os.PathLike | PIL.Image.Image) -> PIL.Image.Image:
    """
    Read an image in its own mode, turned upright as its EXIF orientation says. Of an animation, it is the first frame.

    Args:
        image (`str`, `os.PathLike` or `PIL.Image.Image`): A path or an address, or an image that was opened before.
    Returns:
        `PIL.Image.Image`: a new image. Its `filename` is the path, if there is one.
    Raises:
        ValueError: if there is no such file, or if it is not an image, is damaged or is too large to be safe to read.
    """
    is_path = isinstance(image, (str, os.PathLike))
    with reading_image():
        upright = load_image(os.fspath(image) if is_path else image, convert_method=lambda opened: opened)
    upright.filename = os.fspath(image) if is_path else getattr(image, "filename", "")
    return upright


def to_eight_bits(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """
    Convert an image to 8 bits per channel. Training, evaluation and classification all convert images this way.

    Values of 16 bits are divided by 257, and floats from 0 to 1 are multiplied by 255. Nothing is clipped.

    Args:
        image (`PIL.Image.Image`): An image of any mode, as [`open_image`] returns it.
        mode (`str`): `"L"` or `"RGB"`. Palettes, CMYK, transparent and coloured images are converted by Pillow.
    Returns:
        `PIL.Image.Image`: a new image of this mode, without metadata.
    Raises:
        ValueError: if the image has no pixels, a mode that Pillow does not convert, or values whose range is not
            known: floats outside [0, 1], or 32-bit integers.

    Example:
        ```py
        >>> import PIL.Image
        >>> from flowback_hf.pipelines.pipeline_flowback import to_eight_bits

        >>> to_eight_bits(PIL.Image.new("I;16", (2, 2), 0x8080), "L").getpixel((0, 0))
        128
        ```
    """
    if 0 in image.size:
        raise ValueError(f"must have pixels, but has a size of {image.width}x{image.height}")
    if image.mode == "I":
        raise ValueError("must have 8 or 16 bits, or floats in [0, 1], but has 32-bit integers of an unknown range")
    if image.mode == "F" or image.mode.startswith("I;16"):
        white = 1.0 if image.mode == "F" else 65535.0
        values = VaeImageProcessor.pil_to_numpy([image]) * (255.0 / white)  # it divides by 255
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is refused too
            raise ValueError(f"must hold values from 0 to {white:g}, but they are {image.getextrema()}")
        (image,) = VaeImageProcessor.numpy_to_pil(values[..., None])
    try:
        converted = image.convert(mode)
    except ValueError as error:
        raise ValueError(f"cannot be converted: {error}") from error
    converted.info = {}
    return converted


def array_to_pixels(image: Any, number: int) -> torch.Tensor:
    """Turn an array (height, width[, channels]) or a tensor ([channels, ]height, width) into the latter, in [0, 1]."""
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu()
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels
    elif hasattr(image, "__array__"):
        try:
            # A copy, because torch has no negative strides, as of a mirrored array.
            pixels = torch.from_numpy(image.__array__().copy())
        except (TypeError, ValueError) as error:
            raise ValueError(f"Image {number} must hold floats in [0, 1] or uint8, but {error}") from error
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.movedim(-1, 0)
    else:
        raise ValueError(
            f"Image {number} must be a PIL image, an array, a tensor or a path, but is of type {type(image).__name__}."
        )
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"Image {number} must have 1 or 3 channels, but its shape is {tuple(image.shape)}.")
    if pixels.numel() == 0:
        raise ValueError(f"Image {number} must have pixels, but its shape is {tuple(image.shape)}.")
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    if pixels.is_complex():
        raise ValueError(f"Image {number} must hold floats in [0, 1] or uint8, but holds {pixels.dtype}.")
    if not pixels.is_floating_point() or not ((pixels >= 0) & (pixels <= 1)).all():
        values = pixels.double()
        raise ValueError(
            f"Image {number} must hold floats in [0, 1] or uint8, but holds {pixels.dtype} from {values.min():.3g} to"
            f" {values.max():.3g}."
        )
    return pixels


def is_one_image(images: Any, num_channels: int) -> bool:
    """
    Tell one image, in any accepted form, from several.

    Only flows of grey images take batches without channels, `(num_images, height, width)`.

    Args:
        images: What a user passed.
        num_channels (`int`): The number of channels of the flow's images.
    Raises:
        ValueError: if a tensor could be three grey images or a coloured one.
    """
    if isinstance(images, (str, os.PathLike)):
        return not os.path.isdir(images)
    if hasattr(images, "convert"):
        return True
    num_dimensions = getattr(images, "ndim", None)
    if num_dimensions != 3 or num_channels != 1:
        return num_dimensions is not None and num_dimensions < 4
    if images.shape[-1] in (1, 3, 4):  # channels; a tensor with its channels last is refused as one image
        return True
    if not isinstance(images, torch.Tensor):
        return False
    if images.shape[0] == 3:
        raise ValueError(
            f"`images` of shape {tuple(images.shape)} could be three grey images or one of three channels. Pass"
            " `images[:, None]` for three, or `images[None]` for one."
        )
    return images.shape[0] == 1


def iterate_images(images: Any, num_channels: int) -> Iterable:
    """
    Find the single images in what a user passed.

    Args:
        images: Images in any form that [`~FlowBackPipeline.encode`] takes.
        num_channels (`int`): The number of channels of the flow's images.
    Returns:
        `Iterable`: the images, at least one. It has a length if `images` have one.
    Raises:
        ValueError: if there are none, or if it is not clear which they are.
    """
    if is_one_image(images, num_channels):
        return [images]
    if isinstance(images, (str, os.PathLike)):
        images = find_image_files(Path(images))
    elif isinstance(images, Mapping):
        raise ValueError(f"`images` must be images, but is a mapping of {list(images)}. Pass one of its values.")
    elif hasattr(images, "select_columns"):  # a data set of the library datasets
        images = select_image_column(images)
    iterator = iter(images)
    for first in iterator:
        return images if hasattr(images, "__len__") else itertools.chain([first], iterator)
    raise ValueError("`images` must hold at least one image, but are empty.")


def find_image_files(folder: Path) -> list[Path]:
    """List the image files of a folder and its subfolders, hidden ones excepted, sorted by path."""
    endings = PIL.Image.registered_extensions()
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in endings and path.is_file() and not path.name.startswith(".")
    ]
    if not files:
        raise ValueError(f"`images` is the folder {str(folder)!r}, which holds no image files.")
    return files


def select_image_column(dataset: Any) -> Any:
    """Return the one column of a data set that holds images."""
    features = dataset.features or {}
    columns = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(columns) != 1:
        raise ValueError(
            f"`images` is a data set, which must have one column of images, but {len(columns)} of its columns"
            f" {list(features)} are such. Pass one column, such as `dataset['image']`."
        )
    return dataset[columns[0]]


CLASS_EMBED_FILE = "class_embed.safetensors"


def check_lora_weights(source: Any, state_dict: dict[str, torch.Tensor], transformer: ModelMixin):
    """
    Check that a LoRA adapter fits a flow, before anything is attached.

    Args:
        source: What the user gave, for the message.
        state_dict (`dict`): The adapter's tensors, named `transformer.<module>.lora_A.weight` and `...lora_B.weight`.
        transformer ([`TarFlowTransformer2DModel`]): The flow.
    Raises:
        ValueError: if a tensor has another name, or does not fit the module that it names.
    """
    source = "a dictionary" if isinstance(source, dict) else repr(str(source))
    modules = dict(transformer.named_modules())
    for name, tensor in state_dict.items():
        module_name, separator, factor = name.removeprefix("transformer.").partition(".lora_")
        if not name.startswith("transformer.") or not separator:
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` must hold a LoRA adapter of a flow, with tensors such as"
                f" 'transformer.blocks.0.layers.0.attn.to_qkv.lora_A.weight', but {source} holds {name!r}."
            )
        module = modules.get(module_name)
        fits = hasattr(module, "in_features") and (
            tensor.shape[-1] == module.in_features if factor[0] == "A" else len(tensor) == module.out_features
        )
        if not fits:
            raise ValueError(
                f"`pretrained_model_name_or_path_or_dict` must hold an adapter of this flow, but that of {source} was"
                f" made for another: {name!r} of shape {tuple(tensor.shape)} fits no layer here."
            )


class FlowBackLoraLoaderMixin(SanaLoraLoaderMixin):
    """
    Loads and saves LoRA adapters of a pipeline's flow, and switches between them, as diffusers' pipelines do.

    The base class does the same for another pipeline whose adapters belong to its `transformer` only. It documents
    `save_lora_weights`, `set_adapters`, `fuse_lora`, `unfuse_lora`, `disable_lora`, `enable_lora`, `delete_adapters`
    and `unload_lora_weights`.
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = False,
        **kwargs,
    ):
        """
        Load a LoRA adapter, attach it to the flow and switch it on.

        Args:
            pretrained_model_name_or_path_or_dict (`str` or `dict`):
                A folder or a repository on the Hub with the file `pytorch_lora_weights.safetensors`, the path of such
                a file, or its tensors.
            adapter_name (`str`, *optional*): What to call the adapter. By default, `"default_0"`, `"default_1"` ...
            hotswap (`bool`, defaults to `False`): Replace the weights of the adapter of this name, in place.
            low_cpu_mem_usage (`bool`, defaults to `False`): Create the adapter's layers without memory first.
            kwargs: As in diffusers: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.
        Raises:
            ImportError: if PEFT is not installed.
            OSError: if there is no such file.
            ValueError: if it holds something else or an adapter of another flow. Nothing is attached then.
        """
        if not is_peft_available():
            raise ImportError(
                "`load_lora_weights` needs PEFT. Install it with `pip install peft`, or with the extra:"
                " `pip install 'flowback_hf[lora]'`."
            )
        state_dict, metadata = self._read_tensors(pretrained_model_name_or_path_or_dict, **kwargs)
        check_lora_weights(pretrained_model_name_or_path_or_dict, state_dict, self.transformer)
        self.load_lora_into_transformer(
            state_dict,
            self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    def _read_tensors(self, source: Any, **kwargs) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Return the tensors of a safetensors file, and what was saved with them."""
        try:
            return self.lora_state_dict(source, **{"use_safetensors": True, **kwargs, "return_lora_metadata": True})
        except Exception as error:  # of the file system, of the network or of safetensors
            # ValueError is of a path that does not exist, and is no repository's id either.
            kind = OSError if isinstance(error, OSError | ValueError) else ValueError
            raise kind(
                "`pretrained_model_name_or_path_or_dict` must be a folder, a file or a repository on the Hub that"
                f" holds an adapter's safetensors, but {str(source)!r} cannot be read: {error}"
            ) from error


class FlowBackPipelineMixin(FlowBackLoraLoaderMixin):
    """
    What pipelines of a flow share: its components, class names, and the way from an image to the flow's data.

    Args:
        transformer ([`TarFlowTransformer2DModel`]): The flow.
        vae ([`~diffusers.AutoencoderKL`], *optional*): The VAE of a latent flow.
        id2label (`dict[int, str]`, *optional*): Class names by class id. Commas separate synonyms.
        guidance_scale (`float`, defaults to 1.0), guidance_rule (`str`, defaults to `"linear"`):
            How [`FlowBackPipeline`] samples by default.
    """

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
        check_number("guidance_scale", guidance_scale, float, at_least=1.0)
        transformer.check_inverse_arguments(guidance_rule=guidance_rule)
        if vae is not None and vae.config.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"`vae` must have as many latent channels as the flow has `in_channels`, but they are"
                f" {vae.config.latent_channels} and {transformer.config.in_channels}."
            )
        self.register_modules(transformer=transformer, vae=vae)
        # JSON turns the keys into strings.
        id2label = {int(label_id): label for label_id, label in (id2label or {}).items()}
        self.register_to_config(id2label=id2label or None, guidance_scale=guidance_scale, guidance_rule=guidance_rule)
        self.image_processor = VaeImageProcessor()
        self._running_calls: dict[int, CallState] = {}  # by thread
        self._last_call = CallState()

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        index = read_pipeline_index(super()._dict_from_json_file(json_file), cls.__module__)
        if "reverse_transformer" not in cls._optional_components:
            index.pop("reverse_transformer", None)
        return index

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """
        Make this pipeline from another pipeline of a flow. Both share the components; nothing is copied or cast.

        Args:
            pipeline ([`FlowBackPipeline`] or [`FlowBackClassificationPipeline`]):
                The pipeline whose components, class names and default guidance are used.
            kwargs: Components and other arguments that replace those of `pipeline`; a `dtype` to cast all of them to.
        Returns:
            The new pipeline.
        Raises:
            ValueError: if `pipeline` has no flow.
        """
        if "transformer" not in pipeline.components:
            raise ValueError(
                f"`pipeline` must be a pipeline of a flow, with a `transformer`, but is a {type(pipeline).__name__}."
            )
        # By themselves, diffusers passes on components of the annotated classes only, without their subclasses, and
        # casts all of them to one dtype.
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        components = {name: pipeline.components.get(name) for name in ("transformer", *cls._optional_components)}
        names = ("id2label", "guidance_scale", "guidance_rule")
        config = {name: pipeline.config[name] for name in names if name in pipeline.config}
        new = cls(**{**components, **config, **kwargs})
        new.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return new if dtype is None else new.to(dtype=dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs):
        """
        Save the pipeline to a folder, as every diffusers pipeline does.

        Args:
            save_directory (`str`): The folder. It is created if it does not exist.
            push_to_hub (`bool`, defaults to `False`):
                Also publish, to the repository `repo_id` or, without one, to a repository with the folder's name.
            args, kwargs:
                Arguments of [`~diffusers.DiffusionPipeline.save_pretrained`], such as `max_shard_size`, and `repo_id`,
                `commit_message`, `private`, `token`, `create_pr` and `license` of `push_to_hub`.
        Raises:
            ValueError: if a `variant` is to be published, which `push_to_hub` does not do.
        """
        if push_to_hub and kwargs.get("variant") is not None:
            raise ValueError(
                "`variant` must be left out with `push_to_hub`, which publishes the weights as they are, but is"
                f" {kwargs['variant']!r}."
            )
        names = ("repo_id", "commit_message", "private", "token", "create_pr", "license")
        publishing = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub:
            repo_id = publishing.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, **publishing)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        *,
        run_dir: str | os.PathLike | None = None,
        license: str = "apache-2.0",
        force: bool = False,
    ) -> str:
        """
        Publish weights, code and a model card. The repository loads with this package and without it.

        The repository is the same for [`FlowBackPipeline`] and [`FlowBackClassificationPipeline`]: either loads it.

        Args:
            repo_id (`str`): `"name"` in the token's own namespace, or `"organization/name"`.
            commit_message (`str`, *optional*): The message of the commit. By default, "Upload FlowBackPipeline".
            private (`bool`, *optional*): Create a private repository. If true, an existing public one is refused.
            token (`str`, *optional*): A token with write access. By default, that of `hf auth login` or `HF_TOKEN`.
            create_pr (`bool`, defaults to `False`): Open a pull request with the files instead of committing them.
            run_dir (`str`, *optional*):
                An output folder of `training/train_rra.py`, whose files fill the card. By default, the folder that the
                pipeline was loaded from, if it is such a folder.
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
        return hub.push_to_hub(
            self, repo_id, commit_message, private, token, create_pr, run_dir=run_dir, license=license, force=force
        )

    def compile(self):
        """
        Compile the flow for the device that it is on. Nothing else needs to be configured.

        The first call compiles: about half a minute on a CPU. Code for one image and code for any larger batch are
        compiled apart. PyTorch keeps both on disk, so that another process on the same machine needs a few seconds. On
        a CUDA device, steps run as CUDA graphs; if that fails, a warning says so and they are compiled without.

        Move the pipeline to its device first. Adapters may be loaded before or afterwards.

        Example:
            ```py
            >>> import torch
            >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

            >>> pipe = FlowBackPipeline(
            ...     TarFlowTransformer2DModel(
            ...         sample_size=8, patch_size=2, num_blocks=2, num_layers=1, num_attention_heads=2,
            ...         attention_head_dim=16, num_classes=10,
            ...     )
            ... )
            >>> pipe.compile()
            >>> len(pipe(class_labels=[3]).images)
            1
            ```
        """
        reverse_transformer = self.components.get("reverse_transformer")
        if reverse_transformer is not None:
            reverse_transformer.compile_repeated_blocks(fullgraph=True)
        if self._execution_device.type != "cuda":
            self.transformer.compile_repeated_blocks(fullgraph=True)
            return
        self.transformer.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
        config = self.transformer.config
        noise = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
        try:
            self.transformer(noise.to(self._execution_device), inverse=True, solver="sequential")
        except Exception as error:
            logger.warning(f"The flow is compiled without CUDA graphs, which failed: {error}")
            torch.compiler.reset()
            self.transformer.compile_repeated_blocks(fullgraph=True)

    @property
    def vae_scale_factor(self) -> int:
        """The number of pixels that one cell of the sample covers along each side. It is 1 without a VAE."""
        return 1 if self.vae is None else vae_scale_factor(self.vae)

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the images that the flow takes, or its VAE if it has one."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def num_channels(self) -> int:
        """The number of channels of the images that the flow takes, or its VAE if it has one."""
        return (self.transformer if self.vae is None else self.vae).config.in_channels

    @property
    def labels(self) -> dict[str, int]:
        """
        The class id of each name and synonym in `id2label`. A name goes before a synonym that is spelled alike, and
        what several classes are called is left out.
        """
        id2label = self.config.id2label or {}
        classes = classes_by_name(id2label)
        synonyms = dict.fromkeys(name.strip() for label in id2label.values() for name in label.split(","))
        return {name: classes[name][0] for name in synonyms if len(classes[name]) == 1}

    def get_label_ids(self, label: str | list[str], argument: str = "class_labels") -> list[int]:
        """
        Look up the class ids of labels that are strings. The command line and Python read labels alike.

        A known name is a name, and any other whole number is a class id. A string that is the name of one class and
        the id of another is refused: `"name:7"` is the class that is called 7, and `"id:7"` is class 7, as is the
        number 7 in Python.

        Args:
            label (`str` or `list[str]`): Names or synonyms from `id2label`, or class ids, or `"-1"` for no class.
            argument (`str`, defaults to `"class_labels"`): The argument that errors name.
        Returns:
            `list[int]`: one id for each label. Their range is not checked.
        Raises:
            ValueError: if a label is neither a known name nor a whole number, or if it can be read in two ways or
                names several classes. The message suggests the most similar known names, or shows how to write either
                class.

        Example:
            ```py
            >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

            >>> flow = TarFlowTransformer2DModel(8, 4, 3, num_blocks=1, num_layers=1, num_classes=3)
            >>> pipe = FlowBackPipeline(flow, id2label={0: "cat, house cat", 1: "2", 2: "dog"})
            >>> pipe.get_label_ids(["house cat", "0", "name:2", "id:2"])
            [0, 0, 1, 2]
            ```
        """
        classes = classes_by_name(self.config.id2label or {})
        return [self._get_label_id(name, argument, classes) for name in ([label] if isinstance(label, str) else label)]

    def _get_label_id(self, label: str, argument: str, classes: dict[str, list[int]]) -> int:
        kind, _, rest = label.partition(":")
        name = rest if kind == "name" and label not in classes else label
        named = classes.get(name, [])
        if len(named) > 1:
            raise ValueError(
                f"`{argument}` must name one class, but {name!r} is the name of the classes {named}. Write"
                f" 'id:{named[0]}' for the first."
            )
        if named:
            other = read_whole_number(label)
            if other not in (None, named[0]) and 0 <= other < (self.transformer.config.num_classes or 0):
                raise ValueError(
                    f"`{argument}` must name one class, but {label!r} is the name of class {named[0]} and the number"
                    f" of class {other}. Write 'name:{label}' for the former or 'id:{label}' for the latter."
                )
            return named[0]
        label_id = read_whole_number(rest if kind == "id" else label)
        if label_id is None:
            nearest = difflib.get_close_matches(label, list(self.labels), n=3, cutoff=0.0)
            known = f"The nearest known ones are {nearest}." if nearest else "This pipeline has no `id2label`."
            raise ValueError(f"`{argument}` must be known names or numbers, but {label!r} is not one. {known}")
        return label_id

    def normalize_class_labels(
        self, class_labels: int | str | list[int | str] | torch.Tensor, argument: str = "class_labels"
    ) -> list[int]:
        """
        Turn class labels of any accepted form into one flat list of class ids.

        Args:
            class_labels (`int`, `str`, a nested list of them or a `torch.Tensor`):
                Class ids, or strings as in [`~FlowBackPipeline.get_label_ids`].
            argument (`str`, defaults to `"class_labels"`): The argument that errors name.
        Returns:
            `list[int]`: the class ids. Their range is not checked.
        Raises:
            ValueError: as [`~FlowBackPipeline.get_label_ids`], or if a label is neither a whole number nor a string.
        """
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str):
            return self.get_label_ids(class_labels, argument)
        if isinstance(class_labels, Iterable):
            return [label for entry in class_labels for label in self.normalize_class_labels(entry, argument)]
        try:
            if isinstance(class_labels, bool):
                raise TypeError
            return [operator.index(class_labels)]
        except TypeError:
            raise ValueError(f"`{argument}` must be whole numbers or names, but one is {class_labels!r}.") from None

    def parse_class_labels(
        self, class_labels: int | str | list[int | str] | torch.Tensor, argument: str = "class_labels"
    ) -> torch.Tensor:
        """
        Turn class labels of any accepted form into what the flow takes, and check that it takes them.

        Args:
            class_labels (`int`, `str`, a nested list of them or a `torch.Tensor`):
                Class ids or names as in [`~FlowBackPipeline.normalize_class_labels`]; or class weights, a tensor of
                floats of shape `(num_labels, num_classes)`.
            argument (`str`, defaults to `"class_labels"`): The argument that errors name.
        Returns:
            `torch.LongTensor` of shape `(num_labels,)`, where -1 is no class; or the class weights.
        Raises:
            ValueError: if the flow is unconditional, if there are no labels, or if one is unknown or out of its range.
        """
        num_classes = self.transformer.config.num_classes
        if num_classes is None:
            raise ValueError(f"`{argument}` must be None for an unconditional model, but is {class_labels!r}.")
        if isinstance(class_labels, torch.Tensor) and class_labels.is_floating_point():
            shape = tuple(class_labels.shape)
            if len(shape) != 2 or shape[0] == 0 or shape[1] != num_classes or not class_labels.isfinite().all():
                raise ValueError(
                    f"`{argument}` must be class ids or names, or finite class weights of shape (num_labels,"
                    f" {num_classes}), but is {class_labels.dtype} of shape {shape} from {class_labels.tolist()}."
                )
            return class_labels
        label_ids = self.normalize_class_labels(class_labels, argument)
        if not label_ids:
            raise ValueError(f"`{argument}` must name at least one class, but is empty.")
        for label_id in label_ids:
            if not -1 <= label_id < num_classes:
                raise ValueError(
                    f"`{argument}` must lie between 0 and {num_classes - 1}, or be -1 for no class, but one is"
                    f" {label_id}."
                )
        return torch.tensor(label_ids)

    @torch.no_grad()
    def encode(self, images: Any, generator: torch.Generator | None = None, strict: bool = False) -> torch.Tensor:
        """
        Turn images into the data that the flow models, without the noise of training.

        Sampling returns such data with `output_type="latent"`. `pipe.transformer(data, class_labels).sample` maps it
        to the flow's latents.

        Args:
            images (a PIL image, array, tensor or path, or many of them):
                Many images may come as a list; a folder, whose image files are taken in the order of their sorted
                paths, with those of its subfolders; a `datasets.Dataset` with one column of images, or such a column;
                any other iterable; or an array or tensor with a leading batch dimension. Arrays are `(height, width[,
                channels])`, tensors `([channels, ]height, width)`. For a flow of grey images, three dimensions are
                `(num_images, height, width)`, unless the one of the channels is 1 or 3. Arrays and tensors hold floats
                in [0, 1] or uint8, as do the `"np"` and `"pt"` outputs of [`FlowBackPipeline`]. An image of another
                size is center-cropped and resized, with a warning.
            generator (`torch.Generator`, *optional*):
                Draws from the VAE's posterior. Without one, its mode is returned. Pixels need none.
            strict (`bool`, defaults to `False`): Refuse images of another size or mode instead of converting them.
        Returns:
            `torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`: pixels in [-1, 1], or the
            VAE's `(latents - shift_factor) * scaling_factor`. float32, or float64 for a float64 flow.
        Raises:
            ValueError: if something is not an image, with its number; with `strict`, also for another size or mode.
        """
        images = iterate_images(images, self.num_channels)
        return self._encode_pixels(self._stack_pixels(enumerate(images), strict), generator)

    def _stack_pixels(self, numbered_images: Iterable[tuple[int, Any]], strict: bool) -> torch.Tensor:
        """Turn images into pixels in [0, 1], of shape `(num_images, channels, image_size, image_size)`."""
        return torch.stack([self._to_pixels(image, number, strict) for number, image in numbered_images])

    def _to_pixels(self, image: Any, number: int, strict: bool) -> torch.Tensor:
        """Turn one image into pixels in [0, 1], of shape `(channels, image_size, image_size)`."""
        size = self.image_size
        channels = self.num_channels
        mode = {1: "L", 3: "RGB"}[channels]
        name = f"Image {number}"
        if isinstance(image, (str, os.PathLike)) or hasattr(image, "convert"):
            filename = os.fspath(image) if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "")
            name += f", {str(filename)!r}," if filename else ""
            try:
                image = open_image(image)
                converted = to_eight_bits(image, mode)
            except ValueError as error:
                raise ValueError(f"{name} {error}.") from error
        else:
            pixels = array_to_pixels(image, number)
            if tuple(pixels.shape) == (channels, size, size):
                return pixels
            if strict:
                raise ValueError(
                    f"{name} must have {channels} channels of {size}x{size} pixels, but has shape"
                    f" {tuple(pixels.shape)} (channels first). Convert it, or leave out `strict`."
                )
            array = VaeImageProcessor.pt_to_numpy(pixels[None])
            (image,) = VaeImageProcessor.numpy_to_pil(array)
            converted = image.convert(mode)
        if strict and (image.mode != mode or image.size != (size, size)):
            raise ValueError(
                f"{name} must be {size}x{size} pixels of mode {mode}, but is {image.width}x{image.height} of"
                f" mode {image.mode}. Convert it, or leave out `strict`."
            )
        if converted.size != (size, size):
            warnings.warn(
                f"Images that are not {size}x{size} pixels are resized and center-cropped; `strict=True` refuses them."
            )
            converted = fit_image(converted, size)
        return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy([converted]))[0]

    def _encode_pixels(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Turn pixels in [0, 1] into the data that the flow models."""
        device, dtype = self._execution_device, torch.promote_types(self.transformer.dtype, torch.float32)
        sample = self.image_processor.normalize(pixels.to(device, dtype))
        if self.vae is None:
            return sample
        encoded = self.vae.encode(sample.to(self.vae.dtype))
        if hasattr(encoded, "latents"):  # AutoencoderTiny
            latents = encoded.latents
        else:
            posterior = encoded.latent_dist
            latents = posterior.mode() if generator is None else posterior.sample(generator)
        return scale_latents(latents.to(dtype), self.vae.config)


@dataclass
class CallState:
    """
    What a callback can ask a running call of [`FlowBackPipeline`], and what it can tell it.

    Args:
        guidance_scale (`float`, defaults to 1.0): Read before every flow block. 1.0 and less is off.
        num_timesteps (`int`, defaults to 0): The number of steps. A step inverts one flow block.
        interrupt (`bool`, defaults to `False`): Whether to stop before the next block.
    """

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    interrupt: bool = False


def slerp(start: torch.Tensor, end: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """
    Interpolate spherically: the direction moves along the arc from one to the other, the norm changes linearly.

    Latents of images have norms near the square root of their dimension. Points on the straight line between two of
    them are nearer to the origin, where no image is.

    Args:
        start, end (`torch.Tensor` of the same shape): What to interpolate between.
        fractions (`torch.Tensor` of shape `(num_points,)`): Positions on the arc; 0 is `start`, 1 is `end`.
    Returns:
        `torch.Tensor` of shape `(num_points, *start.shape)`: the points.

    Example:
        ```py
        >>> import torch
        >>> from flowback_hf.pipelines.pipeline_flowback import slerp

        >>> slerp(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5, 1.0])).round(decimals=3)
        tensor([[3.0000, 0.0000],
                [1.4140, 1.4140],
                [0.0000, 1.0000]])
        ```

    Reference: Shoemake, Animating Rotation with Quaternion Curves, 1985, https://doi.org/10.1145/325334.325242
    """
    first, last = (F.normalize(each.flatten(), dim=0) for each in (start, end))
    # The angle from the middle of the arc. This form is also exact for directions that are equal or opposite.
    half_angle = torch.atan2((last - first).norm(), (last + first).norm())
    angles = ((2 * fractions - 1) * half_angle).unsqueeze(1)
    middle, across = F.normalize(last + first, dim=0), F.normalize(last - first, dim=0)
    directions = F.normalize(angles.cos() * middle + angles.sin() * across, dim=1)
    norms = torch.lerp(start.norm(), end.norm(), fractions).unsqueeze(1)
    return (norms * directions).unflatten(1, start.shape)


class FlowBackPipeline(FlowBackPipelineMixin, DiffusionPipeline):
    r"""
    Generate and edit images with a normalizing flow, of given classes or unconditionally.

    A call draws noise and inverts the flow blocks one by one, from the noise to the image. If the flow was trained
    with Gaussian noise, one step along its exact score then removes that noise. If the flow has a VAE, the VAE decodes
    the result. With a learned inverse and `solver="learned"`, one evaluation of it takes the place of both.

    Several threads may call one pipeline at the same time, each with its own options and generator. In a callback,
    `guidance_scale`, `num_timesteps` and `interrupt` are those of the call that runs the callback.

    Args:
        transformer ([`TarFlowTransformer2DModel`]): The flow.
        vae ([`~diffusers.AutoencoderKL`], *optional*):
            The VAE of a latent flow. It encodes the flow's data and decodes its samples. Noise, guidance and denoising
            then work on its latents, on the scale of [`~FlowBackPipeline.encode`].
        id2label (`dict[int, str]`, *optional*): Class names by class id. Commas separate synonyms.
        guidance_scale (`float`, defaults to 1.0), guidance_rule (`str`, defaults to `"linear"`):
            Defaults for calls that do not set them. They are saved with the pipeline, so that a checkpoint samples as
            its authors intended.
        reverse_transformer ([`TarFlowReverseTransformer2DModel`], *optional*):
            The learned inverse of the flow, which `training/train_reverse.py` trains.

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
        ValueError: if the VAE's latents and the flow's data differ in their number of channels, or the guidance is out
            of its range.

    References: Zhai et al., Normalizing Flows are Capable Generative Models, https://arxiv.org/abs/2412.06329;
    Flowing Backwards: Improving Normalizing Flows via Reverse Representation Alignment,
    https://arxiv.org/abs/2511.22345
    """

    model_cpu_offload_seq = "transformer->reverse_transformer->vae"
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["vae", "reverse_transformer"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        guidance_scale: float = 1.0,
        guidance_rule: str = "linear",
        reverse_transformer: ModelMixin | None = None,
    ):
        super().__init__(transformer, vae, id2label, guidance_scale, guidance_rule)
        self.register_modules(reverse_transformer=reverse_transformer)

    def save_class_embeddings(self, save_directory: str | os.PathLike):
        """
        Save the flow's class tables and class names, beside an adapter that was trained with them.

        Args:
            save_directory (`str`): The folder. `class_embed.safetensors` is written to it.
        Raises:
            ValueError: if the flow is unconditional.
        """
        self.write_lora_layers(
            {name: table.detach() for name, table in self._class_tables().items()},
            save_directory,
            is_main_process=True,
            weight_name=CLASS_EMBED_FILE,
            save_function=None,
            safe_serialization=True,
            lora_adapter_metadata={"id2label": self.config.id2label},
        )

    def load_class_embeddings(self, pretrained_model_name_or_path_or_dict: str | os.PathLike, **kwargs):
        """
        Replace the flow's class tables and class names by those that were trained with an adapter.

        They stay when the adapter is switched off or unloaded. Load the flow again to have its own.

        Args:
            pretrained_model_name_or_path_or_dict (`str`):
                A folder or a repository on the Hub that holds `class_embed.safetensors`. It may have more classes.
            kwargs: As in diffusers: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.
        Raises:
            OSError: if there is no such file.
            ValueError: if its tables do not fit the flow, or if the flow is unconditional. Nothing is replaced then.
        """
        source, own = pretrained_model_name_or_path_or_dict, self._class_tables()
        tables, metadata = self._read_tensors(source, weight_name=CLASS_EMBED_FILE, **kwargs)
        widths, expected = ({name: each[name].shape[-1] for name in sorted(each)} for each in (tables, own))
        if widths != expected:
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` must hold class tables for this flow, of widths"
                f" {list(expected.values())}, but those of {str(source)!r} are of widths {list(widths.values())}."
            )
        num_classes = {len(table) for table in tables.values()}
        if len(num_classes) > 1:
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` must hold class tables of as many classes each, but those of"
                f" {str(source)!r} are of {sorted(num_classes)}."
            )
        for name, block in zip(own, self.transformer.blocks):
            block.class_embed = torch.nn.Parameter(tables[name].to(block.class_embed))
        self.transformer.register_to_config(num_classes=num_classes.pop())
        id2label = (metadata or {}).get("id2label") or {}
        self.register_to_config(id2label={int(label_id): label for label_id, label in id2label.items()} or None)

    def _class_tables(self) -> dict[str, torch.nn.Parameter]:
        """Return the class table of every block, from block 1 on, by its name in files."""
        if self.transformer.config.num_classes is None:
            raise ValueError("Class tables need a flow with classes, but this one is unconditional.")
        blocks = enumerate(self.transformer.blocks)
        return {f"transformer.blocks.{index}.class_embed": block.class_embed for index, block in blocks}

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call, which reads it before every flow block. 1.0 is off."""
        return self._call.guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the running call or the last one. A step inverts one flow block."""
        return self._call.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop. Set `pipe._interrupt = True` in a callback to stop after its block."""
        return self._call.interrupt

    # Names that callbacks written for diffusers assign to. From a thread without a call, as the button of a page runs
    # in, an assignment is meant for all running calls.

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, guidance_scale: float):
        for call in self._addressed_calls():
            call.guidance_scale = guidance_scale

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool):
        for call in self._addressed_calls():
            call.interrupt = interrupt

    @property
    def _call(self) -> CallState:
        """The call that runs in this thread; without one, the call that was started last."""
        return self._running_calls.get(threading.get_ident(), self._last_call)

    def _addressed_calls(self) -> list[CallState]:
        own = self._running_calls.get(threading.get_ident())
        return list(self._running_calls.values()) if own is None else [own]

    @contextlib.contextmanager
    def _running(self, call: CallState) -> Iterator[CallState]:
        """Make a call the one that runs in this thread."""
        thread = threading.get_ident()
        outer = self._running_calls.get(thread)  # a callback may itself call the pipeline
        self._running_calls[thread] = self._last_call = call
        try:
            yield call
        finally:
            if outer is None:
                del self._running_calls[thread]
            else:
                self._running_calls[thread] = outer

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
                [`~FlowBackPipeline.get_label_ids`] says. A tensor of floats of shape `(num_images, num_classes)`
                holds class weights, which blend classes. With `None`, images are sampled without a class. An
                unconditional flow takes `None` only.
            guidance_scale (`float`, *optional*, defaults to the pipeline's):
                The strength of classifier-free guidance. 1.0 and less turns it off. More guidance makes classes
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
                How to invert a block and how exactly; see [`TarFlowTransformer2DModel.forward`]. `"learned"` takes one
                evaluation of the learned inverse instead. Its images are not those of the exact inverse. Of the
                guidance arguments, it has `guidance_scale` only.
            denoise (`bool`, defaults to `True`):
                Remove the Gaussian noise of training: `x + sigma^2 grad log p(x | y)`. Flows that were trained with
                uniform noise or none are never denoised. A learned inverse returns clean data by itself; what it knows
                of the noisy data needs its heads, see [`TarFlowReverseTransformer2DModel.load_heads`].
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
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            class_labels,
            guidance_scale,
            num_images_per_prompt,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            on_overflow,
            guidance_rule,
            guidance_schedule,
            guidance_temperature,
            solver,
            tolerance,
            denoise,
        )
        class_labels, num_images = self.encode_labels(class_labels, num_images_per_prompt)
        latents = self.prepare_latents(num_images, generator, latents)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        if solver == "learned":
            sample = self.apply_reverse_transformer(latents, class_labels, guidance_scale, denoise, *callback)
        else:
            sample = self.invert_blocks(
                latents,
                class_labels,
                guidance_scale,
                guidance_rule,
                guidance_schedule,
                guidance_temperature,
                solver,
                tolerance,
                *callback,
            )
        if denoise:
            sample = self.denoise(sample, class_labels, solver)
        images = self.decode(sample, output_type, on_overflow)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        on_overflow: str = "warn",
        guidance_rule: str | None = None,
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        solver: str = "auto",
        tolerance: float | None = None,
        denoise: bool = True,
    ):
        """
        Check the arguments of a call.

        Args:
            class_labels, guidance_scale, num_images_per_prompt, generator, latents: Arguments of a call.
            output_type, callback_on_step_end_tensor_inputs, on_overflow: Arguments of a call.
            guidance_rule, guidance_schedule, guidance_temperature, solver, tolerance, denoise: Arguments of a call.
        Raises:
            ValueError: for the first argument that is out of its range, in one sentence.
        """
        config = self.transformer.config
        num_labels = 1 if class_labels is None else len(self.parse_class_labels(class_labels))
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        rule = self.config.guidance_rule if guidance_rule is None else guidance_rule
        if solver == "learned":
            self._check_learned_solver(
                scale, guidance_rule, guidance_schedule, guidance_temperature, tolerance, denoise
            )
            solver = "auto"  # the other arguments must be right, too
        self.transformer.check_inverse_arguments(
            scale, rule, guidance_schedule, guidance_temperature, solver, tolerance
        )
        check_number("num_images_per_prompt", num_images_per_prompt, int, at_least=1)
        num_images = num_images_per_prompt * num_labels
        check_generator(generator, num_images)
        expected = (num_images, config.in_channels, config.sample_size, config.sample_size)
        if latents is not None and not (isinstance(latents, torch.Tensor) and latents.shape == expected):
            is_tensor = isinstance(latents, torch.Tensor)
            shape = f"have shape {tuple(latents.shape)}" if is_tensor else f"are {latents!r:.60}"
            raise ValueError(f"`latents` must be a tensor of shape {expected}, but {shape}.")
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

    def _check_learned_solver(
        self,
        guidance_scale: float,
        guidance_rule: str | None,
        guidance_schedule: str,
        guidance_temperature: float,
        tolerance: float | None,
        denoise: bool,
    ):
        """Raise ValueError unless there is a learned inverse of this flow, which takes these arguments."""
        if self.reverse_transformer is None:
            raise ValueError(
                "`solver='learned'` needs a learned inverse, but this pipeline has no `reverse_transformer`. Train one"
                " with `python training/train_reverse.py --model FLOW --train_data_dir IMAGES --output_dir OUTPUT`."
            )
        exact_only = guidance_rule, guidance_schedule, guidance_temperature, tolerance
        if exact_only != (None, "constant", 1.0, None):
            raise ValueError(
                "`guidance_rule`, `guidance_schedule`, `guidance_temperature` and `tolerance` are for the exact"
                " solvers: leave them out with `solver='learned'`."
            )
        self.reverse_transformer.check_guidance_scale(guidance_scale)
        self.reverse_transformer.check_flow(self.transformer)
        if not denoise and self.reverse_transformer.config.denoises:
            self.reverse_transformer.check_heads("`denoise=False`")

    def encode_labels(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
    ) -> tuple[torch.Tensor | None, int]:
        """
        Turn class labels into what the flow takes.

        Args:
            class_labels, num_images_per_prompt: Arguments of a call.
        Returns:
            `tuple[torch.Tensor | None, int]`: the class id of each image, of shape `(num_images,)`, or its class
            weights, of shape `(num_images, num_classes)`, or `None` without labels; and the number of images.
        Raises:
            ValueError: as [`~FlowBackPipeline.parse_class_labels`].
        """
        if class_labels is None:
            return None, num_images_per_prompt
        labels = self.parse_class_labels(class_labels).to(self._execution_device)
        return labels.repeat_interleave(num_images_per_prompt, dim=0), len(labels) * num_images_per_prompt

    def prepare_latents(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        check_number("num_images", num_images, int, at_least=1)
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

    @torch.no_grad()
    def invert_blocks(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        guidance_rule: str | None = None,
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        solver: str = "auto",
        tolerance: float | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> torch.Tensor:
        """
        Invert the flow blocks one by one, from the noise to noisy data.

        Args:
            latents (`torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`): The noise.
            class_labels (`torch.Tensor`, *optional*): Class ids or weights from [`~FlowBackPipeline.encode_labels`].
            guidance_scale, guidance_rule, guidance_schedule, guidance_temperature: Arguments of a call.
            solver, tolerance, callback_on_step_end, callback_on_step_end_tensor_inputs: Arguments of a call.
        Returns:
            `torch.Tensor` of the same shape: data that are as noisy as those the flow was trained on.
        """
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        guidance_rule = self.config.guidance_rule if guidance_rule is None else guidance_rule
        latents = latents.to(self._execution_device)
        num_blocks = self.transformer.config.num_blocks
        call = CallState(guidance_scale, num_timesteps=num_blocks)
        with self._running(call), self.progress_bar(total=num_blocks) as progress_bar:
            for step, block in enumerate(range(num_blocks, 0, -1)):
                if call.interrupt:
                    break
                latents = self.transformer(
                    latents,
                    class_labels,
                    blocks=[block],
                    inverse=True,
                    guidance_scale=call.guidance_scale,
                    guidance_rule=guidance_rule,
                    guidance_schedule=guidance_schedule,
                    guidance_temperature=guidance_temperature,
                    solver=solver,
                    tolerance=tolerance,
                ).sample
                latents = self._end_step(
                    step, block, latents, callback_on_step_end, callback_on_step_end_tensor_inputs
                )
                progress_bar.update()
        return latents

    def _end_step(
        self,
        step: int,
        block: int,
        latents: torch.Tensor,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None,
        callback_on_step_end_tensor_inputs: tuple[str, ...],
    ) -> torch.Tensor:
        """Call the callback, and return the latents with which it replaces its own."""
        if callback_on_step_end is None:
            return latents
        tensors = {"latents": latents}
        callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
        callback_outputs = callback_on_step_end(self, step, block, callback_kwargs)
        return (callback_outputs or {}).get("latents", latents)

    @torch.no_grad()
    def apply_reverse_transformer(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        denoise: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> torch.Tensor:
        """
        Map noise to data with the learned inverse, in one evaluation.

        Args:
            latents (`torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`): The noise.
            class_labels (`torch.Tensor`, *optional*): Class ids or weights from [`~FlowBackPipeline.encode_labels`].
            guidance_scale, denoise: Arguments of a call.
            callback_on_step_end, callback_on_step_end_tensor_inputs:
                Arguments of a call. The only step is that of block 0.
        Returns:
            `torch.Tensor` of the same shape: clean data if the learned inverse returns such and `denoise` is true,
            else noisy data.
        """
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        latents = latents.to(self._execution_device)
        with self._running(CallState(scale, num_timesteps=1)):
            if denoise or not self.reverse_transformer.config.denoises:
                sample = self.reverse_transformer(latents, class_labels, scale).sample
            else:
                sample = self.reverse_transformer(latents, class_labels, scale, output_trajectory=True).trajectory[0]
            return self._end_step(0, 0, sample, callback_on_step_end, callback_on_step_end_tensor_inputs)

    def denoise(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None = None, solver: str = "auto"
    ) -> torch.Tensor:
        """
        Remove the Gaussian noise of training with the exact score (TARFlow, section 3.4).

        Args:
            sample (`torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`): Noisy data.
            class_labels (`torch.Tensor`, *optional*): Class ids or weights from [`~FlowBackPipeline.encode_labels`].
            solver (`str`, defaults to `"auto"`): What drew the sample.
        Returns:
            `torch.Tensor` of the same shape: `x + sigma^2 grad_x log p(x | y)`, Tweedie's formula. For a flow that was
            trained with uniform noise or none, and for a learned inverse that returns clean data, `sample` itself.
        """
        if solver == "learned" and self.reverse_transformer.config.denoises:
            return sample
        noise_std = self.transformer.config.noise_std
        if self.transformer.config.noise_type != "gaussian" or noise_std == 0:
            return sample
        # The caller may be in inference mode, whose tensors autograd does not save. It does save clones of them.
        with torch.inference_mode(False), torch.enable_grad():
            noisy_sample = sample.clone().requires_grad_()
            class_labels = None if class_labels is None else class_labels.clone()
            log_prob = self.transformer.log_prob(noisy_sample, class_labels)
            (score,) = torch.autograd.grad(log_prob.sum(), noisy_sample)
        return sample + noise_std**2 * score

    @torch.no_grad()
    def decode(self, sample: torch.Tensor, output_type: str = "pil", on_overflow: str = "warn") -> Any:
        """
        Turn the flow's data into images. It undoes [`~FlowBackPipeline.encode`], up to what a VAE loses.

        Args:
            sample (`torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`): The data.
            output_type, on_overflow: Arguments of a call.
        Returns:
            The images, as `output_type` says; see a call.
        Raises:
            OverflowError: if an image is not finite and `on_overflow` is `"raise"`.
        """
        if output_type != "latent" and self.vae is not None:
            latents = unscale_latents(sample, self.vae.config)
            sample = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        self._report_overflow(sample, on_overflow)
        if output_type == "latent":
            return sample
        return self.image_processor.postprocess(sample, output_type=output_type)

    def _report_overflow(self, sample: torch.Tensor, on_overflow: str):
        """Name the images that are not finite, in a warning or an OverflowError."""
        overflowed = (~torch.isfinite(sample).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if not overflowed:
            return
        message = (
            f"Images {overflowed} of this call overflowed and are not finite. Try another seed, a smaller"
            " `guidance_scale` or `guidance_rule='product'`."
        )
        if self.vae is not None and self.vae.dtype == torch.float16:
            message += " If latents are finite (`output_type='latent'`), the VAE needs more than float16."
        if on_overflow == "raise":
            self.maybe_free_model_hooks()
            raise OverflowError(message)
        logger.warning(message)

    # Likelihoods and edits of given images

    @torch.no_grad()
    def invert(
        self,
        images: Any,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        add_noise: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Turn images into the noise that the flow makes them of, exactly, in one forward pass.

        `pipe(latents=pipe.invert(images, labels), class_labels=labels, guidance_scale=1.0, denoise=False)` returns the
        images. With guidance or another class it returns related images, see [`~FlowBackPipeline.swap_class`].

        The flow was trained on noisy images, and the latents of clean ones vary less than the noise of a call. Adding
        the noise first gave no better edits where it was measured (`docs/editing.md`), and without it the image comes
        back exactly. Add it if latents have to be distributed like the noise of a call.

        Args:
            images (a PIL image, array, tensor or path, or many of them):
                Images in any form that [`~FlowBackPipeline.encode`] takes.
            class_labels (`int`, `str`, a list of them or a `torch.Tensor`, *optional*):
                One label for all images or one for each, as in a call.
            add_noise (`bool`, defaults to `False`): Add the noise of training to the images first.
            generator (`torch.Generator` or one for each image, *optional*): Draws this noise.
        Returns:
            `torch.Tensor` of shape `(num_images, in_channels, sample_size, sample_size)`: `latents` for a call, in
            float32, or float64 for a float64 flow.
        Raises:
            ValueError: if an image cannot be used, with its number, or if an argument is out of its range.

        Example:
            ```py
            >>> import torch
            >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

            >>> pipe = FlowBackPipeline(TarFlowTransformer2DModel(8, 4, 3, num_blocks=2, num_layers=1, num_classes=3))
            >>> pipe.set_progress_bar_config(disable=True)
            >>> images = torch.rand(2, 3, 8, 8)
            >>> latents = pipe.invert(images, [2, 0])
            >>> restored = pipe([2, 0], latents=latents, guidance_scale=1.0, denoise=False, output_type="pt").images
            >>> torch.allclose(images, restored, atol=1e-6)
            True
            ```
        """
        sample, labels = self._encode_labelled(images, generator, class_labels=class_labels)
        latents = self.transformer(self._add_noise(sample, generator) if add_noise else sample, labels).sample
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def likelihood_map(
        self,
        images: Any,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        add_noise: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        r"""
        Compute how much each token of an image contributes to its log-likelihood.

        The log-likelihood is a sum over tokens. With the latents `z_i` of token `i`, of `d` values, and its log-scales
        `a_i` in every flow block, a token contributes

            -|z_i|^2 / 2 - (d / 2) log(2 pi) - sum over blocks and values of a_i.

        Low values mark tokens that the flow did not expect there. The value of a token depends on all others, since
        blocks see the tokens in alternating order.

        Args:
            images, class_labels, add_noise, generator: As in [`~FlowBackPipeline.invert`].
        Returns:
            `torch.Tensor` of shape `(num_images, grid_size, grid_size)` with `grid_size = sample_size / patch_size`:
            nats. They sum to `pipe.transformer.log_prob(pipe.encode(images), class_labels)`. For a latent flow, this
            is the density of the VAE's latents, not of pixels. float32, or float64 for a float64 flow.
        Raises:
            ValueError: as [`~FlowBackPipeline.invert`].

        Example:
            ```py
            >>> import torch
            >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

            >>> pipe = FlowBackPipeline(TarFlowTransformer2DModel(8, 4, 3, num_blocks=2, num_layers=1, num_classes=3))
            >>> pipe.likelihood_map(torch.rand(5, 3, 8, 8)).shape
            torch.Size([5, 2, 2])
            ```
        """
        sample, labels = self._encode_labelled(images, generator, class_labels=class_labels)
        sample = self._add_noise(sample, generator) if add_noise else sample
        output = self.transformer(sample, labels, output_token_log_abs_det=True)
        latents = self.transformer.patchify(output.sample)
        nats = output.token_log_abs_det - 0.5 * (latents.square() + math.log(2 * math.pi)).sum(dim=2)
        self.maybe_free_model_hooks()
        grid_size = self.transformer.config.sample_size // self.transformer.config.patch_size
        return nats.unflatten(1, (grid_size, grid_size))

    @torch.no_grad()
    def swap_class(
        self,
        images: Any,
        source: int | str | list[int | str] | torch.Tensor | None,
        target: int | str | list[int | str] | torch.Tensor | None,
        guidance_scale: float | None = None,
        guidance_rule: str | None = None,
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        solver: str = "auto",
        tolerance: float | None = None,
        denoise: bool = False,
        on_overflow: str = "warn",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """
        Turn images of one class into similar images of another class.

        The latents of an image under its own class describe what the class does not: the flow makes an image of the
        other class from them. Only that second step is guided: a guided inversion kept less of the image
        (`docs/editing.md`).

        Args:
            images (a PIL image, array, tensor or path, or many of them):
                Images in any form that [`~FlowBackPipeline.encode`] takes.
            source, target (`int`, `str`, a list of them, a `torch.Tensor` or `None`):
                The class of the images and the class to turn them into, as `class_labels` of a call: one for all
                images or one for each. `None` and -1 are no class.
            guidance_scale (`float`, *optional*, defaults to the pipeline's):
                How strongly to guide towards the target. 1.0 turns guidance off; then the same class as `source` and
                `target` returns the image.
            denoise (`bool`, defaults to `False`): As in a call. The latents are those of a clean image.
            guidance_rule, guidance_schedule, guidance_temperature, solver, tolerance: As in a call.
            on_overflow, output_type, return_dict, callback_on_step_end: As in a call.
        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: one image for each of `images`.
        Raises:
            ValueError: if an image cannot be used, with its number, or if an argument is out of its range.
            OverflowError: if an image is not finite and `on_overflow` is `"raise"`.

        Example:
            ```py
            >>> import torch
            >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

            >>> flow = TarFlowTransformer2DModel(8, 4, 3, num_blocks=2, num_layers=1, num_classes=3)
            >>> pipe = FlowBackPipeline(flow, id2label={0: "cat", 1: "dog", 2: "cow"})
            >>> len(pipe.swap_class(torch.rand(4, 3, 8, 8), "cat", ["dog", "cow", "dog", "cow"]).images)
            4
            ```
        """
        options = {
            "guidance_scale": guidance_scale,
            "guidance_rule": guidance_rule,
            "guidance_schedule": guidance_schedule,
            "guidance_temperature": guidance_temperature,
            "solver": solver,
            "tolerance": tolerance,
            "denoise": denoise,
            "on_overflow": on_overflow,
            "output_type": output_type,
        }
        self.check_inputs(**options)
        sample, source, target = self._encode_labelled(images, source=source, target=target)
        latents = self.transformer(sample, source).sample
        options |= {"return_dict": return_dict, "callback_on_step_end": callback_on_step_end}
        return self._sample_from(latents, target, **options)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: Any,
        image_b: Any,
        num_steps: int = 8,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        guidance_scale: float | None = 1.0,
        guidance_rule: str | None = None,
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        solver: str = "auto",
        tolerance: float | None = None,
        denoise: bool = False,
        on_overflow: str = "warn",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """
        Make the images between two images: spherically between their latents, with blended class weights.

        Args:
            image_a, image_b (a PIL image, array, tensor or path):
                One image each, in any form that [`~FlowBackPipeline.encode`] takes.
            num_steps (`int`, defaults to 8): The number of images to return, with both ends: at least 2.
            class_labels (`int`, `str`, a list of them or a `torch.Tensor`, *optional*):
                The classes of `image_a` and `image_b`, or one class for both, as in a call.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Without guidance, which is the default, the first and the last image are `image_a` and `image_b`.
                Guidance makes the images between them look more like their classes. `None` is the pipeline's.
            denoise (`bool`, defaults to `False`): As in a call. The latents are those of clean images.
            guidance_rule, guidance_schedule, guidance_temperature, solver, tolerance: As in a call.
            on_overflow, output_type, return_dict, callback_on_step_end: As in a call.
        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: `num_steps` images, from `image_a` to `image_b`.
        Raises:
            ValueError: if an image cannot be used, or if an argument is out of its range.
            OverflowError: if an image is not finite and `on_overflow` is `"raise"`.

        Example:
            ```py
            >>> import torch
            >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

            >>> pipe = FlowBackPipeline(TarFlowTransformer2DModel(8, 4, 3, num_blocks=2, num_layers=1, num_classes=3))
            >>> image_a, image_b = torch.rand(2, 3, 8, 8)
            >>> len(pipe.interpolate(image_a, image_b, num_steps=5, class_labels=[0, 2]).images)
            5
            ```
        """
        options = {
            "guidance_scale": guidance_scale,
            "guidance_rule": guidance_rule,
            "guidance_schedule": guidance_schedule,
            "guidance_temperature": guidance_temperature,
            "solver": solver,
            "tolerance": tolerance,
            "denoise": denoise,
            "on_overflow": on_overflow,
            "output_type": output_type,
        }
        self.check_inputs(**options)
        check_number("num_steps", num_steps, int, at_least=2)
        images = []
        for name, image in (("image_a", image_a), ("image_b", image_b)):
            if not is_one_image(image, self.num_channels):
                raise ValueError(f"`{name}` must be one image, but is of type {type(image).__name__}.")
            images.append(image)
        sample, labels = self._encode_labelled(images, class_labels=class_labels)
        latents = self.transformer(sample, labels).sample
        fractions = torch.linspace(0, 1, num_steps, device=latents.device, dtype=latents.dtype)
        weights = None
        if labels is not None:
            first, last = self._class_weights(labels, latents.dtype)
            weights = torch.lerp(first, last, fractions.unsqueeze(1))
        latents = slerp(*latents, fractions)
        options |= {"return_dict": return_dict, "callback_on_step_end": callback_on_step_end}
        return self._sample_from(latents, weights, **options)

    @torch.no_grad()
    def vary(
        self,
        images: Any,
        strength: float = 0.5,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        guidance_scale: float | None = 1.0,
        guidance_rule: str | None = None,
        guidance_schedule: str = "constant",
        guidance_temperature: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        solver: str = "auto",
        tolerance: float | None = None,
        denoise: bool = False,
        on_overflow: str = "warn",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Make variations of images: a part of their latents is drawn again.

        The latents become `sqrt(1 - strength^2) z + strength noise`, which keeps the distribution of standard normal
        latents. Drawing all latents of some tokens again changes more at the same strength, and does about as well at
        the same distance from the image (`docs/editing.md`).

        Args:
            images (a PIL image, array, tensor or path, or many of them):
                Images in any form that [`~FlowBackPipeline.encode`] takes.
            strength (`float`, defaults to 0.5):
                How much to change, from 0, which returns the image, to 1, which returns a new sample.
            class_labels (`int`, `str`, a list of them or a `torch.Tensor`, *optional*):
                The class of the images, as in a call: one for all images or one for each.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Guidance, which is off by default, makes the variations look more like their class. `strength` 0 then
                does not return the image. `None` is the pipeline's.
            num_images_per_prompt (`int`, defaults to 1): Variations of each image.
            generator (`torch.Generator` or one for each variation, *optional*): Draws the noise.
            denoise (`bool`, defaults to `False`): As in a call. Turn it on for strengths near 1.
            guidance_rule, guidance_schedule, guidance_temperature, solver, tolerance: As in a call.
            on_overflow, output_type, return_dict, callback_on_step_end: As in a call.
        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the variations of the first image, then those of the second,
            and so on.
        Raises:
            ValueError: if an image cannot be used, with its number, or if an argument is out of its range.
            OverflowError: if an image is not finite and `on_overflow` is `"raise"`.

        Example:
            ```py
            >>> import torch
            >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

            >>> pipe = FlowBackPipeline(TarFlowTransformer2DModel(8, 4, 3, num_blocks=2, num_layers=1, num_classes=3))
            >>> images = torch.rand(2, 3, 8, 8)
            >>> len(pipe.vary(images, strength=0.3, class_labels=[2, 0], num_images_per_prompt=4).images)
            8
            ```
        """
        options = {
            "guidance_scale": guidance_scale,
            "guidance_rule": guidance_rule,
            "guidance_schedule": guidance_schedule,
            "guidance_temperature": guidance_temperature,
            "solver": solver,
            "tolerance": tolerance,
            "denoise": denoise,
            "on_overflow": on_overflow,
            "output_type": output_type,
        }
        self.check_inputs(num_images_per_prompt=num_images_per_prompt, **options)
        check_number("strength", strength, float, at_least=0.0, at_most=1.0)
        sample, labels = self._encode_labelled(images, generator, num_images_per_prompt, class_labels=class_labels)
        latents = self.transformer(sample, labels).sample.repeat_interleave(num_images_per_prompt, dim=0)
        noise = self.prepare_latents(len(latents), generator).to(latents.device)
        latents = math.sqrt(1 - strength**2) * latents + strength * noise
        labels = None if labels is None else labels.repeat_interleave(num_images_per_prompt, dim=0)
        options |= {"return_dict": return_dict, "callback_on_step_end": callback_on_step_end}
        return self._sample_from(latents, labels, **options)

    def _sample_from(
        self, latents: torch.Tensor, labels: torch.Tensor | None, **options: Any
    ) -> ImagePipelineOutput | tuple:
        """Call the pipeline with latents and a label for each of them, or none at all."""
        return self(labels, num_images_per_prompt=len(latents) if labels is None else 1, latents=latents, **options)

    def _encode_labelled(
        self,
        images: Any,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        **class_labels: Any,
    ) -> list[torch.Tensor | None]:
        """
        Read and check the images, the generator and the labels of an edit, then encode the images.

        Args:
            images, generator, num_images_per_prompt: Arguments of an edit.
            class_labels: Labels by the name of their argument; one for all images, or one for each.
        Returns:
            `list`: the images as data without noise, and then for every argument a label for each image, or `None`.
        """
        labels = {
            name: None if each is None else self.parse_class_labels(each, name) for name, each in class_labels.items()
        }
        pixels = self._stack_pixels(enumerate(iterate_images(images, self.num_channels)), strict=False)
        for name, each in labels.items():
            if each is not None and len(each) not in (1, len(pixels)):
                raise ValueError(
                    f"`{name}` must be one label for all images, or one for each of the {len(pixels)} images, but"
                    f" holds {len(each)}."
                )
        check_generator(generator, len(pixels) * num_images_per_prompt)
        sample = self._encode_pixels(pixels)
        of_each = (each if each is None else each.expand(len(sample), *each.shape[1:]) for each in labels.values())
        return [sample, *(each if each is None else each.to(sample.device) for each in of_each)]

    def _add_noise(
        self, sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """Add the noise of training, drawn image by image."""
        config = self.transformer.config
        noise = self.prepare_latents(len(sample), generator).to(sample.device)
        if config.noise_type == "uniform":
            noise = torch.special.ndtr(noise)  # the distribution function makes them uniform
        return apply_noise(sample, noise, config.noise_type, config.noise_std)

    def _class_weights(self, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Turn labels into class weights, `(num_labels, num_classes)`. No class is the mean of all."""
        if labels.is_floating_point():
            return labels.to(dtype)
        num_classes = self.transformer.config.num_classes
        weights = F.one_hot(labels.clamp(min=0), num_classes).to(dtype)
        return torch.where(labels.unsqueeze(1) < 0, 1 / num_classes, weights)
