"""
Times sampling from a trained flow: the package's solvers, plain and compiled, against the published token loop and the
two published Jacobi recipes, alternately and in one run; refuses to report times of wrong results. Draws how far each
is from what the hardware allows. With --cold, times the first call instead: each sampler starts in a new process. With
--learned, times the learned inverse against them, from noise to finished images. Written as it goes.

    python benchmarks/prepare_flow.py
    python benchmarks/sampling.py --compile
    python benchmarks/sampling.py --cold --guidance_scales 2 --batch_sizes 1 16 4
    python benchmarks/sampling.py --learned --guidance_scales 2 --batch_sizes 1 16
"""

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from baselines import calibrate_gs_jacobi, gs_jacobi, published_token_loop, selective_jacobi_decoding
from reporting import add_run_arguments, peak_memory_of, seconds_of, write_report
from tqdm.auto import tqdm

from flowback_hf import FlowBackPipeline, TarFlowReverseTransformer2DModel, TarFlowTransformer2DModel
from flowback_hf.models.transformer_tarflow import Guidance, measure_residual
from flowback_hf.reporting import figure_file, markdown_table


Sampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BASELINES = ("published loop", "GS-Jacobi", "SeJD")
# Each in a new process. The second compiled one finds on the disk what the first has compiled.
COLD_SAMPLERS = ("published loop", "plain", "compiled", "compiled, second process")
# A baseline's run that took longer is not repeated.
REPEATED_SECONDS = 10.0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("outputs/benchmark_flow/flow"),
        help="The saved pipeline to sample from. Default: %(default)s.",
    )
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64],
        help="Images that are sampled together. Default: 1 4 16 64.",
    )
    parser.add_argument(
        "--guidance_scales",
        type=float,
        nargs="+",
        default=[1.0, 2.0],
        help="Guidance scales; 1.0 is off. Default: 1 2.",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="Tolerance of every solver but the token loops. Default: %(default)s.",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="Timed runs of each sampler, after one that is not. Default: %(default)s.",
    )
    parser.add_argument(
        "--largest_residual",
        type=float,
        default=1e-2,
        help="Refuse samples whose max |f(x) - z| is larger. Default: %(default)s.",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16"],
        default="float32",
        help="The dtype of the weights. Default: %(default)s.",
    )
    parser.add_argument("--compile", action="store_true", help="Also time the solvers with compiled steps.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--cold",
        action="store_true",
        help="Time each sampler's first call in a new process, and later calls. Default output: sampling_cold.json.",
    )
    mode.add_argument(
        "--learned",
        action="store_true",
        help="Time the pipeline's learned inverse, or an untrained one of the default size, which takes as long. The"
        " others denoise their samples. Default output: sampling_learned.json.",
    )
    add_run_arguments(parser, "sampling.json")
    args = parser.parse_args(arguments)
    if args.output == parser.get_default("output"):
        suffix = "_cold" if args.cold else "_learned" if args.learned else ""
        args.output = args.output.with_stem(args.output.stem + suffix)
    if min(args.repeats, *args.batch_sizes) < 1:
        parser.error("--repeats and --batch_sizes must be at least 1")
    if not (args.model / "model_index.json").exists():
        parser.error(f"--model must be a saved pipeline, but {args.model} is none: run benchmarks/prepare_flow.py")
    return args


def load_pipeline(args: argparse.Namespace) -> FlowBackPipeline:
    pipe = FlowBackPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.transformer.eval().requires_grad_(False)
    return pipe


def draw_noise_and_labels(
    model: TarFlowTransformer2DModel, args: argparse.Namespace, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch_size)
    config = model.config
    latents = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    class_labels = torch.randint(config.num_classes, (batch_size,), generator=generator)
    dtype = torch.promote_types(model.dtype, torch.float32)
    return latents.to(args.device, dtype), class_labels.to(args.device)


def compile_copy(model: TarFlowTransformer2DModel) -> TarFlowTransformer2DModel:
    pipe = FlowBackPipeline(copy.deepcopy(model))
    pipe.compile()
    return pipe.transformer


