"""
The table of bad values: every argument of the public classes, their methods and the scripts, found in signatures and
parsers, gets values that make no sense. Each answer is a sentence that names the argument, or a right result.

An argument is covered as soon as it exists. A new class or function needs a line in `calls`.
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import types
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from flowback_hf import (
    AlignedFlowObjective,
    FlowBackClassificationPipeline,
    FlowBackPipeline,
    RepresentationTeacher,
    TarFlowTransformer2DModel,
)
from flowback_hf.evaluation import EvaluationArguments
from flowback_hf.training import TrainingArguments
from flowback_hf_cli.command import was_raised_by_a_check

from ..conftest import REPOSITORY, load_script


NUMBERS = [math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.5, True, "2", "", [], {}, 1j, None]
TEXTS = ["no such", "", 3, 1.5, [], None]
ON_THE_COMMAND_LINE = ["nan", "inf", "-inf", "-1", "-0.5", "0", "0.5", "1e999", "two", ""]

FLOW = {
    "sample_size": 4, "patch_size": 2, "in_channels": 1, "num_blocks": 2, "num_layers": 1, "num_attention_heads": 1,
    "attention_head_dim": 4, "num_classes": 3,
}  # fmt: skip


def make_flow(**options) -> TarFlowTransformer2DModel:
    torch.manual_seed(0)
    flow = TarFlowTransformer2DModel(**{**FLOW, **options}).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


def build(**options):
    flow = make_flow(**options)
    size, channels = flow.config.sample_size, flow.config.in_channels
    return flow.log_prob(torch.zeros(1, channels, size, size))


def calls(folder: Path) -> dict[str, tuple[Callable, dict[str, Any], Callable]]:
    """By name: what is called, a call that works, and where the signature is if that says nothing of the arguments."""
    flow = make_flow()
    pipe, classifier = FlowBackPipeline(flow), FlowBackClassificationPipeline(flow)
    for pipeline in (pipe, classifier):
        pipeline.set_progress_bar_config(disable=True)
    sample, labels = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    places = {"flow": flow, "places": [(2, 1)], "teacher_dim": 5, "projector_dim": 4}
    encoder = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28))

    def objective(**options):
        built = AlignedFlowObjective(**{**places, **options})
        return built(sample, labels, torch.randn(2, 4, 5)).loss

    def teacher(**options):
        return RepresentationTeacher(encoder, **options)(torch.zeros(1, 3, 8, 8))

    def guided(**options):
        return pipe(**{"generator": torch.Generator().manual_seed(0), "output_type": "latent", **options}).images

    def edited(method: Callable) -> Callable:
        return lambda **options: method(**{"output_type": "latent", **options}).images

    def score(**options):
        return classifier.out_of_distribution_score(images, torch.tensor([1.0, 2.0]), **options)

    inverse = {"sample": sample, "class_labels": labels, "inverse": True}
    return {
        "model": (build, {}, TarFlowTransformer2DModel),
        "model, data to latents": (flow, {"sample": sample, "class_labels": labels}, flow.forward),
        "model, latents to data": (flow, inverse, flow.forward),
        "model, by sweeps": (flow, {**inverse, "solver": "jacobi"}, flow.forward),
        "model, guided": (flow, {**inverse, "guidance_scale": 2.0}, flow.forward),
        "profile": (flow.profile_inverse, {"latents": sample, "class_labels": labels}, None),
        "objective": (objective, {}, AlignedFlowObjective),
        "objective, forward": (objective, {"strategy": "forward"}, AlignedFlowObjective),
        "teacher": (teacher, {"grid_size": 2}, RepresentationTeacher),
        "pipeline": (lambda **options: FlowBackPipeline(flow, **options), {}, FlowBackPipeline.__init__),
        "sampling": (guided, {"class_labels": [1]}, pipe.__call__),
        "sampling, guided": (guided, {"class_labels": [1], "guidance_scale": 2.0}, pipe.__call__),
        "sampling, by sweeps": (guided, {"class_labels": [1], "solver": "jacobi"}, pipe.__call__),
        "check_inputs": (pipe.check_inputs, {"class_labels": [1]}, None),
        "prepare_latents": (pipe.prepare_latents, {"num_images": 1}, None),
        "invert_blocks": (pipe.invert_blocks, {"latents": sample, "class_labels": labels}, None),
        "invert": (pipe.invert, {"images": images}, None),
        "likelihood_map": (pipe.likelihood_map, {"images": images}, None),
        "swap_class": (edited(pipe.swap_class), {"images": images, "source": 0, "target": 1}, pipe.swap_class),
        "interpolate": (edited(pipe.interpolate), {"image_a": images[0], "image_b": images[1]}, pipe.interpolate),
        "vary": (edited(pipe.vary), {"images": images}, pipe.vary),
        "classification": (classifier, {"images": images}, classifier.__call__),
        "classification, ascent": (classifier, {"images": images, "method": "ascent"}, classifier.__call__),
        "classification, bayes": (classifier, {"images": images, "method": "bayes"}, classifier.__call__),
        "class_scores": (classifier.class_scores, {"images": images}, None),
        "log_prob": (classifier.log_prob, {"images": images}, None),
        "bits_per_dim": (classifier.bits_per_dim, {"images": images}, None),
        "add_noise": (classifier.add_noise, {"images": images}, None),
        "out_of_distribution_score": (score, {}, classifier.out_of_distribution_score),
        "TrainingArguments": (TrainingArguments, {"output_dir": "x"}, None),
        "EvaluationArguments": (EvaluationArguments, {"model": "x", "output_dir": folder}, None),
    }


def kinds_of(annotation: Any) -> set[type]:
    """The types in an annotation."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return set().union(*map(kinds_of, typing.get_args(annotation)))
    return {annotation}


