# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What the flags of `training/train_reverse.py` build, and the trainer of a learned inverse."""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, Dataset, TensorDataset, default_collate
from tqdm.auto import tqdm

from flowback_hf import (
    FlowBackPipeline,
    ReverseFlowObjective,
    TarFlowReverseTransformer2DModel,
)
from flowback_hf.data import (
    ImageSource,
    LatentSource,
    RowGenerator,
    Splits,
    Stream,
    add_noise,
    collate,
    load_teacher,
    make_generator,
)
from flowback_hf.files import write_whole
from flowback_hf.models.transformer_reverse import hash_flow
from flowback_hf.models.transformer_tarflow import Guidance
from flowback_hf.training.flow import add_classes, check_vae_of_latents
from flowback_hf.training.sharding import sharding_of
from flowback_hf.training.trainer import Trainer
from flowback_hf.training.validation import draw_samples, validate_learned_inverse
from flowback_hf_cli.numbers import check_number
from flowback_hf_cli.training import TrainingArguments


logger = get_logger(__name__, log_level="INFO")

# Files of a run with pairs of the sampler, each whole or not there: an interrupted drawing goes on where it was.
PAIRS_FOLDER = "sampled_pairs"
PAIRS_PER_FILE = 256
# The share of a batch that is replaced by pairs of the sampler
SAMPLED_SHARE = {"data": 0.0, "sampler": 1.0, "both": 0.5}
NUM_STATISTICS_IMAGES = 512
# Besides the trainer's seed, what random numbers are for. The numbers of steps, which seed the noise of training, are
# far from these.
STATISTICS, PAIRS = 2**32 - 1, 2**32 - 2


# What the flags build


def match_classes(pipeline: FlowBackPipeline, class_names: list[str] | None) -> list[int]:
    """
    Find the flow's class id of each class of the data.

    Raises:
        ValueError: if the flow does not know a class, or if only one of flow and data has classes.
    """
    labelled = add_classes(pipeline, class_names)
    if labelled.flow is not pipeline.transformer:
        known = pipeline.transformer.config.num_classes
        unknown = [labelled.id2label[label] for label in labelled.label_ids if label >= known]
        raise ValueError(
            f"The flow must know the classes of the data, but does not know {unknown}. Train on those that it was"
            " trained on."
        )
    return labelled.label_ids


def make_reverse_source(
    args: argparse.Namespace, splits: Splits, pipeline: FlowBackPipeline
) -> ImageSource | LatentSource:
    """
    Build the source of batches that the flags describe: images, or the latents of the pipeline's VAE.

    Args:
        args (`argparse.Namespace`): The data flags.
        splits ([`Splits`]): What [`load_splits`] loaded.
        pipeline ([`FlowBackPipeline`]): Holds the flow and its VAE.
    Raises:
        ValueError: if the data do not fit the flow.
    """
    label_ids, config = match_classes(pipeline, splits.class_names), pipeline.transformer.config
    label_column = None if args.unconditional else args.label_column
    if (splits.latents is None) != (pipeline.vae is None):
        raise ValueError(
            "A latent flow needs `--latents`, and a flow of images needs images, but"
            f" {'--latents are not given' if splits.latents is None else 'this flow has no VAE'}."
        )
    if splits.latents is None:
        return ImageSource(splits, config, label_ids, args.image_column, label_column)
    check_vae_of_latents(args, splits.latents, pipeline.vae, args.model)
    return LatentSource(splits, config, label_ids, pipeline.vae, label_column, aligned=False)


