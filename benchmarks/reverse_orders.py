"""
How many terms of the Neumann series the reverse gradient needs: the gradient of the alignment at every order against
the naive graph of the sequential generative pass, in float64.

    python benchmarks/reverse_orders.py --runs outputs/digits outputs/shapes

`--runs` are output folders of training/train_rra.py: their last checkpoint, validation images and teacher are used,
and random projectors where the run has none. Random flows with output weights of three sizes come first.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from alignment_baselines import likelihood_pass, sequential_alignment
from reporting import PAPERS_ALIGNMENT, add_run_arguments, write_report
from safetensors.torch import load_file
from tqdm.auto import tqdm

from flowback_hf import AlignedFlowObjective, FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.data import ImageDataset, RowGenerator, add_noise, collate, load_splits, load_teacher, make_generator
from flowback_hf.places import choose_places
from flowback_hf.reporting import markdown_table
from flowback_hf.training import list_checkpoints
from flowback_hf.training.run_folder import EARLIER_ALIGNMENT


# Standard deviation of the output projections' weights of the random flows.
OUTPUT_STD = (0.03, 0.05, 0.07)
RANDOM_FLOW = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "num_blocks": 4, "num_layers": 3}
RANDOM_FLOW |= {"num_attention_heads": 4, "attention_head_dim": 16, "num_classes": 10}


@dataclass
class Case:
    """A flow with what its objective needs, all of it in float64."""

    name: str
    flow: TarFlowTransformer2DModel
    state_dict: dict[str, torch.Tensor]
    arguments: dict[str, Any]
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def objective(self, strategy: str, order: int | str | None) -> AlignedFlowObjective:
        torch.manual_seed(0)  # for the projectors that the state lacks
        objective = AlignedFlowObjective(self.flow, strategy, order=order, **self.arguments)
        objective.load_state_dict(self.state_dict, strict=False)
        return objective.double()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="*",
        default=[],
        help="Output folders of training/train_rra.py to measure beside random flows. Default: none.",
    )
    parser.add_argument(
        "--orders",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 5, 8, 12],
        help="Orders of the reverse gradient. Default: 0 1 2 3 5 8 12.",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Images in the batch. Default: %(default)s.")
    add_run_arguments(parser, "reverse_orders.json", device=False)
    args = parser.parse_args(arguments)
    if min(args.orders) < 0 or args.batch_size < 1:
        parser.error("--orders must be at least 0 and --batch_size at least 1")
    for run in args.runs:
        if not (run / "model_index.json").exists():
            parser.error(f"--runs must be finished output folders of training/train_rra.py, but {run} is not one")
    return args


def random_case(std: float, batch_size: int) -> Case:
    torch.manual_seed(0)
    flow = TarFlowTransformer2DModel(**RANDOM_FLOW)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=std)
    batch = torch.randn(batch_size, 1, 8, 8), torch.arange(batch_size) % 10, torch.randn(batch_size, 16, 64)
    arguments = {"places": [(3, 2), (4, 2)], "teacher_dim": 64, "projector_dim": 128} | PAPERS_ALIGNMENT
    return Case(f"random, output std {std}", flow, {}, arguments, batch)


def trained_case(run: Path, batch_size: int) -> Case:
    settings = argparse.Namespace(**json.loads((run / "training_args.json").read_text()))
    flow = FlowBackPipeline.from_pretrained(run).transformer
    config = flow.config
    dataset = ImageDataset(
        load_splits(settings).validation,
        settings.image_column,
        settings.label_column,
        list(range(config.num_classes)),
        config.sample_size,
        config.in_channels,
    )
    batch = collate([dataset[number] for number in range(batch_size)])
    noisy_sample = add_noise(batch["images"], config, RowGenerator(make_generator(0), len(batch["images"])))
    grid_size = config.sample_size // config.patch_size
    name = settings.teacher_model_name_or_path
    teacher = load_teacher(name, grid_size, Accelerator(cpu=True), settings.cache_dir)
    num_layers = [len(block.layers) for block in flow.blocks]
    arguments = {
        "places": choose_places(num_layers, settings.alignment_blocks, settings.alignment_layer),
        "teacher_dim": teacher.feature_dim,
        "projector_dim": settings.projector_dim,
    }
    arguments |= {option: getattr(settings, option, None) or value for option, value in EARLIER_ALIGNMENT.items()}
    state_dict = load_file(list_checkpoints(run)[-1] / "model.safetensors")
    batch = noisy_sample, batch["class_labels"], teacher(batch["images"])
    return Case(run.name, flow, state_dict, arguments, batch)


def block_gradients(loss: torch.Tensor, objective: AlignedFlowObjective) -> dict[int, torch.Tensor]:
    """One vector for each flow block that the alignment reaches, by its number."""
    vectors = {}
    for number in range(min(block for block, _ in objective.places), len(objective.flow.blocks) + 1):
        parameters = list(objective.flow.blocks[number - 1].parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        vectors[number] = torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found)]
        )
    return vectors


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def compare(case: Case, orders: list[int]) -> list[dict]:
    noisy_sample, class_labels, teacher_features = case.batch
    noisy_sample, teacher_features = noisy_sample.double(), teacher_features.double()
    objective = case.objective("reverse", 0)
    _, states = likelihood_pass(objective, noisy_sample, class_labels)
    alignment = sequential_alignment(objective, states[-1].detach(), class_labels, teacher_features)
    expected = block_gradients(alignment, objective)

    def measure(strategy: str, order: int | str | None) -> dict:
        objective = case.objective(strategy, order)
        output = objective(noisy_sample, class_labels, teacher_features)
        actual = block_gradients(output.alignment, objective)
        growth = output.neumann_growth or {}
        return {
            "strategy": strategy,
            "order": order,
            "relative_error": relative_error(torch.cat(list(actual.values())), torch.cat(list(expected.values()))),
            "worst_block_relative_error": max(relative_error(actual[number], expected[number]) for number in expected),
            "worst_block_cosine": min(
                torch.cosine_similarity(actual[number], expected[number], dim=0).item() for number in expected
            ),
            "log_growth": {number: value.log().item() for number, value in growth.items()},
        }

    orders = [order for order in orders if order < states[0].shape[1] - 1]
    return [measure("detach", None), *(measure("reverse", order) for order in [*orders, "exact"])]


def results_table(results: list[dict]) -> str:
    header = ["flow", "tokens", "strategy", "relative error", "of the worst block", "cosine of the worst block"]
    header.append("log of growth, by block")
    rows = []
    for result in results:
        for row in result["gradients"]:
            name = row["strategy"] if row["order"] is None else f"{row['strategy']} {row['order']}"
            growth = ", ".join(f"{number}: {value:+.3f}" for number, value in row["log_growth"].items())
            errors = [f"{row[key]:.1e}" for key in ("relative_error", "worst_block_relative_error")]
            cosine = f"{row['worst_block_cosine']:.6f}"
            rows.append([result["flow"], str(result["num_tokens"]), name, *errors, cosine, growth])
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    cases = [random_case(std, args.batch_size) for std in OUTPUT_STD]
    cases += [trained_case(run, args.batch_size) for run in args.runs]
    results = [
        {"flow": case.name, "num_tokens": case.batch[2].shape[1], "gradients": compare(case, args.orders)}
        for case in tqdm(cases, desc="Flows")
    ]
    table = results_table(results)
    print(table)
    write_report(args.output, arguments, "cpu", results, table)


if __name__ == "__main__":
    main()
