"""Runs that stream their data: resumed in the middle, on other numbers of processes, and refused."""

import functools
import shutil
from pathlib import Path

import datasets
import pytest
import torch

from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel
from flowback_hf.data import ImageSource, Splits, Stream
from flowback_hf.files import read_json, read_metrics_log
from flowback_hf.training import Trainer, TrainingArguments, list_checkpoints
from flowback_hf.training.streaming import check_num_shards
from flowback_hf_cli.training import parse_args

from ..conftest import image_rows, write_parquet_files
from ..drills.runs import assert_same_run, start_group
from .test_sharding import FSDP, pipeline_of, set_environment


# Images of each file; a step takes four.
SHARDS = {"train": [5, 3, 4, 6], "validation": [3]}


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory) -> Path:
    """Files in which one image is damaged."""
    folder = tmp_path_factory.mktemp("parquet")
    write_parquet_files(folder, SHARDS)
    (third,) = folder.glob("train-00002-*")
    rows = datasets.Dataset.from_parquet(str(third), cache_dir=str(folder / "cache"))
    files = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    files[0]["image"] = {"path": "damaged.png", "bytes": b"damaged"}
    datasets.Dataset.from_list(files, rows.features).to_parquet(third)
    shutil.rmtree(folder / "cache")
    return folder


@pytest.fixture
def run(arguments, parquet_folder, tmp_path):
    """A function that runs to the end, on some processes."""

    def run_to_end(name: str, num_processes: int = 2, code: int = 0, prepare=None, **options):
        options = {
            "train_data_dir": None, "dataset_name": parquet_folder, "streaming": True, "shuffle_buffer_size": 3,
            "max_train_steps": 8, "random_flip": True, "label_dropout": 0.5, "validation_steps": 100,
            "train_batch_size": 4 // num_processes, "output_dir": tmp_path / name,
        } | options  # fmt: skip
        (tmp_path / "logs").mkdir(exist_ok=True)
        processes = start_group(tmp_path / "logs", [arguments(**options)] * num_processes, prepare)
        for process in processes:
            assert process.wait(120) == code, process.log
        return processes

    return run_to_end


def go_back_to(folder: Path, step: int):
    for checkpoint in list_checkpoints(folder):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)


def test_a_run_goes_on_in_the_middle_of_a_stream(run, tmp_path):
    """To the bit, past the end of an epoch, with a damaged image. Three steps of workers that take turns."""
    options = {"dataloader_num_workers": 2, "checkpointing_steps": 3, "logging_steps": 1}
    processes = run("whole", **options)
    assert any("Skipped an image: damaged.png" in process.log for process in processes), processes[1].log
    epochs = [record["epoch"] for record in read_metrics_log(tmp_path / "whole") if "loss" in record]
    assert epochs == sorted(epochs) and {0, 1} <= set(epochs)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    go_back_to(tmp_path / "resumed", 3)
    run("resumed", resume_from_checkpoint="latest", **options)
    go_back_to(tmp_path / "whole", 8)
    go_back_to(tmp_path / "resumed", 8)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_a_stream_goes_on_with_another_number_of_processes(run, tmp_path):
    """What is left of the old lanes comes first; tests of `Stream` count the rows."""
    run("run", checkpointing_steps=2, max_train_steps=2)
    run("run", num_processes=1, resume_from_checkpoint="latest", checkpointing_steps=2, max_train_steps=4)
    two, one = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4))
    assert sorted(path.name for path in two.glob("stream-*")) == ["stream-00000.json", "stream-00001.json"]
    assert [place["num_lanes"] for (place,) in read_json(two / "stream-00000.json")] == [2]
    ((*rests, last),) = read_json(one / "stream-00000.json")
    assert last["num_lanes"] == 1 and rests and all(place["num_lanes"] == 2 for place in rests)


def test_a_sharded_run_goes_on_in_the_middle_of_a_stream(run, tmp_path):
    options = {"prepare": functools.partial(set_environment, FSDP), "checkpointing_steps": 2, "max_train_steps": 4}
    run("whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    go_back_to(tmp_path / "resumed", 2)
    assert len(list((tmp_path / "resumed" / "checkpoint-2").glob("stream-*"))) == 2
    run("resumed", resume_from_checkpoint="latest", **options)
    weights, expected = pipeline_of(tmp_path / "resumed"), pipeline_of(tmp_path / "whole")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_too_few_files_are_refused():
    stream = Stream(datasets.Dataset.from_dict({"image": range(5)}).to_iterable_dataset(num_shards=5), read=None)
    check_num_shards(stream, num_processes=2, num_workers=2)
    check_num_shards(stream, num_processes=5, num_workers=0)
    with pytest.raises(
        ValueError, match="have 5 files .* 2 processes with 3 loader workers .* --dataloader_num_workers 2"
    ):
        check_num_shards(stream, num_processes=2, num_workers=3)
    with pytest.raises(ValueError, match="have 5 files .* fewer than 6 processes: save the data in more files"):
        check_num_shards(stream, num_processes=6, num_workers=0)


def test_a_stream_needs_a_number_of_steps_and_has_no_stored_features(tmp_path):
    rows, flow = image_rows(4), TarFlowTransformer2DModel(8, 4, 3, num_blocks=1, num_layers=1, num_classes=1)
    splits = Splits(rows.to_iterable_dataset(num_shards=2), rows, ["cat"])
    source, arguments = ImageSource(splits, flow.config, [0]), TrainingArguments(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="`max_train_steps` must be given for a stream"):
        Trainer(AlignedFlowObjective(flow, "none"), source, arguments)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="`teacher_features` belong to rows that have numbers"):
        ImageSource(splits, flow.config, [0], teacher_features=rows, teacher_dim=4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_train_steps": None}, "--streaming needs --max_train_steps"),
        ({"train_data_dir": "images", "dataset_name": None}, "Images of a folder are never copied"),
        ({"max_train_samples": 5}, "--max_train_samples draws images at random"),
        ({"teacher_features": "features", "teacher_model_name_or_path": None}, "--teacher_features belong to rows"),
        ({"streaming": None, "shuffle_buffer_size": 5}, "--shuffle_buffer_size belongs to --streaming"),
    ],
)
def test_flags_that_a_stream_does_not_know(arguments, capsys, options, message):
    options = {"train_data_dir": None, "dataset_name": "data", "streaming": True, "output_dir": "run"} | options
    with pytest.raises(SystemExit):
        parse_args(arguments(**options))
    assert message in capsys.readouterr().err
