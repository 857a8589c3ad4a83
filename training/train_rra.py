#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Train a class-conditional normalizing flow with reverse representation alignment.

    accelerate launch training/train_rra.py --train_data_dir path/to/images --output_dir outputs/flow --resolution 64

The output folder then holds the pipeline (`FlowBackPipeline.from_pretrained("outputs/flow")`), `metrics.jsonl`,
`loss_curve.png`, `samples/` with a grid for each validation, `training_args.json`, and `checkpoint-*` to resume from.
"""

import argparse
import json
import logging
import math
import os
import re
import shutil
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from flowback_hf import (
    AlignedFlowObjective,
    FlowBackClassificationPipeline,
    FlowBackPipeline,
    RepresentationTeacher,
    TarFlowTransformer2DModel,
)
from flowback_hf.alignment.objective import STRATEGIES, AlignedFlowOutput, projector_name
from flowback_hf.hub import check_repository
from flowback_hf.latents import (
    LatentDataset,
    draw_latents,
    hash_weights,
    load_latents,
    load_vae,
    read_latents_settings,
)
from flowback_hf.models.transformer_tarflow import ACTIVATION_FNS, NOISE_TYPES, POSITION_EMBEDDINGS
from flowback_hf.utils import UNREADABLE, write_atomically


logger = get_logger(__name__, log_level="INFO")

# What a resumed run may change: how it is run and watched, and how long, which stretches the learning rate's schedule.
RESUMABLE_ARGUMENTS = {
    "cache_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "dataloader_num_workers",
    "eval_batch_size",
    "hub_model_id",
    "hub_private_repo",
    "logging_dir",
    "logging_steps",
    "max_train_steps",
    "max_validation_samples",
    "num_train_epochs",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "tracker_project_name",
    "validation_class_labels",
    "validation_guidance_scale",
    "validation_steps",
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    latents = parser.add_argument_group("latent flows")
    latents.add_argument("--latents", help="A folder of training/precompute_latents.py, instead of a data set.")
    latents.add_argument("--vae_model_name_or_path", help="Default: the one that made the latents.")
    latents.add_argument("--vae_subfolder", help="Where the VAE is part of a pipeline: vae.")
    data = parser.add_argument_group("augmentation and loading")
    data.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    data.add_argument("--dataloader_num_workers", type=int, default=0)

    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", help="A saved or pushed pipeline to fine-tune.")
    model.add_argument("--model_config", help="A JSON file of the model's arguments, instead of the sizes below.")
    model.add_argument("--resolution", type=int, help="Images are resized and center-cropped to it. Default: 64.")
    model.add_argument("--in_channels", type=int, choices=[1, 3], help="1 trains on grey images. Default: 3.")
    model.add_argument("--patch_size", type=int, help="Default: 4.")
    model.add_argument("--num_blocks", type=int, help="Default: 8.")
    model.add_argument("--num_layers", type=int, nargs="+", help="Of every block, or of each. Default: 8.")
    model.add_argument("--num_attention_heads", type=int, help="Default: 16.")
    model.add_argument("--attention_head_dim", type=int, help="Default: 64.")
    model.add_argument("--position_embedding", choices=POSITION_EMBEDDINGS, help="Default: learned.")
    model.add_argument("--activation_fn", choices=ACTIVATION_FNS, help="Of the feed-forward layers. Default: gelu.")
    model.add_argument("--noise_std", type=float, help="Of the noise added to images in [-1, 1]. Default: 0.05.")
    model.add_argument("--noise_type", choices=NOISE_TYPES, help="uniform trains a density model. Default: gaussian.")

    alignment = parser.add_argument_group("alignment")
    alignment.add_argument("--alignment", choices=STRATEGIES, default="reverse")
    alignment.add_argument(
        "--teacher_model_name_or_path",
        help="DINOv2, CLIP, SigLIP or ViT-MAE, of the Hub or a folder. Default: facebook/dinov2-base.",
    )
    alignment.add_argument(
        "--teacher_features", help="A folder of training/precompute_features.py, instead of a teacher that runs along."
    )
    alignment.add_argument("--alignment_blocks", type=int, nargs="+", help="From 1, the image. Default: the last two.")
    alignment.add_argument("--alignment_layer", type=int, help="From 1. Default: round(0.75 * layers of the block).")
    alignment.add_argument("--alignment_weight", type=float, default=0.1)
    alignment.add_argument("--alignment_order", type=order_type, help="Of reverse: 0 (default), 1, ... or exact.")
    alignment.add_argument("--projector_dim", type=int, default=1024)

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--train_batch_size", type=int, default=32, help="Of each process.")
    optimization.add_argument("--eval_batch_size", type=int, default=32)
    optimization.add_argument("--num_train_epochs", type=int, default=100)
    optimization.add_argument("--max_train_steps", type=int, help="Overrides --num_train_epochs.")
    optimization.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optimization.add_argument("--gradient_checkpointing", action="store_true")
    optimization.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    optimization.add_argument("--allow_tf32", action="store_true")
    optimization.add_argument("--torch_compile", action="store_true", help="Compile the transformer layers.")
    optimization.add_argument("--learning_rate", type=float, default=1e-4)
    optimization.add_argument("--scale_lr", action="store_true", help="Multiply the rate by the total batch size.")
    optimization.add_argument("--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="cosine")
    optimization.add_argument("--lr_warmup_steps", type=int, default=500)
    optimization.add_argument("--adam_beta1", type=float, default=0.9)
    optimization.add_argument("--adam_beta2", type=float, default=0.95)
    optimization.add_argument("--adam_weight_decay", type=float, default=1e-4)
    optimization.add_argument("--adam_epsilon", type=float, default=1e-8)
    optimization.add_argument("--max_grad_norm", type=float, default=1.0)
    optimization.add_argument("--label_dropout", type=float, default=0.1, help="Share of labels replaced by no class.")
    optimization.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=True)
    optimization.add_argument("--ema_decay", type=float, default=0.9999)

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", required=True)
    run.add_argument("--logging_dir", default="logs", help="Of the trackers, inside the output folder.")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--logging_steps", type=int, default=10)
    run.add_argument("--checkpointing_steps", type=int, default=500)
    run.add_argument("--checkpoints_total_limit", type=int, help="Older ones are deleted once a new one is safe.")
    run.add_argument("--resume_from_checkpoint", help="A checkpoint folder of this output folder, or latest.")
    run.add_argument("--validation_steps", type=int, default=500)
    run.add_argument("--validation_class_labels", nargs="+", help="Numbers or names. Default: the first ten classes.")
    run.add_argument("--validation_guidance_scale", type=float, default=1.0)
    run.add_argument("--report_to", help="tensorboard, wandb, comet_ml or all, beside metrics.jsonl. Default: none.")
    run.add_argument("--tracker_project_name", default="flowback_hf")
    run.add_argument("--push_to_hub", action="store_true", help="Publish the pipeline with a card when it is trained.")
    run.add_argument("--hub_model_id", help="Of the repository. Default: the output folder's name.")
    run.add_argument("--hub_token", help="Default: that of `hf auth login` or HF_TOKEN. Written nowhere.")
    run.add_argument("--hub_private_repo", action="store_true")

    args = parser.parse_args(arguments)
    check_data_arguments(parser, args)
    if args.latents is None and (args.vae_model_name_or_path or args.vae_subfolder):
        parser.error("--vae_model_name_or_path and --vae_subfolder belong to --latents.")
    if args.latents is not None and args.teacher_features is not None:
        parser.error("--latents hold their own features: leave --teacher_features out.")
    if args.teacher_features is not None and (args.teacher_model_name_or_path or args.alignment == "none"):
        parser.error("--teacher_features take the place of --teacher_model_name_or_path, and --alignment needs them.")
    at_least_one = ["train_batch_size", "eval_batch_size", "num_train_epochs", "gradient_accumulation_steps"]
    at_least_one += ["max_train_steps", "checkpointing_steps"]
    at_least_one += ["checkpoints_total_limit", "validation_steps", "logging_steps", "projector_dim"]
    check_at_least_one(parser, args, at_least_one)
    if not 0 <= args.label_dropout <= 1:
        parser.error(f"--label_dropout must lie in [0, 1], but is {args.label_dropout}.")
    if args.validation_guidance_scale < 1:
        parser.error(f"--validation_guidance_scale must be at least 1.0, but is {args.validation_guidance_scale}.")
    return args


def add_data_arguments(parser: argparse.ArgumentParser):
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Of the Hub, a folder that `datasets` loads, or a parquet file.")
    data.add_argument("--dataset_config_name")
    data.add_argument(
        "--train_data_dir", help="An image folder, one folder a class, below train/ and validation/ or not."
    )
    data.add_argument("--image_column", default="image")
    data.add_argument("--label_column", default="label")
    data.add_argument("--unconditional", action="store_true", help="Ignore labels and train without classes.")
    data.add_argument("--cache_dir")
    data.add_argument("--max_train_samples", type=int)
    data.add_argument("--max_validation_samples", type=int, default=1024)
    data.add_argument("--train_val_split", type=float, default=0.05, help="Held out if there is no validation split.")


def check_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    sources = {
        name: getattr(args, name) for name in ("dataset_name", "train_data_dir", "latents") if hasattr(args, name)
    }
    if sum(source is not None for source in sources.values()) != 1:
        *others, last = (f"--{name}" for name in sources)
        parser.error(f"give one of {', '.join(others)} and {last}.")
    check_at_least_one(parser, args, ["max_train_samples", "max_validation_samples"])
    if not 0 < args.train_val_split < 1:
        parser.error(f"--train_val_split must lie between 0 and 1, but is {args.train_val_split}.")


def check_at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, names: list[str]):
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}.")


def order_type(text: str) -> int | str:
    if text != "exact" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be 0, 1, 2, ... or exact, but is {text!r}")
    return text if text == "exact" else int(text)


# Data


class ImageDataset(torch.utils.data.Dataset):
    """
    Clean images in [-1, 1] with their class ids, resized and center-cropped to a square.

    Grey, CMYK, palette and transparent images are converted. One that cannot be decoded is replaced by the next that
    can be, and its name is reported with the item: a bad file never ends a run.

    With `teacher_features`, the rows of `training/precompute_features.py`, an item holds those of its image, too.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_column: str | None,
        label_ids: list[int],
        sample_size: int,
        in_channels: int,
        teacher_features: datasets.Dataset | None = None,
    ):
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.label_column = label_column
        self.label_ids = label_ids
        self.sample_size = sample_size
        self.mode = {1: "L", 3: "RGB"}[in_channels]
        self.teacher_features = teacher_features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped = []
        for offset in range(len(self)):
            number = (index + offset) % len(self)
            row = self.rows[number]
            file = row[self.image_column]
            try:
                image = datasets.Image().decode_example(file).convert(self.mode)
            except UNREADABLE:
                skipped.append((file or {}).get("path") or f"row {number}")
                continue
            image = PIL.ImageOps.fit(image, (self.sample_size, self.sample_size), PIL.Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(image)).reshape(self.sample_size, self.sample_size, -1)
            label = -1 if self.label_column is None else row[self.label_column]
            class_label = -1 if label is None or label < 0 else self.label_ids[label]
            images = pixels.permute(2, 0, 1) / 127.5 - 1
            item = {"images": images, "class_labels": class_label, "skipped": skipped}
            if self.teacher_features is not None:
                item["teacher_features"] = self._read_teacher_features(index, images)
            return item
        raise ValueError(f"None of the {len(self)} images of the data set can be decoded; the first is {skipped[0]}.")

    def _read_teacher_features(self, index: int, images: torch.Tensor) -> torch.Tensor:
        row = self.teacher_features[index]
        if row["checksum"] != checksum(images):
            raise ValueError(
                f"`--teacher_features` must be of this training split, but row {index} is of another image: give"
                " training/precompute_features.py the data flags, --seed and --resolution of this run."
            )
        return torch.from_numpy(row["features"])


