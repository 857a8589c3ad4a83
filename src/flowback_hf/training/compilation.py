# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Compiling the transformer layers for training, as many of them as are worth it."""

import statistics
import time

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from flowback_hf import AlignedFlowObjective
from flowback_hf.training.sharding import sharding_of


logger = get_logger(__name__, log_level="INFO")


def compile_layers(accelerator: Accelerator, objective: AlignedFlowObjective, batch_size: int):
    """
    Compile all transformer layers, or all but those that several gradients pass through if that is faster.

    In the blocks where the gradients of likelihood and alignment part, several gradients are taken of one graph, and a
    compiled layer computes its parameters' gradients each time. Which is faster depends on the device: a few steps of
    each are timed, and the main process decides for all. With FSDP nothing is timed, and every layer is compiled.

    Args:
        accelerator (`accelerate.Accelerator`): Its device and precision.
        objective ([`AlignedFlowObjective`]): What is trained. It is moved to that device to be timed.
        batch_size (`int`): Images in the timed steps.
    """
    # Several gradients of one graph need its buffers to be kept.
    torch._functorch.config.donated_buffer = False
    flow = objective.flow
    flow.compile_repeated_blocks()
    # A flow that will be sharded may be too large to be timed whole.
    if not objective.leaf_blocks or sharding_of(accelerator) is not None:
        return
    objective.to(accelerator.device)
    every_layer = seconds_per_step(accelerator, objective, batch_size)
    leaf_layers = [layer for number in objective.leaf_blocks for layer in flow.blocks[number - 1].layers]
    for layer in leaf_layers:
        layer._compiled_call_impl = None
    but_leaf_blocks = seconds_per_step(accelerator, objective, batch_size)
    (compile_all,) = broadcast_object_list([every_layer < but_leaf_blocks])
    if compile_all:
        for layer in leaf_layers:
            layer.compile()
    logger.info(
        f"A step takes {every_layer:.3f} s with every layer compiled and {but_leaf_blocks:.3f} s without those of the"
        f" flow blocks {objective.leaf_blocks}: compiled {'every layer' if compile_all else 'the others'}."
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
        # Reading a value waits for the device. An adapter leaves most parameters without a gradient.
        next(parameter.grad for parameter in objective.flow.parameters() if parameter.grad is not None).sum().item()
        seconds.append(time.perf_counter() - start)
        objective.zero_grad()
    return statistics.median(seconds[1:])