def make_reverse_objective(
    args: argparse.Namespace, pipeline: FlowBackPipeline, accelerator: Accelerator
) -> ReverseFlowObjective:
    """
    Build the learned inverse and the objective that the flags describe.

    Args:
        args (`argparse.Namespace`): The model, pairs and objective flags.
        pipeline ([`FlowBackPipeline`]): Holds the flow and its VAE.
        accelerator (`accelerate.Accelerator`): Where the teacher is loaded to.
    Raises:
        ValueError: as [`TarFlowReverseTransformer2DModel`] and [`ReverseFlowObjective`].
    """
    flow = pipeline.transformer
    sizes = {name: getattr(args, name) for name in ("patch_size", "num_layers", "num_attention_heads")}
    sizes |= {"attention_head_dim": args.attention_head_dim}
    lowest, highest = guidance_range(args, flow.config.num_classes is not None)
    reverse_transformer = TarFlowReverseTransformer2DModel.for_flow(
        flow,
        **{name: size for name, size in sizes.items() if size is not None},
        min_guidance_scale=lowest,
        max_guidance_scale=highest,
        denoises=not args.no_denoising,
        through_data_space=args.supervision == "data_space",
    )
    teacher = None
    if args.teacher_model_name_or_path is not None:
        grid_size = flow.config.sample_size // flow.config.patch_size
        teacher = load_teacher(args.teacher_model_name_or_path, grid_size, accelerator, args.cache_dir)
    return ReverseFlowObjective(
        reverse_transformer,
        flow,
        supervision=args.supervision,
        weight=args.hidden_weight,
        normalize=not args.no_normalization,
        adaptive_power=args.adaptive_power,
        adaptive_offset=args.adaptive_offset,
        teacher=teacher,
        perceptual_weight=args.perceptual_weight,
        vae=pipeline.vae,
    )


def choose_sampled_guidance_scale(args: argparse.Namespace, pipeline: FlowBackPipeline) -> float:
    """The guidance scale of the sampler's pairs: the one given, or the pipeline's default."""
    if args.sampled_guidance_scale is not None:
        return args.sampled_guidance_scale
    is_conditional = pipeline.transformer.config.num_classes is not None
    return pipeline.config.guidance_scale if is_conditional and args.pairs != "data" else 1.0


def guidance_range(args: argparse.Namespace, is_conditional: bool) -> tuple[float, float]:
    """
    The lowest and the highest guidance scale that a run trains for.

    Raises:
        ValueError: if the pairs do not teach all scales between them.
    """
    highest, sampled = args.max_guidance_scale, args.sampled_guidance_scale
    if not is_conditional and max(highest or 1.0, sampled) > 1.0:
        raise ValueError(
            "`--max_guidance_scale` and `--sampled_guidance_scale` must be 1.0 for a flow without classes, but are"
            f" {highest or 1.0} and {sampled}."
        )
    if args.pairs == "sampler":
        if highest not in (None, sampled):
            raise ValueError(
                "Pairs of the sampler teach one guidance scale, `--sampled_guidance_scale`: leave out"
                f" `--max_guidance_scale`, which is {highest}, or take `--pairs both`."
            )
        return sampled, sampled
    if args.pairs == "data":
        return 1.0, (3.0 if is_conditional else 1.0) if highest is None else highest
    if highest is None:
        highest = max(3.0, sampled) if is_conditional else 1.0
    if sampled > highest:
        raise ValueError(
            f"`--sampled_guidance_scale` must be at most `--max_guidance_scale`, {highest}, but is {sampled}."
        )
    return 1.0, highest


def choose_validation_guidance_scale(args: argparse.Namespace) -> float:
    """The guidance scale of the sample grids: the one given, or the lowest that the run trains for."""
    if args.validation_guidance_scale is not None:
        return args.validation_guidance_scale
    return args.sampled_guidance_scale if args.pairs == "sampler" else 1.0


# Pairs of the exact sampler


class Pairs(NamedTuple):
    """
    Pairs of the exact sampler.

    Args:
        clean_sample, noisy_sample (`torch.Tensor` of shape `(num_pairs, in_channels, sample_size, sample_size)`):
            Its samples, denoised and not.
        class_labels (`torch.LongTensor` of shape `(num_pairs,)`): -1 is no class.
    """

    clean_sample: torch.Tensor
    noisy_sample: torch.Tensor
    class_labels: torch.Tensor


