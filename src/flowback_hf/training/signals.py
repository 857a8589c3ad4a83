# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Signals that ask a run to end, such as a scheduler's or Ctrl-C."""

import os
import signal
import threading
from collections.abc import Iterable

from flowback_hf_cli.training import SAVE_SIGNALS


class StopSignals:
    """
    A context in which a first signal is only remembered, so that a run can save before it ends. A second one ends the
    process at once.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        signals (iterable of `signal.Signals`): What to listen to.

    Example:
        ```py
        >>> import signal
        >>> from flowback_hf.training.signals import StopSignals

        >>> with StopSignals([signal.SIGTERM]) as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.received
        <Signals.SIGTERM: 15>
        ```
    """

    def __init__(self, signals: Iterable[signal.Signals]):
        self.signals = tuple(signals)
        self.received: signal.Signals | None = None
        self._handlers = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in self.signals}
            # A signal to all processes of a job also ends those that load data, whereupon torch's own handler would
            # raise in the middle of the step.
            self._handlers[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _):
        self.received = signal.Signals(number)
        for number in self._handlers:
            signal.signal(number, signal.SIG_DFL)
        # Not through `print` or a logger: the signal may have come while they write.
        name = self.received.name
        os.write(2, f"\n{name}: saving at the end of this step. Another signal ends the run at once.\n".encode())


def leave_process_group(_: int):
    """
    Keep a process that loads data out of reach of signals to the whole process group, such as Ctrl-C: the running step
    needs it.

    Args:
        _ (`int`): Its number, which a `worker_init_fn` of `torch.utils.data.DataLoader` takes.
    """
    os.setsid()
    for name in ("SIGINT", *SAVE_SIGNALS):  # SIGTERM is how it is ended
        signal.signal(signal.Signals[name], signal.SIG_IGN)
