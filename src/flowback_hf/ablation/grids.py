# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Grids of alignments: their files, the variants that they describe, and the cells that are run."""

import argparse
import contextlib
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flowback_hf.alignment.objective import AlignedFlowObjective
from flowback_hf.data.splits import DataSource
from flowback_hf.files import read_json
from flowback_hf.places import Place, choose_places
from flowback_hf.training.checkpoints import list_checkpoints
from flowback_hf.training.flow import make_flow
from flowback_hf_cli.evaluation import parse_args as parse_evaluation
from flowback_hf_cli.training import parse_args as parse_training


AXES = ("alignment", "alignment_order", "alignment_blocks", "alignment_layer", "alignment_weight", "teacher")
# How the stored features of a control are shuffled, by the name of its teacher.
SHUFFLES = {"shuffled-class": "class", "shuffled-all": "all"}
TEACHERS = ("given", "other", "random", *SHUFFLES)
# What an ablation decides, cell by cell; the settings hold the rest. The grid's weight wins over the settings'.
OWN_TRAIN_ARGUMENTS = {*AXES, "teacher_model_name_or_path", "teacher_features", "train_data_dir", "dataset_name"}
OWN_TRAIN_ARGUMENTS |= {"output_dir", "seed", "resume_from_checkpoint"}
OWN_TRAIN_ARGUMENTS -= {"alignment_weight"}
OWN_EVALUATE_ARGUMENTS = {"model", "output_dir", "data_dir", "dataset_name", "features", "seed", "write_best_guidance"}

# The flags that have a --no- form.
ON_BY_DEFAULT = ("use_ema", "normalize_teacher_features")

BASELINE = "none"
RANDOM_TEACHER = "random_teacher"

Grid = dict[str, list]


@dataclass
class Variant:
    """
    One combination of a grid's values.

    Args:
        name (`str`): What folders, tables and figures call it.
        train (`dict`): Its arguments of `training/train_rra.py`, with those of the settings and without a cell's.
        evaluate (`dict`): Its arguments of `pipelines/evaluate_flow.py`, likewise.
        checkpoint_guidance_scale (`float`, *optional*):
            The scale at which its checkpoints are sampled. `None` samples none.
        places (`list[Place]`): Where it is aligned; for the baseline, where it would be by default.
        baseline (`str`): The variant that it is compared with; a baseline's is itself.
        shuffle (`str`, *optional*): How the stored features that it reads are shuffled: `"class"` or `"all"`.
    """

    name: str
    train: dict[str, Any]
    evaluate: dict[str, Any]
    checkpoint_guidance_scale: float | None = None
    places: list[Place] = field(default_factory=list)
    baseline: str = BASELINE
    shuffle: str | None = None


@dataclass
class Cell:
    """
    A variant with a seed, in a folder of its own.

    Args:
        variant (`Variant`): What is trained.
        seed (`int`): Its seed.
        folder (`pathlib.Path`): Where it is trained and evaluated.
        record_file (`pathlib.Path`, *optional*):
            Where its results are kept once it is done, so that it never runs again, even without its folder. `None`
            keeps no record.
    """

    variant: Variant
    seed: int
    folder: Path
    record_file: Path | None = None

    @property
    def flow_folder(self) -> Path:
        return self.folder / "flow"

    @property
    def evaluation_file(self) -> Path:
        return self.folder / "evaluation" / "evaluation.json"

    @property
    def log_file(self) -> Path:
        return self.folder / "log.txt"

    @property
    def config(self) -> dict[str, dict[str, Any]]:
        """What its results depend on, beside the seed."""
        return {"train": self.variant.train, "evaluate": self.variant.evaluate}

    @property
    def record(self) -> dict[str, Any] | None:
        """Its config, commit, machine and results; `None` if there is no record of it."""
        return None if self.record_file is None else read_json(self.record_file)

    @property
    def recorded_config(self) -> dict[str, dict[str, Any]]:
        """What a record depends on. A folder can be sampled at another scale later, but a record cannot."""
        return self.config | {"checkpoints": {"guidance_scale": self.variant.checkpoint_guidance_scale}}

    @property
    def checkpoints(self) -> list[Path]:
        """
        The checkpoints that are evaluated: all but the last, whose flow the evaluation is of, and those that an
        interruption left at other steps than other cells have.
        """
        if self.variant.checkpoint_guidance_scale is None:
            return []
        interval = parse_train_options(self.variant.train).checkpointing_steps
        earlier = list_checkpoints(self.flow_folder)[:-1]
        return [folder for folder in earlier if int(folder.name.removeprefix("checkpoint-")) % interval == 0]

    def checkpoint_folder(self, checkpoint: Path) -> Path:
        return self.folder / "checkpoints" / checkpoint.name

    @property
    def state(self) -> dict[str, Any]:
        """`status` (done, failed, or `None` for neither), the `error` of a failed cell, and `seconds` by stage."""
        if self.record is not None:
            return {"status": "done", "seconds": self.record["row"]["seconds"]}
        return read_json(self.folder / "state.json") or {"status": None, "seconds": {}}