def build_samplers(
    model: TarFlowTransformer2DModel,
    compiled_model: TarFlowTransformer2DModel | None,
    args: argparse.Namespace,
    scale: float,
) -> dict[str, Sampler]:
    """Samplers by name, the published token loop first. The model and its compiled copy have a profile afterwards."""
    few = draw_noise_and_labels(model, args, batch_size=4)
    recipe = calibrate_gs_jacobi(model, *few, scale, args.tolerance)
    print(f"guidance {scale}: GS-Jacobi's recipe is {recipe}", flush=True)
    samplers = {
        "published loop": partial(published_token_loop, model, guidance_scale=scale),
        "GS-Jacobi": partial(gs_jacobi, model, guidance_scale=scale, tolerance=args.tolerance, recipe=recipe),
        "SeJD": partial(selective_jacobi_decoding, model, guidance_scale=scale, tolerance=args.tolerance),
    }
    profile = model.profile_inverse(*few, guidance_scale=scale)
    print(f"guidance {scale}: the profile is {profile}", flush=True)
    for suffix, each in (("", model), (", compiled", compiled_model)):
        if each is not None:
            each.register_to_config(inverse_profile=profile)
            for solver in ("sequential", "auto"):
                samplers[f"{solver}{suffix}"] = partial(sample, each, args, scale, solver)
    return samplers


def sample(
    model: TarFlowTransformer2DModel,
    args: argparse.Namespace,
    guidance_scale: float,
    solver: str,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
) -> torch.Tensor:
    options = {"solver": solver, "tolerance": args.tolerance, "guidance_scale": guidance_scale}
    return model(latents, class_labels, inverse=True, **options).sample