def checksum(images: torch.Tensor) -> int:
    """By which stored features know the clean image that they are of."""
    return zlib.crc32(images.contiguous().numpy())


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Images, and whatever else an item holds as a tensor, each stacked."""
    names = [name for name, value in items[0].items() if isinstance(value, torch.Tensor)]
    batch = {name: torch.stack([item[name] for item in items]) for name in names}
    batch["class_labels"] = torch.tensor([item["class_labels"] for item in items])
    batch["skipped"] = [name for item in items for name in item["skipped"]]
    return batch


def load_splits(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation rows, their columns checked."""
    if getattr(args, "latents", None) is not None:
        return hold_out(
            args, load_latents(args.latents, args.cache_dir), [] if args.unconditional else ["label_column"]
        )
    if args.train_data_dir is not None:
        option, source = "--train_data_dir", args.train_data_dir
        if not Path(source).is_dir():
            raise ValueError(f"`--train_data_dir` must be an existing folder, but is {source!r}.")
        builder = {"path": "imagefolder", "data_dir": source}
    else:
        option, source = "--dataset_name", args.dataset_name
        builder = {"path": source, "name": args.dataset_config_name}
        if source.endswith(".parquet"):
            builder = {"path": "parquet", "data_files": source}
    try:
        splits = datasets.load_dataset(**builder, cache_dir=args.cache_dir)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"`{option}` {source!r} holds no images that can be loaded: {error}") from error

    return hold_out(args, splits, ["image_column"] if args.unconditional else ["image_column", "label_column"])


