"""
Time and peak memory of a training step (forward and backward; no optimizer, no teacher) by alignment strategy: the
package's, the reverse gradient by two evaluations, and by the naive sequential graph; eager, with every transformer
layer compiled, and with those compiled that no additional gradient passes through. All alternate in one run.

    python benchmarks/train_step.py --batch_size 2 --threads 2 --modes eager compiled

Results are refused unless every arrangement of one strategy gives the same gradient.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from alignment_baselines import sequential_loss, two_evaluation_loss
from reporting import (
    PAPERS_ALIGNMENT,
    add_alignment_sizes,
    add_flow_sizes,
    add_run_arguments,
    build_random_flow,
    peak_memory_of,
    seconds_of,
    write_report,
)
from tqdm.auto import tqdm

from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel
from flowback_hf.reporting import markdown_table


# strategy, order, how: the package's own objective or one of the baselines
STEPS = {
    "none": ("none", None, "package"),
    "forward": ("forward", None, "package"),
    "detach": ("detach", None, "package"),
    "reverse 0": ("reverse", 0, "package"),
    "reverse 1": ("reverse", 1, "package"),
    "reverse 2": ("reverse", 2, "package"),
    "reverse 0, two evaluations": ("reverse", 0, "two evaluations"),
    "reverse 1, two evaluations": ("reverse", 1, "two evaluations"),
    "reverse 2, two evaluations": ("reverse", 2, "two evaluations"),
    "reverse exact, sequential graph": ("reverse", "exact", "sequential"),
}
MODES = ("eager", "compiled", "compiled below")
BASELINES = {"two evaluations": two_evaluation_loss, "sequential": sequential_loss}
# Relative, of the gradients of two arrangements: rounding, amplified by the series in float32; 8 bits in bfloat16.
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 5e-2}
NUM_CLASSES = 1000
# Takes one step and leaves its gradients in the objective, which it returns.
Step = Callable[[], AlignedFlowObjective]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flow_sizes(parser, sample_size=64, num_blocks=8, num_layers=8, num_heads=8)
    add_alignment_sizes(parser)
    parser.add_argument("--batch_size", type=int, default=2, help="Images in a step. Default: %(default)s.")
    parser.add_argument(
        "--dtype",
        choices=list(LARGEST_DIFFERENCE),
        default="float32",
        help="The precision; bfloat16 is by autocast. Default: %(default)s.",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="Timed steps of each kind, after one that is not. Default: %(default)s."
    )
    parser.add_argument(
        "--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="Kinds of steps to time. Default: all."
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=list(MODES),
        default=["eager", "compiled"],
        help="What is compiled. Default: eager compiled.",
    )
    parser.add_argument(
        "--sequential_repeats",
        type=int,
        default=1,
        help="Timed steps of the sequential graph, which runs in eager mode only. Default: %(default)s.",
    )
    add_run_arguments(parser, "train_step.json")
    args = parser.parse_args(arguments)
    if min(args.repeats, args.sequential_repeats, args.batch_size) < 1:
        parser.error("--repeats, --sequential_repeats and --batch_size must be at least 1")
    if "none" not in args.steps:
        parser.error("--steps must name none, which the others are compared with")
    return args


def build_flow(args: argparse.Namespace) -> TarFlowTransformer2DModel:
    flow = build_random_flow(args, NUM_CLASSES)
    for block in flow.blocks:
        # An untrained flow is the identity, through which no gradient of the generative pass comes.
        torch.nn.init.normal_(block.proj_out.weight, std=0.1 * block.proj_out.in_features**-0.5)
    return flow.to(args.device)


def compile_layers(flow: TarFlowTransformer2DModel, args: argparse.Namespace, mode: str):
    # Several gradients are taken of one graph, which a compiled one refuses while it reuses its buffers.
    torch._functorch.config.donated_buffer = False
    last = {"eager": 0, "compiled below": min(args.aligned_blocks) - 1, "compiled": args.num_blocks}[mode]
    for block in flow.blocks[:last]:
        for layer in block.layers:
            layer.compile(fullgraph=True)


def build_steps(flow: TarFlowTransformer2DModel, args: argparse.Namespace) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(1)
    num_tokens = (args.sample_size // args.patch_size) ** 2
    sample = torch.randn(args.batch_size, 3, args.sample_size, args.sample_size, generator=generator)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), generator=generator)
    features = torch.randn(args.batch_size, num_tokens, args.teacher_dim, generator=generator)
    inputs = [tensor.to(args.device) for tensor in (sample, labels, features)]
    places = [(block, args.aligned_layer) for block in args.aligned_blocks]

    def build(strategy: str, order: int | str | None, arrangement: str) -> Step:
        torch.manual_seed(2)
        objective = AlignedFlowObjective(
            flow,
            strategy,
            places,
            order,
            teacher_dim=args.teacher_dim,
            projector_dim=args.projector_dim,
            **PAPERS_ALIGNMENT,
        ).to(args.device)

        def step() -> AlignedFlowObjective:
            objective.zero_grad()
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                if arrangement == "package":
                    loss = objective(*inputs).loss
                else:
                    loss = BASELINES[arrangement](objective, *inputs)
            loss.backward()
            return objective

        return step

    return {name: build(*STEPS[name]) for name in args.steps}


def gradient_of(step: Step) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in step().parameters()])


def peak_memory(step: Step, device: str) -> int:
    """Bytes of tensors alive at once in a step, weights included and gradients of an earlier step not."""
    objective = step()
    objective.zero_grad()
    transient = peak_memory_of(step, device)
    objective.zero_grad()
    return transient + sum(weight.numel() * weight.element_size() for weight in objective.parameters())


def build_arrangements(args: argparse.Namespace) -> dict[tuple[str, str], Step]:
    """Steps by mode and name, each mode with a flow of its own."""
    torch.compiler.reset()
    arrangements = {}
    for mode in args.modes:
        flow = build_flow(args)
        compile_layers(flow, args, mode)
        steps = build_steps(flow, args)
        if mode != "eager":  # the sequential graph calls the parts of a layer, which are not compiled
            steps = {name: step for name, step in steps.items() if STEPS[name][2] != "sequential"}
        check_gradients(steps, args)  # and warm up
        arrangements |= {(mode, name): step for name, step in steps.items()}
    return arrangements


def measure(arrangements: dict[tuple[str, str], Step], args: argparse.Namespace) -> list[dict]:
    seconds = {key: [] for key in arrangements}
    for repeat in tqdm(range(max(args.repeats, args.sequential_repeats)), desc="Timing"):
        # Alternately, so that whatever else the machine does meets all of them.
        for (mode, name), step in arrangements.items():
            if repeat < (args.sequential_repeats if STEPS[name][2] == "sequential" else args.repeats):
                seconds[mode, name].append(seconds_of(step, args.device))
    memory = {key: peak_memory(step, args.device) for key, step in tqdm(arrangements.items(), desc="Memory")}
    results = []
    for mode, name in arrangements:
        timings = seconds[mode, name]
        # Of the same round, which met the same machine.
        ratios = [timing / none for timing, none in zip(timings, seconds[mode, "none"])]
        results.append(
            {
                "mode": mode,
                "step": name,
                "median_seconds": statistics.median(timings),
                "min_seconds": min(timings),
                "max_seconds": max(timings),
                "times_none": statistics.median(ratios),
                "min_times_none": min(ratios),
                "max_times_none": max(ratios),
                "images_per_second": args.batch_size / statistics.median(timings),
                "peak_bytes": memory[mode, name],
                "memory_times_none": memory[mode, name] / memory[mode, "none"],
            }
        )
    return results


def check_gradients(steps: dict[str, Step], args: argparse.Namespace):
    by_order: dict[int | str, tuple[str, torch.Tensor]] = {}
    for name, step in steps.items():
        strategy, order, _ = STEPS[name]
        if strategy != "reverse":
            step()
            continue
        gradient = gradient_of(step)
        first_name, first = by_order.setdefault(order, (name, gradient))
        difference = ((gradient - first).norm() / first.norm()).item()
        if not difference <= LARGEST_DIFFERENCE[args.dtype]:  # NaN is refused too
            sys.exit(
                f"The gradients of {first_name!r} and {name!r} differ by {difference:.2e}, more than"
                f" {LARGEST_DIFFERENCE[args.dtype]:.0e}: times of different results are not compared."
            )


def matrix_rate(args: argparse.Namespace) -> float:
    """Operations a second of a large matrix product, the best of three."""
    size = 8192 if torch.device(args.device).type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=args.device, dtype=getattr(torch, args.dtype)) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds_of(lambda: left @ right, args.device) for _ in range(3))


def operations_per_step(flow: TarFlowTransformer2DModel, args: argparse.Namespace) -> float:
    """Of the strategy none: two for each weight of a product and token forward, twice that backward; and attention,
    counted causal."""
    num_tokens = (args.sample_size // args.patch_size) ** 2
    width = args.num_attention_heads * args.attention_head_dim
    weights = sum(module.weight.numel() for module in flow.modules() if isinstance(module, torch.nn.Linear))
    attention = 2 * num_tokens * width * args.num_layers * args.num_blocks  # of a token: 2 products of T/2 * width
    return 3 * args.batch_size * num_tokens * (2 * weights + attention)


def results_table(results: list[dict]) -> str:
    header = [
        "layers",
        "step",
        "seconds (range)",
        "of none",
        "images/s",
        "peak memory",
        "of none",
        "of the matrix rate",
    ]
    rows = [
        [
            result["mode"],
            result["step"],
            f"{result['median_seconds']:.3f} ({result['min_seconds']:.3f} to {result['max_seconds']:.3f})",
            f"{result['times_none']:.3f} ({result['min_times_none']:.3f} to {result['max_times_none']:.3f})",
            f"{result['images_per_second']:.2f}",
            f"{result['peak_bytes'] / 2**30:.2f} GiB",
            f"{result['memory_times_none']:.3f}",
            f"{result['share_of_matrix_rate']:.1%}" if "share_of_matrix_rate" in result else "",
        ]
        for result in results
    ]
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rate = matrix_rate(args)
    operations = operations_per_step(build_flow(args), args)
    results = measure(build_arrangements(args), args)
    for result in results:
        if result["step"] == "none":
            result["share_of_matrix_rate"] = operations / result["median_seconds"] / rate
    table = results_table(results)
    print(table)
    write_report(args.output, arguments, args.device, {"matrix_operations_per_second": rate, "steps": results}, table)


if __name__ == "__main__":
    main()
