# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The flags of `training/train_reverse.py`. Those that it shares with `training/train_rra.py` are defined there."""

import argparse

from flowback_hf_cli.data import add_data_arguments, check_data_arguments
from flowback_hf_cli.numbers import COUNT, Number
from flowback_hf_cli.training import (
    add_hub_arguments,
    add_latents_argument,
    add_loading_arguments,
    add_optimization_arguments,
    add_run_arguments,
    add_validation_guidance_argument,
    check_streaming_arguments,
)


DESCRIPTION = """
Train the learned inverse of a flow: a network that maps its noise to clean images in one evaluation.

    accelerate launch training/train_reverse.py --model outputs/flow --train_data_dir path/to/images \\
        --output_dir outputs/flow_learned

The output folder then holds the pipeline with both networks (`solver="learned"` samples with the new one),
`metrics.jsonl`, `loss_curve.png`, `samples/` with the exact sampler's images on the left and the learned ones on the
right, `training_args.json`, and `checkpoint-*` to resume from.
"""

# Literal, because the modules that define them import torch; a test compares them.
SUPERVISIONS = ("heads", "data_space", "final")
PAIRS = ("data", "sampler", "both")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line of `training/train_reverse.py`.

    Args:
        arguments (`list[str]`, *optional*): Flags and values. Default: those of this process.
    Raises:
        SystemExit: after a message, for a wrong flag or value.
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub id of the pipeline whose flow is inverted.")
    data = parser.add_argument_group("data")
    add_data_arguments(data)
    add_latents_argument(data)
    add_pairs_arguments(parser.add_argument_group("pairs"))
    add_loading_arguments(parser.add_argument_group("augmentation and loading"))
    add_model_arguments(parser.add_argument_group("model"))
    add_objective_arguments(parser.add_argument_group("objective"))
    add_optimization_arguments(parser.add_argument_group("optimization"))
    run = parser.add_argument_group("run")
    add_run_arguments(run)
    add_validation_guidance_argument(
        run,
        "Guidance scale of the sample grids; 1.0 is off. Default: 1.0, or with --pairs sampler,"
        " --sampled_guidance_scale.",
    )
    add_hub_arguments(parser.add_argument_group("publishing"))
    args = parser.parse_args(arguments)
    check_data_arguments(parser, args)
    check_streaming_arguments(parser, args)
    if args.pairs == "data" and args.sampled_guidance_scale is not None:
        parser.error("--sampled_guidance_scale is for --pairs sampler and both: leave it out with --pairs data.")
    return args


def add_pairs_arguments(group: argparse._ArgumentGroup):
    group.add_argument(
        "--pairs",
        choices=PAIRS,
        default="data",
        help="What the network learns from: images and the noise that the flow maps them to, images that the exact"
        " sampler drew of noise, or both in equal shares. Default: %(default)s.",
    )
    group.add_argument(
        "--num_sampled_pairs",
        type=COUNT,
        default=10_000,
        help="Images that the exact sampler draws before training, once, for --pairs sampler and both, divided among"
        " the processes. They wait for each other for --ddp_timeout seconds. Default: %(default)s.",
    )
    group.add_argument(
        "--sampled_guidance_scale",
        type=Number(float, at_least=1),
        help="Guidance scale of these images; 1.0 is off. Default: the pipeline's.",
    )


def add_model_arguments(group: argparse._ArgumentGroup):
    group.add_argument("--patch_size", type=COUNT, help="Height and width of a token. Default: the flow's.")
    group.add_argument(
        "--num_layers",
        type=COUNT,
        help="Transformer layers in each stage; there is one stage more than flow blocks. Default: the most that"
        " make no more layers than the flow has, at least 1.",
    )
    group.add_argument("--num_attention_heads", type=COUNT, help="Attention heads. Default: the flow's.")
    group.add_argument(
        "--attention_head_dim",
        type=COUNT,
        help="Width of an attention head. The network is heads times this wide. Default: the flow's.",
    )
    group.add_argument(
        "--max_guidance_scale",
        type=Number(float, at_least=1),
        help="Train for guidance scales from 1.0 to this; 1.0 trains without guidance. Pairs of the sampler teach"
        " only --sampled_guidance_scale. Default: 3.0 for flows with classes, or --sampled_guidance_scale if that is"
        " larger.",
    )
    group.add_argument(
        "--no_denoising",
        action="store_true",
        help="Learn noisy images, which are then denoised by the flow's score. Default: learn clean ones.",
    )


def add_objective_arguments(group: argparse._ArgumentGroup):
    group.add_argument(
        "--supervision",
        choices=SUPERVISIONS,
        default="heads",
        help="What the stages are taught. heads: small heads predict the input of each flow block; data_space: each"
        " stage passes on its prediction and nothing else; final: only the final image. Default: %(default)s.",
    )
    group.add_argument(
        "--hidden_weight",
        type=Number(float, at_least=0),
        default=1.0,
        help="Weight of the stages' distances in the loss. Default: %(default)s.",
    )
    group.add_argument(
        "--no_normalization",
        action="store_true",
        help="Compare what the blocks exchange as it is. Default: standardize it, so that no block dominates.",
    )
    group.add_argument(
        "--adaptive_power",
        type=Number(float, at_least=0),
        default=0.0,
        help="Divide each distance by this power of itself; 0 weighs all images alike. Default: %(default)s.",
    )
    group.add_argument(
        "--adaptive_offset",
        type=Number(float, above=0),
        default=0.01,
        help="Added to each distance before --adaptive_power is applied; it bounds the weights. Default: %(default)s.",
    )
    group.add_argument(
        "--teacher_model_name_or_path",
        help="Also compare the features of a vision encoder, DINOv2, CLIP, SigLIP, ViT-MAE or ConvNeXt V2: its id on"
        " the Hub or a folder. Default: compare pixels only.",
    )
    group.add_argument(
        "--perceptual_weight",
        type=Number(float, at_least=0),
        default=1.0,
        help="Weight of the features' distance in the loss. Default: %(default)s.",
    )