def hold_out(
    args: argparse.Namespace, splits: datasets.DatasetDict, column_options: list[str]
) -> tuple[datasets.Dataset, datasets.Dataset]:
    if "train" not in splits:
        raise ValueError(f"The data set must have a split named 'train', but has {list(splits)}.")
    train_rows = splits["train"]
    for option in column_options:
        column = getattr(args, option)
        if column not in train_rows.column_names:
            raise ValueError(
                f"`--{option}` must be a column of the data set, one of {train_rows.column_names}, but is {column!r}."
            )
    if not args.unconditional and not isinstance(train_rows.features[args.label_column], datasets.ClassLabel):
        splits = encode_labels(splits, args.label_column)
        train_rows = splits["train"]

    held_out = next((splits[name] for name in ("validation", "val", "test") if name in splits), None)
    if held_out is None and len(train_rows) > 1:
        halves = train_rows.train_test_split(test_size=args.train_val_split, seed=args.seed)
        train_rows, held_out = halves["train"], halves["test"]
    if args.max_train_samples is not None:
        train_rows = train_rows.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(train_rows))))
    if held_out is None or len(train_rows) == 0 or len(held_out) == 0:
        raise ValueError(
            f"The data set must hold images to train on and to validate with, but has {len(train_rows)} and"
            f" {0 if held_out is None else len(held_out)} rows."
        )
    # Class folders lie side by side: the first rows alone would be of few classes.
    held_out = held_out.shuffle(seed=0).select(range(min(args.max_validation_samples, len(held_out))))
    return train_rows, held_out


def load_latents_vae(args: argparse.Namespace, settings: dict[str, Any]) -> AutoencoderKL:
    """The VAE of a latent flow: the one given, else the pretrained pipeline's, else the one that made the latents.
    Raises ValueError unless it is that one, by its weights."""
    name, subfolder = settings["vae"], settings["vae_subfolder"]
    if args.pretrained_model_name_or_path is not None:
        name, subfolder = args.pretrained_model_name_or_path, "vae"
    if args.vae_model_name_or_path is not None:
        name, subfolder = args.vae_model_name_or_path, args.vae_subfolder
    vae = load_vae(name, subfolder, args.cache_dir)
    if hash_weights(vae) != settings["vae_hash"]:
        raise ValueError(
            f"`--latents` {args.latents!r} were made with another VAE ({settings['vae']!r}) than {name!r}, whose"
            " weights differ: a flow trained on them would be decoded wrongly."
        )
    return vae


def check_latents(settings: dict[str, Any], config: Any, args: argparse.Namespace):
    """Raises ValueError if latents do not fit the flow or hold nothing that it could be aligned with."""
    grid_size = config.sample_size // config.patch_size
    if (config.in_channels, config.sample_size) != (settings["latent_channels"], settings["latent_size"]):
        raise ValueError(
            f"The flow must take samples like the latents, {settings['latent_channels']} channels of"
            f" {settings['latent_size']}x{settings['latent_size']}, but takes {config.in_channels} of"
            f" {config.sample_size}x{config.sample_size} (`in_channels`, `sample_size`)."
        )
    if config.noise_type != "gaussian":
        raise ValueError("`--noise_type` must be gaussian for latents: the uniform noise dequantizes 8-bit pixels.")
    if args.alignment == "none":
        return
    if settings["store"] == "none":
        raise ValueError(
            "`--latents` were stored without images and features: give --alignment none, or make them with --store."
        )
    if settings["store"] == "features" and settings["grid_size"] != grid_size:
        raise ValueError(
            f"The features in `--latents` must lie on the flow's grid of {grid_size}x{grid_size} tokens, but lie on"
            f" {settings['grid_size']}x{settings['grid_size']}."
        )
    if settings["store"] == "features" and args.teacher_model_name_or_path not in (None, settings["teacher"]):
        raise ValueError(
            f"`--teacher_model_name_or_path` {args.teacher_model_name_or_path!r} is not the teacher whose features are"
            f" in `--latents`, {settings['teacher']!r}: leave it out, or store images."
        )


