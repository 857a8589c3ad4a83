# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What the processes of a run agree on: the main one decides about files, and a signal to one of them stops all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from flowback_hf.files import read_json


def decide(accelerator: Accelerator, function: Callable, *args: Any) -> Any:
    """
    Call a function in the main process only, and return its result in all of them.

    Args:
        accelerator (`accelerate.Accelerator`): Knows the processes, all of which must call this.
        function (`Callable`), args: What to call. The result must be picklable.
    Raises:
        Exception: what the function raised, in every process, so that none waits for another.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = function(*args)
        except Exception as raised:
            error = raised
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


def check_shared(accelerator: Accelerator, file: Path, option: str):
    """
    Check that all processes see a JSON file that the main process has written, each at the same path.

    Raises:
        ValueError: in every process, unless all of them do. Says which do not.
    """
    expected = decide(accelerator, read_json, file)
    try:
        is_shared = read_json(file) == expected
    except (OSError, ValueError):
        is_shared = False
    shared = accelerator.gather(torch.tensor([is_shared], device=accelerator.device)).tolist()
    if not all(shared):
        blind = [number for number, sees in enumerate(shared) if not sees]
        raise ValueError(
            f"`{option}` {file.parent} must be a folder that all {len(shared)} processes share, but those numbered"
            f" {blind} do not see what the main process writes there: choose one on a file system that all nodes"
            " mount."
        )


class SharedSignal:
    """
    Tells all processes of a run when one of them has received a signal, at the same step.

    The processes' numbers are compared while the next step runs, so that none waits: they learn of a signal one step
    after it came.

    Args:
        accelerator (`accelerate.Accelerator`): Knows the processes, all of which must make one of these.
    """

    def __init__(self, accelerator: Accelerator):
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.pending: tuple[torch.Tensor, torch.distributed.Work] | None = None

    def share(self, received: int | None) -> int | None:
        """
        Called by every process at the end of every step.

        Args:
            received (`int`, *optional*): The number of the signal that this process has received.
        Returns:
            `int`: the number of a signal that some process had received by the end of the step before. With one
            process, `received` itself.
        """
        if self.group is None:
            return received
        known = self.finish()
        number = torch.tensor([received or 0])
        work = torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group, async_op=True)
        self.pending = number, work
        return known

    def finish(self) -> int | None:
        """The same, without asking for another step: called by every process before the run ends."""
        if self.pending is None:
            return None
        number, work = self.pending
        work.wait()
        self.pending = None
        return int(number) or None
