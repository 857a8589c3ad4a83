"""
Time and peak memory of a training step of a flow and of its learned inverse, AdamW included: by pairs of data without
guidance and with it, which costs one more evaluation without gradients. All alternate in one run.

    python benchmarks/reverse_step.py --batch_size 2 --threads 2
"""

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from reporting import add_flow_sizes, add_run_arguments, build_random_flow, peak_memory_of, seconds_of, write_report
from tqdm.auto import tqdm

from flowback_hf import AlignedFlowObjective, ReverseFlowObjective, TarFlowReverseTransformer2DModel
from flowback_hf.reporting import markdown_table


NUM_CLASSES = 1000
MAX_GUIDANCE_SCALE = 3.0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flow_sizes(parser, sample_size=64, num_blocks=8, num_layers=8, num_heads=8)
    parser.add_argument("--batch_size", type=int, default=2, help="Images in a step. Default: %(default)s.")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="The precision; bfloat16 is by autocast. Default: %(default)s.",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="Timed steps of each kind, after one that is not. Default: %(default)s."
    )
    add_run_arguments(parser, "reverse_step.json")
    args = parser.parse_args(arguments)
    if min(args.repeats, args.batch_size) < 1:
        parser.error("--repeats and --batch_size must be at least 1")
    return args


class Step:
    """
    A training step: forward, backward and AdamW.

    Args:
        objective (`torch.nn.Module`): What is trained.
        compute_loss (`Callable`): Its loss, without arguments.
        args (`argparse.Namespace`): Device and precision.
    """

    def __init__(self, objective: torch.nn.Module, compute_loss: Callable[[], torch.Tensor], args: argparse.Namespace):
        self.objective, self.compute_loss = objective, compute_loss
        self.device = torch.device(args.device).type
        self.uses_bfloat16 = args.dtype == "bfloat16"
        trained = [weight for weight in objective.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def __call__(self):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.uses_bfloat16):
            loss = self.compute_loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """Bytes of weights, frozen ones included, and of AdamW's moments."""
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.objective.parameters(), *moments))


def build_steps(args: argparse.Namespace) -> dict[str, Step]:
    flow = build_random_flow(args, NUM_CLASSES).to(args.device)
    generator = torch.Generator().manual_seed(1)
    shape = (args.batch_size, 3, args.sample_size, args.sample_size)
    clean, noise = (torch.randn(shape, generator=generator).to(args.device) for _ in range(2))
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), generator=generator).to(args.device)
    scale = torch.full((args.batch_size,), MAX_GUIDANCE_SCALE, device=args.device)
    noisy = clean + flow.config.noise_std * noise

    model = TarFlowReverseTransformer2DModel.for_flow(flow, max_guidance_scale=MAX_GUIDANCE_SCALE)
    of_flow = AlignedFlowObjective(copy.deepcopy(flow), "none")
    of_inverse = ReverseFlowObjective(model, flow).to(args.device)
    of_inverse.measure_statistics([(noisy, labels)])
    return {
        "flow": Step(of_flow, lambda: of_flow(noisy, labels).loss, args),
        "learned inverse": Step(of_inverse, lambda: of_inverse(clean, noisy, labels).loss, args),
        "learned inverse, guided": Step(of_inverse, lambda: of_inverse(clean, noisy, labels, scale).loss, args),
    }


def measure(steps: dict[str, Step], args: argparse.Namespace) -> list[dict]:
    seconds = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in tqdm(range(args.repeats), desc="Timing"):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, args.device))
    results = []
    for name, step in tqdm(steps.items(), desc="Memory"):
        # Of the same round, which met the same machine.
        ratios = [own / flow for own, flow in zip(seconds[name], seconds["flow"])]
        results.append(
            {
                "step": name,
                "num_trained_parameters": sum(weight.numel() for weight in step.optimizer.param_groups[0]["params"]),
                "median_seconds": statistics.median(seconds[name]),
                "min_seconds": min(seconds[name]),
                "max_seconds": max(seconds[name]),
                "times_flow": statistics.median(ratios),
                "images_per_second": args.batch_size / statistics.median(seconds[name]),
                "peak_bytes": step.held_bytes() + peak_memory_of(step, args.device),
            }
        )
    return results


def results_table(results: list[dict]) -> str:
    header = ["step of", "trained parameters", "seconds (range)", "of the flow's", "images/s", "peak memory"]
    rows = [
        [
            result["step"],
            f"{result['num_trained_parameters'] / 1e6:.1f} M",
            f"{result['median_seconds']:.3f} ({result['min_seconds']:.3f} to {result['max_seconds']:.3f})",
            f"{result['times_flow']:.2f}",
            f"{result['images_per_second']:.2f}",
            f"{result['peak_bytes'] / 2**30:.2f} GiB",
        ]
        for result in results
    ]
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = measure(build_steps(args), args)
    table = results_table(results)
    print(table)
    write_report(args.output, arguments, args.device, results, table)


if __name__ == "__main__":
    main()