def load_teacher_features(folder: str, config: Any, num_images: int) -> tuple[datasets.Dataset, int]:
    """
    The rows that `training/precompute_features.py` stored, memory-mapped, and the dimension of the features. Raises
    ValueError if they are incomplete or of other images or another grid than this run's.
    """
    settings_file = Path(folder) / "features.json"
    if not settings_file.exists():
        raise ValueError(
            f"`--teacher_features` must be a folder of training/precompute_features.py, but {folder!r} has no"
            " features.json."
        )
    settings = json.loads(settings_file.read_text())
    expected = {
        "num_images": num_images,
        "resolution": config.sample_size,
        "in_channels": config.in_channels,
        "grid_size": config.sample_size // config.patch_size,
    }
    for name, value in expected.items():
        if settings[name] != value:
            raise ValueError(
                f"`--teacher_features` must have `{name}` {value}, as this run, but have {settings[name]}."
            )
    shards = sorted(Path(folder).glob("shard-*"))
    if len(shards) != settings["num_shards"]:
        raise ValueError(
            f"`--teacher_features` must be complete, but {folder!r} holds {len(shards)} of {settings['num_shards']}"
            " shards: run training/precompute_features.py again, which goes on where it was."
        )
    rows = datasets.concatenate_datasets([datasets.load_from_disk(str(shard)) for shard in shards])
    return rows.with_format("numpy"), settings["feature_dim"]


def encode_labels(splits: datasets.DatasetDict, label_column: str) -> datasets.DatasetDict:
    """Numbers for text or other labels, all splits together: a split that lacks a class numbers the others alike."""
    encoded = datasets.concatenate_datasets(list(splits.values())).class_encode_column(label_column)
    ends = np.cumsum([len(rows) for rows in splits.values()])
    return datasets.DatasetDict(
        {name: encoded.select(range(end - len(splits[name]), end)) for name, end in zip(splits, ends.tolist())}
    )


def add_noise(images: torch.Tensor, config: Any, generator: torch.Generator) -> torch.Tensor:
    """What the flow sees: images in [-1, 1] plus Gaussian noise, or 8-bit pixels dequantized uniformly."""
    if config.noise_type == "gaussian":
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        return images + config.noise_std * noise
    uniform = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return ((images + 1) * 127.5 + uniform) / 128 - 1


def make_generator(device: torch.device, *entropy: int) -> torch.Generator:
    """Randomness as a function of seed, batch and process: resuming needs no random state, and repeats none."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


# Model


def make_flow(
    args: argparse.Namespace, class_names: list[str] | None, data_sizes: dict[str, int]
) -> tuple[TarFlowTransformer2DModel, dict[int, str] | None, list[int]]:
    """The flow, its class names, and the flow's class id of each label of the data set."""
    sizes = {
        "sample_size": args.resolution,
        "in_channels": args.in_channels,
        "patch_size": args.patch_size,
        "num_blocks": args.num_blocks,
        "num_layers": args.num_layers[0] if args.num_layers and len(args.num_layers) == 1 else args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "attention_head_dim": args.attention_head_dim,
        "position_embedding": args.position_embedding,
        "activation_fn": args.activation_fn,
        "noise_std": args.noise_std,
        "noise_type": args.noise_type,
    }
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if args.pretrained_model_name_or_path is not None:
        pipeline = FlowBackPipeline.from_pretrained(args.pretrained_model_name_or_path, cache_dir=args.cache_dir)
        config = pipeline.transformer.config
        source = "--pretrained_model_name_or_path"
    elif args.model_config is not None:
        if not Path(args.model_config).is_file():
            raise ValueError(f"`--model_config` must be an existing JSON file, but is {args.model_config!r}.")
        config = json.loads(Path(args.model_config).read_text())
        source = "--model_config"
    else:
        config, source = {**data_sizes, **sizes}, "the command line"
    contradicted = [name for name, size in sizes.items() if name in config and config[name] != size]
    if contradicted:
        raise ValueError(
            f"{source} says { ({name: config[name] for name in contradicted}) }, but the command line says"
            f" { ({name: sizes[name] for name in contradicted}) }: leave the latter out."
        )

    if args.pretrained_model_name_or_path is not None:
        return add_classes(pipeline, class_names)
    num_classes = None if class_names is None else len(class_names)
    if source == "--model_config":
        unknown = set(config) - set(TarFlowTransformer2DModel._get_init_keys(TarFlowTransformer2DModel))
        unknown = sorted(name for name in unknown if not name.startswith("_"))
        if unknown:
            raise ValueError(f"`--model_config` must hold arguments of TarFlowTransformer2DModel, but has {unknown}.")
    flow = TarFlowTransformer2DModel.from_config({**config, **sizes, "num_classes": num_classes})
    id2label = None if class_names is None else dict(enumerate(class_names))
    return flow, id2label, list(range(num_classes or 0))


def add_classes(
    pipeline: FlowBackPipeline, class_names: list[str] | None
) -> tuple[TarFlowTransformer2DModel, dict[int, str] | None, list[int]]:
    """A pretrained flow, with a row for each class name that it does not know; such a row starts at the table's mean,
    so that what 'no class' means stays as it is."""
    old = pipeline.transformer
    if (class_names is None) != (old.config.num_classes is None):
        raise ValueError(
            f"The pretrained flow has `num_classes` {old.config.num_classes}, but the data set has"
            f" {'no labels' if class_names is None else 'labels'}: give or leave out --unconditional."
        )
    if class_names is None:
        return old, None, []
    id2label = pipeline.config.id2label or {label: str(label) for label in range(old.config.num_classes)}
    id2label = {int(label): name for label, name in id2label.items()}
    known = {name: label for label, name in id2label.items()}
    for name in class_names:
        if name not in known:
            known[name] = len(known)
            id2label[known[name]] = name
    label_ids = [known[name] for name in class_names]
    num_new = len(known) - old.config.num_classes
    if num_new == 0:
        return old, id2label, label_ids
    flow = TarFlowTransformer2DModel.from_config({**old.config, "num_classes": len(known)})
    state_dict = old.state_dict()
    for name, table in state_dict.items():
        if name.endswith("class_embed"):
            state_dict[name] = torch.cat([table, table.mean(dim=0, keepdim=True).expand(num_new, -1)])
    flow.load_state_dict(state_dict)
    return flow, id2label, label_ids


