"""Saves the gradients of DDP with accumulation to a file. torchrun runs it in two processes."""

import sys

import torch
from accelerate import Accelerator

from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel


def main(inputs: str, outputs: str):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    setting = torch.load(inputs, weights_only=True)
    gradients = {}
    for name, (strategy, order) in setting["strategies"].items():
        flow = TarFlowTransformer2DModel.from_config(setting["config"])
        objective = AlignedFlowObjective(flow, strategy, order=order, **setting["arguments"]).double()
        objective.load_state_dict(setting["state_dict"])
        prepared = accelerator.prepare(objective)
        assert isinstance(prepared, torch.nn.parallel.DistributedDataParallel)
        # Each process has two batches of one image, so four images make the gradient. The processes do not exchange
        # gradients of the first batch.
        for number in range(2):
            image = slice(2 * number + accelerator.process_index, 2 * number + accelerator.process_index + 1)
            batch = {key: tensor[image] for key, tensor in setting["batch"].items()}
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
        gradients[name] = {key: parameter.grad for key, parameter in objective.named_parameters()}
        accelerator.free_memory()
    torch.save(gradients, f"{outputs}.{accelerator.process_index}")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