def command_line(options: dict[str, Any]) -> list[str]:
    """
    Options as a command line: true ones are flags. False ones that are off by default and `None` are left out.

    Example:
        ```py
        >>> from flowback_hf.ablation import command_line

        >>> command_line({"use_ema": False, "strict": True, "guidance_scales": [1.0, 2.0], "max_images": None})
        ['--no-use_ema', '--strict', '--guidance_scales', '1.0', '2.0']
        ```
    """
    line = []
    for name, value in options.items():
        if value is False and name in ON_BY_DEFAULT:
            line.append(f"--no-{name}")
        elif value is not None and value is not False:
            line.append(f"--{name}")
            if value is not True:
                line += [str(part) for part in (value if isinstance(value, list) else [value])]
    return line


def parse_train_options(options: dict[str, Any]) -> argparse.Namespace:
    """Options of `training/train_rra.py` as its parser sees them. Raises ValueError with its words for wrong ones."""
    return parse(parse_training, options | {"output_dir": "o"})


def parse_evaluate_options(options: dict[str, Any]) -> argparse.Namespace:
    """Likewise for `pipelines/evaluate_flow.py`."""
    return parse(parse_evaluation, options | {"output_dir": "o", "model": "m"})


def parse(parser: Callable[[list[str]], argparse.Namespace], options: dict[str, Any]) -> argparse.Namespace:
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            return parser(command_line(options))
        except SystemExit as error:
            raise ValueError(stderr.getvalue().strip().splitlines()[-1].partition("error: ")[2]) from error


# The files


