# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Evaluate a trained flow on a data set: likelihood, training-free classification, sample quality over a grid of guidance
scales and, on request, a linear probe of its hidden states.

    python pipelines/evaluate_flow.py --model outputs/flow --data_dir path/to/images --output_dir outputs/evaluation \\
        --features facebook/dinov2-base --num_samples 5000 --guidance_scales 1.0 1.5 2.0 3.0 --linear_probe

A data set without a validation split is evaluated on the images that training held out of it.

Writes `evaluation.json` (flat: `accuracy/gradient`, `frechet_distance/guidance_2.0`, ...), `evaluation.md` for a model
card, `guidance_curve.png`, `samples.png`, `linear_probe.png`, the samples in `samples/` and finished work in `parts/`.
The same command resumes an interrupted evaluation; a command that asks for more adds it. `accelerate launch` shares
the work between processes, which must see the same output folder. The results stay the same.
"""

import argparse
from pathlib import Path


METHODS = ("gradient", "ascent", "bayes", "shortlist")
GUIDANCE_RULES = ("linear", "product")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line of `pipelines/evaluate_flow.py`.

    Args:
        arguments (`list[str]`, *optional*): The command line without the script's name. Default: that of the process.
    Returns:
        `argparse.Namespace`: the fields of [`~flowback_hf.evaluation.EvaluationOptions`].
    """
    parser = argparse.ArgumentParser(
        prog="evaluate_flow.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Folder or Hub id of the pipeline to evaluate.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder that the results are written to.")
    add_data_arguments(parser)
    add_part_arguments(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--batch_size", type=int, default=32, help="Images per process and pass. Default: %(default)s.")
    run.add_argument("--seed", type=int, default=0, help="Seed of all noise. Default: %(default)s.")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def add_data_arguments(parser: argparse.ArgumentParser):
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id, folder that `datasets` loads, or parquet file of the data set.")
    data.add_argument("--dataset_config_name", help="Configuration of a data set that has several.")
    data.add_argument(
        "--data_dir", help="Image folder with one folder per class, either directly or in train/ and validation/."
    )
    data.add_argument("--image_column", default="image", help="Column of the images. Default: %(default)s.")
    data.add_argument("--label_column", default="label", help="Column of the classes. Default: %(default)s.")
    data.add_argument(
        "--split",
        default="validation",
        help="Split to evaluate on. Without a validation split, validation means the images that training held out."
        " all means every image. Default: %(default)s.",
    )
    data.add_argument(
        "--reference_split",
        default="train",
        help="Split of the real images that samples are compared with and the linear probe is fitted to. train never"
        " contains images that training held out. Default: %(default)s.",
    )
    data.add_argument("--cache_dir", help="Folder where data sets and encoders are cached.")
    data.add_argument("--max_images", type=int, help="Largest number of images of --split. Default: all.")
    data.add_argument(
        "--max_reference_images",
        type=int,
        default=50_000,
        help="Largest number of images of --reference_split for the samples. Default: %(default)s.",
    )
    data.add_argument("--strict", action="store_true", help="Refuse images of another size instead of resizing them.")


def add_part_arguments(parser: argparse.ArgumentParser):
    classification = parser.add_argument_group("likelihood and classification")
    classification.add_argument(
        "--methods", nargs="*", choices=METHODS, default=list(METHODS), help="Methods to classify with. Default: all."
    )
    classification.add_argument(
        "--num_noise_draws",
        type=int,
        default=1,
        help="Draws of the training noise per image. 0 classifies clean images. Default: %(default)s.",
    )
    classification.add_argument(
        "--shortlist_size",
        type=int,
        default=5,
        help="Classes that the method shortlist compares. Default: %(default)s.",
    )

    samples = parser.add_argument_group("samples")
    samples.add_argument(
        "--features",
        help="Encoder or classifier of transformers, or inception, whose features compare samples with real images."
        " Default: none, and no samples are made.",
    )
    samples.add_argument(
        "--num_samples", type=int, default=2000, help="Samples for each guidance scale. Default: %(default)s."
    )
    samples.add_argument(
        "--guidance_scales",
        type=float,
        nargs="+",
        default=[1.0, 1.5, 2.0, 3.0],
        help="Guidance scales to sample at. 1.0 is off. Default: 1.0 1.5 2.0 3.0.",
    )
    samples.add_argument("--guidance_rule", choices=GUIDANCE_RULES, help="Guidance rule. Default: the pipeline's.")
    samples.add_argument(
        "--guidance_temperature",
        type=float,
        default=1.0,
        help="Attention temperature that guides an unconditional flow. 1.0 is off. Default: %(default)s.",
    )
    samples.add_argument(
        "--reference", type=Path, help="A reference.npz of an earlier evaluation, used instead of --reference_split."
    )
    samples.add_argument(
        "--write_best_guidance",
        action="store_true",
        help="Write the guidance scale with the lowest Fréchet distance into the model folder's config.",
    )

    probe = parser.add_argument_group("linear probe")
    probe.add_argument(
        "--linear_probe", action="store_true", help="Fit a linear classifier to the hidden states of every layer."
    )
    probe.add_argument(
        "--max_probe_images",
        type=int,
        default=10_000,
        help="Largest number of images of --reference_split that the probe is fitted to. Default: %(default)s.",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    if (args.dataset_name is None) == (args.data_dir is None):
        parser.error("give one of --dataset_name and --data_dir.")
    at_least = {"max_images": 2, "max_reference_images": 2, "num_samples": 2, "batch_size": 1, "shortlist_size": 1}
    at_least |= {"max_probe_images": 2, "num_noise_draws": 0}
    for name, minimum in at_least.items():
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}, but is {getattr(args, name)}.")
    if min(args.guidance_scales) < 1:
        parser.error(f"--guidance_scales must be at least 1.0, which is off, but are {args.guidance_scales}.")
    if args.write_best_guidance and args.features is None:
        parser.error("--write_best_guidance needs --features to compare guidance scales by.")
    if args.write_best_guidance and not Path(args.model).is_dir():
        parser.error(f"--write_best_guidance needs a --model folder to write to, but {args.model!r} is none.")
