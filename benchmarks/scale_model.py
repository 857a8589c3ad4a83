"""
What training a flow on many GPUs needs, by arithmetic: memory, communication and time of a step, its bottleneck,
checkpoints, and CPU cores that load images. Nothing is measured here. The card, the network and the shares of their
rates that a run reaches are assumptions, which the options set.

    python benchmarks/scale_model.py
    python benchmarks/scale_model.py --configs imagenet256_latent_p2 --num_gpus 8 --alignment none

A step: bfloat16 by autocast, float32 weights, AdamW, averaged weights, and the teacher on every GPU. DDP keeps all
weights on every GPU. FSDP2 shares them among all GPUs, HSDP among those of a node; each block and each projector is
gathered when it is needed. Without gradient checkpointing where that fits, else with it. Computing and sending overlap
entirely; the optimizer's step overlaps with neither.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from flow_costs import activation_bytes, count_step_flops, count_teacher, load_config, make_objective
from reporting import PAPERS_ALIGNMENT, add_alignment_sizes, add_run_arguments, write_report

from flowback_hf import AlignedFlowObjective
from flowback_hf.reporting import markdown_table


GIB = 2**30
FLOAT = 4  # bytes
SHARDINGS = ("DDP", "FSDP2", "HSDP")
# float32 weights, gradients, the two moments of AdamW
TRAINED_BYTES = 4 * FLOAT
# the moving average
AVERAGED_BYTES = FLOAT
# A checkpoint holds weights and moments, and the moving average.
SAVED_BYTES = 3 * FLOAT
# The norm of the gradient reads it and clipping reads and writes it; AdamW reads weight, gradient and moments and
# writes all but the gradient; the moving average reads and writes itself and a difference, and reads the weight.
UPDATED_BYTES = (3 + 7 + 6) * FLOAT
# Options that are no assumptions.
LISTED = ("configs", "num_gpus", "batch_sizes", "output")
# Of a card's memory; the rest is CUDA's, NCCL's and lost between tensors.
USABLE_MEMORY = 0.9


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs",
        nargs="+",
        default=["imagenet64_p4", "imagenet64_p4_3b", "imagenet64_p4_7b"],
        help="Names of model sizes in training/configs. Default: the paper's, and two that are wider.",
    )
    parser.add_argument("--num_gpus", type=int, nargs="+", default=[8, 64], help="GPUs of a run. Default: 8 64.")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[32, 4], help="Images per GPU and step. Default: 32 4."
    )
    parser.add_argument(
        "--alignment",
        choices=["none", "forward", "detach", "reverse"],
        default="reverse",
        help="How the flow is aligned with DINOv2-B; reverse is of order 0. Default: %(default)s.",
    )
    add_alignment_sizes(parser)

    def add(name: str, default: float, help: str):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{help} Default: %(default)s.")

    add("peak_tflops", 989.0, "Matrix products of a GPU in TFLOP/s, an H100's in dense bfloat16.")
    add("matrix_share", 0.4, "Share of --peak_tflops that is assumed to be reached.")
    add("memory_gb", 80.0, "Memory of a GPU in GB.")
    add("memory_gb_per_second", 3350.0, "Bandwidth of a GPU's memory in GB/s.")
    add("nvlink_gb_per_second", 450.0, "What a GPU sends to others of its node in GB/s.")
    add("infiniband_gb_per_second", 50.0, "What a GPU sends to other nodes in GB/s.")
    add("bandwidth_share", 0.8, "Share of the three bandwidths that is assumed to be reached.")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs in a node. Default: %(default)s.")
    add("writer_gb_per_second", 0.65, "What one process writes of a checkpoint in GB/s, checksums included.")
    add("disk_gb_per_second", 4.0, "What the disk of a node writes in GB/s.")
    parser.add_argument(
        "--checkpointing_steps", type=int, default=500, help="Steps between two checkpoints. Default: %(default)s."
    )
    add("images_per_core", 400.0, "Images that a CPU core decodes and resizes in a second.")
    add_run_arguments(parser, "scale_model.json", device=False, threads=False)
    args = parser.parse_args(arguments)
    for num_gpus in args.num_gpus:
        if num_gpus < 1 or num_gpus > args.gpus_per_node and num_gpus % args.gpus_per_node:
            parser.error(f"--num_gpus must fit in a node or fill several of {args.gpus_per_node}, but is {num_gpus}")
    return args


def alignment_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of [`AlignedFlowObjective`]."""
    if args.alignment == "none":
        return {}
    places = [(block, args.aligned_layer) for block in args.aligned_blocks]
    sizes = {"teacher_dim": args.teacher_dim, "projector_dim": args.projector_dim}
    return {"strategy": args.alignment, "places": places} | sizes | PAPERS_ALIGNMENT