def read_object(path: Path, option: str, keys: Iterable[str]) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if there is none, or if it has other keys."""
    if not path.is_file():
        raise ValueError(f"`--{option}` must be an existing JSON file, but is {str(path)!r}.")
    content = read_json(path)
    check_keys(content, f"`--{option}` {path}", keys)
    return content


def check_keys(content: Any, what: str, keys: Iterable[str]):
    """Raise ValueError unless `content` is an object with these keys, or some of them."""
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold a JSON object, but holds {content!r}.")
    unknown = sorted(set(content) - set(keys))
    if unknown:
        raise ValueError(f"{what} has the unknown keys {unknown}; it may have {sorted(keys)}.")


def read_grid(path: Path) -> Grid:
    """
    Read a grid: lists of values for `alignment`, `seeds` and whatever else is varied, or `seeds` and `variants`, which
    names variants one by one, each with its own arguments. Either may have `confirmation_seeds`.

    Raises:
        ValueError: if the file is not a grid.
    """
    grid = read_object(path, "grid", {*AXES, "seeds", "confirmation_seeds", "variants"})
    named = grid.get("variants")
    if named is not None:
        check_named_variants(grid, path)
    for name in ("alignment", "seeds"):
        if name not in grid and (name == "seeds" or named is None):
            raise ValueError(f"`--grid` {path} has no {name!r}, but every cell needs one.")
    for name, values in grid.items():
        if name != "variants" and (not isinstance(values, list) or not values):
            raise ValueError(f"`--grid` {path} must have a list of values for {name!r}, but has {values!r}.")
    both = sorted(set(grid["seeds"]) & set(grid.get("confirmation_seeds", [])))
    if both:
        raise ValueError(f"`--grid` {path} must have other 'confirmation_seeds' than 'seeds', but both have {both}.")
    teachers = grid.get("teacher", []) + [own["teacher"] for own in (named or {}).values() if "teacher" in own]
    unknown = [teacher for teacher in teachers if teacher not in TEACHERS]
    if unknown:
        raise ValueError(f"`--grid` {path} names the teachers {unknown}, but they are {list(TEACHERS)}.")
    return grid


def train_arguments() -> set[str]:
    """Arguments of `training/train_rra.py` that an ablation does not decide itself."""
    return vars(parse_train_options({"train_data_dir": "d"})).keys() - OWN_TRAIN_ARGUMENTS


def check_named_variants(grid: Grid, path: Path):
    """Raise ValueError unless `variants` of a grid are objects of arguments, by names that folders can have."""
    others = sorted(set(grid) - {"variants", "seeds", "confirmation_seeds"})
    if others:
        raise ValueError(f"`--grid` {path} must have either 'variants' or lists of values, but also has {others}.")
    check_keys(grid["variants"], f"'variants' of `--grid` {path}", grid["variants"])
    for name, own in grid["variants"].items():
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"`--grid` {path} names the variant {name!r}, but a folder has to have its name.")
        check_keys(own, f"the variant {name!r} of `--grid` {path}", {*AXES, "baseline", *train_arguments()})
        if "alignment" not in own:
            raise ValueError(f"The variant {name!r} of `--grid` {path} has no 'alignment', but every cell needs one.")
    unaligned = [name for name, own in grid["variants"].items() if own["alignment"] == BASELINE]
    for name, own in grid["variants"].items():
        if "baseline" in own and own["baseline"] not in unaligned:
            raise ValueError(
                f"The variant {name!r} of `--grid` {path} must have a baseline of the grid that is not aligned, one of"
                f" {unaligned}, but has {own['baseline']!r}."
            )


def read_settings(path: Path) -> dict[str, Any]:
    """
    Read what all cells share: `train`, `evaluate` and `checkpoint_guidance_scale`.

    Raises:
        ValueError: if there are arguments that the scripts do not know or that an ablation decides itself, or if
            checkpoints cannot be compared with the final flow.
    """
    settings = {"train": {}, "evaluate": {}, "checkpoint_guidance_scale": None}
    settings |= read_object(path, "settings", settings)
    check_keys(settings["train"], f"'train' of `--settings` {path}", train_arguments())
    known = vars(parse_evaluate_options({"data_dir": "d"})).keys() - OWN_EVALUATE_ARGUMENTS
    check_keys(settings["evaluate"], f"'evaluate' of `--settings` {path}", known)
    scale, scales = settings["checkpoint_guidance_scale"], settings["evaluate"].get("guidance_scales", [])
    if scale is not None and scale not in scales:
        raise ValueError(
            f"'checkpoint_guidance_scale' of `--settings` {path} must be one of the evaluation's 'guidance_scales'"
            f" {scales}, at which the last distance is measured, but is {scale}."
        )
    if scale is not None and not settings["train"].get("use_ema", True):
        raise ValueError(
            f"'checkpoint_guidance_scale' of `--settings` {path} needs 'use_ema': checkpoints are sampled with their"
            " averaged weights."
        )
    return settings


# Variants


def resolve_blocks(blocks: str | list[int], num_blocks: int) -> list[int]:
    """
    The flow blocks that a word stands for, numbered from 1 at the image; early and late are two each, as in the paper.

    Example:
        ```py
        >>> from flowback_hf.ablation import resolve_blocks

        >>> resolve_blocks("late", 8)
        [7, 8]
        ```
    """
    named = {
        "early": list(range(1, min(2, num_blocks) + 1)),
        "late": list(range(max(1, num_blocks - 1), num_blocks + 1)),
        "all": list(range(1, num_blocks + 1)),
    }
    if isinstance(blocks, str):
        if blocks not in named:
            raise ValueError(f"`alignment_blocks` must be numbers or one of {list(named)}, but are {blocks!r}.")
        return named[blocks]
    return blocks


def resolve_layer(layer: str | int, num_layers: int) -> int:
    """The layer, from 1, that a word stands for: a quarter, half or three quarters up, the paper's 2, 4 and 6 of 8."""
    quarters = {"shallow": 1, "middle": 2, "deep": 3}
    if isinstance(layer, str):
        if layer not in quarters:
            raise ValueError(f"`alignment_layer` must be a number or one of {list(quarters)}, but is {layer!r}.")
        return math.ceil(quarters[layer] * num_layers / 4)
    return layer


