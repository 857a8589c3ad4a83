import pytest
import torch
from accelerate import Accelerator

from flowback_hf import AlignedFlowObjective
from flowback_hf.training import compilation


@pytest.mark.parametrize("every_layer, but_leaf_blocks, kept", [(1.0, 2.0, [True, True]), (2.0, 1.0, [True, False])])
def test_the_faster_way_to_compile_is_kept(randomised_model, monkeypatch, every_layer, but_leaf_blocks, kept):
    flow = randomised_model(num_blocks=2, num_layers=2)
    objective = AlignedFlowObjective(flow, "detach", places=[(2, 1)], teacher_dim=5)
    timings = {(True, True): every_layer, (True, False): but_leaf_blocks}

    def compiled():
        return [all(layer._compiled_call_impl is not None for layer in block.layers) for block in flow.blocks]

    monkeypatch.setattr(compilation, "seconds_per_step", lambda *_: timings[tuple(compiled())])
    with torch._functorch.config.patch(donated_buffer=True):
        compilation.compile_layers(Accelerator(cpu=True), objective, batch_size=2)
        assert not torch._functorch.config.donated_buffer
    assert compiled() == kept