@torch.no_grad()
def draw_pairs(
    pipeline: FlowBackPipeline,
    folder: Path,
    num_pairs: int,
    guidance: Guidance,
    batch_size: int,
    dropout: float,
    seed: int,
    process_index: int = 0,
    num_processes: int = 1,
    after_file: Callable[[], None] = lambda: None,
):
    """
    Draw pairs with the exact sampler and save them, [`PAIRS_PER_FILE`] in a file. Files that are there are kept.

    Args:
        pipeline ([`FlowBackPipeline`]): Holds the flow.
        folder (`pathlib.Path`): The folder of the files.
        num_pairs (`int`): How many pairs, of all classes in turn.
        guidance ([`Guidance`]): Scale and rule.
        batch_size (`int`): Images per call.
        dropout (`float`): The share that is drawn without a class.
        seed (`int`): Decides noise and dropped classes, for each file.
        process_index (`int`, defaults to 0), num_processes (`int`, defaults to 1):
            Which share of the files is drawn here.
        after_file (`Callable`, *optional*):
            Called after each file, as often in every process. It may end the process.
    Raises:
        ValueError: if a file holds pairs of another flow or other guidance, or an image overflows.
    """
    folder.mkdir(exist_ok=True)
    origin = describe_origin(pipeline, guidance)
    num_files = math.ceil(num_pairs / PAIRS_PER_FILE)
    with tqdm(total=num_pairs, desc="Drawing pairs", disable=process_index > 0) as progress_bar:
        for first in range(0, num_files, num_processes):
            number = first + process_index
            if number < num_files:
                start = number * PAIRS_PER_FILE
                path, count = folder / f"{start:08d}.safetensors", min(PAIRS_PER_FILE, num_pairs - start)
                generator = make_generator(seed, PAIRS, number)
                labels = draw_labels(start, count, pipeline.transformer.config.num_classes, dropout, generator)
                draw_file(pipeline, path, origin, labels, guidance, batch_size, generator)
            progress_bar.update(min(num_processes * PAIRS_PER_FILE, num_pairs - progress_bar.n))
            after_file()


def draw_file(
    pipeline: FlowBackPipeline,
    path: Path,
    origin: dict[str, str],
    labels: torch.Tensor,
    guidance: Guidance,
    batch_size: int,
    generator: torch.Generator,
):
    """Draw the pairs of one file of [`draw_pairs`] and save them, unless it is there."""
    if path.exists():
        check_origin(path, origin)
        return
    tensors = draw_pairs_of_labels(pipeline, labels, guidance, batch_size, generator)
    with write_whole(path) as partial:
        save_file(tensors, partial, metadata=origin)


def draw_labels(
    start: int, count: int, num_classes: int | None, dropout: float, generator: torch.Generator
) -> torch.Tensor:
    """All classes in turn, some of them dropped: -1."""
    if num_classes is None:
        return torch.full((count,), -1)
    labels = torch.arange(start, start + count) % num_classes
    labels[torch.rand(count, generator=generator) < dropout] = -1
    return labels


