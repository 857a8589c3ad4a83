# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Training data that are read as they come, from files that need not fit on the disk.

The files of a data set, its shards, are dealt out again in every epoch to lanes, one for each process that loads data:
as many as there are training processes times their loader workers. A lane has no end: when it has read its share of
an epoch, it goes on with its share of the next. No process waits for another whose shards are larger, every batch is
full, and each row is read once in every epoch, by some lane.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
import fsspec.asyn
import torch

from flowback_hf.data.noise import make_generator


DEFAULT_BUFFER_SIZE = 1000
# Rows that are taken out of a file at a time
ROWS_PER_READ = 64
# Chance may deal nothing but empty files to a lane, but not so often in a row.
MAX_EMPTY_EPOCHS = 10


@dataclass(frozen=True)
class LanePosition:
    """
    How far a lane is: what it has to read, and where it goes on.

    Args:
        lane (`int`), num_lanes (`int`): Which lane of how many it is, numbered from 0.
        epoch (`int`, defaults to 0): The epoch that is being read, numbered from 0.
        last_epoch (`int`, *optional*): The last one that it reads. Default: it goes on forever.
        shard (`int`, defaults to 0): Where its shuffle buffer begins: which of its shards of the epoch,
        row (`int`, defaults to 0): and which row of that shard.
        num_read (`int`, defaults to 0): How many rows of the shuffled buffer have been read.
    """

    lane: int
    num_lanes: int
    epoch: int = 0
    last_epoch: int | None = None
    shard: int = 0
    row: int = 0
    num_read: int = 0


# What a loader has to read, one after another: the rests of lanes of an earlier division, then a lane of its own.
Itinerary = list[LanePosition]


def first_itineraries(num_lanes: int) -> list[Itinerary]:
    """Where the lanes of a new run begin."""
    return [[LanePosition(lane, num_lanes)] for lane in range(num_lanes)]


def divide_anew(itineraries: list[Itinerary], num_lanes: int) -> list[Itinerary]:
    """
    Divide what is left to read among another number of lanes.

    The old lanes are read to the end of the latest epoch that one of them has begun, so that no row is left out or
    read twice. New lanes share the epochs after that. Loaders that get no old lane begin with them.

    Example:
        ```py
        >>> from flowback_hf.data.streams import LanePosition, divide_anew

        >>> old = [[LanePosition(0, 2, epoch=3)], [LanePosition(1, 2, epoch=4, row=7)]]
        >>> for itinerary in divide_anew(old, num_lanes=1):
        ...     print([(place.lane, place.num_lanes, place.epoch, place.last_epoch) for place in itinerary])
        [(0, 2, 3, 4), (1, 2, 4, 4), (0, 1, 5, None)]
        ```
    """
    if len(itineraries) == num_lanes:
        return itineraries
    places = sorted((place for itinerary in itineraries for place in itinerary), key=lambda place: place.epoch)
    last_epoch = places[-1].epoch
    rests = [replace(place, last_epoch=last_epoch) if place.last_epoch is None else place for place in places]
    return [
        [*rests[lane::num_lanes], LanePosition(lane, num_lanes, epoch=last_epoch + 1)] for lane in range(num_lanes)
    ]


def itinerary_to_json(itinerary: Itinerary) -> list[dict[str, Any]]:
    return [asdict(place) for place in itinerary]


def itinerary_from_json(places: list[dict[str, Any]]) -> Itinerary:
    return [LanePosition(**place) for place in places]


