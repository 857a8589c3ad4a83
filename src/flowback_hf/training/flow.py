# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What the flags of `training/train_rra.py` build: the flow, its data, its teacher and its objective."""

import argparse
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.models import AutoencoderKL

from flowback_hf import AlignedFlowObjective, FlowBackPipeline, RepresentationTeacher, TarFlowTransformer2DModel
from flowback_hf.data import (
    ImageSource,
    LatentSource,
    Splits,
    load_teacher,
    load_teacher_features,
    match_class_names,
)
from flowback_hf.data.latents import hash_weights, load_vae
from flowback_hf.files import read_json
from flowback_hf.hub import load_pipeline
from flowback_hf.places import choose_places
from flowback_hf.training.adapters import add_lora


class LabelledFlow(NamedTuple):
    """
    A flow and what its classes are called.

    Args:
        flow ([`TarFlowTransformer2DModel`]): The flow.
        id2label (`dict[int, str]`, *optional*): Its class names; `None` without classes.
        label_ids (`list[int]`): The flow's class id of each class id of the data set.
        guidance_scale (`float`, defaults to 1.0), guidance_rule (`str`, defaults to `"linear"`):
            The defaults of the pretrained pipeline.
    """

    flow: TarFlowTransformer2DModel
    id2label: dict[int, str] | None
    label_ids: list[int]
    guidance_scale: float = 1.0
    guidance_rule: str = "linear"


def make_flow(args: argparse.Namespace, class_names: list[str] | None, data_sizes: dict[str, int]) -> LabelledFlow:
    """
    Build the flow that the flags describe, or load and extend a pretrained one, with an adapter if they say so.

    Args:
        args (`argparse.Namespace`): The model flags and the adapter flags.
        class_names (`list[str]`, *optional*): By class id of the data set; `None` without classes.
        data_sizes (`dict`): The model's arguments that the data decide.
    Raises:
        ValueError: if the flags contradict the pretrained model or the JSON file of `--model_config`; and as
            [`add_lora`].
    """
    sizes = model_flags(args)
    if args.pretrained_model_name_or_path is not None:
        option = "--pretrained_model_name_or_path"
        pipeline = load_pipeline(FlowBackPipeline, args.pretrained_model_name_or_path, option, args.cache_dir)
        check_contradictions("--pretrained_model_name_or_path", pipeline.transformer.config, sizes)
        guidance = {name: pipeline.config[name] for name in ("guidance_scale", "guidance_rule")}
        labelled = add_classes(pipeline, class_names)._replace(**guidance)
        if args.lora_rank is not None:
            num_known = pipeline.transformer.config.num_classes
            new_classes = [name for label, name in (labelled.id2label or {}).items() if label >= num_known]
            add_lora(args, labelled.flow, new_classes)
        return labelled
    config = data_sizes
    if args.model_config is not None:
        config = read_model_config(args.model_config)
        check_contradictions("--model_config", config, sizes)
    num_classes = None if class_names is None else len(class_names)
    flow = TarFlowTransformer2DModel.from_config({**config, **sizes, "num_classes": num_classes})
    id2label = None if class_names is None else dict(enumerate(class_names))
    return LabelledFlow(flow, id2label, list(range(num_classes or 0)))


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The model's arguments that are given on the command line."""
    num_layers = args.num_layers
    sizes = {
        "sample_size": args.resolution,
        "in_channels": args.in_channels,
        "patch_size": args.patch_size,
        "num_blocks": args.num_blocks,
        "num_layers": num_layers[0] if num_layers and len(num_layers) == 1 else num_layers,
        "num_attention_heads": args.num_attention_heads,
        "attention_head_dim": args.attention_head_dim,
        "position_embedding": args.position_embedding,
        "activation_fn": args.activation_fn,
        "noise_std": args.noise_std,
        "noise_type": args.noise_type,
    }
    return {name: size for name, size in sizes.items() if size is not None}


def read_model_config(path: str) -> dict[str, Any]:
    """Read a JSON file of the model's arguments. Raises ValueError if it is missing or has others."""
    config = read_json(path)
    if config is None:
        raise ValueError(f"`--model_config` must be an existing JSON file, but is {path!r}.")
    unknown = set(config) - set(TarFlowTransformer2DModel._get_init_keys(TarFlowTransformer2DModel))
    unknown = sorted(name for name in unknown if not name.startswith("_"))
    if unknown:
        raise ValueError(f"`--model_config` must hold arguments of TarFlowTransformer2DModel, but has {unknown}.")
    return config


def check_contradictions(source: str, config: dict[str, Any], sizes: dict[str, Any]):
    """Raise ValueError if the command line contradicts where the model's arguments come from."""
    contradicted = [name for name, size in sizes.items() if name in config and config[name] != size]
    if contradicted:
        raise ValueError(
            f"{source} says { ({name: config[name] for name in contradicted}) }, but the command line says"
            f" { ({name: sizes[name] for name in contradicted}) }: leave the latter out."
        )


