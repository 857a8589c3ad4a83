"""What a user can get wrong is found before a file is written or a number is drawn, so that the next try works."""

import inspect
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline, TarFlowTransformer2DModel

from ..conftest import REPOSITORY, command_line, end_of_command, load_script
from .test_numbers import NUMBERS, TEXTS, kinds_of


FLOW = {"resolution": 4, "patch_size": 2, "num_blocks": 1, "num_layers": 1, "num_attention_heads": 1}
TRAIN = {**FLOW, "attention_head_dim": 4, "train_batch_size": 2, "max_train_steps": 1, "alignment": "none"}


def write_images(folder, number: int = 0, broken: bool = False):
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for copy in range(3):
            path = folder / label / f"{copy}.png"
            if broken:
                path.write_text("no image")
            else:
                PIL.Image.fromarray(np.full((4, 4, 3), 40 * number + copy, np.uint8)).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A flow, images, and data that are wrong."""
    folder = tmp_path_factory.mktemp("world")
    for number, split in enumerate(("train", "validation")):
        write_images(folder / "images" / split, number)
        for broken in ("train", "validation"):
            write_images(folder / f"broken_{broken}" / split, number, broken=split == broken)
    write_images(folder / "flat" / "train", 0)
    shutil.rmtree(folder / "flat" / "train" / "dog")
    for name, column in {"texts": ["hello"] * 6, "numbers": list(range(6))}.items():
        datasets.Dataset.from_dict({"image": column, "label": [0, 1] * 3}).to_parquet(folder / f"{name}.parquet")
    flow = TarFlowTransformer2DModel(
        4, 2, 3, num_blocks=1, num_layers=1, num_attention_heads=1, attention_head_dim=4, num_classes=2
    )
    FlowBackPipeline(flow, id2label={0: "cat", 1: "dog"}).save_pretrained(folder / "flow")
    return folder


# Script, options that work, what is wrong with them, and the end of what is said. Names of files are inside the world.
MISTAKES = {
    "broken validation images": ("training/train_rra.py", {"train_data_dir": "broken_validation"}, "can be used"),
    "broken training images": ("training/train_rra.py", {"train_data_dir": "broken_train"}, "can be used"),
    "texts for images": (
        "training/train_rra.py",
        {"train_data_dir": None, "dataset_name": "texts.parquet"},
        "None of the 5 images of the data set can be used. The first: hello cannot be read",
    ),
    "numbers for images": (
        "training/train_rra.py",
        {"train_data_dir": None, "dataset_name": "numbers.parquet"},
        "`--image_column` must be a column of images, but 'image' holds Value('int64')",
    ),
    "one class folder": ("training/train_rra.py", {"train_data_dir": "flat"}, "give --unconditional"),
    "a rate of nan": ("training/train_rra.py", {"learning_rate": "nan"}, "must be a finite number of at least 0, but"),
    "noise of nan": ("training/train_rra.py", {"noise_std": "nan"}, "must be a finite number of at least 0, but is"),
    "a patch of 0": ("training/train_rra.py", {"patch_size": 0}, "must be a whole number of at least 1, but is 0"),
    "ascent": ("training/train_rra.py", {"max_grad_norm": -1}, "must be a finite number of at least 0, but is -1.0"),
    "no temperature": ("pipelines/sample.py", {"guidance_temperature": 0}, "must be a finite number above 0, but is"),
    "a seed below 0": ("pipelines/sample.py", {"seed": -1}, "must be a whole number of at least 0"),
    "a folder for a table": ("pipelines/classify.py", {"output": "flow"}, "`--output` must be a file, but"),
    "a file for a folder": ("pipelines/classify.py", {"output": "texts.parquet/x.csv"}, "is no folder to write to"),
    "broken images to evaluate": ("pipelines/evaluate_flow.py", {"data_dir": "broken_validation"}, "can be used"),
    "broken images for features": (
        "training/precompute_features.py",
        {"train_data_dir": "broken_train"},
        "can be used. The first: ",
    ),
    "a patch of 0 for features": ("training/precompute_features.py", {"patch_size": 0}, "whole number of at least 1"),
    "broken images for latents": ("training/precompute_latents.py", {"train_data_dir": "broken_train"}, "can be used"),
}  # fmt: skip
WORKS = {
    "train_rra": {"train_data_dir": "images", "output_dir": "out", **TRAIN},
    "sample": {"model": "flow", "output_dir": "out", "num_images": 2},
    "classify": {"model": "flow", "images": "images", "output": "out"},
    "evaluate_flow": {"model": "flow", "data_dir": "images", "output_dir": "out", "methods": ["bayes"]},
    "precompute_features": {"train_data_dir": "images", "output_dir": "out", "resolution": 4, "patch_size": 2},
    "precompute_latents": {"train_data_dir": "images", "output_dir": "out", "resolution": 4, "unconditional": True},
}


@pytest.mark.parametrize("script, wrong, sentence", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_leaves_nothing_behind(world, tmp_path, monkeypatch, script, wrong, sentence):
    path = REPOSITORY / script
    options = {**WORKS[path.stem], **wrong, "cache_dir": tmp_path / "cache"}
    if path.stem in ("sample", "classify"):
        del options["cache_dir"]
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    end = end_of_command(path, command_line(**options), monkeypatch)
    assert sentence in end
    assert sorted(world.rglob("*")) == before


def test_the_corrected_command_works(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    train_rra = load_script(REPOSITORY / "training" / "train_rra.py")
    options = {**WORKS["train_rra"], "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match="can be used"):
        train_rra.main(train_rra.parse_args(command_line(**{**options, "train_data_dir": "broken_validation"})))
    train_rra.main(train_rra.parse_args(command_line(**options)))
    assert (tmp_path / "out" / "model_index.json").exists()


def test_no_refused_call_draws_from_its_generator(world):
    pipe = FlowBackPipeline.from_pretrained(world / "flow")
    classifier = FlowBackClassificationPipeline.from_pretrained(world / "flow")
    num_refused = 0
    for pipeline, base in {pipe: {"class_labels": [0]}, classifier: {"images": torch.rand(1, 3, 4, 4)}}.items():
        pipeline.set_progress_bar_config(disable=True)
        for parameter in inspect.signature(pipeline.__call__).parameters.values():
            kinds = kinds_of(parameter.annotation)
            values = NUMBERS if kinds & {int, float} else TEXTS if str in kinds else []
            for value in values if parameter.name != "images" else []:
                generator = torch.Generator().manual_seed(0)
                before = generator.get_state()
                try:
                    pipeline(**{**base, "generator": generator, parameter.name: value})
                except ValueError:
                    num_refused += 1
                    assert torch.equal(generator.get_state(), before), (parameter.name, value)
    assert num_refused > 150