def load_teacher(args: argparse.Namespace, grid_size: int, accelerator: Accelerator) -> RepresentationTeacher:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    try:
        teacher = RepresentationTeacher.from_pretrained(
            args.teacher_model_name_or_path or "facebook/dinov2-base",
            grid_size=grid_size,
            dtype=dtype,
            cache_dir=args.cache_dir,
        )
    except OSError as error:
        raise ValueError(f"`--teacher_model_name_or_path` cannot be loaded. {error}") from error
    return teacher.to(accelerator.device)


def compile_layers(accelerator: Accelerator, objective: AlignedFlowObjective, batch_size: int):
    """
    Compiles the transformer layers: all of them or, where that is faster, all but those of the blocks in which the
    gradients of likelihood and alignment part. There several gradients are taken of one graph, and a compiled layer
    computes those of its parameters each time. Which is faster depends on the device: a few steps decide.
    """
    # Several gradients of one graph are what a compiled one refuses while it reuses its buffers.
    torch._functorch.config.donated_buffer = False
    flow = objective.flow
    flow.compile_repeated_blocks()
    if not objective.parting_blocks:
        return
    every_layer = seconds_per_step(accelerator, objective, batch_size)
    parting_layers = [layer for number in objective.parting_blocks for layer in flow.blocks[number - 1].layers]
    for layer in parting_layers:
        layer._compiled_call_impl = None
    but_parting = seconds_per_step(accelerator, objective, batch_size)
    # The main process decides for all.
    (compile_all,) = broadcast_object_list([every_layer < but_parting])
    if compile_all:
        for layer in parting_layers:
            layer.compile()
    logger.info(
        f"A step takes {every_layer:.3f} s with every layer compiled and {but_parting:.3f} s without those of the flow"
        f" blocks {objective.parting_blocks}: compiled {'every layer' if compile_all else 'the others'}."
    )


def seconds_per_step(accelerator: Accelerator, objective: AlignedFlowObjective, batch_size: int) -> float:
    """The median of three steps without an optimizer, after one that compiles."""
    config = objective.flow.config
    noise = torch.zeros(batch_size, config.in_channels, config.sample_size, config.sample_size)
    labels = None if config.num_classes is None else torch.zeros(batch_size, dtype=torch.long)
    num_tokens = (config.sample_size // config.patch_size) ** 2
    features = torch.ones(batch_size, num_tokens, objective.teacher_dim)
    inputs = [None if tensor is None else tensor.to(accelerator.device) for tensor in (noise, labels, features)]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        with accelerator.autocast():
            loss = objective(*inputs).loss
        loss.backward()
        # Reading a value waits for the device.
        objective.flow.blocks[0].proj_in.weight.grad.sum().item()
        seconds.append(time.perf_counter() - start)
        objective.zero_grad()
    return statistics.median(seconds[1:])


def alignment_places(flow: TarFlowTransformer2DModel, blocks: list[int] | None, layer: int | None):
    num_blocks = len(flow.blocks)
    blocks = blocks or list(range(max(1, num_blocks - 1), num_blocks + 1))

    def default_layer(block: int) -> int:
        num_layers = len(flow.blocks[block - 1].layers) if 1 <= block <= num_blocks else 1
        return max(1, round(0.75 * num_layers))

    return [(block, default_layer(block) if layer is None else layer) for block in blocks]


# The output folder


def check_output_dir(args: argparse.Namespace) -> bool:
    """Whether there is a run to resume. Raises ValueError if the folder holds another one."""
    folder = Path(args.output_dir)
    args_file = folder / "training_args.json"
    if not args_file.exists():
        if folder.exists() and (any(folder.glob("checkpoint-*")) or (folder / "model_index.json").exists()):
            raise ValueError(f"`--output_dir` {folder} already holds another model: choose another folder.")
        return False
    if args.resume_from_checkpoint is None:
        raise ValueError(
            f"`--output_dir` {folder} already holds a run: add --resume_from_checkpoint latest to go on with it, or"
            " choose another folder."
        )
    earlier = json.loads(args_file.read_text())
    different = [
        f"--{name} ({earlier.get(name)!r} then, {value!r} now)"
        for name, value in vars(args).items()
        if name not in RESUMABLE_ARGUMENTS and earlier.get(name) != value
    ]
    if different:
        raise ValueError(f"`--output_dir` {folder} holds a different run; it differs in {', '.join(different)}.")
    return True


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders from the oldest to the newest; other names that begin alike are left alone."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def save_checkpoint(accelerator: Accelerator, output_dir: Path, global_step: int, num_batches: int, limit: int | None):
    """Under a temporary name first, then renamed; only then are older ones deleted."""
    partial = output_dir / f".checkpoint-{global_step}.partial"
    checkpoint = output_dir / f"checkpoint-{global_step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
        progress = {"global_step": global_step, "num_batches": num_batches, "file_sizes": sizes}
        (partial / "progress.json").write_text(json.dumps(progress, indent=2))
        shutil.rmtree(checkpoint, ignore_errors=True)
        os.replace(partial, checkpoint)
        for old in list_checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def read_progress(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; `None` if it is not whole."""
    try:
        progress = json.loads((checkpoint / "progress.json").read_text())
        whole = all((checkpoint / name).stat().st_size == size for name, size in progress["file_sizes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return progress if whole else None


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint asked for or, where it is not whole, the newest whole one before it."""
    candidates = list_checkpoints(output_dir)
    if resume_from_checkpoint != "latest":
        names = [path.name for path in candidates]
        name = Path(resume_from_checkpoint).name
        if name not in names:
            raise ValueError(f"`--resume_from_checkpoint` must be latest or one of {names}, but is {name!r}.")
        candidates = candidates[: names.index(name) + 1]
    for checkpoint in reversed(candidates):
        progress = read_progress(checkpoint)
        if progress is not None:
            return checkpoint, progress
        logger.warning(f"{checkpoint} is truncated or incomplete: falling back to the checkpoint before it.")
    return None


def save_pipeline(pipeline: FlowBackPipeline, output_dir: Path):
    partial = output_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    # model_index.json last: a folder that has one holds a whole pipeline.
    for path in sorted(partial.iterdir(), key=lambda path: path.is_file()):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    partial.rmdir()


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, and the loss curve drawn from it."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        self.records = []
        if path.exists():
            lines = path.read_text().splitlines()
            # A killed run may have left half a line, and lines of steps that are about to be done again.
            whole = [json.loads(line) for line in lines if line.endswith("}")]
            self.records = [record for record in whole if 0 < first_step >= record["step"]]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.records))

    def write(self, record: dict[str, Any]):
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def draw(self, path: Path):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        recorded = {key for record in self.records for key in record}
        panels = {"nll": ["nll", "validation_nll"], "alignment": ["alignment"]}
        panels = {name: keys for name, keys in panels.items() if recorded.intersection(keys)}
        figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
        for axis, (name, keys) in zip(axes[0], panels.items()):
            for key in keys:
                points = [(record["step"], record[key]) for record in self.records if key in record]
                if points:
                    axis.plot(*zip(*points), label=key.replace("_", " "), marker="o" if key != name else None)
            axis.set_xlabel("step")
            axis.set_ylabel({"nll": "nats per dimension", "alignment": "mean of -cos"}[name])
            axis.legend()
            axis.grid(alpha=0.3)
        figure.tight_layout()
        partial = path.with_name(f".partial-{path.name}")
        figure.savefig(partial, dpi=100)
        plt.close(figure)
        os.replace(partial, path)


