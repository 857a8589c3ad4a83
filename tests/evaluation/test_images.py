import argparse
import io
import json

import datasets
import numpy as np
import PIL.Image
import pytest

from flowback_hf import FlowBackPipeline
from flowback_hf.data import DataSource, HoldOut, load_split, load_splits
from flowback_hf.evaluation import EvaluationArguments, evaluate, join_processes, match_labels
from flowback_hf.evaluation.run import Evaluation

from .conftest import CLASS_NAMES, random_image


def save_parquet(path, labels, feature):
    rows = {"image": [PIL.Image.new("RGB", (4, 4), (60 * n, 0, 0)) for n in range(len(labels))], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    path.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path / "validation.parquet")


# Labels


@pytest.mark.parametrize(
    "labels, feature, expected",
    [
        ([1, 0, 1], datasets.ClassLabel(names=["cat", "ant"]), [0, 2, 0]),
        (["bee", "cat"], datasets.Value("string"), [1, 2]),
        ([2, 0, 1], datasets.Value("int64"), [2, 0, 1]),
    ],
)
def test_labels_are_matched_by_name_and_else_by_number(pipeline, tmp_path, labels, feature, expected):
    save_parquet(tmp_path / "rows", labels, feature)
    source = DataSource("--dataset_name", str(tmp_path / "rows"), False, cache_dir=str(tmp_path / "cache"))
    assert match_labels(load_split(source, "validation", "image"), "label", pipeline) == expected


def test_numbers_that_training_called_classes_by_are_names(randomised_model):
    """Training sorts numbers as text: 10 comes before 9, so that a class's number is not its class id."""
    rows = datasets.Dataset.from_dict({"label": [9, 10, 3]})
    pipeline = FlowBackPipeline(randomised_model(num_classes=3), id2label={0: "10", 1: "3", 2: "9"})
    names = rows.class_encode_column("label").features["label"].names
    assert names == [pipeline.config.id2label[label] for label in range(3)]
    assert match_labels(rows, "label", pipeline) == [2, 0, 1]


# The images that training held out


@pytest.fixture(params=["flat folder", "parquet file", "parquet file of numbers"])
def unsplit(request, tmp_path):
    """A data set without a validation split, as training and evaluation name it."""
    rng = np.random.default_rng(0)
    images = [(label, random_image(rng)) for label in range(3) for _ in range(14)]
    if request.param == "flat folder":
        for number, (label, image) in enumerate(images):
            folder = tmp_path / "insects" / CLASS_NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")
        path = str(tmp_path / "insects")
        return {"train_data_dir": path, "dataset_name": None}, {"data_dir": path}
    feature = datasets.Value("int64") if "numbers" in request.param else datasets.ClassLabel(names=CLASS_NAMES)
    files = []
    for _, image in images:
        content = io.BytesIO()
        image.save(content, "png")
        files.append({"bytes": content.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = datasets.Dataset.from_dict({"image": files, "label": [label for label, _ in images]}, features)
    path = str(tmp_path / "insects.parquet")
    rows.to_parquet(path)
    return {"train_data_dir": None, "dataset_name": path}, {"dataset_name": path}


def train_splits(train_source, cache_dir, **options):
    return load_splits(
        argparse.Namespace(
            **train_source,
            **{
                "dataset_config_name": None,
                "image_column": "image",
                "label_column": "label",
                "unconditional": False,
                "cache_dir": str(cache_dir),
                "train_val_split": 0.2,
                "seed": 3,
                "max_train_samples": None,
                "max_validation_samples": 10**6,
                **options,
            },
        )
    )


def contents(rows):
    """The images of rows, as a set of their pixels."""
    rows = rows.cast_column("image", datasets.Image())
    pixels = [np.asarray(image.convert("RGB")).tobytes() for image in rows["image"]]
    assert len(set(pixels)) == len(pixels)
    return set(pixels)


@pytest.mark.parametrize("record", ["held_out.json", "training_args.json"])
def test_a_flow_is_evaluated_on_what_its_training_held_out(unsplit, record, pipeline, model_folder, judge, tmp_path):
    train_source, source = unsplit
    splits = train_splits(train_source, tmp_path / "cache")
    if record == "held_out.json":
        splits.hold_out.write(model_folder)
    else:  # all that a run of version 0.1.0 left
        arguments = {**train_source, "train_val_split": 0.2, "seed": 3}
        (model_folder / record).write_text(json.dumps(arguments))
    options = EvaluationArguments(
        str(model_folder),
        tmp_path / "evaluation",
        **source,
        cache_dir=str(tmp_path / "cache"),
        methods=["gradient"],
        features=str(judge),
        num_samples=6,
        guidance_scales=[1.0],
        linear_probe=True,
    )
    evaluation = Evaluation(join_processes(), pipeline, options)
    held_out, trained_on = contents(splits.validation), contents(splits.train)
    assert len(held_out) == 9 and len(trained_on) == 33
    assert contents(evaluation.images.rows) == held_out
    for images in (evaluation.reference_images, evaluation.probe_images):
        assert contents(images.rows) == trained_on

    results = evaluate(pipeline, options)
    assert (results["num_images"], results["num_reference_images"], results["num_probe_images"]) == (9, 33, 33)
    options.split, options.output_dir = "all", tmp_path / "all"
    everything = Evaluation(join_processes(), pipeline, options)
    assert contents(everything.images.rows) == held_out | trained_on
    assert contents(everything.reference_images.rows) == trained_on


def test_without_a_record_nothing_is_held_out(unsplit, pipeline, model_folder, tmp_path):
    _, source = unsplit
    options = {"cache_dir": str(tmp_path / "cache"), "methods": ["gradient"]}
    for model in (str(model_folder), "someone/flow"):
        with pytest.raises(ValueError, match="no record of images that its training held out .* --split all"):
            evaluate(pipeline, EvaluationArguments(model, tmp_path / "evaluation", **source, **options))
    assert not (tmp_path / "evaluation").exists()
    whole = EvaluationArguments(str(model_folder), tmp_path / "all", **source, **options, split="all")
    assert evaluate(pipeline, whole)["num_images"] == 42


def test_another_data_set_than_the_trained_one_is_refused(unsplit, pipeline, model_folder, tmp_path):
    train_source, source = unsplit
    splits = train_splits(train_source, tmp_path / "cache")
    HoldOut(0.2, 3, splits.hold_out.num_images, splits.hold_out.checksum + 1).write(model_folder)
    options = EvaluationArguments(str(model_folder), tmp_path / "out", **source, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="held out cannot be told from the others"):
        evaluate(pipeline, options)
    assert not (tmp_path / "out").exists()
