# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The flags of `pipelines/evaluate_flow.py`, which are the arguments of [`flowback_hf.evaluation.evaluate`]."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowback_hf_cli.command import add_debug_argument
from flowback_hf_cli.data import add_source_arguments, check_one_source
from flowback_hf_cli.numbers import COUNT, SEED, Number, check_number_fields, number_field, number_of


DESCRIPTION = """
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

# Literal, because the modules that define them import torch; a test compares them.
METHODS = ("gradient", "ascent", "bayes", "shortlist")
GUIDANCE_RULES = ("linear", "product")
GUIDANCE_SCHEDULES = ("constant", "linear")
# The exact ones of the flow, and the pipeline's learned inverse.
SOLVERS = ("auto", "sequential", "jacobi", "learned")


@dataclass
class EvaluationArguments:
    """
    What is evaluated, and how. Names and defaults are those of the flags of `pipelines/evaluate_flow.py`.

    Args:
        model (`str`): Folder or Hub id that the pipeline was loaded from.
        output_dir (`pathlib.Path`): Where the results are written.
        data_dir, dataset_name, dataset_config_name, cache_dir (`str`, *optional*): The data set: one of the first two.
        image_column, label_column (`str`, default to `"image"` and `"label"`): Its columns.
        split, reference_split (`str`, default to `"validation"` and `"train"`):
            What the flow is evaluated on, and the real images for the samples and the linear probe. See
            [`~flowback_hf.data.load_split`].
        max_images, max_reference_images, max_probe_images (`int`, *optional*): How many images are used at most.
        strict (`bool`, defaults to `False`): Refuse images of another size instead of resizing them.
        methods, num_noise_draws, shortlist_size: See [`~flowback_hf.evaluation.evaluate_likelihood`].
        features (`str`, *optional*): The encoder whose features compare samples with real images. `None` makes none.
        num_samples (`int`, defaults to 2000): Samples at each guidance scale.
        guidance_scales (`Sequence[float]`, defaults to 1.0, 1.5, 2.0 and 3.0): 1.0 is off.
        guidance_rule (`str`, *optional*): Default: the pipeline's.
        guidance_schedule (`str`, *optional*): With `"linear"`, guidance grows along the sequence. Default: constant.
        guidance_temperature (`float`, defaults to 1.0): What guides an unconditional flow.
        solver (`str`, defaults to `"auto"`): How the flow is inverted; `"learned"` samples with the learned inverse.
        reference (`pathlib.Path`, *optional*): The `reference.npz` of an earlier evaluation.
        write_best_guidance (`bool`, defaults to `False`): Write the best guidance scale into the folder `model`.
        linear_probe (`bool`, defaults to `False`): Fit linear probes to the hidden states.
        batch_size (`int`, defaults to 32): Images per process and pass.
        seed (`int`, defaults to 0): Decides all noise.
    Raises:
        ValueError: if a number is out of its range.
    """

    model: str
    output_dir: Path
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    data_dir: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    split: str = "validation"
    reference_split: str = "train"
    cache_dir: str | None = None
    max_images: int | None = number_field(None, Number(int, at_least=2))
    max_reference_images: int | None = number_field(50_000, Number(int, at_least=4))
    strict: bool = False
    methods: Sequence[str] = METHODS
    num_noise_draws: int = number_field(1, Number(int, at_least=0))
    shortlist_size: int = number_field(5, COUNT)
    features: str | None = None
    num_samples: int = number_field(2000, Number(int, at_least=4))
    guidance_scales: Sequence[float] = number_field((1.0, 1.5, 2.0, 3.0), Number(float, at_least=1))
    guidance_rule: str | None = None
    guidance_schedule: str | None = None
    guidance_temperature: float = number_field(1.0, Number(float, above=0))
    solver: str = "auto"
    reference: Path | None = None
    write_best_guidance: bool = False
    linear_probe: bool = False
    max_probe_images: int | None = number_field(10_000, Number(int, at_least=2))
    batch_size: int = number_field(32, COUNT)
    seed: int = number_field(0, SEED)

    def __post_init__(self):
        check_number_fields(self)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line of `pipelines/evaluate_flow.py`.

    Args:
        arguments (`list[str]`, *optional*): The command line without the script's name. Default: that of the process.
    Returns:
        `argparse.Namespace`: the fields of [`EvaluationArguments`], and `debug` if it is given.
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub id of the pipeline to evaluate.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder that the results are written to.")
    add_data_arguments(parser)
    add_part_arguments(parser)
    defaults = EvaluationArguments
    run = parser.add_argument_group("run")
    run.add_argument(
        "--batch_size",
        type=number_of(defaults, "batch_size"),
        default=defaults.batch_size,
        help="Images per process and pass. Default: %(default)s.",
    )
    run.add_argument(
        "--seed",
        type=number_of(defaults, "seed"),
        default=defaults.seed,
        help="Seed of all noise. Default: %(default)s.",
    )
    add_debug_argument(run)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def add_data_arguments(parser: argparse.ArgumentParser):
    defaults = EvaluationArguments
    data = parser.add_argument_group("data")
    add_source_arguments(data, "--data_dir")
    data.add_argument(
        "--split",
        default=defaults.split,
        help="Split to evaluate on. Without a validation split, validation means the images that training held out."
        " all means every image. Default: %(default)s.",
    )
    data.add_argument(
        "--reference_split",
        default=defaults.reference_split,
        help="Split of the real images that samples are compared with and the linear probe is fitted to. train never"
        " contains images that training held out. Default: %(default)s.",
    )
    data.add_argument("--cache_dir", help="Folder where data sets and encoders are cached.")
    data.add_argument(
        "--max_images",
        type=number_of(defaults, "max_images"),
        help="Use at most this many images of --split. Default: all.",
    )
    data.add_argument(
        "--max_reference_images",
        type=number_of(defaults, "max_reference_images"),
        default=defaults.max_reference_images,
        help="Compare samples with at most this many images of --reference_split. Default: %(default)s.",
    )
    data.add_argument("--strict", action="store_true", help="Refuse images of another size instead of resizing them.")


def add_part_arguments(parser: argparse.ArgumentParser):
    defaults = EvaluationArguments
    classification = parser.add_argument_group("likelihood and classification")
    classification.add_argument(
        "--methods",
        nargs="*",
        choices=METHODS,
        default=list(defaults.methods),
        help="Methods to classify with. Default: all.",
    )
    classification.add_argument(
        "--num_noise_draws",
        type=number_of(defaults, "num_noise_draws"),
        default=defaults.num_noise_draws,
        help="Draws of the training noise per image. 0 classifies clean images. Default: %(default)s.",
    )
    classification.add_argument(
        "--shortlist_size",
        type=number_of(defaults, "shortlist_size"),
        default=defaults.shortlist_size,
        help="Classes that the method shortlist compares. Default: %(default)s.",
    )

    samples = parser.add_argument_group("samples")
    samples.add_argument(
        "--features",
        help="Encoder or classifier of transformers, or inception, whose features compare samples with real images."
        " Default: none, and no samples are made.",
    )
    samples.add_argument(
        "--num_samples",
        type=number_of(defaults, "num_samples"),
        default=defaults.num_samples,
        help="Samples for each guidance scale. Default: %(default)s.",
    )
    samples.add_argument(
        "--guidance_scales",
        type=number_of(defaults, "guidance_scales"),
        nargs="+",
        default=list(defaults.guidance_scales),
        help="Guidance scales to sample at. 1.0 is off. Default: 1.0 1.5 2.0 3.0.",
    )
    samples.add_argument("--guidance_rule", choices=GUIDANCE_RULES, help="Guidance rule. Default: the pipeline's.")
    samples.add_argument(
        "--guidance_schedule",
        choices=GUIDANCE_SCHEDULES,
        help="How guidance changes along the sequence of tokens. Default: constant.",
    )
    samples.add_argument(
        "--guidance_temperature",
        type=number_of(defaults, "guidance_temperature"),
        default=defaults.guidance_temperature,
        help="Attention temperature that guides an unconditional flow. 1.0 is off. Default: %(default)s.",
    )
    samples.add_argument(
        "--solver",
        choices=SOLVERS,
        default=defaults.solver,
        help="How the flow is inverted; learned samples with the pipeline's learned inverse. Default: %(default)s.",
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
        type=number_of(defaults, "max_probe_images"),
        default=defaults.max_probe_images,
        help="Fit the probe to at most this many images of --reference_split. Default: %(default)s.",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    check_one_source(parser, args, "dataset_name", "data_dir")
    if args.write_best_guidance and args.features is None:
        parser.error("--write_best_guidance needs --features to compare guidance scales by.")
    if args.write_best_guidance and args.guidance_schedule == "linear":
        parser.error("--write_best_guidance is for the constant --guidance_schedule: a pipeline saves no other.")
    if args.write_best_guidance and args.guidance_temperature != 1.0:
        parser.error("--write_best_guidance is for --guidance_temperature 1.0: a pipeline saves no other.")
    if args.write_best_guidance and not Path(args.model).is_dir():
        parser.error(f"--write_best_guidance needs a --model folder to write to, but {args.model!r} is none.")
