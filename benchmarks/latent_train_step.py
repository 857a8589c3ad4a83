"""
Memory and time of one training step (likelihood, AdamW, EMA, bfloat16 autocast) of the 256x256 latent flows: by
arithmetic anywhere, and measured as well where there is a CUDA device.

    python benchmarks/latent_train_step.py --configs imagenet256_latent_p2 imagenet256_latent_p1 --batch_size 32

What the arithmetic knows: the bytes of weights, gradients, moments and averages; those of every tensor that autograd
saves, counted on the graph itself without allocating it; and three forward passes of operations a step.
With gradient checkpointing autograd keeps the input of every layer and, while it goes back, what one layer saves; a
step is then four forward passes. The time follows from `--peak_tflops` and `--utilisation`, which are assumptions.
"""

import argparse
import statistics

import torch
from diffusers.training_utils import EMAModel
from flow_costs import activation_bytes, count_flops, count_parameters, load_config, make_batch
from reporting import add_run_arguments, seconds_of, write_report

from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel
from flowback_hf.reporting import markdown_table


GIB = 2**30
# float32 weights, gradients, two moments of AdamW and the moving average
BYTES_PER_PARAMETER = 4 * (1 + 1 + 2 + 1)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs",
        nargs="+",
        default=["imagenet256_latent_p2", "imagenet256_latent_p1"],
        help="Names of model sizes in training/configs. Default: the two of 256x256 in latents.",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="Images in a step. Default: %(default)s.")
    parser.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="Keep the inputs of the layers only, and compute the rest again.",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="Timed steps on a GPU, after two that are not. Default: %(default)s."
    )
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=989.0,
        help="The device's peak in TFLOP/s. Default: %(default)s, an H100's in dense bfloat16.",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="The share of the peak that is assumed to be used. Default: %(default)s.",
    )
    add_run_arguments(parser, "latent_train_step.json", device=False)
    return parser.parse_args(arguments)


def forward_passes(args: argparse.Namespace) -> int:
    """A training step's floating-point operations in units of a forward pass."""
    return 4 if args.gradient_checkpointing else 3


def predict(name: str, args: argparse.Namespace) -> dict[str, float]:
    config = load_config(name)
    parameters, flops = count_parameters(config), count_flops(config)
    per_image, shared = activation_bytes(config, args.gradient_checkpointing)
    step_flops = forward_passes(args) * flops * args.batch_size
    return {
        "parameters": parameters,
        "forward_flops_per_image": flops,
        "states_gib": parameters * BYTES_PER_PARAMETER / GIB,
        "half_precision_weights_gib": shared / GIB,
        "activations_gib_per_image": per_image / GIB,
        "memory_gib": (parameters * BYTES_PER_PARAMETER + shared + per_image * args.batch_size) / GIB,
        "seconds": step_flops / (args.peak_tflops * 1e12 * args.utilisation),
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory and median time of a step on the CUDA device."""
    config = load_config(name)
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = TarFlowTransformer2DModel.from_config(config)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    objective = AlignedFlowObjective(model, strategy="none")
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)
    ema = EMAModel(model.parameters(), decay=0.9999, foreach=True)
    batch = make_batch(config, args.batch_size, "cuda")

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = objective(*batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    seconds = [seconds_of(step, "cuda") for _ in range(2 + args.repeats)]
    median = statistics.median(seconds[2:])
    flops = forward_passes(args) * count_flops(config) * args.batch_size
    return {
        "memory_gib": torch.cuda.max_memory_allocated() / GIB,
        "seconds": median,
        "utilisation": flops / median / (args.peak_tflops * 1e12),
    }


def table(results: list[dict]) -> str:
    header = ["config", "parameters", "states, GiB", "activations, GiB per image", "memory, GiB", "step, s"]
    header += ["measured memory, GiB", "measured step, s"]
    rows = []
    for result in results:
        predicted, measured = result["predicted"], result["measured"]
        row = [f"`{result['config']}`", f"{predicted['parameters'] / 1e6:.1f} M", f"{predicted['states_gib']:.1f}"]
        row += [f"{predicted['activations_gib_per_image']:.3f}", f"{predicted['memory_gib']:.1f}"]
        row += [f"{predicted['seconds']:.3f}"]
        row += [f"{measured['memory_gib']:.1f}", f"{measured['seconds']:.3f}"] if measured else ["not measured"] * 2
        rows.append(row)
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    has_cuda = torch.cuda.is_available()
    results = []
    for name in args.configs:
        measured = None
        if has_cuda:
            try:
                measured = measure(name, args)
            except torch.cuda.OutOfMemoryError as error:
                print(f"{name}: not measured, a batch of {args.batch_size} does not fit: {error}")
            torch.cuda.empty_cache()
        results.append({"config": name, "predicted": predict(name, args), "measured": measured})
    assumptions = (
        f"Batch of {args.batch_size}, bfloat16 autocast,"
        f" {'with' if args.gradient_checkpointing else 'without'} gradient checkpointing; time by arithmetic at"
        f" {args.utilisation:.0%} of {args.peak_tflops:g} TFLOP/s, which is an assumption."
    )
    if not has_cuda:
        assumptions += " There is no CUDA device here: memory and time were not measured."
    text = f"{assumptions}\n\n{table(results)}"
    print(text)
    write_report(args.output, arguments, "cuda" if has_cuda else "cpu", results, text)


if __name__ == "__main__":
    main()