def time_alternately(
    samplers: dict[str, Sampler], inputs: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace
) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Samples and seconds by sampler. Whatever else the machine does meets all samplers."""
    samples, seconds = {}, {}
    for name, sampler in samplers.items():
        # Warms up, and compiles.
        first_seconds = seconds_of(lambda: samples.update({name: sampler(*inputs)}), args.device)
        seconds[name] = [first_seconds] if name in BASELINES and first_seconds > REPEATED_SECONDS else []
    repeated = [name for name in samplers if not seconds[name]]
    for _ in range(args.repeats):
        for name in repeated:
            seconds[name].append(seconds_of(lambda: samplers[name](*inputs), args.device))
    return samples, seconds


def measure(
    samplers: dict[str, Sampler],
    model: TarFlowTransformer2DModel,
    args: argparse.Namespace,
    batch_size: int,
    guidance_scale: float,
) -> dict:
    inputs = draw_noise_and_labels(model, args, batch_size)
    samples, seconds = time_alternately(samplers, inputs, args)
    residuals = {name: residual(model, sample, *inputs, guidance_scale) for name, sample in samples.items()}
    for name, worst in residuals.items():
        if not worst <= args.largest_residual:  # NaN is refused too
            sys.exit(
                f"The residual of {name}'s samples is {worst:.2e} at batch size {batch_size}, more than"
                f" {args.largest_residual:.0e}: times of wrong results are not compared."
            )
    baseline, baseline_seconds = samples["published loop"], statistics.median(seconds["published loop"])
    return {
        name: {
            **summarise(seconds[name], baseline_seconds),
            "residual": residuals[name],
            "difference_from_published_loop": (samples[name] - baseline).abs().max().item(),
        }
        for name in samplers
    }


def residual(
    model: TarFlowTransformer2DModel,
    sample: torch.Tensor,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    guidance_scale: float,
) -> float:
    """The largest `|f(x) - z|`, `f` guided. Two exact samples may differ by more, where a flow amplifies rounding."""
    tokens, latents = model.patchify(sample), model.patchify(latents)
    return measure_residual(model.blocks, tokens, latents, class_labels, Guidance(guidance_scale)).max().item()


def summarise(seconds: list[float], baseline_seconds: float) -> dict:
    median = statistics.median(seconds)
    return {
        "median_seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "times_faster_than_published_loop": baseline_seconds / median,
    }


def measure_memory(model: TarFlowTransformer2DModel, args: argparse.Namespace, batch_size: int, scale: float) -> dict:
    """Peak bytes of tensors beyond the weights, one flow block at a time, and those of the key/value caches."""
    inputs = draw_noise_and_labels(model, args, batch_size)
    num_tokens = (model.config.sample_size // model.config.patch_size) ** 2
    solvers = {solver: {"solver": solver} for solver in ("sequential", "auto", "jacobi")}
    solvers |= {"jacobi, all tokens": {"solver": "jacobi", "window_size": num_tokens}}
    peaks = {
        name: peak_memory_of(
            lambda: model(
                *inputs, inverse=True, guidance_scale=scale, blocks=[1], tolerance=args.tolerance, **options
            ),
            args.device,
        )
        for name, options in solvers.items()
    }
    rows = batch_size * (1 if scale == 1.0 else 2)
    block = model.blocks[0]
    cache = rows * 2 * num_tokens * block.proj_in.out_features * len(block.layers) * model.dtype.itemsize
    return {"batch_size": batch_size, "guidance_scale": scale, "cache_bytes": cache, "peak_bytes": peaks}


class Floor:
    """What no token loop can be faster than: weights that are read for every token, and products that are computed."""

    def __init__(self, model: TarFlowTransformer2DModel, device: str):
        matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
        self.weights = sum(weight.numel() for weight in matrices) / len(model.blocks)
        self.num_blocks = len(model.blocks)
        self.num_steps = (model.config.sample_size // model.config.patch_size) ** 2 - 1
        self.bytes = self.weights * model.dtype.itemsize
        # As large as a block's weights, which are what is read again and again: they may stay in a cache.
        source = torch.empty(int(self.bytes), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bytes_per_second = 2 * self.bytes / fastest(lambda: target.copy_(source), device)
        matrix = torch.randn(2048, 2048, device=device, dtype=model.dtype)
        self.operations_per_second = 2 * 2048**3 / fastest(lambda: matrix @ matrix, device)

    def seconds(self, rows: int) -> dict[str, float]:
        """`rows`: tokens a step, twice the batch size under guidance."""
        steps = self.num_blocks * self.num_steps
        return {
            "bandwidth": steps * self.bytes / self.bytes_per_second,
            "operations": steps * 2 * self.weights * rows / self.operations_per_second,
        }


def fastest(function: Callable, device: str) -> float:
    return min(seconds_of(function, device) for _ in range(10))


def results_table(results: list[dict]) -> str:
    """Seconds for the batch, the median of the repeats, and how many times faster than the published loop."""
    names = list(results[0]["samplers"])
    rows = []
    for result in results:
        row = [str(result["batch_size"]), f"{result['guidance_scale']:g}"]
        for name in names:
            timing = result["samplers"][name]
            row.append(f"{timing['median_seconds']:.3f} ({timing['times_faster_than_published_loop']:.2f})")
        binds = max(result["floor"], key=result["floor"].get)
        rows.append([*row, f"{result['floor'][binds]:.3f} ({binds})"])
    return markdown_table(["batch", "guidance", *names, "floor"], rows)


def residuals_table(results: list[dict]) -> str:
    names = list(results[0]["samplers"])
    rows = [
        [str(result["batch_size"]), f"{result['guidance_scale']:g}"]
        + [f"{result['samplers'][name]['residual']:.1e}" for name in names]
        for result in results
    ]
    return markdown_table(["batch", "guidance", *names], rows)


def memory_table(memory: dict) -> str:
    sequential = memory["peak_bytes"]["sequential"]
    rows = [[name, f"{peak / 2**20:.1f}", f"{peak / sequential:.3f}"] for name, peak in memory["peak_bytes"].items()]
    about = (
        f"Peak memory of inverting one block, batch {memory['batch_size']}, guidance {memory['guidance_scale']:g}; the"
        f" cache of keys and values is {memory['cache_bytes'] / 2**20:.1f} MiB of it:"
    )
    return f"{about}\n\n{markdown_table(['solver', 'MiB', 'of sequential'], rows)}"


def draw(results: list[dict], path: Path):
    """Seconds an image against the batch size, with the floor."""
    scales = sorted({result["guidance_scale"] for result in results})
    size = (6 * len(scales), 4.5)
    with figure_file(path, 1, len(scales), dpi=110, figsize=size, layout="constrained") as (_, [axes]):
        for axis in axes[1:]:
            axis.sharey(axes[0])
        for axis, scale in zip(axes, scales):
            of_scale = [result for result in results if result["guidance_scale"] == scale]
            batch_sizes = [result["batch_size"] for result in of_scale]
            for name in of_scale[0]["samplers"]:
                seconds = [result["samplers"][name]["median_seconds"] / result["batch_size"] for result in of_scale]
                axis.plot(batch_sizes, seconds, marker="o", linestyle="--" if name in BASELINES else "-", label=name)
            floor = [max(result["floor"].values()) / result["batch_size"] for result in of_scale]
            axis.fill_between(batch_sizes, floor, min(floor) / 3, color="0.85", label="below the floor")
            axis.set(xscale="log", yscale="log", xlabel="batch size", title=f"guidance scale {scale:g}")
            axis.set_xticks(batch_sizes, batch_sizes)
            axis.minorticks_off()
        axes[0].set_ylabel("seconds an image")
        axes[-1].legend(fontsize=8)


def report(
    args: argparse.Namespace, arguments: list[str] | None, results: list[dict], floor: Floor, memory: dict | None
):
    """Table, record and figure of what has been measured so far."""
    table = [
        "Seconds for the batch (times faster than the published loop):",
        results_table(results),
        "How exact the samples are: the largest `|f(x) - z|`, `f` guided and `z` the noise they were made from:",
        residuals_table(results),
        f"The floor: {floor.bytes / 1e6:.1f} MB of a block's weights, copied at"
        f" {floor.bytes_per_second / 1e9:.0f} GB/s (reading and writing), or products at"
        f" {floor.operations_per_second / 1e12:.3f} TFLOP/s.",
    ]
    record = {
        "sampling": results,
        "bytes_per_second": floor.bytes_per_second,
        "operations_per_second": floor.operations_per_second,
    }
    if memory is not None:
        record["memory"] = memory
        table.append(memory_table(memory))
        print("\n\n".join(table))
    write_report(args.output, arguments, args.device, record, "\n\n".join(table))
    draw(results, args.output.with_suffix(".png"))


def cold_start(args: argparse.Namespace, name: str) -> list[dict]:
    """
    Load the pipeline and time a sampler's first call at each batch size, from noise to finished images, and later
    calls, the inversion alone: alternately with the published loop, so that whatever else the machine does meets both.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipe = load_pipeline(args)
    if name.startswith("compiled"):
        pipe.compile()
    results = []
    for scale in args.guidance_scales:
        published = partial(published_token_loop, pipe.transformer, guidance_scale=scale)
        is_published = name == "published loop"
        sampler = published if is_published else partial(sample, pipe.transformer, args, scale, "auto")
        for batch_size in args.batch_sizes:
            inputs = draw_noise_and_labels(pipe.transformer, args, batch_size)
            first = seconds_of(lambda: pipe.denoise(sampler(*inputs), inputs[1]), args.device)
            seconds, published_seconds = [], []
            for _ in range(args.repeats):
                published_seconds.append(seconds_of(lambda: published(*inputs), args.device))
                if not is_published:
                    seconds.append(seconds_of(lambda: sampler(*inputs), args.device))
            worst = residual(pipe.transformer, sampler(*inputs), *inputs, scale)
            later = summarise(seconds or published_seconds, statistics.median(published_seconds))
            setting = {"sampler": name, "batch_size": batch_size, "guidance_scale": scale}
            results.append({**setting, "first_seconds": first, **later, "residual": worst})
    return results