# What is sent


@dataclass
class Traffic:
    """
    Bytes of the tensors of a step's collective operations, on every GPU. A GPU sends and receives a little less, or
    twice as much if the tensor is all-reduced.

    Args:
        gathered (`int`): All weights after all-gathers.
        num_gathers (`int`): How many all-gathers.
        reduced (`int`): All gradients before reduce-scatters.
        all_reduced (`int`): Gradients that are all-reduced.
    """

    gathered: int = 0
    num_gathers: int = 0
    reduced: int = 0
    all_reduced: int = 0


def count_gathers(objective: AlignedFlowObjective) -> dict[torch.nn.Module, int]:
    """
    How often a step gathers the weights of each block and projector: once for each forward and backward pass and for
    each vector-Jacobian product of [`AlignedFlowObjective`], because they are freed after it.
    """
    is_reverse = objective.strategy == "reverse"
    gathers = {}
    for number, block in enumerate(objective.flow.blocks, start=1):
        gathers[block] = 2
        if number in objective.leaf_blocks:
            gathers[block] += number > 1  # the likelihood's gradient, for the blocks before
            if is_reverse:
                gathers[block] += objective.num_neumann_terms + sum(place[0] == number for place in objective.places)
    if is_reverse:
        # FSDP2 expects a backward pass at the first product, and gathers the block with which it would begin.
        gathers[block] += 1
    return gathers | {projector: 3 if is_reverse else 2 for projector in objective.projectors.values()}


def padded_bytes(module: torch.nn.Module, num_shards: int) -> int:
    """Of its float32 weights, the rows of each filled up to a multiple of the shards."""
    rows = ((math.ceil(len(weight) / num_shards) * num_shards, weight[0].numel()) for weight in module.parameters())
    return FLOAT * sum(length * size for length, size in rows)


def step_traffic(objective: AlignedFlowObjective, sharding: str, num_shards: int) -> Traffic:
    """
    What a step sends.

    Args:
        objective ([`AlignedFlowObjective`]): What is trained; may be on the meta device.
        sharding (`str`): One of `SHARDINGS`.
        num_shards (`int`): GPUs among which the weights are shared.
    """
    if sharding == "DDP":
        return Traffic(all_reduced=FLOAT * sum(weight.numel() for weight in objective.parameters()))
    gathers = count_gathers(objective)
    sizes = {unit: padded_bytes(unit, num_shards) for unit in gathers}
    traffic = Traffic(
        gathered=sum(count * sizes[unit] for unit, count in gathers.items()),
        num_gathers=sum(gathers.values()),
        reduced=sum(sizes.values()),
    )
    if sharding == "HSDP":
        traffic.all_reduced = traffic.reduced // num_shards
    return traffic


def network_seconds(traffic: Traffic, sharding: str, num_gpus: int, args: argparse.Namespace) -> float:
    """
    Seconds of a step's collective operations.

    An all-gather of B bytes brings each GPU the shares of the other GPUs, by NVLink, and each node the shares of the
    other nodes, by the InfiniBand of its GPUs together. A reduce-scatter does the opposite, an all-reduce both.
    """
    nvlink = 1e9 * args.nvlink_gb_per_second * args.bandwidth_share
    infiniband = 1e9 * args.infiniband_gb_per_second * args.bandwidth_share
    in_node = min(num_gpus, args.gpus_per_node)
    num_nodes = num_gpus // in_node
    between_nodes = (num_nodes - 1) / num_nodes
    if sharding == "HSDP":
        shared = (traffic.gathered + traffic.reduced) * (in_node - 1) / in_node / nvlink
        # Each GPU reduces its share with one GPU of every other node.
        return shared + 2 * traffic.all_reduced * between_nodes / infiniband
    num_bytes = traffic.gathered + traffic.reduced + 2 * traffic.all_reduced
    return num_bytes * max((num_gpus - 1) / num_gpus / nvlink, between_nodes / (in_node * infiniband))


