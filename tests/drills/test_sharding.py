"""Gradients of sharded flows: all strategies and units, with and without gradient checkpointing."""

import pytest

from ..training.test_sharding import check_gradients


# Four processes are two groups that share the weights (HSDP).
@pytest.mark.drill
@pytest.mark.parametrize("checkpointing", [[], ["--checkpointing"]], ids=["", "checkpointing"])
@pytest.mark.parametrize("unit_classes", [[], ["TarFlowBlock"], ["TarFlowLayer"]], ids=["root", "blocks", "layers"])
@pytest.mark.parametrize("num_processes, num_replicas", [(2, 1), (3, 1), (4, 2)], ids=["two", "three", "hsdp"])
def test_gradients_of_sharded_flows(drill, tmp_path, num_processes, num_replicas, unit_classes, checkpointing):
    line = ["--unit_classes", *unit_classes, "--num_replicas", str(num_replicas), *checkpointing]
    check_gradients(tmp_path, num_processes, *line)
    drill("Gradients of sharded flows", strategies=6, wrong=0)
