import json
import os
import shutil
import signal
import subprocess
import time

import datasets
import pytest
import torch

from flowback_hf import RepresentationTeacher
from flowback_hf.data import ImageDataset, ImageSource, Splits, load_splits, load_teacher_features, sources
from flowback_hf.data.teacher_features import shuffle_within
from flowback_hf.training import flow

from ..conftest import REPOSITORY, command_line, image_rows, load_script, start_two_processes
from .test_train_rra import read_metrics


@pytest.fixture(scope="module")
def precompute_features():
    return load_script(REPOSITORY / "training" / "precompute_features.py")


@pytest.fixture
def features_arguments(images, teacher, tmp_path):
    """The command line for the tiny runs' images, as a function of what differs."""

    def build(**options) -> list[str]:
        options = {
            "train_data_dir": images,
            "teacher_model_name_or_path": teacher,
            "cache_dir": tmp_path / "cache",
            "resolution": 8,
            "patch_size": 2,
            "images_per_shard": 8,
            "batch_size": 5,
            "output_dir": tmp_path / "features",
            **options,
        }
        return command_line(**options)

    return build


def run(precompute_features, line):
    precompute_features.main(precompute_features.parse_args(line))


def test_both_flips_of_every_training_image(
    precompute_features, train_rra, features_arguments, arguments, teacher, tmp_path, capsys
):
    run(precompute_features, features_arguments())
    # 20 images, 2 x 16 tokens x 16 numbers of 2 bytes
    assert "20 images, 1.0 kB an image, 0.0 MB in all, " in capsys.readouterr().out
    folder = tmp_path / "features"
    assert sorted(path.name for path in folder.iterdir()) == ["features.json", *(f"shard-0000{n}" for n in range(3))]
    settings = json.loads((folder / "features.json").read_text())
    assert settings["bytes_per_image"] == 1024 and settings["num_images"] == 20 and settings["grid_size"] == 4

    args = train_rra.parse_args(arguments(output_dir=tmp_path / "run"))
    rows = load_splits(args).train
    config = make_config(sample_size=8, patch_size=2, in_channels=3)
    stored, feature_dim = load_teacher_features(str(folder), config, len(rows))
    dataset = ImageDataset(rows, "image", "label", [0, 1], 8, 3, stored)
    encoder = RepresentationTeacher.from_pretrained(teacher, grid_size=4)
    assert feature_dim == encoder.feature_dim == 16 and len(dataset) == 20
    for number in (0, 7, 8, 19):
        item = dataset[number]
        for features, image in zip(item["teacher_features"], (item["images"], item["images"].flip(-1))):
            # float16 has 11 bits
            torch.testing.assert_close(features.float(), encoder(image[None])[0], rtol=2**-11, atol=1e-4)


@pytest.mark.parametrize("shuffle", ["class", "all"])
def test_shuffled_features_are_those_of_another_image(
    precompute_features, train_rra, features_arguments, arguments, tmp_path, shuffle
):
    options = {"shuffle": shuffle, "output_dir": tmp_path / "shuffled"}
    run(precompute_features, features_arguments())
    run(precompute_features, features_arguments(**options, seed=1))
    settings = json.loads((tmp_path / "shuffled" / "features.json").read_text())
    assert (settings["shuffle"], settings["shuffle_seed"]) == (shuffle, 1)

    config = make_config(sample_size=8, patch_size=2, in_channels=3)
    own, shuffled = (load_teacher_features(str(tmp_path / name), config, 20)[0] for name in ("features", "shuffled"))
    assert list(own["checksum"]) == list(shuffled["checksum"])  # a run finds its images
    own_features, shuffled_features = (
        torch.tensor(rows[:]["features"]).float().flatten(1) for rows in (own, shuffled)
    )
    distances, partners = torch.cdist(shuffled_features, own_features).min(dim=1)  # of the image and its mirror image
    partners = partners.tolist()
    assert distances.max() < 0.1 < torch.pdist(own_features).min()
    assert sorted(partners) == list(range(20)) and all(number != partner for number, partner in enumerate(partners))
    labels = load_splits(train_rra.parse_args(arguments(output_dir="o"))).train["label"]
    same_class = [labels[number] == labels[partner] for number, partner in enumerate(partners)]
    assert all(same_class) if shuffle == "class" else not all(same_class)

    with pytest.raises(ValueError, match=r"holds other features; they differ in shuffle_seed \(1 then, 0 now\)"):
        run(precompute_features, features_arguments(**options))
    options = {"teacher_model_name_or_path": None, "teacher_features": tmp_path / "shuffled"}
    train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "run", max_train_steps=1, **options)))


