# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Signals that ask a run to end, such as a scheduler's or Ctrl-C."""

import os
import signal
import threading
import time
from collections.abc import Iterable

from flowback_hf_cli.training import SAVE_SIGNALS


# Seconds in which a signal is the same as the one before: a scheduler sends it to all processes of a job, and a
# launcher among them passes it on.
REPEATED_WITHIN = 1.0


class StopSignals:
    """
    A context in which a first signal is only remembered, so that a run can save before it ends. A second one, at least
    a second later, ends the process at once.

    If the launcher of several processes has died, which leaves them without anyone that could end them, it is as if
    they had received SIGHUP.

    Outside the main thread, where Python allows no handlers, it listens to no signals.

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
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._handlers = {}

    @property
    def received(self) -> signal.Signals | None:
        """The first signal; `None` if there was none."""
        if self._received is None and self._launcher not in (None, os.getppid()):
            self._remember(signal.SIGHUP, "the launcher has ended")
        return self._received

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
        if self._received is None:
            self._remember(signal.Signals(number), signal.Signals(number).name)
        elif time.monotonic() - self._received_at > REPEATED_WITHIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _remember(self, received: signal.Signals, reason: str):
        self._received, self._received_at = received, time.monotonic()
        if signal.SIGCHLD in self._handlers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Not through `print` or a logger: the signal may have come while they write.
        os.write(2, f"\n{reason}: saving at the end of this step. Another signal ends the run at once.\n".encode())


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