# Training


def scalars(output: AlignedFlowOutput) -> dict[str, torch.Tensor]:
    """An objective's output as one flat table of scalars."""
    table = {"loss": output.loss, "nll": output.nll}
    if output.alignment is not None:
        table["alignment"] = output.alignment
        for place, cosine in output.cosine_similarity.items():
            table[f"cosine_similarity/{projector_name(place)}"] = cosine
    for block, growth in (output.neumann_growth or {}).items():
        table[f"neumann_growth/block{block}"] = growth
    table["max_log_scale"] = output.max_log_scale
    return {name: value.detach().float() for name, value in table.items()}


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    classifier: FlowBackClassificationPipeline,
    dataloader: torch.utils.data.DataLoader,
    vae_config: Any | None,
) -> dict[str, float]:
    """
    Negative log-likelihood in nats per dimension; of a density model bits too; of a flow with classes the accuracy of
    its training-free classification by one gradient. All of one draw of noise, the same every time.
    """
    flow = classifier.transformer
    log_probs, hits = [], []
    for number, batch in enumerate(dataloader):
        generator = make_generator(accelerator.device, 0, number, accelerator.process_index)
        batch = mirror(batch, torch.zeros_like(batch["class_labels"], dtype=torch.bool))
        noisy_sample = add_noise(clean_sample(batch, vae_config, generator), flow.config, generator)
        class_labels = None if flow.config.num_classes is None else batch["class_labels"]
        log_probs.append(accelerator.gather_for_metrics(flow.log_prob(noisy_sample, class_labels)))
        if class_labels is not None:
            _, gradient = classifier.log_prob_and_class_gradient(noisy_sample[None])
            predictions, class_labels = accelerator.gather_for_metrics((gradient.argmax(dim=1), class_labels))
            hits.append((predictions == class_labels)[class_labels >= 0])
    num_dimensions = flow.config.in_channels * flow.config.sample_size**2
    nll = -torch.cat(log_probs).mean().item() / num_dimensions
    metrics = {"validation_nll": nll}
    if flow.config.noise_type == "uniform":
        metrics["validation_bits_per_dim"] = (nll + math.log(128)) / math.log(2)
    if sum(map(len, hits)):
        metrics["validation_accuracy"] = torch.cat(hits).float().mean().item()
    return metrics