def test_images_without_another_keep_their_place():
    labels = ["cat", "dog", "cat", None, "cat"]
    partners = shuffle_within(labels, seed=0)
    assert [labels[partner] for partner in partners] == labels
    assert [number for number, partner in enumerate(partners) if number == partner] == [1, 3]
    # other permutations by other seeds, without a fixed point
    drawn = {tuple(shuffle_within([0] * 6, seed)) for seed in range(10)}
    assert len(drawn) > 5 and all(number != partner for each in drawn for number, partner in enumerate(each))


def test_what_cannot_be_shuffled_is_refused(precompute_features, features_arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        precompute_features.parse_args([*features_arguments(shuffle="class"), "--unconditional"])
    assert "--shuffle class needs labels: leave --unconditional out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`--shuffle all` must have images to exchange, but each is the only one"):
        run(precompute_features, features_arguments(shuffle="all", max_train_samples=1))
    assert not (tmp_path / "features").exists()


def make_config(**values):
    return type("Config", (), values)


def test_training_reads_them_and_no_teacher(
    precompute_features, train_rra, features_arguments, arguments, tmp_path, monkeypatch
):
    run(precompute_features, features_arguments())
    options = {"random_flip": True, "dataloader_num_workers": 1}
    # the alignment in which an image and its mirror image differ most
    options |= {"projector_type": "mlp", "normalize_teacher_features": False}
    train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "with teacher", **options)))
    monkeypatch.setattr(flow, "load_teacher", None)
    options |= {"teacher_model_name_or_path": None, "teacher_features": tmp_path / "features"}
    train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "with features", **options)))
    # half the images are mirrored: with the features of the others, a run differs from the first step on
    choose = sources.choose_stored
    monkeypatch.setattr(sources, "choose_stored", lambda batch, mirrored, names: choose(batch, ~mirrored, names))
    train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "swapped", **options)))
    expected, actual, swapped = (
        read_metrics(tmp_path / name)[1:5] for name in ("with teacher", "with features", "swapped")
    )
    for name in ("alignment", "nll"):
        assert [record[name] for record in actual] == pytest.approx([record[name] for record in expected], abs=1e-3)
    for record, other in zip(expected, swapped):
        assert abs(record["alignment"] - other["alignment"]) > 2e-3


def test_flipped_images_get_the_features_of_the_flipped_image():
    images = torch.arange(40.0).view(10, 1, 1, 4)
    features = torch.stack([images.flatten(1), images.flip(-1).flatten(1)], dim=1).unsqueeze(2)
    batch = {"images": images, "class_labels": torch.arange(10), "teacher_features": features}
    mirrored = torch.arange(10) % 3 == 0
    source = ImageSource(Splits(image_rows(2), image_rows(2), ["cat"]), make_config(sample_size=8, in_channels=3), [0])
    augmented = source.mirror(batch, mirrored)
    assert torch.equal(augmented["teacher_features"].flatten(1), augmented["images"].flatten(1))
    assert torch.equal(augmented["class_labels"], torch.arange(10))
    assert torch.equal((augmented["images"] == images).all(dim=-1).flatten(), ~mirrored)