def cold_table(results: list[dict]) -> str:
    rows = [
        [
            f"{result['batch_size']}",
            f"{result['guidance_scale']:g}",
            result["sampler"],
            f"{result['first_seconds']:.2f}",
            f"{result['median_seconds']:.3f}",
            f"{result['times_faster_than_published_loop']:.2f}",
        ]
        for result in results
    ]
    return markdown_table(["batch", "guidance", "sampler", "first call", "later", "times faster"], rows)


def report_cold_starts(args: argparse.Namespace, arguments: list[str] | None):
    results = []
    # An empty cache, so that nothing is compiled before.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in tqdm(COLD_SAMPLERS, desc="Starting"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
                results += executor.submit(cold_start, args, name).result()
            for result in results:
                if not result["residual"] <= args.largest_residual:  # NaN is refused too
                    sys.exit(f"The samples are wrong, so their times are not compared: {result}.")
            write_report(args.output, arguments, args.device, results, cold_table(results))
    print(cold_table(results))


def build_finished_samplers(
    pipe: FlowBackPipeline, compiled_pipe: FlowBackPipeline, args: argparse.Namespace, scale: float
) -> dict[str, Sampler]:
    """From noise to finished images: exact samplers, the learned inverse, and one forward pass of the flow."""

    def finish(sampler: Sampler) -> Sampler:
        return lambda latents, class_labels: pipe.denoise(sampler(latents, class_labels), class_labels)

    samplers = {"published loop": finish(partial(published_token_loop, pipe.transformer, guidance_scale=scale))}
    profile = pipe.transformer.profile_inverse(*draw_noise_and_labels(pipe.transformer, args, 4), guidance_scale=scale)
    pipes = {"": pipe, ", compiled": compiled_pipe}
    for suffix, each in pipes.items():
        each.transformer.register_to_config(inverse_profile=profile)
        samplers[f"auto{suffix}"] = finish(partial(sample, each.transformer, args, scale, "auto"))
    for suffix, each in pipes.items():
        samplers[f"learned{suffix}"] = partial(each.apply_reverse_transformer, guidance_scale=scale, denoise=True)
    samplers["forward pass"] = lambda latents, class_labels: pipe.transformer(latents, class_labels).sample
    return samplers