def draw_samples(pipeline: FlowBackPipeline, args: argparse.Namespace, path: Path):
    """A grid with one row a class, small images enlarged so that a person can see them."""
    num_images = 4
    class_labels = args.validation_class_labels
    if class_labels is None and pipeline.transformer.config.num_classes is not None:
        class_labels = list(range(min(10, pipeline.transformer.config.num_classes)))
    guided = pipeline.transformer.config.num_classes is not None
    images = pipeline(
        class_labels=class_labels,
        num_images_per_prompt=num_images,
        guidance_scale=args.validation_guidance_scale if guided else 1.0,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    path.parent.mkdir(exist_ok=True)
    size = max(64, images[0].width)
    make_image_grid(images, rows=len(images) // num_images, cols=num_images, resize=size).save(path)


def main(args: argparse.Namespace):
    output_dir = Path(args.output_dir)
    # The arguments go into files and trackers from here on, and the token must not.
    hub_token = vars(args).pop("hub_token")
    hub_model_id = args.hub_model_id or output_dir.resolve().name
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(output_dir / args.logging_dir)
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    datasets.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('The loss curve needs matplotlib: pip install "flowback_hf[train]".') from error

    # Everything a user can get wrong is found before anything is written.
    holds_run = check_output_dir(args)
    train_rows, validation_rows = load_splits(args)
    class_names = None if args.unconditional else train_rows.features[args.label_column].names
    latents = None if args.latents is None else read_latents_settings(args.latents)
    data_sizes = (
        {} if latents is None else {"in_channels": latents["latent_channels"], "sample_size": latents["latent_size"]}
    )
    flow, id2label, label_ids = make_flow(args, class_names, data_sizes)
    vae = None
    if latents is not None:
        check_latents(latents, flow.config, args)
        vae = load_latents_vae(args, latents).to(accelerator.device)
    elif flow.config.in_channels not in (1, 3):
        raise ValueError(f"`in_channels` must be 1 or 3 to train on images, but is {flow.config.in_channels}.")
    pipeline = FlowBackPipeline(flow, vae, id2label=id2label)
    if args.push_to_hub:
        check_repository(hub_model_id, dict(flow.config), args.hub_private_repo, hub_token)
    if args.validation_class_labels is not None:
        numbers_or_names = [int(label) if label.isdigit() else label for label in args.validation_class_labels]
        args.validation_class_labels = pipeline.normalize_class_labels(numbers_or_names)
        pipeline.check_inputs(args.validation_class_labels, args.validation_guidance_scale)
    objective_arguments = {"strategy": args.alignment, "weight": args.alignment_weight, "order": args.alignment_order}
    teacher, stored_features = None, None
    if args.alignment != "none":
        if args.teacher_features is not None:
            stored_features, teacher_dim = load_teacher_features(args.teacher_features, flow.config, len(train_rows))
        elif latents is not None and latents["store"] == "features":
            teacher_dim = latents["feature_dim"]
        else:
            teacher = load_teacher(args, flow.config.sample_size // flow.config.patch_size, accelerator)
            teacher_dim = teacher.feature_dim
        objective_arguments |= {
            "places": alignment_places(flow, args.alignment_blocks, args.alignment_layer),
            "teacher_dim": teacher_dim,
            "projector_dim": args.projector_dim,
        }
    objective = AlignedFlowObjective(flow, **objective_arguments)
    labels = (None if args.unconditional else args.label_column, label_ids)
    sizes = (flow.config.sample_size, flow.config.in_channels)
    if latents is not None:
        for_alignment = [name for name in ("image", "teacher_features") if name in train_rows.column_names]
        validation_rows = validation_rows.remove_columns(for_alignment)
        if args.alignment == "none":
            train_rows = train_rows.remove_columns(for_alignment)
        train_dataset, validation_dataset = (LatentDataset(rows, *labels) for rows in (train_rows, validation_rows))
    else:
        train_dataset = ImageDataset(train_rows, args.image_column, *labels, *sizes, teacher_features=stored_features)
        validation_dataset = ImageDataset(validation_rows, args.image_column, *labels, *sizes)
    batch_size = args.train_batch_size * accelerator.num_processes
    if len(train_dataset) < batch_size:
        raise ValueError(
            f"`--train_batch_size` {args.train_batch_size} on {accelerator.num_processes} processes needs {batch_size}"
            f" images, but the training split has {len(train_dataset)}."
        )
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if args.resume_from_checkpoint and checkpoint is None:
        logger.warning(f"There is no checkpoint to resume from in {output_dir}: starting at step 0.")

    vae_config = None if vae is None else vae.config
    # A copy holds the averaged weights when they are looked at: the trained ones are never touched, and compiled
    # layers never run token by token.
    evaluated_flow = TarFlowTransformer2DModel.from_config(flow.config).to(accelerator.device).eval()
    evaluated_flow.requires_grad_(False)
    pipeline.register_modules(transformer=evaluated_flow)
    classifier = FlowBackClassificationPipeline(evaluated_flow)
    for flow_pipeline in (pipeline, classifier):
        flow_pipeline.set_progress_bar_config(disable=True)
    if args.gradient_checkpointing:
        flow.enable_gradient_checkpointing()
    if args.torch_compile:
        compile_layers(accelerator, objective.to(accelerator.device), args.train_batch_size)

    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= batch_size * args.gradient_accumulation_steps
    optimizer = torch.optim.AdamW(
        objective.parameters(),
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    loader_arguments = {"num_workers": args.dataloader_num_workers, "collate_fn": collate}
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset, args.train_batch_size, shuffle=True, drop_last=True, **loader_arguments
    )
    validation_dataloader = torch.utils.data.DataLoader(validation_dataset, args.eval_batch_size, **loader_arguments)
    objective, optimizer, train_dataloader, validation_dataloader = accelerator.prepare(
        objective, optimizer, train_dataloader, validation_dataloader
    )
    batches_per_epoch = len(train_dataloader)
    max_train_steps = args.max_train_steps
    if max_train_steps is None:
        max_train_steps = args.num_train_epochs * math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    # The scheduler is stepped by every process.
    lr_scheduler = accelerator.prepare(
        get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=max_train_steps * accelerator.num_processes,
        )
    )
    ema = None
    if args.use_ema:
        ema = EMAModel(flow.parameters(), decay=args.ema_decay, foreach=True)
        accelerator.register_for_checkpointing(ema)

    accelerator.wait_for_everyone()  # every process has looked at the output folder
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not holds_run:
            write_atomically(output_dir / "training_args.json", json.dumps(vars(args), indent=2))
    global_step, num_batches = 0, 0
    if checkpoint is not None:
        folder, progress = checkpoint
        logger.info(f"Resuming from {folder}.")
        accelerator.load_state(str(folder))
        global_step, num_batches = progress["global_step"], progress["num_batches"]
        if ema is not None:
            ema.to(accelerator.device)
    metrics_file = None
    if accelerator.is_main_process:
        metrics_file = MetricsFile(output_dir / "metrics.jsonl", global_step)
        tracked = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str | bool)}
        accelerator.init_trackers(args.tracker_project_name, tracked)

    def record(values: dict[str, float]):
        accelerator.log(values, step=global_step)
        if accelerator.is_main_process:
            metrics_file.write({"step": global_step, **values})

    @torch.no_grad()
    def update_evaluated_flow():
        averaged_parameters = flow.parameters() if ema is None else ema.shadow_params
        for parameter, averaged in zip(evaluated_flow.parameters(), averaged_parameters):
            parameter.copy_(averaged)

    def evaluate():
        update_evaluated_flow()
        record(validate(accelerator, classifier, validation_dataloader, vae_config))
        if accelerator.is_main_process:
            draw_samples(pipeline, args, output_dir / "samples" / f"step-{global_step:07d}.png")
            metrics_file.draw(output_dir / "loss_curve.png")
        accelerator.wait_for_everyone()

    progress_bar = tqdm(
        total=max_train_steps, initial=global_step, desc="Training", disable=not accelerator.is_local_main_process
    )
    if global_step == 0:
        evaluate()
    skipped_files: set[str] = set()
    num_skipped = 0
    batch_values: list[torch.Tensor] = []
    num_images, started_at = 0, time.perf_counter()
    while global_step < max_train_steps:
        epoch, num_done = divmod(num_batches, batches_per_epoch)
        train_dataloader.set_epoch(epoch)
        epoch_dataloader = accelerator.skip_first_batches(train_dataloader, num_done) if num_done else train_dataloader
        for batch in epoch_dataloader:
            generator = make_generator(accelerator.device, args.seed, num_batches, accelerator.process_index)
            batch = augment(batch, args, generator)
            with accelerator.accumulate(objective):
                teacher_features = batch.get("teacher_features") if teacher is None else teacher(batch["images"])
                output = objective(
                    add_noise(clean_sample(batch, vae_config, generator), flow.config, generator),
                    None if args.unconditional else batch["class_labels"],
                    teacher_features,
                )
                accelerator.backward(output.loss)
                values = scalars(output)
                batch_values.append(torch.stack(list(values.values())))
                if accelerator.sync_gradients:
                    # (batches of this step on all processes, values)
                    gathered = accelerator.gather(torch.stack(batch_values))
                    batch_values.clear()
                    values = dict(zip(values, gathered.mean(dim=0).tolist()))
                    values["max_log_scale"] = gathered[:, -1].amax().item()
                    gradient_norm = accelerator.clip_grad_norm_(objective.parameters(), args.max_grad_norm).item()
                    check_finite(accelerator, global_step + 1, values["loss"], gradient_norm, output_dir)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients and ema is not None:
                    ema.step(flow.parameters())

            num_batches += 1
            num_images += batch_size
            num_skipped += len(batch["skipped"])
            for name in set(batch["skipped"]) - skipped_files:
                logger.warning(f"Skipped {name}: it cannot be decoded.", main_process_only=False)
            skipped_files.update(batch["skipped"])
            if not accelerator.sync_gradients:
                continue

            global_step += 1
            progress_bar.update()
            progress_bar.set_postfix(loss=f"{values['loss']:.4f}")
            if global_step % args.logging_steps == 0 or global_step == max_train_steps:
                elapsed = time.perf_counter() - started_at
                values |= {
                    "gradient_norm": gradient_norm,
                    "learning_rate": lr_scheduler.get_last_lr()[0],
                    "images_per_second": num_images / elapsed,
                    "images_skipped": num_skipped,
                    "epoch": epoch,
                }
                record(values)
                num_images, started_at = 0, time.perf_counter()
            # What was logged before a checkpoint is kept when the run is resumed from it: it comes last.
            if global_step % args.validation_steps == 0 or global_step == max_train_steps:
                evaluate()
            if global_step % args.checkpointing_steps == 0 or global_step == max_train_steps:
                save_checkpoint(accelerator, output_dir, global_step, num_batches, args.checkpoints_total_limit)
            if global_step == max_train_steps:
                break
    progress_bar.close()

    update_evaluated_flow()
    if accelerator.is_main_process:
        pipeline.register_to_config(guidance_scale=args.validation_guidance_scale)
        save_pipeline(pipeline, output_dir)
        logger.info(f"Saved the pipeline in {output_dir}; skipped {len(skipped_files)} files that cannot be decoded.")
        if args.push_to_hub:
            publish(pipeline, hub_model_id, output_dir, args.hub_private_repo, hub_token)
    accelerator.end_training()