def test_a_killed_run_goes_on_and_two_processes_share_it(features_arguments, tmp_path, precompute_features):
    script = REPOSITORY / "training" / "precompute_features.py"
    line = features_arguments(images_per_shard=1, batch_size=1)
    process = start_two_processes(script, line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "features").glob("shard-*"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("shard-*")}
    assert 3 <= len(before) < 20
    # Processes that each thought themselves alone would meet at the first shard: a folder is not moved onto another.
    process = start_two_processes(script, line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("shard-*")}
    assert len(after) == 20 and after.items() >= before.items()

    run(precompute_features, features_arguments(images_per_shard=1, batch_size=1, output_dir=tmp_path / "whole"))
    for path in after:
        expected = datasets.load_from_disk(str(tmp_path / "whole" / path.name))
        assert datasets.load_from_disk(str(path)).to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: shutil.rmtree(folder), "must be a folder of training/precompute_features.py, but .* has no"),
        (lambda folder: shutil.rmtree(folder / "shard-00001"), "must be complete, but .* holds 2 of 3 shards: run"),
    ],
)
def test_incomplete_features_are_refused(
    precompute_features, train_rra, features_arguments, arguments, tmp_path, change, message
):
    run(precompute_features, features_arguments())
    change(tmp_path / "features")
    options = {"teacher_model_name_or_path": None, "teacher_features": tmp_path / "features"}
    with pytest.raises(ValueError, match=f"`--teacher_features` {message}"):
        train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "run", **options)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "made_with, message",
    [
        ({"resolution": 4}, "must have `resolution` 8, as this run, but have 4"),
        ({"patch_size": 4}, "must have `grid_size` 4, as this run, but have 2"),
        ({"in_channels": 1}, "must have `in_channels` 3, as this run, but have 1"),
        ({"max_train_samples": 19}, "must have `num_images` 20, as this run, but have 19"),
        ({"max_train_samples": 20, "seed": 1}, "must be of this training split, but row .* is of another image"),
    ],
)
def test_features_of_other_images_are_refused(
    precompute_features, train_rra, features_arguments, arguments, tmp_path, made_with, message
):
    run(precompute_features, features_arguments(**made_with))
    options = {"teacher_model_name_or_path": None, "teacher_features": tmp_path / "features"}
    with pytest.raises(ValueError, match=f"`--teacher_features` {message}"):
        train_rra.main(train_rra.parse_args(arguments(output_dir=tmp_path / "run", **options)))


def test_a_folder_of_other_features_is_refused(precompute_features, features_arguments, tmp_path):
    run(precompute_features, features_arguments())
    with pytest.raises(ValueError, match=r"holds other features; they differ in grid_size \(4 then, 2 now\)"):
        run(precompute_features, features_arguments(patch_size=4))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").touch()
    with pytest.raises(ValueError, match="must be empty or hold features, but holds something else"):
        run(precompute_features, features_arguments(output_dir=tmp_path / "other"))


def test_too_small_a_disk_is_found_before_work_begins(precompute_features, features_arguments, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="The features need 0.0 GiB, but .* has 0.0 GiB left"):
        run(precompute_features, features_arguments())
    assert not list((tmp_path / "features").iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 3}, "--resolution must be divisible by --patch_size, but they are 8 and 3"),
        ({"batch_size": 0}, "argument --batch_size: must be a whole number of at least 1, but is 0"),
        (
            {"train_val_split": 2},
            "argument --train_val_split: must be a finite number above 0 and below 1, but is 2.0",
        ),
        ({"dataset_name": "both"}, "give one of --dataset_name and --train_data_dir"),
    ],
)
def test_bad_arguments(precompute_features, features_arguments, capsys, options, message):
    with pytest.raises(SystemExit):
        precompute_features.parse_args(features_arguments(**options))
    assert message in capsys.readouterr().err


def test_training_takes_a_teacher_or_its_features(train_rra, arguments, tmp_path, capsys):
    for options in ({"teacher_features": "a"}, {"teacher_features": "a", "alignment": "none"}):
        with pytest.raises(SystemExit):
            train_rra.parse_args(arguments(output_dir=tmp_path, **options))
        assert "--teacher_features take the place of --teacher_model_name_or_path" in capsys.readouterr().err
