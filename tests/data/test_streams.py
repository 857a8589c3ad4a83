"""Streams: each row once in an epoch, whoever reads it, and from any row on."""

import itertools
import json
from collections import Counter

import datasets
import pytest
import torch

from flowback_hf.data import collate
from flowback_hf.data.streams import LanePosition, Stream, divide_anew, first_itineraries, itinerary_from_json


# Rows of each shard; they share nothing with the numbers of lanes below.
SHARDS = [5, 1, 0, 9, 3, 4, 7, 2]
NUM_ROWS = sum(SHARDS)


def read(row: dict, name: str) -> dict:
    return {"images": torch.tensor(row["number"]), "class_labels": 0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Numbered rows in parquet files of different sizes."""
    folder, numbers = tmp_path_factory.mktemp("shards"), itertools.count()
    features = datasets.Features({"number": datasets.Value("int64")})
    for shard, size in enumerate(SHARDS):
        values = {"number": list(itertools.islice(numbers, size))}
        datasets.Dataset.from_dict(values, features).to_parquet(folder / f"{shard}.parquet")
    stream = datasets.load_dataset("parquet", data_dir=str(folder), split="train", streaming=True)
    assert stream.num_shards == len(SHARDS)
    return stream


def make_stream(rows, itineraries=None) -> Stream:
    stream = Stream(rows, read)
    stream.seed, stream.buffer_size = 3, 4
    stream.itineraries = itineraries or stream.itineraries
    return stream


def numbers_by_epoch(items) -> dict[int, list[int]]:
    seen = {}
    for item in items:
        seen.setdefault(item["itinerary"][0]["epoch"], []).append(int(item["images"]))
    return seen


def read_epochs(stream: Stream, last_epoch: int) -> list[dict]:
    """The items of the one lane of a stream, to the end of an epoch."""
    return list(itertools.takewhile(lambda item: item["itinerary"][0]["epoch"] <= last_epoch, stream))


@pytest.mark.parametrize("num_processes, num_workers", [(1, 0), (3, 0), (3, 2), (2, 4)])
def test_each_row_comes_once_an_epoch(rows, num_processes, num_workers):
    """In real loader workers, which `datasets` would by itself deal the shards out to a second time."""
    num_lanes = num_processes * max(1, num_workers)
    itineraries, seen = first_itineraries(num_lanes), Counter()
    for begin in range(0, num_lanes, max(1, num_workers)):
        stream = make_stream(rows, itineraries[begin : begin + max(1, num_workers)])
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers)
        unfinished = set(range(begin, begin + max(1, num_workers)))
        for item in loader:
            place = item["itinerary"][0]
            if place["epoch"] < 2:
                seen[place["epoch"], int(item["images"])] += 1
            elif unfinished := unfinished - {place["lane"]}:
                continue
            else:
                break
    assert seen == {(epoch, number): 1 for epoch in range(2) for number in range(NUM_ROWS)}


def test_epochs_are_shuffled_anew_and_across_a_buffer(rows):
    first, second, *_ = numbers_by_epoch(itertools.islice(make_stream(rows), 2 * NUM_ROWS)).values()
    assert sorted(first) == sorted(second) == list(range(NUM_ROWS)) and first != second
    in_their_order = sum(later == earlier + 1 for earlier, later in itertools.pairwise(first))
    assert in_their_order < NUM_ROWS / 3
    assert first == numbers_by_epoch(itertools.islice(make_stream(rows), NUM_ROWS))[0]


def test_a_stream_goes_on_at_any_row(rows):
    """Also where a buffer, a shard or an epoch ends."""
    whole = list(itertools.islice(make_stream(rows, [[LanePosition(1, 2)]]), 2 * NUM_ROWS))
    for num_read in range(1, NUM_ROWS + 3):
        kept = json.loads(json.dumps(whole[num_read - 1]["itinerary"]))
        rest = itertools.islice(make_stream(rows, [itinerary_from_json(kept)]), NUM_ROWS // 2)
        assert [item["images"] for item in rest] == [
            item["images"] for item in whole[num_read : num_read + NUM_ROWS // 2]
        ]


@pytest.mark.parametrize("divisions", [(4, 3, 2), (2, 5), (3, 1, 7)])
def test_another_division_leaves_no_row_out_and_reads_none_twice(rows, divisions):
    """Lanes stop at different places, and some of them have begun the next epoch."""
    itineraries, seen, last_epoch = first_itineraries(divisions[0]), [], 6
    for num_lanes in divisions[1:]:
        left = []
        for lane, itinerary in enumerate(itineraries):
            items = list(itertools.islice(make_stream(rows, [itinerary]), 3 + 4 * lane))
            seen += items
            left.append(itinerary_from_json(items[-1]["itinerary"]))
        itineraries = divide_anew(left, num_lanes)
    for itinerary in itineraries:
        for place in itinerary:
            seen += read_epochs(make_stream(rows, [[place]]), last_epoch)
    assert {epoch: sorted(numbers) for epoch, numbers in numbers_by_epoch(seen).items()} == {
        epoch: list(range(NUM_ROWS)) for epoch in range(last_epoch + 1)
    }


def test_the_same_division_goes_on_as_it_was():
    itineraries = [[LanePosition(0, 2, epoch=1)], [LanePosition(1, 2, epoch=2)]]
    assert divide_anew(itineraries, 2) == itineraries


def test_rows_that_cannot_be_used_are_named_and_left_out(rows):
    def read_odd(row: dict, name: str) -> dict:
        if row["number"] % 2 == 0:
            raise ValueError(f"{name} is even")
        return read(row, name)

    stream = make_stream(rows)
    stream.read = read_odd
    items = list(itertools.islice(stream, NUM_ROWS // 2))
    assert sorted(int(item["images"]) for item in items) == list(range(1, NUM_ROWS, 2))
    batch = collate(items)
    assert batch["itinerary"] == items[-1]["itinerary"]
    skipped = batch["skipped"] + next(iter(itertools.islice(stream, NUM_ROWS // 2, None)))["skipped"]
    assert "row 1 of shard 0 is even" not in skipped and {"row 0 of shard 0 is even"} <= set(skipped)


def test_a_lane_without_anything_usable_ends(rows):
    def refuse(row: dict, name: str):
        raise ValueError(f"{name} is refused")

    stream = make_stream(rows)
    stream.read = refuse
    with pytest.raises(ValueError, match="found nothing that it can use in 10 epochs: row . of shard . is refused"):
        next(iter(stream))
    with pytest.raises(ValueError, match="found nothing"):
        next(iter(make_stream(rows.filter(lambda row: False))))
