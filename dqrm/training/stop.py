"""Stopping on request: the step in progress is finished before the run is saved."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yield a StopRequest that hears SIGINT and SIGTERM while the block runs.

    Outside the main thread, where Python lets nobody listen to signals, it hears nothing.
    """
    request = StopRequest()
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            previous[number] = signal.signal(number, request._receive)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