def name_variant(choice: dict[str, Any], grid: Grid) -> str:
    """The strategy, and the values of whatever else the grid varies."""

    def text(axis: str, value: Any) -> str:
        if axis == "alignment_order":
            return str(value)
        if isinstance(value, list):
            return "blocks" + "+".join(str(number) for number in value)
        prefix = {"alignment_layer": "layer", "alignment_weight": "weight"}.get(axis, "")
        suffix = "-teacher" if axis == "teacher" else ""
        return f"{'' if isinstance(value, str) else prefix}{value}{suffix}"

    varied = [text(axis, value) for axis, value in choice.items() if axis != "alignment" and len(grid[axis]) > 1]
    return "-".join([str(choice["alignment"]), *varied])


def list_choices(grid: Grid) -> list[dict[str, Any]]:
    """Every combination of the grid's values that makes sense; the baseline has no others, an order only reverse."""
    axes = [axis for axis in AXES if axis in grid]
    choices = []
    for values in itertools.product(*(grid[axis] for axis in axes)):
        choice = dict(zip(axes, values))
        if choice["alignment"] == BASELINE:
            choice = {"alignment": BASELINE}
        elif choice["alignment"] != "reverse":
            choice.pop("alignment_order", None)
        choices.append(choice)
    return choices


def name_choices(grid: Grid) -> dict[str, dict[str, Any]]:
    """The values of each variant, by its name."""
    if "variants" in grid:
        return grid["variants"]
    return {name_variant(choice, grid): choice for choice in list_choices(grid)}


def find_baselines(grid: Grid) -> dict[str, str]:
    """
    The variant that each variant is compared with, by its name.

    It is the one that the variant names as its `baseline`, or else `none`. A variant that others name is compared with
    itself, as `none` is.
    """
    choices = name_choices(grid)
    named = {choice["baseline"] for choice in choices.values() if "baseline" in choice}
    return {name: choice.get("baseline", name if name in named else BASELINE) for name, choice in choices.items()}


def make_variants(
    grid: Grid,
    settings: dict[str, Any],
    source: DataSource,
    teacher: str,
    judge: str,
    output_dir: Path,
    other_teacher: str | None = None,
) -> dict[str, Variant]:
    """
    Make every variant of a grid, once.

    Args:
        grid (`dict`): As [`read_grid`] returns it.
        settings (`dict`): As [`read_settings`] returns them.
        source ([`~flowback_hf.data.DataSource`]): The data set.
        teacher, judge (`str`): The encoders to align with and to compare samples by: Hub ids or folders.
        output_dir (`pathlib.Path`): Holds the random teacher and shuffled features, if the grid has them.
        other_teacher (`str`, *optional*): The encoder of variants whose teacher is `"other"`.
    Returns:
        `dict` of `str` to [`Variant`]: by name.
    Raises:
        ValueError: for a variant that cannot be trained, with its name.
    """
    name, folder = (None, source.name) if source.is_image_folder else (source.name, None)
    evaluate = settings["evaluate"] | {"dataset_name": name, "data_dir": folder, "features": judge}
    shared = settings["train"] | {"dataset_name": name, "train_data_dir": folder}
    teachers = {"given": teacher, "other": other_teacher, "random": str(output_dir / RANDOM_TEACHER)}
    baselines = find_baselines(grid)
    variants, known_arguments = {}, []
    for variant_name, choice in name_choices(grid).items():
        with naming_variant(variant_name):
            own = dict(choice)
            kind = own.pop("teacher", "given")
            own.pop("baseline", None)
            # A variant may have a flow of its own, of another width or depth.
            flow = make_shapes(shared | {name: value for name, value in own.items() if name not in AXES})
            num_layers = [len(block.layers) for block in flow.blocks]
            if "alignment_blocks" in own:
                own["alignment_blocks"] = resolve_blocks(own["alignment_blocks"], len(num_layers))
            if "alignment_layer" in own:
                own["alignment_layer"] = resolve_layer(own["alignment_layer"], min(num_layers))
            if kind in SHUFFLES:
                own["teacher_features"] = str(output_dir / f"shuffled_{SHUFFLES[kind]}" / "features")
            elif choice["alignment"] != BASELINE:
                own["teacher_model_name_or_path"] = teachers[kind]
            if own in known_arguments:  # in a block of two layers, middle and shallow are the same
                continue
            known_arguments.append(own)
            scale = settings["checkpoint_guidance_scale"]
            variant = Variant(variant_name, shared | own, evaluate, scale, baseline=baselines[variant_name])
            variant.shuffle = SHUFFLES.get(kind)
            variant.places = check_variant(variant, flow)
            variants[variant.name] = variant
    return variants