def is_nonsense(value: Any, kinds: set[type], default: Any) -> bool:
    """Whether no argument of these types may be this value; what is left may be in some ranges and not in others."""
    if value is None:
        return types.NoneType not in kinds and default is not None
    if isinstance(value, str):
        return str not in kinds or value not in ("linear", "constant")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    if not kinds & {int, float}:
        return True
    if value < 0 or not math.isfinite(value):
        return True
    return float not in kinds and isinstance(value, float)


def numbers_in(result: Any) -> list[float]:
    """All numbers in a result, to look for such as are not finite."""
    if isinstance(result, torch.Tensor | np.ndarray):
        return torch.as_tensor(result).double().flatten().tolist()
    if isinstance(result, bool | int | float):
        return [float(result)]
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [number for each in result for number in numbers_in(each)]
    if isinstance(result, PIL.Image.Image):
        return numbers_in(np.asarray(result))
    return []


def verdict(function: Callable, base: dict[str, Any], name: str, value: Any, nonsense: bool) -> str:
    """What a call with one strange argument ends in."""
    try:
        result = function(**{**base, name: value})
    except Exception as error:
        says = f"`{name}`" in str(error) and was_raised_by_a_check(error) and isinstance(error, ValueError)
        return "refused" if says else f"unclear: {type(error).__name__}: {str(error)[:120]}"
    if nonsense:
        return "accepted"
    return "right" if all(map(math.isfinite, numbers_in(result))) else "accepted: the result is not finite"


def table_of_calls(folder: Path) -> dict[str, str]:
    answers = {}
    for title, (function, base, described) in calls(folder).items():
        for parameter in inspect.signature(described or function).parameters.values():
            kinds = kinds_of(parameter.annotation)
            # The texts of a dataclass are names that are looked up later.
            texts = [] if dataclasses.is_dataclass(function) else TEXTS
            values = NUMBERS if kinds & {int, float} else texts if str in kinds else []
            if parameter.name in ("class_labels", "source", "target", "images"):  # of many types, tested elsewhere
                continue
            for value in values:
                nonsense = is_nonsense(value, kinds, parameter.default)
                answers[f"{title}: {parameter.name}={value!r}"] = verdict(
                    function, base, parameter.name, value, nonsense
                )
    return answers


# Flags that a command needs beside those that it requires, so that one strange value is the only mistake.
OTHER_FLAGS = {
    "train_rra": ["--train_data_dir", "x"],
    "precompute_features": ["--train_data_dir", "x"],
    "precompute_latents": ["--train_data_dir", "x"],
    "evaluate_flow": ["--data_dir", "x"],
    "ablate": ["--data_dir", "x"],
}


class ParserFound(Exception):
    pass


def parser_of(script: types.ModuleType, monkeypatch) -> argparse.ArgumentParser:
    """The parser of a script, which makes it within a function."""

    def stop(self, arguments=None, namespace=None):
        raise ParserFound(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ParserFound) as found:
            script.parse_args([])
    return found.value.args[0]


def table_of_flags(monkeypatch) -> dict[str, str]:
    answers = {}
    for path in sorted([*(REPOSITORY / "training").glob("*.py"), *(REPOSITORY / "pipelines").glob("*.py")]):
        script = load_script(path)
        parser = parser_of(script, monkeypatch)
        for action in parser._actions:
            is_number = action.type is not None and action.type not in (str, Path)
            for text in ON_THE_COMMAND_LINE if is_number and action.option_strings else []:
                flag = action.option_strings[-1]
                line = list(OTHER_FLAGS.get(path.stem, []))
                for other in parser._actions:
                    if other.required and other is not action:
                        line += [other.option_strings[0], next(iter(other.choices or ["1"]))]
                answers[f"{path.name} {flag}={text}"] = verdict_of_line(script, line, flag, text)
    return answers


def verdict_of_line(script: types.ModuleType, line: list[str], flag: str, text: str) -> str:
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            script.parse_args([*line, f"{flag}={text}"])
    except SystemExit:
        last = (stderr.getvalue().splitlines() or [""])[-1]
        return "refused" if flag in last else f"unclear: {last[:120]}"
    except Exception as error:
        return f"unclear: {type(error).__name__}: {str(error)[:120]}"
    may_be_right = text in ("0", "0.5")
    return "right" if may_be_right else "accepted"


def report(answers: dict[str, str]) -> dict[str, int]:
    """Count the answers and, if `DRILL_REPORT` names a file, write them there."""
    counts = Counter(answer.partition(":")[0] for answer in answers.values())
    if "DRILL_REPORT" in os.environ:
        path = Path(os.environ["DRILL_REPORT"])
        earlier = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(earlier | answers, indent=1))
    print(dict(counts))
    return counts


def assert_clean(answers: dict[str, str]):
    report(answers)
    assert not {call: answer for call, answer in answers.items() if answer not in ("refused", "right")}


def test_calls(tmp_path):
    answers = table_of_calls(tmp_path)
    assert len(answers) >= 900
    assert_clean(answers)


def test_flags(monkeypatch):
    answers = table_of_flags(monkeypatch)
    assert len(answers) >= 600
    assert_clean(answers)
