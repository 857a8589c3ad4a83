# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Sharding: each process holds and updates a share of every weight (FSDP2, torch's `fully_shard`)."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    broadcast,
)
from diffusers.training_utils import EMAModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flowback_hf import AlignedFlowObjective


# What `accelerate launch` sets if its config asks for more than copies of the flow.
FSDP_VARIABLE = "ACCELERATE_USE_FSDP"
MESH_VARIABLE = "ACCELERATE_USE_PARALLELISM_CONFIG"
UNSUPPORTED_VARIABLES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
UNSUPPORTED_TYPES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

# The classes whose modules may be gathered one at a time.
UNIT_CLASSES = ("TarFlowBlock", "TarFlowLayer")

CURE = "Take training/configs/accelerate/fsdp2.yaml as a model, or ddp.yaml, which shards nothing."


@dataclass(frozen=True)
class Sharding:
    """
    How a run's weights are divided.

    Args:
        unit_classes (`tuple[str]`): Classes of [`UNIT_CLASSES`] whose modules are gathered one at a time. With none,
            the whole objective is gathered at once.
        reshard_after_forward (`bool`): Whether a module's weights are freed between forward and backward pass.
        num_replicas (`int`): How many groups of processes hold all of the weights (HSDP). 1 is FSDP.
    """

    unit_classes: tuple[str, ...] = ("TarFlowBlock",)
    reshard_after_forward: bool = True
    num_replicas: int = 1

    def units(self, objective: AlignedFlowObjective) -> list[torch.nn.Module]:
        """
        The modules that are gathered one at a time, inner ones first.

        The objective takes gradients while it is called, and torch frees the weights of the whole objective after the
        first of them. All weights must therefore belong to a module that gathers them again when it is used: where
        there are units, every block and every projector is one.
        """
        if not self.unit_classes:
            return []
        units = {*objective.flow.blocks, *objective.projectors.values()}
        if "TarFlowLayer" in self.unit_classes:
            units |= {layer for block in objective.flow.blocks for layer in block.layers}
        return [module for module in reversed(list(objective.modules())) if module in units]

    def make_mesh(self, accelerator: Accelerator) -> DeviceMesh:
        """The processes: `(num_replicas, processes that share the weights)`, or the latter only."""
        num_processes, device_type = accelerator.num_processes, accelerator.device.type
        if self.num_replicas == 1:
            return init_device_mesh(device_type, (num_processes,), mesh_dim_names=("shard",))
        shape = (self.num_replicas, num_processes // self.num_replicas)
        return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))

    @torch.no_grad()
    def shard(self, objective: AlignedFlowObjective, accelerator: Accelerator):
        """
        Shard an objective in place. Its parameters become new ones: an optimizer must be made afterwards.

        All processes start with the weights of the main one. Nothing is cast: gradients are summed in the dtype of the
        weights, and a flow's inputs stay in float32. Mixed precision is autocast's.
        """
        # No output of a module is changed in place here.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for tensor in [*objective.parameters(), *objective.buffers()]:
            tensor.copy_(broadcast(tensor.to(accelerator.device)))
        options = {
            "mesh": self.make_mesh(accelerator),
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
        }
        for module in self.units(objective):
            fully_shard(module, **options)
        fully_shard(objective, **options)


def read_sharding() -> Sharding | None:
    """
    Read what the accelerate config asks for, and hide it from Accelerate, which ignores it on a CPU and otherwise
    casts the inputs of the flow. transformers would load the teacher in the main process only.

    Returns:
        [`Sharding`]: `None` if each process is to hold all weights.
    Raises:
        ValueError: if the config asks for something else than FSDP2, or for an option that is not supported.
    """
    for variable, name in UNSUPPORTED_VARIABLES.items():
        if is_on(variable):
            raise ValueError(f"The accelerate config must not use {name}, which is not supported. {CURE}")
    if not is_on(FSDP_VARIABLE):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(f"The accelerate config must have `fsdp_version: 2`: the first one is not supported. {CURE}")
    plugin = FullyShardedDataParallelPlugin()
    mesh = ParallelismConfig() if is_on(MESH_VARIABLE) else ParallelismConfig(1, 1, 1, 1, sp_size=1)
    check_options(plugin, mesh)
    unit_classes = ()
    if plugin.auto_wrap_policy is not None:
        unit_classes = tuple(plugin.transformer_cls_names_to_wrap or ["TarFlowBlock"])
        if not set(unit_classes) <= set(UNIT_CLASSES):
            raise ValueError(
                f"`fsdp_transformer_layer_cls_to_wrap` must be among {', '.join(UNIT_CLASSES)}, but is"
                f" {', '.join(unit_classes)}."
            )
    for variable in (FSDP_VARIABLE, MESH_VARIABLE):
        os.environ.pop(variable, None)
    return Sharding(unit_classes, plugin.reshard_after_forward, mesh.dp_replicate_size)


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def check_options(plugin: FullyShardedDataParallelPlugin, mesh: ParallelismConfig):
    """Raise ValueError for what a config asks for and is not supported, or for numbers that contradict each other."""
    size_based = plugin.auto_wrap_policy is not None and plugin.min_num_params is not None
    unsupported = {
        "fsdp_auto_wrap_policy: SIZE_BASED_WRAP": size_based,
        "fsdp_offload_params: true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: true (--gradient_checkpointing does it)": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
        "tensor, context or sequence parallelism": mesh.non_data_parallel_size > 1,
    }
    found = [name for name, is_used in unsupported.items() if is_used]
    if found:
        raise ValueError(f"The accelerate config has `{'`, `'.join(found)}`, which is not supported. {CURE}")
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if is_on(MESH_VARIABLE) and mesh.total_size != num_processes:
        raise ValueError(
            "`parallelism_config_dp_replicate_size` times `parallelism_config_dp_shard_size` must be the number of"
            f" processes, {num_processes}, but is {mesh.dp_replicate_size} times {mesh.dp_shard_size}."
        )


