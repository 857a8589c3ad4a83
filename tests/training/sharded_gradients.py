"""
Compares gradients and optimizer steps of sharded objectives with those of one process, in float64. Every process of a
group runs it.

    sharded_gradients.py [--unit_classes TarFlowBlock TarFlowLayer] [--checkpointing] [--strategies reverse-exact ...]
"""

import argparse

import torch
from diffusers.training_utils import EMAModel

from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel
from flowback_hf.training.sharding import Sharding, ShardingAccelerator, whole
from tests.conftest import randomise_weights


STRATEGIES = {
    "none": ("none", None),
    "forward": ("forward", None),
    "detach": ("detach", None),
    "reverse-0": ("reverse", 0),
    "reverse-1": ("reverse", 1),
    "reverse-exact": ("reverse", "exact"),
}
PLACES = [(2, 1), (2, 2), (3, 1)]
TEACHER_DIM = 5
NUM_IMAGES = 24


def make_objective(strategy: str, checkpointing: bool) -> AlignedFlowObjective:
    flow = TarFlowTransformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=1,
        num_blocks=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        mlp_ratio=2.0,
        num_classes=3,
    )
    strategy, order = STRATEGIES[strategy]
    objective = AlignedFlowObjective(
        flow, strategy, places=PLACES, order=order, weight=0.3, teacher_dim=TEACHER_DIM, projector_dim=6
    ).double()
    randomise_weights(objective, seed=0)
    if checkpointing:
        flow.enable_gradient_checkpointing()
    return objective


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "noisy_sample": torch.randn(NUM_IMAGES, 1, 4, 4, generator=generator, dtype=torch.float64),
        "class_labels": torch.randint(-1, 3, (NUM_IMAGES,), generator=generator),
        "teacher_features": torch.randn(NUM_IMAGES, 4, TEACHER_DIM, generator=generator, dtype=torch.float64),
    }


def share_of(batch: dict[str, torch.Tensor], accelerator: ShardingAccelerator, number: int) -> dict[str, torch.Tensor]:
    """This process's part of one of two batches."""
    count = NUM_IMAGES // 2 // accelerator.num_processes
    first = NUM_IMAGES // 2 * number + count * accelerator.process_index
    return {name: tensor[first : first + count] for name, tensor in batch.items()}


def check_gradients(accelerator: ShardingAccelerator, strategy: str, checkpointing: bool):
    """Two steps of two accumulated batches each, with a look at the loss, without gradients, in between."""
    batch = make_batch()
    expected = make_objective(strategy, checkpointing=False)
    expected(**batch).loss.backward()
    objective = make_objective(strategy, checkpointing)
    if accelerator.process_index:  # all start with the weights of the main process
        randomise_weights(objective, seed=1)
    objective = accelerator.prepare_model(objective)
    for _ in range(2):
        objective.zero_grad()
        for number in range(2):
            (objective(**share_of(batch, accelerator, number)).loss / 2).backward()
        for (name, parameter), reference in zip(objective.named_parameters(), expected.parameters(), strict=True):
            if reference.grad is None:
                assert parameter.grad is None, name
                continue
            assert whole(parameter).shape == reference.shape and parameter.to_local().numel() < reference.numel()
            gradient, scale = whole(parameter.grad), reference.grad.abs().max().item()
            torch.testing.assert_close(gradient, reference.grad, rtol=0, atol=1e-12 * scale, msg=name)
        with torch.no_grad():
            value = accelerator.reduce(objective(**share_of(batch, accelerator, 0)).nll, reduction="mean")
            first = {name: tensor[: NUM_IMAGES // 2] for name, tensor in batch.items()}
            torch.testing.assert_close(value, expected(**first).nll, rtol=0, atol=1e-12)


def check_steps(accelerator: ShardingAccelerator, strategy: str):
    """A step of the optimizer is that of one process, and a failed one changes nothing."""
    batch, max_norm = make_batch(), 0.5
    expected = make_objective(strategy, checkpointing=False)
    objective = accelerator.prepare_model(make_objective(strategy, checkpointing=False))
    norms, averages = [], []
    for module in (expected, objective):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True, eps=1e-3)
        average = EMAModel(module.parameters(), decay=0.5, foreach=True)
        for has_failed in (0.0, 0.0, 1.0):
            optimizer.found_inf = torch.tensor(has_failed)
            optimizer.zero_grad()
            module(**batch).loss.backward()
            norms.append(accelerator.clip_grad_norm_(module.parameters(), max_norm))
            before = [whole(parameter).clone() for parameter in module.parameters()]
            optimizer.step()
            average.step(module.parameters())
            unchanged = [torch.equal(*pair) for pair in zip(before, map(whole, module.parameters()))]
            assert all(unchanged) if has_failed else not all(unchanged)
        averages.append([whole(parameter) for parameter in average.shadow_params])
    torch.testing.assert_close(torch.stack(norms[:3]), torch.stack(norms[3:]), rtol=1e-12, atol=0)
    assert min(norms) > max_norm
    for (name, parameter), reference in zip(objective.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter), reference, rtol=0, atol=1e-11, msg=name)
    torch.testing.assert_close(averages[1], averages[0], rtol=0, atol=1e-11)


def main(args: argparse.Namespace):
    sharding = Sharding(tuple(args.unit_classes), num_replicas=args.num_replicas)
    accelerator = ShardingAccelerator(sharding, [])
    for strategy in args.strategies:
        check_gradients(accelerator, strategy, args.checkpointing)
    check_steps(accelerator, args.strategies[-1])
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--unit_classes", nargs="*", default=["TarFlowBlock"])
    parser.add_argument("--num_replicas", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    main(parser.parse_args())