def learned_table(results: list[dict]) -> str:
    """Seconds for the batch, and how many times faster the compiled learned inverse is."""
    rows = []
    for result in results:
        seconds = {name: timing["median_seconds"] for name, timing in result["samplers"].items()}
        learned = seconds["learned, compiled"]
        cells = [f"{each:.3f} ({each / learned:.1f})" for each in seconds.values()]
        rows.append([str(result["batch_size"]), f"{result['guidance_scale']:g}", *cells])
    return markdown_table(["batch", "guidance", *results[0]["samplers"]], rows)


def report_learned(args: argparse.Namespace, arguments: list[str] | None):
    pipe = load_pipeline(args)
    if pipe.reverse_transformer is None:
        highest = max(args.guidance_scales)
        reverse_transformer = TarFlowReverseTransformer2DModel.for_flow(pipe.transformer, max_guidance_scale=highest)
        pipe.register_modules(reverse_transformer=reverse_transformer.to(args.device, pipe.transformer.dtype))
    pipe.reverse_transformer.eval().requires_grad_(False)
    compiled_pipe = FlowBackPipeline(
        copy.deepcopy(pipe.transformer), reverse_transformer=copy.deepcopy(pipe.reverse_transformer)
    )
    compiled_pipe.compile()
    parameters = {"flow": pipe.transformer.num_parameters(), "learned": pipe.reverse_transformer.num_parameters()}
    settings = [(scale, batch_size) for scale in args.guidance_scales for batch_size in args.batch_sizes]
    results = []
    for scale, batch_size in tqdm(settings, desc="Timing"):
        samplers = build_finished_samplers(pipe, compiled_pipe, args, scale)
        inputs = draw_noise_and_labels(pipe.transformer, args, batch_size)
        with torch.no_grad():
            _, seconds = time_alternately(samplers, inputs, args)
            exact = sample(pipe.transformer, args, scale, "auto", *inputs)
            worst = residual(pipe.transformer, exact, *inputs, scale)
        if not worst <= args.largest_residual:  # NaN is refused too
            sys.exit(f"The residual of auto's samples is {worst:.2e}: times of wrong results are not compared.")
        baseline_seconds = statistics.median(seconds["published loop"])
        timings = {name: summarise(each, baseline_seconds) for name, each in seconds.items()}
        results.append({"batch_size": batch_size, "guidance_scale": scale, "samplers": timings})
        record = {"num_parameters": parameters, "sampling": results}
        write_report(args.output, arguments, args.device, record, learned_table(results))
    print(learned_table(results))


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.cold:
        report_cold_starts(args, arguments)
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.learned:
        report_learned(args, arguments)
        return
    model = load_pipeline(args).transformer
    compiled_model = compile_copy(model) if args.compile else None
    floor = Floor(model, args.device)
    results = []
    with torch.no_grad(), tqdm(total=len(args.guidance_scales) * len(args.batch_sizes), desc="Timing") as progress:
        for scale in args.guidance_scales:
            samplers = build_samplers(model, compiled_model, args, scale)
            for batch_size in args.batch_sizes:
                timings = measure(samplers, model, args, batch_size, scale)
                rows = batch_size * (1 if scale == 1.0 else 2)
                setting = {"batch_size": batch_size, "guidance_scale": scale}
                results.append({**setting, "samplers": timings, "floor": floor.seconds(rows)})
                progress.write(
                    json.dumps(setting | {name: round(t["median_seconds"], 3) for name, t in timings.items()})
                )
                report(args, arguments, results, floor, memory=None)
                progress.update()
        memory = measure_memory(model, args, max(args.batch_sizes), max(args.guidance_scales))
    report(args, arguments, results, floor, memory)


if __name__ == "__main__":
    main()