def sharding_of(accelerator: Accelerator) -> Sharding | None:
    """How an accelerator shards; `None` if it does not."""
    return getattr(accelerator, "sharding", None)


def check_accelerator(accelerator: Accelerator):
    """Raise ValueError for an accelerator that shards in a way of its own."""
    if accelerator.distributed_type in UNSUPPORTED_TYPES:
        raise ValueError(
            "`accelerator` must come from `flowback_hf.training.make_accelerator`, which reads the accelerate config,"
            f" but this one uses {accelerator.distributed_type.value}."
        )


class ShardingAccelerator(Accelerator):
    """
    An accelerator that shards what it prepares, if its sharding says so.

    Args:
        sharding ([`Sharding`], *optional*): `None` gives every process a copy of the weights (DDP).
        kwargs: Of [`~accelerate.Accelerator`].
    Raises:
        ValueError: if there is only one process, without a group, or the precision is fp16; or if torch is too old.
    """

    def __init__(self, sharding: Sharding | None, kwargs_handlers: list[Any], **kwargs):
        self.sharding = sharding
        self._replicas: list[DistributedDataParallel] = []  # Accelerate keeps what is inside them
        if sharding is not None:
            # The cache would keep a copy of all gathered weights until the end of the forward pass.
            kwargs_handlers = [*kwargs_handlers, AutocastKwargs(cache_enabled=False)]
        super().__init__(kwargs_handlers=kwargs_handlers, **kwargs)
        if sharding is not None:
            self._check_processes()

    def _check_processes(self):
        if not torch.distributed.is_initialized():
            raise ValueError(
                "The accelerate config asks for FSDP, but this process was started alone: start the script with"
                " `accelerate launch` or `torchrun`."
            )
        self.wait_for_everyone()  # none may end while another one still connects to it
        if not hasattr(dcp, "HuggingFaceStorageWriter"):
            raise ValueError(f"FSDP needs a newer torch than {torch.__version__}, one that shards safetensors files.")
        if self.mixed_precision == "fp16":
            raise ValueError("`--mixed_precision` fp16 is not supported with FSDP: choose bf16.")

    def prepare_model(self, model: torch.nn.Module, *args, **kwargs) -> torch.nn.Module:
        """Prepare an objective, before an optimizer of its parameters is made. Takes the arguments of Accelerate's."""
        if self.sharding is None:
            prepared = super().prepare_model(model, *args, **kwargs)
            if isinstance(prepared, DistributedDataParallel):
                self._replicas.append(prepared)
            return prepared
        self.sharding.shard(model, self)
        # Autocast and nothing else, as for a model that is not trained.
        return super().prepare_model(model, evaluation_mode=True)

    def end_training(self):
        """Finish trackers and leave the group of processes, which nothing can be trained with any more."""
        # The group goes here, and its threads end. As its last owner, a reducer would hold Python's lock while it
        # waits for a thread that needs it: now and then, a process would never end. If a thread still ran when Python
        # ends, the process would abort.
        for replica in self._replicas:
            replica.reducer = replica.logger = replica.process_group = None
        super().end_training()

    def clip_grad_norm_(self, *args, **kwargs) -> torch.Tensor:
        """Clip gradients, and return the norm of them all. Takes the arguments of Accelerate's."""
        return whole(super().clip_grad_norm_(*args, **kwargs))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor whose shares several processes have, who must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# Checkpoints


def describe_shards(accelerator: Accelerator, ema: EMAModel | None) -> dict[str, torch.Tensor]:
    """
    All that a sharded run resumes from, by name: weights, the optimizer's averages and the averaged weights.

    Tensors are those in use, so that loading into them loads the run. The optimizer's are made if there are none yet.
    """
    (objective,), (optimizer,) = accelerator._models, accelerator._optimizers
    options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
    weights, averages = get_state_dict(objective, optimizer.optimizer, options=options)
    state = {f"objective.{name}": weight for name, weight in weights.items()}
    # Others are the arguments of the optimizer, which a run sets by itself.
    state |= {f"optimizer.{name}": value for name, value in averages.items() if torch.is_tensor(value)}
    if ema is not None:
        state |= {ema_name(number): average for number, average in enumerate(ema.shadow_params)}
    return state


def ema_name(number: int) -> str:
    """The name of the average of the n-th trained parameter."""
    return f"ema.{number:05d}"


def save_shards(state: dict[str, torch.Tensor], folder: Path, group: torch.distributed.ProcessGroup | None = None):
    """
    Write each process's part of a state to a safetensors file of its own. Called by every process.

    Args:
        state (`dict`): What [`describe_shards`] returned, or a copy of it.
        folder (`pathlib.Path`): Where to.
        group (`torch.distributed.ProcessGroup`, *optional*): The processes. Default: the group that trains.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with plain_errors():
        dcp.save(state, storage_writer=writer, process_group=group)


def load_shards(state: dict[str, torch.Tensor], folder: Path, by_one_process: bool = False):
    """
    Load a state in place, however many processes saved it. Nothing is unpickled.

    Called by every process, unless `by_one_process` says that the state is whole and that this one loads it alone.
    """
    with plain_errors():
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=by_one_process)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise, in every process, what one of them raised. torch's own is no `Exception`, and passes by `except`."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint is one of a sharded run."""
    return any(folder.glob("shard-*.safetensors"))