def augment(batch: dict[str, Any], args: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """Mirrors half of the images, if asked to, and drops a share of the labels."""
    class_labels = batch["class_labels"]
    mirrored, dropped = torch.rand(2, len(class_labels), generator=generator, device=class_labels.device)
    batch = mirror(batch, (mirrored < 0.5) & args.random_flip)
    return batch | {"class_labels": class_labels.masked_fill(dropped < args.label_dropout, -1)}


def mirror(batch: dict[str, Any], mirrored: torch.Tensor) -> dict[str, Any]:
    """Some images mirrored; of what is stored for an image and its mirror image, the one or the other."""
    chosen = {}
    if "images" in batch:
        images = batch["images"]
        chosen["images"] = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    for name in ("teacher_features", "moments"):
        if name in batch:
            chosen[name] = batch[name][torch.arange(len(mirrored), device=mirrored.device), mirrored.long()]
    return batch | chosen


def clean_sample(batch: dict[str, Any], vae_config: Any | None, generator: torch.Generator) -> torch.Tensor:
    """What the flow models, before noise: the images or, where there is a VAE, a draw of their latents."""
    return batch["images"] if vae_config is None else draw_latents(batch["moments"], vae_config, generator)


def publish(pipeline: FlowBackPipeline, repo_id: str, output_dir: Path, private: bool, token: str | None):
    try:
        url = pipeline.push_to_hub(repo_id, run_dir=output_dir, private=private, token=token)
    except Exception as error:
        raise RuntimeError(
            f"The pipeline is saved in {output_dir}, but could not be published: {error}. Try again with"
            f" pipelines/push_to_hub.py --model {output_dir} --hub_model_id {repo_id}."
        ) from error
    logger.info(f"Published {url}.")


def check_finite(accelerator: Accelerator, step: int, loss: float, gradient_norm: float, output_dir: Path):
    # Loss scaling of fp16 meets infinite gradients and skips their steps by itself.
    if math.isfinite(loss) and (math.isfinite(gradient_norm) or accelerator.scaler is not None):
        return
    checkpoints = list_checkpoints(output_dir)
    good = f"the last checkpoint, {checkpoints[-1]}, is intact" if checkpoints else "there is no checkpoint yet"
    raise FloatingPointError(
        f"Step {step}: the loss is {loss} and the gradient's norm {gradient_norm}. Training stopped before this step"
        f" changed the weights; {good}. Try a lower --learning_rate or --max_grad_norm, or more --lr_warmup_steps."
    )


if __name__ == "__main__":
    main(parse_args())