class Stream(torch.utils.data.IterableDataset):
    """
    An endless stream of items, shuffled, in which each row comes once in every epoch.

    In an epoch, the shards are shuffled and dealt out. A lane fills a buffer with rows of its shards, reads it in a
    random order, and fills it again. Both orders follow from the seed and the position, so that a [`LanePosition`] is
    all that is needed to go on. (`datasets.IterableDataset.shuffle` would lose what is in its buffer.)

    An item is what `read` makes of a row, with `skipped`, the names of rows before it that cannot be used, and
    `itinerary`, what is left to read after it, as plain data.

    Args:
        rows (`datasets.IterableDataset`): What to read.
        read (`Callable`):
            Makes an item of a row and a name for it in messages. Raises ValueError if the row cannot be used.
    Attributes:
        itineraries (`list[Itinerary]`):
            What the loaders of this process read, one for each loader worker, or one if the process loads by itself.
            To begin with, this process is the only one.
        seed (`int`), buffer_size (`int`): They decide the order, with the place.

    Example:
        ```py
        >>> import datasets
        >>> import itertools
        >>> from flowback_hf.data.streams import Stream

        >>> rows = datasets.Dataset.from_dict({"number": range(6)}).to_iterable_dataset(num_shards=3)
        >>> stream = Stream(rows, lambda row, name: {"number": row["number"]})
        >>> numbers = [item["number"] for item in itertools.islice(stream, 12)]
        >>> sorted(numbers[:6]), sorted(numbers[6:])
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
        ```
    """

    def __init__(self, rows: datasets.IterableDataset, read: Callable[[dict[str, Any], str], dict[str, Any]]):
        self.rows = rows
        self.read = read
        self.itineraries = first_itineraries(1)
        self.seed = 0
        self.buffer_size = DEFAULT_BUFFER_SIZE

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def first_rows(self, num_rows: int) -> list[dict[str, Any]]:
        """At most so many rows of the first shards, as they are. The shards are shuffled, always in the same way."""
        rows = (row for shard in self._shuffled_shards(epoch=0) for row in self._read_shard(shard, 0))
        return list(itertools.islice(rows, num_rows))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        fsspec.asyn.reset_lock()  # a forked process would wait forever for what its parent held
        itinerary = self.itineraries[0 if worker is None else worker.id]
        for number, first in enumerate(itinerary):
            later = itinerary_to_json(itinerary[number + 1 :])
            for place, item in self._items_from(first):
                yield item | {"itinerary": [asdict(place), *later]}

    def _items_from(self, place: LanePosition) -> Iterator[tuple[LanePosition, dict[str, Any]]]:
        """The items of a lane, each with the place after it."""
        skipped, num_empty = [], 0
        while place.last_epoch is None or place.epoch <= place.last_epoch:
            num_read, num_empty = place.num_read, num_empty + 1
            for start, buffer in self._buffers(replace(place, num_read=0)):
                generator = self._generator(start.epoch, start.lane, start.shard, start.row)
                order = torch.randperm(len(buffer), generator=generator)
                for number in range(num_read, len(buffer)):
                    try:
                        item = self.read(*buffer[order[number]])
                    except ValueError as error:
                        skipped.append(str(error))
                        continue
                    yield replace(start, num_read=number + 1), item | {"skipped": skipped}
                    skipped, num_empty = [], 0
                num_read = 0
            if num_empty == MAX_EMPTY_EPOCHS:
                reason = f": {skipped[0]}, for example" if skipped else ""
                raise ValueError(f"One loader has found nothing that it can use in {num_empty} epochs{reason}.")
            place = LanePosition(place.lane, place.num_lanes, place.epoch + 1, place.last_epoch)

    def _buffers(self, place: LanePosition) -> Iterator[tuple[LanePosition, list[tuple[dict[str, Any], str]]]]:
        """What fills the shuffle buffer, one after another, to the end of the epoch, each with where it begins."""
        own = self._shuffled_shards(place.epoch)[place.lane :: place.num_lanes]
        buffer, start = [], place
        for shard in range(place.shard, len(own)):
            first = place.row if shard == place.shard else 0
            for row, values in enumerate(self._read_shard(own[shard], first), first):
                if not buffer:
                    start = replace(place, shard=shard, row=row)
                buffer.append((values, f"row {row} of shard {own[shard]}"))
                if len(buffer) == self.buffer_size:
                    yield start, buffer
                    buffer = []
        if buffer:
            yield start, buffer

    def _shuffled_shards(self, epoch: int) -> list[int]:
        return torch.randperm(self.num_shards, generator=self._generator(epoch)).tolist()

    def _read_shard(self, shard: int, first_row: int) -> Iterator[dict[str, Any]]:
        # Not `for row in rows`: in a loader worker, `datasets` would deal the shards out again.
        rows = self.rows.shard(self.num_shards, shard).skip(first_row)
        for batch in rows.iter(ROWS_PER_READ):
            for values in zip(*batch.values()):
                yield dict(zip(batch, values))

    def _generator(self, *entropy: int) -> torch.Generator:
        return make_generator(self.seed, *entropy)
