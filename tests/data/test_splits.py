import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from flowback_hf.data import DataSource, HoldOut, load_split, load_splits
from flowback_hf_cli.training import parse_args

from ..conftest import write_images


def test_splits_agree_on_the_classes_of_text_labels(arguments, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    for split, labels in {"train": ["bird", "ant", "cat"], "validation": ["cat", "bird"]}.items():
        rows = {"image": [PIL.Image.new("RGB", (8, 8))] * len(labels), "label": labels}
        (tmp_path / "rows").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows" / f"{split}.parquet")
    line = arguments(train_data_dir=None, dataset_name=tmp_path / "rows", output_dir=tmp_path / "run")
    splits = load_splits(parse_args(line))
    assert splits.train["label"][:] == [1, 0, 2]
    assert sorted(splits.validation["label"][:]) == [1, 2]
    assert splits.train.features["label"].names == splits.validation.features["label"].names == ["ant", "bird", "cat"]
    assert splits.class_names == ["ant", "bird", "cat"] and splits.hold_out is None


def test_integer_labels_are_numbered_in_their_order_and_negative_ones_are_no_class(arguments, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    labels_of = {"train": [10, 2, 0, 11, 1, None], "validation": [2, 11], "test": [-1, -1]}
    (tmp_path / "rows").mkdir()
    for split, labels in labels_of.items():
        rows = {"image": [PIL.Image.new("RGB", (8, 8))] * len(labels), "label": labels}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows" / f"{split}.parquet")
    line = arguments(train_data_dir=None, dataset_name=tmp_path / "rows", output_dir=tmp_path / "run")
    splits = load_splits(parse_args(line))
    assert splits.class_names == ["0", "1", "2", "10", "11"]
    assert splits.train["label"][:] == [3, 2, 0, 4, 1, None] and sorted(splits.validation["label"][:]) == [2, 4]


def test_names_with_brackets_are_no_patterns(arguments, tmp_path):
    folder = tmp_path / "my images [v1]"
    for label, name in enumerate(("cat", "dog")):
        write_images(folder / name, 3, seed=label)
    line = arguments(train_data_dir=folder, train_val_split=0.5, output_dir=tmp_path / "run")
    splits = load_splits(parse_args(line))
    assert splits.class_names == ["cat", "dog"]
    splits.train.to_parquet(folder / "rows [v1].parquet")
    line = arguments(train_data_dir=None, dataset_name=folder / "rows [v1].parquet", output_dir=tmp_path / "run")
    assert len(load_splits(parse_args(line)).train) == 2


def test_labels_that_are_lists_are_refused(arguments, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("int64"))})
    rows = {"image": [PIL.Image.new("RGB", (8, 8))] * 3, "label": [[0], [1], [0, 1]]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    line = arguments(train_data_dir=None, dataset_name=tmp_path / "rows.parquet", output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="`--label_column` must hold one class per row, but .label. holds "):
        load_splits(parse_args(line))


@pytest.fixture
def flat_folder(tmp_path):
    """Two classes of noise, twelve images each, in no split."""
    for label, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "flat" / name, 12, seed=label)
    return tmp_path / "flat"


@pytest.fixture
def parquet_file(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(24)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": ["dog", "cat"] * 12}, features)
    rows.to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def contents(rows):
    """What is in each image of a split, in no order."""
    return sorted(np.asarray(picture).tobytes() for picture in rows["image"])


@pytest.mark.parametrize("kind", ["flat_folder", "parquet_file"])
def test_evaluation_finds_the_images_that_training_held_out(request, arguments, tmp_path, kind):
    path = request.getfixturevalue(kind)
    source = {"train_data_dir": path} if kind == "flat_folder" else {"train_data_dir": None, "dataset_name": path}
    line = arguments(**source, train_val_split=0.25, seed=3, output_dir=tmp_path / "run")
    splits = load_splits(parse_args(line))
    (tmp_path / "run").mkdir()
    splits.hold_out.write(tmp_path / "run")

    evaluation = argparse.Namespace(
        data_dir=None if kind == "parquet_file" else str(path),
        dataset_name=str(path),
        dataset_config_name=None,
        cache_dir=str(tmp_path / "cache"),
    )
    data = DataSource.from_args(evaluation)
    hold_out = HoldOut.read(tmp_path / "run", data.name)
    held_out, rest, everything = (load_split(data, name, "image", hold_out) for name in ("validation", "train", "all"))
    assert (len(held_out), len(rest), len(everything)) == (6, 18, 24)
    assert contents(held_out) == contents(splits.validation) and contents(rest) == contents(splits.train)
    assert not set(contents(held_out)) & set(contents(rest))

    # a run of version 0.1.0 left its arguments only
    (tmp_path / "run" / "held_out.json").unlink()
    earlier = vars(parse_args(line))
    (tmp_path / "run" / "training_args.json").write_text(json.dumps(earlier, default=str))
    hold_out = HoldOut.read(tmp_path / "run", data.name)
    assert contents(load_split(data, "validation", "image", hold_out)) == contents(splits.validation)
    # which say nothing of other data
    assert HoldOut.read(tmp_path / "run", str(tmp_path)) is None


def test_held_out_images_that_cannot_be_told_are_an_error(flat_folder, arguments, tmp_path):
    splits = load_splits(parse_args(arguments(train_data_dir=flat_folder, output_dir=tmp_path / "run")))
    data = DataSource("--data_dir", str(flat_folder), True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="has no split 'validation', and --model has no record of images that"):
        load_split(data, "validation", "image", None)
    with pytest.raises(ValueError, match=r"has no split 'test', but \['train'\]: choose one with --split"):
        load_split(data, "test", "image", splits.hold_out)
    assert len(load_split(data, "train", "image", None)) == 24

    write_images(flat_folder / "cow", 2, seed=9)
    message = (
        "not the one that the flow was trained on, which had 24 images, or it has changed since. It has 26 images"
    )
    for name in ("validation", "train"):
        with pytest.raises(ValueError, match=message):
            load_split(data, name, "image", splits.hold_out)
    for path in (flat_folder / "cow").iterdir():
        path.unlink()
    # the same names and as many images, of which one that was held out is another picture
    held_out = Path(splits.validation.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"])
    PIL.Image.new("RGB", (8, 8), (1, 2, 3)).save(flat_folder / held_out.parent.name / held_out.name)
    with pytest.raises(ValueError, match="cannot be told from the others"):
        load_split(data, "validation", "image", splits.hold_out)


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_the_split_that_training_validates_with_is_the_validation_split(tmp_path, arguments, name):
    for split, num_images in {"train": 6, name: 3}.items():
        for label, kind in enumerate(("cat", "dog")):
            write_images(tmp_path / "data" / split / kind, num_images, seed=10 * num_images + label)
    splits = load_splits(parse_args(arguments(train_data_dir=tmp_path / "data", output_dir=tmp_path / "run")))
    data = DataSource("--data_dir", str(tmp_path / "data"), True, cache_dir=str(tmp_path / "cache"))
    assert splits.hold_out is None
    assert contents(load_split(data, "validation", "image")) == contents(splits.validation)
    assert contents(load_split(data, "train", "image")) == contents(splits.train)