@contextlib.contextmanager
def naming_variant(name: str) -> Iterator[None]:
    """A context whose errors of value say which variant they are of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The variant {name!r} cannot be run: {error}") from error


def make_shapes(options: dict[str, Any]) -> torch.nn.Module:
    """The flow of options of `training/train_rra.py` without its weights, which is enough to check places."""
    train_args = parse_train_options(options)
    with torch.device("cpu" if train_args.pretrained_model_name_or_path else "meta"):
        return make_flow(train_args, None if train_args.unconditional else ["any"], data_sizes={})[0]


def check_variant(variant: Variant, flow: torch.nn.Module) -> list[Place]:
    """Its places. Raises ValueError for what the scripts or the objective would refuse."""
    train_args = parse_train_options(variant.train)
    parse_evaluate_options(variant.evaluate)
    if "teacher_model_name_or_path" in variant.train and train_args.teacher_model_name_or_path is None:
        raise ValueError("its teacher is 'other', but `--other_teacher` names none.")
    if variant.shuffle is not None and train_args.max_train_samples is not None:
        raise ValueError(
            "`max_train_samples` draws other images for each seed, but shuffled features are stored once."
        )
    num_layers = [len(block.layers) for block in flow.blocks]
    places = choose_places(num_layers, train_args.alignment_blocks, train_args.alignment_layer)
    arguments = {"strategy": train_args.alignment, "weight": train_args.alignment_weight}
    if train_args.alignment != BASELINE:
        arguments |= {"places": places, "teacher_dim": 1, "projector_dim": 1}
    with torch.device("meta"):
        AlignedFlowObjective(flow, order=train_args.alignment_order, **arguments)
    return places


def make_cells(
    variants: dict[str, Variant],
    seeds: Iterable[int],
    output_dir: Path,
    names: Sequence[str] | None = None,
    records_dir: Path | None = None,
) -> list[Cell]:
    """
    Make a cell of each variant with each seed.

    They are ordered seed by seed: a run that is not over yet compares all variants.

    Args:
        variants (`dict` of `str` to [`Variant`]): By name.
        seeds (iterable of `int`): The seeds.
        output_dir (`pathlib.Path`): Holds the folder of each cell.
        names (`Sequence[str]`, *optional*): Which of the variants. Default: all.
        records_dir (`pathlib.Path`, *optional*): Holds the records of finished cells.
    Raises:
        ValueError: if a name is not a variant's.
    """
    unknown = sorted(set(names or []) - set(variants))
    if unknown:
        raise ValueError(f"`--variants` must be of the grid's, {list(variants)}, but {unknown} are not.")
    chosen = [variant for name, variant in variants.items() if names is None or name in names]

    def record_file(variant: Variant, seed: int) -> Path | None:
        return None if records_dir is None else records_dir / variant.name / f"seed-{seed}.json"

    return [
        Cell(variant, seed, output_dir / "cells" / variant.name / f"seed-{seed}", record_file(variant, seed))
        for seed in dict.fromkeys(seeds)
        for variant in chosen
    ]
