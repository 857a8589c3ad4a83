# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The batches of a run that streams its data, and how a checkpoint keeps how far the stream is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader

from flowback_hf.data import Stream
from flowback_hf.data.streams import divide_anew, first_itineraries, itinerary_from_json, itinerary_to_json
from flowback_hf.files import read_json, write_json


STREAM_FILES = "stream-*.json"


def check_num_shards(stream: Stream, num_processes: int, num_workers: int):
    """Raise ValueError if there are fewer shards than processes, or their loader workers, to read them."""
    if stream.num_shards >= num_processes * max(1, num_workers):
        return
    files = f"The training data have {stream.num_shards} file{'s' * (stream.num_shards > 1)} to stream from"
    if stream.num_shards >= num_processes:
        raise ValueError(
            f"{files}, fewer than {num_processes} processes with {num_workers} loader workers each: give"
            f" --dataloader_num_workers {stream.num_shards // num_processes}, or save the data in more files."
        )
    raise ValueError(
        f"{files}, fewer than {num_processes} processes: save the data in more files, as in `for i in range(n):"
        " rows.shard(n, i).to_parquet(...)`, train on fewer processes, or leave --streaming out."
    )


class StreamLoader:
    """
    This process's batches of a stream, which never end, and how far they are.

    Args:
        accelerator (`accelerate.Accelerator`): The processes, and where batches go.
        stream ([`Stream`]): The data.
        batch_size (`int`): Images of a batch.
        seed (`int`), buffer_size (`int`, *optional*): They decide the order.
        options: For `torch.utils.data.DataLoader`.
    Raises:
        ValueError: if there are fewer shards than processes that load them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stream: Stream,
        batch_size: int,
        seed: int,
        buffer_size: int | None = None,
        num_workers: int = 0,
        **options: Any,
    ):
        check_num_shards(stream, accelerator.num_processes, num_workers)
        self.accelerator = accelerator
        self.stream = stream
        self.num_loaders = max(1, num_workers)
        stream.seed = seed
        stream.buffer_size = buffer_size or stream.buffer_size
        self._choose_own(first_itineraries(self.num_lanes))
        # Not `Accelerator.prepare`, which would let every process read everything and keep its share.
        self.dataloader = prepare_data_loader(
            torch.utils.data.DataLoader(stream, batch_size, num_workers=num_workers, **options),
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=True,
        )
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    @property
    def num_lanes(self) -> int:
        return self.accelerator.num_processes * self.num_loaders

    @property
    def epoch(self) -> int:
        """The epoch that all loaders of this process have reached."""
        return min(itinerary[0].epoch for itinerary in self.stream.itineraries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches, from where the stream is. The workers take turns."""
        for batch in self.dataloader:
            _, *others = self.stream.itineraries
            self.stream.itineraries = [*others, itinerary_from_json(batch.pop("itinerary"))]
            yield batch

    def _choose_own(self, itineraries: list):
        begin = self.accelerator.process_index * self.num_loaders
        self.stream.itineraries = itineraries[begin : begin + self.num_loaders]

    def _save(self, models: list, weights: list, folder: str):
        """Accelerate calls this in every process before it saves a checkpoint."""
        itineraries = [itinerary_to_json(itinerary) for itinerary in self.stream.itineraries]
        write_json(Path(folder) / STREAM_FILES.replace("*", f"{self.accelerator.process_index:05d}"), itineraries)

    def _load(self, models: list, folder: str):
        """Accelerate calls this in every process before it loads a checkpoint, of any number of processes."""
        files = sorted(Path(folder).glob(STREAM_FILES))
        if not files:
            raise ValueError(f"there is no {STREAM_FILES}")
        itineraries = [itinerary_from_json(places) for file in files for places in read_json(file)]
        self._choose_own(divide_anew(itineraries, self.num_lanes))
