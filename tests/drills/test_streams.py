"""Runs that stream, stopped and resumed on other numbers of processes: what they have seen, and what is left."""

import functools
import itertools
from collections import Counter
from pathlib import Path

import datasets
import pytest

from flowback_hf.data.images import ImageReader, checksum, image_to_tensor
from flowback_hf.data.streams import LanePosition, Stream
from flowback_hf.files import read_json
from flowback_hf.training import Trainer

from ..conftest import write_parquet_files
from .runs import start_group


FILES = [12, 9, 14, 10, 11, 13, 8, 12]


@pytest.mark.drill
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("divisions", [(3, 3, 3), (3, 2, 1)], ids=str)
def test_what_was_seen_and_what_is_left_is_each_row_once(line, tmp_path, drill, divisions, num_workers):
    """Six images a step, two steps at a time: some steps before the first epoch ends for anyone."""
    (tmp_path / "data").mkdir()
    images = write_parquet_files(tmp_path / "data", {"train": FILES, "validation": [3]})
    expected = Counter(checksum(image_to_tensor(image)) for image in images)
    assert set(expected.values()) == {1}
    options = {"train_data_dir": None, "dataset_name": tmp_path / "data", "streaming": True,
               "shuffle_buffer_size": 5, "validation_steps": 100}  # fmt: skip
    for piece, num_processes in enumerate(divisions, start=1):
        own = {"train_batch_size": 6 // num_processes, "max_train_steps": 2 * piece, "checkpointing_steps": 2}
        own["dataloader_num_workers"] = num_workers
        command = line(tmp_path / "run", **options, **own)
        processes = start_group(tmp_path, [command] * num_processes, functools.partial(note_images, tmp_path / "seen"))
        for process in processes:
            assert process.wait(120) == 0, process.log
        seen = Counter(map(int, (tmp_path / "seen").read_text().split()))
        assert sum(seen.values()) == 12 * piece
        assert seen + left_in_epoch(tmp_path / "data", tmp_path / "run" / f"checkpoint-{2 * piece}") == expected
    drill("Streams resumed on other numbers of processes", runs=len(divisions), rows_lost=0, rows_repeated=0)


def note_images(file: Path, _: int):
    """Let a process write down which images it trains on. One line is written at once, whoever else writes."""
    train_on = Trainer._train_on

    def note_and_train_on(self, batch):
        with file.open("a") as stream:
            stream.write(" ".join(str(checksum(image)) for image in batch["images"]) + "\n")
        train_on(self, batch)

    Trainer._train_on = note_and_train_on


def left_in_epoch(data: Path, checkpoint: Path) -> Counter:
    """What the loaders of a checkpoint would read of the first epoch."""
    rows = datasets.load_dataset(str(data), split="train", streaming=True)
    reader, left = ImageReader("image", "label", [0, 1], 8, 3), Counter()
    for file in checkpoint.glob("stream-*.json"):
        for place in (LanePosition(**place) for itinerary in read_json(file) for place in itinerary):
            stream = Stream(reader.prepare(rows), reader)
            stream.buffer_size, stream.itineraries = 5, [[place]]
            of_first_epoch = itertools.takewhile(lambda item: item["itinerary"][0]["epoch"] == 0, stream)
            left.update(checksum(item["images"]) for item in of_first_epoch)
    return left
