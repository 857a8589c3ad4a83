# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""LoRA adapters of a run: what the flags attach to a flow, and what the run leaves behind."""

import argparse
from pathlib import Path

import torch
from diffusers.utils import is_peft_available

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.files import move_into, staged, write_text
from flowback_hf.model_card import read_edited_card, render_adapter_card
from flowback_hf_cli.training import LORA_TARGET_MODULES


ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def add_lora(args: argparse.Namespace, flow: TarFlowTransformer2DModel, new_classes: list[str]):
    """
    Attach the LoRA adapter that the flags describe. Only it and, if asked, the class tables are trained from then on.

    Args:
        args (`argparse.Namespace`): The adapter flags.
        flow ([`TarFlowTransformer2DModel`]): The pretrained flow.
        new_classes (`list[str]`): Names of the classes that were added to its tables.
    Raises:
        ImportError: if PEFT is not installed.
        ValueError: if the flow lacks a target module or a class table, or new classes would not be trained.
    """
    if not is_peft_available():
        raise ImportError("`--lora_rank` needs PEFT. Install it with `pip install 'flowback_hf[lora]'`.")
    import peft  # takes seconds

    if args.lora_train_class_embed and flow.config.num_classes is None:
        raise ValueError("`--lora_train_class_embed` needs a flow with classes, but this one is unconditional.")
    if new_classes and not args.lora_train_class_embed:
        raise ValueError(
            f"The flow does not know the classes {new_classes}, and an adapter alone cannot tell them apart: add"
            " --lora_train_class_embed, or name the classes as the flow does."
        )
    target_modules = args.lora_target_modules or list(LORA_TARGET_MODULES)
    check_target_modules(flow, target_modules)
    flow.add_adapter(
        peft.LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_rank if args.lora_alpha is None else args.lora_alpha,
            target_modules=target_modules,
        )
    )
    if args.lora_train_class_embed:
        for block in flow.blocks:
            block.class_embed.requires_grad_()


def check_target_modules(flow: TarFlowTransformer2DModel, target_modules: list[str]):
    """Raise ValueError unless each name is that of a linear layer, or the last parts of the names of several."""
    layers = [name for name, module in flow.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            within_layers = [name.split(".", 4)[-1] if ".layers." in name else name.split(".")[-1] for name in layers]
            raise ValueError(
                f"`--lora_target_modules` must be among {list(dict.fromkeys(within_layers))}, or full names such as"
                f" {layers[1]!r}, but one is {target!r}. Queries, keys and values are one layer, to_qkv."
            )


def trained_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are trained: all of a flow without an adapter, else those of the adapter."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def trains_class_tables(flow: TarFlowTransformer2DModel) -> bool:
    """Whether the tables of class embeddings are trained."""
    return flow.config.num_classes is not None and flow.blocks[0].class_embed.requires_grad


def save_adapter(pipeline: FlowBackPipeline, folder: Path, with_class_tables: bool):
    """
    Write a pipeline's adapter into a run's folder, with a card that says how to load it.

    Args:
        pipeline ([`FlowBackPipeline`]): A pipeline whose flow has one adapter.
        folder (`pathlib.Path`): The run's folder. A folder that has the adapter's file is whole: it is
            the first to go and the last to come.
        with_class_tables (`bool`): Whether the class tables were trained, too.
    """
    import peft

    flow = pipeline.transformer
    (adapter_name,) = flow.attached_adapters
    with staged(folder / "adapter") as staging:
        pipeline.save_lora_weights(
            staging,
            transformer_lora_layers=peft.get_peft_model_state_dict(flow, adapter_name=adapter_name),
            transformer_lora_adapter_metadata=flow.peft_config[adapter_name].to_dict(),
        )
        if with_class_tables:
            pipeline.save_class_embeddings(staging)
        if read_edited_card(folder) is None:
            write_text(staging / "README.md", render_adapter_card(pipeline, folder, with_class_tables))
    move_into(staging, folder, ADAPTER_FILE)
