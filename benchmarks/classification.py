"""
Times training-free classification: one gradient for 10 and for 1000 classes, alternately and in one run, against
Bayes' rule, which takes a forward for each class; and counts the bytes that the gradient keeps for its backward.

    python benchmarks/classification.py --threads 1
"""

import argparse
import statistics

import torch
from reporting import add_flow_sizes, add_run_arguments, build_random_flow, seconds_of, write_report

from flowback_hf import FlowBackClassificationPipeline
from flowback_hf.reporting import markdown_table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flow_sizes(parser, sample_size=32, num_blocks=4, num_layers=4, num_heads=4)
    parser.add_argument(
        "--num_classes",
        type=int,
        nargs=2,
        default=[10, 1000],
        help="Few and many classes to compare. Default: 10 1000.",
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="Images that are classified together. Default: %(default)s."
    )
    parser.add_argument(
        "--num_bayes_images",
        type=int,
        default=1,
        help="Images that Bayes' rule classifies, which takes many passes for each. Default: %(default)s.",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=10,
        help="Timed runs of each method, after one that is not. Default: %(default)s.",
    )
    add_run_arguments(parser, "classification.json")
    args = parser.parse_args(arguments)
    if min(args.repeats, args.batch_size, args.num_bayes_images, *args.num_classes) < 1:
        parser.error("--repeats, --batch_size, --num_bayes_images and --num_classes must be at least 1")
    return args


def build_pipeline(args: argparse.Namespace, num_classes: int) -> FlowBackClassificationPipeline:
    model = build_random_flow(args, num_classes)
    for block in model.blocks:
        # An untrained flow is the identity, of which the classes change nothing.
        torch.nn.init.normal_(block.proj_out.weight, std=0.1 * block.proj_out.in_features**-0.5)
        torch.nn.init.normal_(block.class_embed)
    pipeline = FlowBackClassificationPipeline(model.to(args.device).eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bytes_kept_for_backward(pipeline: FlowBackClassificationPipeline, images: torch.Tensor) -> int:
    """The storage of everything that the gradient's forward saves, apart from the flow's parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in pipeline.transformer.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pipeline.class_scores(images, "gradient", batch_size=len(images))
    return sum(storage.nbytes() for storage in saved.values())


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for each number of classes: milliseconds an image and KiB an image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.sample_size, args.sample_size, generator=generator)
    pipelines = {num_classes: build_pipeline(args, num_classes) for num_classes in args.num_classes}

    def gradient(pipeline: FlowBackClassificationPipeline):
        pipeline.class_scores(images, "gradient", batch_size=args.batch_size)

    def bayes(pipeline: FlowBackClassificationPipeline):
        pipeline.class_scores(images[: args.num_bayes_images], "bayes", batch_size=args.batch_size)

    seconds = {num_classes: [] for num_classes in pipelines}
    for repeat in range(args.repeats + 1):
        # Alternately, so that whatever else the machine does meets both; the first time is a warm-up.
        for num_classes, pipeline in pipelines.items():
            time = seconds_of(lambda: gradient(pipeline), args.device)
            if repeat > 0:
                seconds[num_classes].append(time)
    results = []
    for num_classes, pipeline in pipelines.items():
        milliseconds = [1000 * time / args.batch_size for time in seconds[num_classes]]
        results.append(
            {
                "num_classes": num_classes,
                "gradient_median_ms": statistics.median(milliseconds),
                "gradient_min_ms": min(milliseconds),
                "gradient_max_ms": max(milliseconds),
                "gradient_kib": bytes_kept_for_backward(pipeline, images) / 1024 / args.batch_size,
                "bayes_ms": 1000 * seconds_of(lambda: bayes(pipeline), args.device) / args.num_bayes_images,
            }
        )
    few = results[0]
    for result in results:
        # of the pairs of alternate runs, which met the same machine
        pairs = zip(seconds[result["num_classes"]], seconds[few["num_classes"]])
        result["gradient_time_ratio"] = statistics.median(time / few_time for time, few_time in pairs)
        result["gradient_memory_ratio"] = result["gradient_kib"] / few["gradient_kib"]
        result["bayes_times_slower"] = result["bayes_ms"] / result["gradient_median_ms"]
    return results


def make_table(results: list[dict]) -> str:
    """Per image: medians, then their range."""
    few = results[0]["num_classes"]
    header = ["classes", "gradient, ms", f"time / {few} classes", "kept for backward, KiB", f"memory / {few} classes"]
    header += ["Bayes, ms", "Bayes / gradient"]
    rows = [
        [
            str(result["num_classes"]),
            f"{result['gradient_median_ms']:.2f} ({result['gradient_min_ms']:.2f} to {result['gradient_max_ms']:.2f})",
            f"{result['gradient_time_ratio']:.3f}",
            f"{result['gradient_kib']:.0f}",
            f"{result['gradient_memory_ratio']:.3f}",
            f"{result['bayes_ms']:.0f}",
            f"{result['bayes_times_slower']:.1f}",
        ]
        for result in results
    ]
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = measure(args)
    table = make_table(results)
    print(table)
    write_report(args.output, arguments, args.device, results, table)


if __name__ == "__main__":
    main()
