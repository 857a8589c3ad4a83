"""Run by test_processes.py in two processes: the end of training frees the reducer, then the group."""

import weakref

import torch

from flowback_hf.training.sharding import ShardingAccelerator


def main():
    accelerator = ShardingAccelerator(None, [], cpu=True)
    model = accelerator.prepare_model(torch.nn.Linear(2, 1))
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    accelerator.backward(model(torch.ones(3, 2)).sum())
    group, destroy, reducers = weakref.ref(model.process_group), accelerator.state.destroy_process_group, []

    def destroy_process_group():
        reducers.append(model.reducer)
        destroy()

    accelerator.state.destroy_process_group = destroy_process_group
    accelerator.end_training()
    assert reducers == [None]
    assert group() is None and not torch.distributed.is_initialized()


if __name__ == "__main__":
    main()