# What a flow costs


@dataclass
class Costs:
    """
    What training a flow costs, whatever the number of GPUs.

    Args:
        objective ([`AlignedFlowObjective`]): On the meta device.
        flow_parameters, parameters (`int`): Of the flow, and with the projectors.
        teacher (`dict`): Its `parameters`, and `flops` for an image.
        step_flops (`dict`): Operations of a step for an image, the teacher apart, without and with checkpointing.
        activations (`dict`): Bytes kept for each image, and those that all images share, likewise.
    """

    objective: AlignedFlowObjective
    flow_parameters: int
    parameters: int
    teacher: dict[str, int]
    step_flops: dict[bool, int]
    activations: dict[bool, tuple[int, int]]

    @property
    def checkpoint_bytes(self) -> int:
        return SAVED_BYTES * self.parameters + AVERAGED_BYTES * self.flow_parameters


def count_costs(config: dict, alignment: dict[str, Any]) -> Costs:
    with torch.device("meta"):
        objective = make_objective(config, **alignment)
    is_checkpointed = (False, True)
    return Costs(
        objective,
        flow_parameters=sum(weight.numel() for weight in objective.flow.parameters()),
        parameters=sum(weight.numel() for weight in objective.parameters()),
        teacher=count_teacher(config) if alignment else {"parameters": 0, "flops": 0},
        step_flops={each: count_step_flops(config, each, **alignment) for each in is_checkpointed},
        activations={each: activation_bytes(config, each, **alignment) for each in is_checkpointed},
    )


def step_memory(
    costs: Costs, sharding: str, num_shards: int, batch_size: int, checkpointing: bool
) -> dict[str, float]:
    """Bytes on each GPU, by what they are for."""
    states = TRAINED_BYTES * costs.parameters + AVERAGED_BYTES * costs.flow_parameters
    per_image, half_precision_weights = costs.activations[checkpointing]
    memory = {
        "states": states / num_shards,
        "validation": FLOAT * costs.flow_parameters,  # a whole copy of the averaged weights
        "teacher": FLOAT * costs.teacher["parameters"],
    }
    if sharding == "DDP":
        memory["communication"] = FLOAT * costs.parameters  # the buckets, into which gradients are copied
    else:
        # The weights of a block and those of the next, its gradients, and a copy of them to send.
        memory["communication"] = 4 * max(padded_bytes(block, num_shards) for block in costs.objective.flow.blocks)
        if checkpointing:
            half_precision_weights = 0  # autocast keeps none under FSDP2, and they are computed again
    return memory | {"activations": batch_size * per_image + half_precision_weights}