def draw_pairs_of_labels(
    pipeline: FlowBackPipeline, labels: torch.Tensor, guidance: Guidance, batch_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Draw one pair for each label, as the tensors of [`Pairs`]."""
    noise, drawn = pipeline.prepare_latents(len(labels), generator), []
    for chunk, noise_of_chunk in zip(labels.split(batch_size), noise.split(batch_size)):
        class_labels = None if pipeline.transformer.config.num_classes is None else chunk.to(pipeline.device)
        noisy_sample = pipeline.invert_blocks(noise_of_chunk, class_labels, guidance.scale, guidance.rule)
        drawn.append((pipeline.denoise(noisy_sample, class_labels).cpu(), noisy_sample.cpu()))
    clean_sample, noisy_sample = (torch.cat(each).contiguous() for each in zip(*drawn))
    is_finite = (clean_sample.isfinite() & noisy_sample.isfinite()).flatten(1).all(dim=1)
    if not is_finite.all():
        raise ValueError(
            f"The exact sampler must draw finite images, but {int((~is_finite).sum())} of {len(labels)} overflowed."
            " Give a smaller --sampled_guidance_scale, or --pairs data."
        )
    return {"clean_sample": clean_sample, "noisy_sample": noisy_sample, "class_labels": labels}


def describe_origin(pipeline: FlowBackPipeline, guidance: Guidance) -> dict[str, str]:
    """What pairs were drawn with, as the metadata of their files."""
    return {"guidance": json.dumps(asdict(guidance)), "flow_hash": str(hash_flow(pipeline.transformer))}


def check_origin(path: Path, origin: dict[str, str]):
    """Raise ValueError unless a file's pairs were drawn with this flow and guidance."""
    with safe_open(path, framework="pt") as file:
        if file.metadata() != origin:
            raise ValueError(
                f"The pairs in {path.parent} were drawn with another flow or other guidance: {file.metadata()}, not"
                f" {origin}. Start the run in a new folder."
            )


def read_pairs(folder: Path) -> Dataset:
    """What [`draw_pairs`] saved. The files are mapped into memory, which the processes of a machine share."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return ConcatDataset([TensorDataset(*(file[name] for name in Pairs._fields)) for file in files])


# The trainer


class ReverseTrainer(Trainer):
    """
    Trains the learned inverse of a flow, as [`Trainer`] trains a flow: the same folder, checkpoints and log.

    `samples/` shows the exact sampler's images on the left and the learned ones, of the same noise, on the right.

    Args:
        objective ([`ReverseFlowObjective`]): The learned inverse, its flow and its loss.
        source ([`ImageSource`] or [`LatentSource`]): Training and validation data, and what a batch is.
        arguments ([`TrainingArguments`]): How to train, log, validate and save.
        pipeline ([`FlowBackPipeline`]): The flow's pipeline, which is saved together with the learned inverse.
        pairs (`str`, defaults to `"data"`): `"data"`, `"sampler"` or `"both"`.
        num_sampled_pairs (`int`, defaults to 10000), sampled_guidance_scale (`float`, defaults to 1.0):
            Pairs of the sampler, which are drawn before the first step and kept in the run's folder.
        data_guidance_scale (`float`, *optional*):
            The largest guidance scale that pairs of data teach. Default: the largest of the learned inverse.
        settings (`dict`, *optional*), accelerator ([`~accelerate.Accelerator`], *optional*): As in [`Trainer`].
    Raises:
        ValueError: as [`Trainer`]; also if the flow is not finite on the data.
    """

    measure = "reconstruction"

    def __init__(
        self,
        objective: ReverseFlowObjective,
        source: ImageSource | LatentSource,
        arguments: TrainingArguments,
        pipeline: FlowBackPipeline,
        pairs: str = "data",
        num_sampled_pairs: int = 10_000,
        sampled_guidance_scale: float = 1.0,
        data_guidance_scale: float | None = None,
        settings: dict[str, Any] | None = None,
        accelerator: Accelerator | None = None,
    ):
        if pairs not in SAMPLED_SHARE:
            raise ValueError(f"`pairs` must be one of {tuple(SAMPLED_SHARE)}, but is {pairs!r}.")
        check_number("num_sampled_pairs", num_sampled_pairs, int, at_least=1)
        check_number("sampled_guidance_scale", sampled_guidance_scale, float, at_least=1.0)
        if data_guidance_scale is not None:
            check_number("data_guidance_scale", data_guidance_scale, float, at_least=1.0)
        self.flow_pipeline = pipeline
        self.sampled_share = SAMPLED_SHARE[pairs]
        self.num_sampled_pairs = num_sampled_pairs
        self.sampled_guidance = Guidance(sampled_guidance_scale, pipeline.config.guidance_rule)
        self.sampled_pairs: Dataset | None = None
        highest = objective.reverse_transformer.config.max_guidance_scale
        self.data_guidance_scale = highest if data_guidance_scale is None else data_guidance_scale
        super().__init__(objective, source, arguments, settings=settings, accelerator=accelerator)

    def _describe(self, objective: ReverseFlowObjective) -> dict[str, Any]:
        return asdict(self.arguments) | {
            "supervision": objective.supervision,
            "sampled_share": self.sampled_share,
            "num_sampled_pairs": self.num_sampled_pairs,
            "sampled_guidance_scale": self.sampled_guidance.scale,
            "data_guidance_scale": self.data_guidance_scale,
            "flow_hash": hash_flow(objective.flow),
        }

    def _make_pipeline(self, id2label: None) -> FlowBackPipeline:
        """The flow's pipeline, with the averaged weights of the learned inverse."""
        pipeline = FlowBackPipeline.from_pipe(self.flow_pipeline, reverse_transformer=self.evaluated_model)
        # By default, both samplers must take the same guidance scale.
        config = pipeline.reverse_transformer.config
        default = min(max(pipeline.config.guidance_scale, config.min_guidance_scale), config.max_guidance_scale)
        pipeline.register_to_config(guidance_scale=default)
        guidance_scale = self.arguments.validation_guidance_scale
        pipeline.reverse_transformer.check_guidance_scale(guidance_scale, "validation_guidance_scale")
        pipeline.check_inputs(guidance_scale=guidance_scale, solver="learned")
        return pipeline

    def _prepare(self, objective: ReverseFlowObjective):
        if sharding_of(self.accelerator) is not None:
            raise ValueError(
                "A learned inverse is trained without FSDP, but the accelerate config asks for it: take"
                " training/configs/accelerate/ddp.yaml."
            )
        objective.to(self.accelerator.device)
        objective.measure_statistics(self._statistics_batches())
        super()._prepare(objective)

    def _statistics_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Noisy samples and labels of some training images, the same ones in every process."""
        device, dataset = self.accelerator.device, self.source.train_dataset
        generator = make_generator(self.arguments.seed, STATISTICS)
        if isinstance(dataset, Stream):  # it is not divided among the processes yet
            items = itertools.islice(dataset, NUM_STATISTICS_IMAGES)
        else:
            chosen = torch.randperm(len(dataset), generator=generator)[:NUM_STATISTICS_IMAGES]
            items = (dataset[index] for index in chosen.tolist())
        noise = make_generator(self.arguments.seed, STATISTICS, device=device)
        while chunk := list(itertools.islice(items, self.arguments.train_batch_size)):
            batch = collate(chunk)
            batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            batch = self.source.mirror(batch, torch.zeros_like(batch["class_labels"], dtype=torch.bool))
            drawn = RowGenerator(noise, len(chunk))
            noisy_sample = add_noise(self.source.clean_sample(batch, drawn), self.flow.config, drawn)
            yield noisy_sample, None if self.flow.config.num_classes is None else batch["class_labels"]

    def _compile(self, objective: ReverseFlowObjective):
        self.model.compile_repeated_blocks()

    def _train(self):
        if self.sampled_share > 0:
            arguments, accelerator = self.arguments, self.accelerator
            draw_pairs(
                self.pipeline,
                self.folder / PAIRS_FOLDER,
                self.num_sampled_pairs,
                self.sampled_guidance,
                arguments.eval_batch_size,
                arguments.label_dropout,
                arguments.seed,
                accelerator.process_index,
                accelerator.num_processes,
                self._exit_if_stopped,
            )
            accelerator.wait_for_everyone()
            self.sampled_pairs = read_pairs(self.folder / PAIRS_FOLDER)
        super()._train()

    def _compute(self, batch: dict[str, Any], generator: RowGenerator) -> tuple[torch.Tensor, dict[str, Any]]:
        clean_sample = self.source.clean_sample(batch, generator)
        noisy_sample = add_noise(clean_sample, self.flow.config, generator)
        class_labels = None if self.flow.config.num_classes is None else batch["class_labels"]
        count = len(clean_sample)
        guidance_scale = sampled = None
        if self.sampled_pairs is not None:
            sampled = generator.rand((count,)) < self.sampled_share
            clean_sample, noisy_sample, class_labels = self._replace_by_pairs(
                sampled, generator, clean_sample, noisy_sample, class_labels
            )
        if self.data_guidance_scale > 1.0 and self.sampled_share < 1.0:
            guidance_scale = 1.0 + (self.data_guidance_scale - 1.0) * generator.rand((count,))
        self._last_batch = (
            clean_sample, noisy_sample, class_labels, guidance_scale, sampled, self.sampled_guidance
        )  # fmt: skip
        output = self.objective(*self._last_batch)
        return output.loss, {name: value.detach().float() for name, value in output.items()}

    def _replace_by_pairs(
        self,
        sampled: torch.Tensor,
        generator: RowGenerator,
        clean_sample: torch.Tensor,
        noisy_sample: torch.Tensor,
        class_labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Replace some rows of a batch by pairs of the sampler."""
        rows = (generator.rand((len(sampled),), torch.float64) * len(self.sampled_pairs)).long().tolist()
        values = default_collate([self.sampled_pairs[row] for row in rows])
        pairs = Pairs(*(value.to(clean_sample.device) for value in values))
        images = sampled.view(-1, 1, 1, 1)
        clean_sample = torch.where(images, pairs.clean_sample, clean_sample)
        noisy_sample = torch.where(images, pairs.noisy_sample, noisy_sample)
        if class_labels is not None:
            class_labels = torch.where(sampled, pairs.class_labels, class_labels)
        return clean_sample, noisy_sample, class_labels

    def _measure(self) -> torch.Tensor:
        """The squared error of the trained weights as they are now, on the last batch."""
        return self.objective(*self._last_batch).reconstruction

    def _validate(self) -> dict[str, float]:
        return validate_learned_inverse(self.accelerator, self.pipeline, self.validation_dataloader, self.source)

    def _draw_samples(self, path: Path):
        scale, seed = self.arguments.validation_guidance_scale, self.arguments.seed
        draw_samples(self.pipeline, self.validation_class_labels, scale, seed, path, solvers=("auto", "learned"))