def add_classes(pipeline: FlowBackPipeline, class_names: list[str] | None) -> LabelledFlow:
    """
    Give a pretrained flow a row in its class tables for each class name that it does not know.

    A new row starts at the mean of the table, so that what "no class" means stays as it is.

    Raises:
        ValueError: if only one of the flow and the data set has classes; and as [`match_class_names`].
    """
    old = pipeline.transformer
    if (class_names is None) != (old.config.num_classes is None):
        raise ValueError(
            f"The pretrained flow has `num_classes` {old.config.num_classes}, but the data set has"
            f" {'no labels' if class_names is None else 'labels'}: give or leave out --unconditional."
        )
    if class_names is None:
        return LabelledFlow(old, None, [])
    id2label = pipeline.config.id2label or {label: str(label) for label in range(old.config.num_classes)}
    id2label = {int(label): name for label, name in id2label.items()}
    label_ids, num_classes = match_class_names(class_names, id2label), old.config.num_classes
    for index, name in enumerate(class_names):
        if label_ids[index] is None:
            label_ids[index] = num_classes
            id2label[num_classes] = name
            num_classes += 1
    num_new = num_classes - old.config.num_classes
    flow = old if num_new == 0 else extend_class_tables(old, num_new)
    return LabelledFlow(flow, id2label, label_ids)


def extend_class_tables(old: TarFlowTransformer2DModel, num_new: int) -> TarFlowTransformer2DModel:
    """A copy of a flow with so many more classes, each at the mean of those that were there."""
    config = {name: value for name, value in old.config.items() if not name.startswith("_")}
    flow = TarFlowTransformer2DModel(**{**config, "num_classes": old.config.num_classes + num_new})
    state_dict = old.state_dict()
    for name, table in state_dict.items():
        if name.endswith("class_embed"):
            state_dict[name] = torch.cat([table, table.mean(dim=0, keepdim=True).expand(num_new, -1)])
    flow.load_state_dict(state_dict)
    return flow


def make_source(
    args: argparse.Namespace, splits: Splits, config: Any, label_ids: list[int]
) -> ImageSource | LatentSource:
    """
    Build the source of batches that the flags describe: images, or the latents of a VAE.

    Args:
        args (`argparse.Namespace`): The data and alignment flags.
        splits ([`Splits`]): What [`load_splits`] loaded.
        config: Of the flow.
        label_ids (`list[int]`): The flow's class id of each class id of the data set.
    Raises:
        ValueError: if the data, the flow and the stored features do not fit each other.
    """
    label_column = None if args.unconditional else args.label_column
    if splits.latents is None:
        stored, teacher_dim = None, None
        if args.teacher_features is not None:
            stored, teacher_dim = load_teacher_features(args.teacher_features, config, len(splits.train))
        return ImageSource(splits, config, label_ids, args.image_column, label_column, stored, teacher_dim)
    aligned = args.alignment != "none"
    stored_teacher = splits.latents.get("teacher")
    if aligned and stored_teacher and args.teacher_model_name_or_path not in (None, stored_teacher):
        raise ValueError(
            f"`--teacher_model_name_or_path` {args.teacher_model_name_or_path!r} is not the teacher whose features are"
            f" in `--latents`, {stored_teacher!r}: leave it out, or store images."
        )
    vae = load_vae_of_latents(args, splits.latents)
    return LatentSource(splits, config, label_ids, vae, label_column, aligned)


def load_vae_of_latents(args: argparse.Namespace, settings: dict[str, Any]) -> AutoencoderKL:
    """
    Load the VAE of a latent flow: the one given, else the pretrained pipeline's, else the one that made the latents.

    Raises:
        ValueError: unless its weights are those of the VAE that made the latents.
    """
    name, subfolder = settings["vae"], settings["vae_subfolder"]
    if args.pretrained_model_name_or_path is not None:
        name, subfolder = args.pretrained_model_name_or_path, "vae"
    if args.vae_model_name_or_path is not None:
        name, subfolder = args.vae_model_name_or_path, args.vae_subfolder
    vae = load_vae(name, subfolder, args.cache_dir)
    check_vae_of_latents(args, settings, vae, name)
    return vae


def check_vae_of_latents(args: argparse.Namespace, settings: dict[str, Any], vae: AutoencoderKL, name: str):
    """Raise ValueError unless the weights of a VAE are those of the one that made the latents."""
    if hash_weights(vae) != settings["vae_hash"]:
        raise ValueError(
            f"`--latents` {args.latents!r} were made with another VAE ({settings['vae']!r}) than {name!r}, whose"
            " weights differ: a flow trained on them would be decoded wrongly."
        )


def make_teacher(
    args: argparse.Namespace, source: ImageSource | LatentSource, config: Any, accelerator: Accelerator
) -> RepresentationTeacher | None:
    """Load the teacher that the flags name; `None` if its features are stored or nothing is aligned."""
    if args.alignment == "none" or source.teacher_dim is not None:
        return None
    grid_size = config.sample_size // config.patch_size
    return load_teacher(args.teacher_model_name_or_path, grid_size, accelerator, args.cache_dir)


def make_objective(
    args: argparse.Namespace, flow: TarFlowTransformer2DModel, teacher_dim: int | None
) -> AlignedFlowObjective:
    """
    Build the objective that the alignment flags describe.

    Args:
        args (`argparse.Namespace`): The alignment flags.
        flow ([`TarFlowTransformer2DModel`]): The flow to train.
        teacher_dim (`int`, *optional*): Dimension of the teacher's features; not needed for `--alignment none`.
    Raises:
        ValueError: as [`AlignedFlowObjective`].
    """
    arguments = {"strategy": args.alignment, "weight": args.alignment_weight, "order": args.alignment_order}
    if args.alignment != "none":
        num_layers = [len(block.layers) for block in flow.blocks]
        arguments |= {
            "places": choose_places(num_layers, args.alignment_blocks, args.alignment_layer),
            "teacher_dim": teacher_dim,
            "projector_dim": args.projector_dim,
            "projector_type": args.projector_type,
            "normalize_teacher_features": args.normalize_teacher_features,
        }
    return AlignedFlowObjective(flow, **arguments)
