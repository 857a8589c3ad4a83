"""
Counts the bytes of the collective operations of a training step. Started in every process of a group.

    count_traffic.py FOLDER NUM_PROCESSES RANK

Writes `FOLDER/traffic.json`: the fields of `scale_model.Traffic` for each sharding and each case of `CASES`.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel
from flowback_hf.files import write_json


# Of the rows of the weights, some can be shared evenly and some cannot.
SIZES = {
    "sample_size": 6,
    "patch_size": 2,
    "num_blocks": 4,
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 8,
    "num_classes": 5,
}
TEACHER_DIM, NUM_TOKENS = 7, 9
CASES = {
    "none": {"strategy": "none"},
    "forward": {"strategy": "forward", "places": [(3, 1), (4, 2)]},
    "detach": {"strategy": "detach", "places": [(2, 1), (4, 2)]},
    "reverse": {"strategy": "reverse", "places": [(3, 1), (4, 2)]},
    "reverse, of order 2": {"strategy": "reverse", "places": [(3, 2)], "order": 2},
    "reverse, from the first block": {"strategy": "reverse", "places": [(1, 1), (1, 2), (4, 1)]},
}


def build_objective(name: str) -> AlignedFlowObjective:
    flow = TarFlowTransformer2DModel(**SIZES)
    return AlignedFlowObjective(flow, teacher_dim=TEACHER_DIM, projector_dim=9, projector_type="mlp", **CASES[name])


class TrafficCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.traffic = {"gathered": 0, "num_gathers": 0, "reduced": 0, "all_reduced": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.count(function._schema.name.removeprefix("c10d::"), *args)
        return function(*args, **(kwargs or {}))

    def count(self, name: str, first, second=None, *_):
        if name == "_allgather_base_":
            self.traffic["gathered"] += first.nbytes
            self.traffic["num_gathers"] += 1
        elif name == "_reduce_scatter_base_":
            self.traffic["reduced"] += second.nbytes
        elif name == "allreduce_":
            self.traffic["all_reduced"] += sum(tensor.nbytes for tensor in first)
        else:
            raise AssertionError(f"{name} is not expected in a step")


def share(objective: AlignedFlowObjective, sharding: str, num_shards: int, num_processes: int) -> torch.nn.Module:
    """As the trainer does."""
    if sharding == "DDP":
        return DistributedDataParallel(objective)
    mesh = init_device_mesh("cpu", (num_processes // num_shards, num_shards), mesh_dim_names=("replicate", "shard"))
    for unit in [*objective.projectors.values(), *objective.flow.blocks, objective]:
        fully_shard(unit, mesh=mesh if sharding == "HSDP" else mesh["shard"])
    return objective


def count_step(name: str, sharding: str, num_shards: int, num_processes: int) -> dict[str, int]:
    module = share(build_objective(name), sharding, num_shards, num_processes)
    batch = torch.randn(2, 3, 6, 6), torch.tensor([1, -1]), torch.randn(2, NUM_TOKENS, TEACHER_DIM)
    for _ in range(2):  # in which the order of the modules is found, and agreed on
        module(*batch).loss.backward()
    with TrafficCounter() as counter:
        module(*batch).loss.backward()
    return counter.traffic


def main(folder: str, num_processes: int, rank: int):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/processes", rank=rank, world_size=num_processes
    )
    num_shards = {"DDP": 1, "FSDP2": num_processes, "HSDP": num_processes // 2}
    traffic = {
        sharding: {name: count_step(name, sharding, shards, num_processes) for name in CASES}
        for sharding, shards in num_shards.items()
        if sharding != "HSDP" or shards > 1
    }
    if rank == 0:
        write_json(Path(folder) / "traffic.json", traffic)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