def predict(costs: Costs, sharding: str, num_gpus: int, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """A step and a checkpoint of one flow on so many GPUs with so many images each."""
    in_node = min(num_gpus, args.gpus_per_node)
    num_shards = {"DDP": 1, "FSDP2": num_gpus, "HSDP": in_node}[sharding]
    usable = 1e9 * args.memory_gb * USABLE_MEMORY
    for checkpointing in (False, True):
        memory = step_memory(costs, sharding, num_shards, batch_size, checkpointing)
        if sum(memory.values()) <= usable:
            break
    traffic = step_traffic(costs.objective, sharding, num_shards)
    flops = batch_size * (costs.step_flops[checkpointing] + costs.teacher["flops"])
    memory_rate = 1e9 * args.memory_gb_per_second * args.bandwidth_share
    seconds = {
        "compute": flops / (1e12 * args.peak_tflops * args.matrix_share),
        "network": network_seconds(traffic, sharding, num_gpus, args),
        "memory": UPDATED_BYTES * costs.parameters / num_shards / memory_rate,
    }
    step_seconds = max(seconds["compute"], seconds["network"]) + seconds["memory"]
    images_per_second = batch_size / step_seconds
    # DDP's main process writes everything, otherwise each its share.
    num_writers = 1 if sharding == "DDP" else num_shards
    rate = 1e9 * min(
        num_writers * args.writer_gb_per_second, math.ceil(num_writers / args.gpus_per_node) * args.disk_gb_per_second
    )
    checkpoint_seconds = costs.checkpoint_bytes / rate
    return {
        "sharding": sharding,
        "num_gpus": num_gpus,
        "batch_size": batch_size,
        "fits": sum(memory.values()) <= usable,
        "gradient_checkpointing": checkpointing,
        "memory_bytes": memory,
        "traffic_bytes": vars(traffic),
        "seconds": seconds,
        "step_seconds": step_seconds,
        "bottleneck": max(seconds, key=seconds.get),
        "images_per_second_per_gpu": images_per_second,
        "loader_cores_per_gpu": images_per_second / args.images_per_core,
        "checkpoint_seconds": checkpoint_seconds,
        "checkpoint_share": checkpoint_seconds / (checkpoint_seconds + args.checkpointing_steps * step_seconds),
    }


def predict_all(name: str, args: argparse.Namespace) -> dict[str, Any]:
    config, alignment = load_config(name), alignment_of(args)
    costs = count_costs(config, alignment)
    with torch.device("meta"):
        not_aligned = make_objective(config)
    cases = [
        predict(costs, sharding, num_gpus, batch_size, args)
        for batch_size in args.batch_sizes
        for num_gpus in args.num_gpus
        for sharding in SHARDINGS
        if sharding != "HSDP" or num_gpus > args.gpus_per_node  # in one node it is FSDP2
    ]
    return {
        "config": name,
        "flow_parameters": costs.flow_parameters,
        "parameters": costs.parameters,
        "teacher": costs.teacher,
        "step_flops": costs.step_flops[False],
        "step_flops_not_aligned": count_step_flops(config),
        "num_gathers_not_aligned": sum(count_gathers(not_aligned).values()),
        "checkpoint_bytes": costs.checkpoint_bytes,
        "cases": cases,
    }


def cases_of(results: dict[str, Any]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Each flow with each of its cases."""
    return ((flow, case) for flow in results["flows"] for case in flow["cases"])


def table(results: dict[str, Any]) -> str:
    header = [
        "config",
        "images per GPU",
        "GPUs",
        "sharding",
        "memory, GiB",
        "checkpointing",
        "compute, s",
        "network, s",
        "update, s",
    ]
    header += ["step, s", "bottleneck", "images/s per GPU", "checkpoint, s", "loader cores per GPU"]
    rows = []
    for flow, case in cases_of(results):
        row = [f"`{flow['config']}`", case["batch_size"], case["num_gpus"], case["sharding"]]
        row += [f"{sum(case['memory_bytes'].values()) / GIB:.1f}{'' if case['fits'] else ', does not fit'}"]
        row += ["yes" if case["gradient_checkpointing"] else "no"]
        row += [f"{case['seconds'][name]:.3f}" for name in ("compute", "network", "memory")]
        row += [f"{case['step_seconds']:.3f}", case["bottleneck"], f"{case['images_per_second_per_gpu']:.0f}"]
        rows.append([*row, f"{case['checkpoint_seconds']:.1f}", f"{case['loader_cores_per_gpu']:.1f}"])
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    assumptions = {name: value for name, value in vars(args).items() if name not in LISTED}
    results = {"assumptions": assumptions, "flows": [predict_all(name, args) for name in args.configs]}
    text = f"By arithmetic, nothing measured. Assumptions: {assumptions}\n\n{table(results)}"
    print(text)
    write_report(args.output, arguments, "cpu", results, text)


if __name__ == "__main__":
    main()
