"""Does all communication of a process, in the order it was asked for.

Collectives must start in the same order on every rank. Multi-phase ones wait between their phases,
which is safe here and nowhere else: a callback that waits keeps the group's own thread from the
work it waits for (github.com/pytorch/pytorch/issues/48478).

Beside computation a thread of its own does the work. It needs a core of its own: on a single one
the two take turns by the milliseconds of the scheduler, which is longer than most exchanges. There
the caller does all of it when it waits for the first result.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from dqrm.comm.meter import Meter

T = TypeVar("T")


class AgreedError(RuntimeError):
    """An error that all ranks raise at the same place: communication can go on after it."""


class Pending(Generic[T]):
    """A result that communication is to deliver."""

    def __init__(
        self, future: "Future[T]", meter: Meter, work: Callable[["Future[T]"], None] | None
    ) -> None:
        self._future = future
        self._meter = meter
        self._work = work

    def wait(self, timeout: float | None = None) -> T:
        """Return the result, or raise what the work raised.

        Args:
            timeout: seconds; None waits as long as the process group's own time-out lets it.

        Raises:
            TimeoutError: the time is over; the work goes on.
        """
        begin = time.perf_counter()
        try:
            if self._work is not None:
                self._work(self._future)
            return self._future.result(timeout)
        finally:
            self._meter.exposed_seconds += time.perf_counter() - begin

    def then(self, callback: "Callable[[Future[T]], object]") -> None:
        """Call with the finished future, where the work is done; it must not wait there."""
        if self._work is not None:
            self._work(self._future)
        self._future.add_done_callback(callback)

    def done(self) -> bool:
        """Whether wait() would return or raise at once."""
        return self._future.done()


class Communication:
    """Runs what it is given one after the other.

    Args:
        meter: counts the time.
        overlap: on a thread of its own; else on the caller's, when it waits.
        name: of the thread.
    """

    def __init__(self, meter: Meter, *, overlap: bool = True, name: str = "communication") -> None:
        self._meter = meter
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._broken: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        if overlap:
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def submit(self, function: Callable[[], T]) -> Pending[T]:
        """Run a function after all that were submitted before.

        Once one has failed in a way that other ranks may not share, all further ones fail with the
        same error, rather than wait for ranks that are elsewhere.
        """
        if self._closed:
            raise RuntimeError("communication was closed")
        future: Future[T] = Future()

        def run() -> None:
            if self._broken is not None:
                future.set_exception(self._broken)
                return
            begin = time.perf_counter()
            try:
                result = function()
            except BaseException as error:
                if not isinstance(error, AgreedError):
                    self._broken = error
                future.set_exception(error)
            else:
                future.set_result(result)
            finally:
                self._meter.busy_seconds += time.perf_counter() - begin

        self._tasks.put(run)
        return Pending(future, self._meter, self._run_until if self._thread is None else None)

    def close(self, timeout: float | None = None) -> None:
        """Finish what was submitted, waiting at most ``timeout`` seconds for a thread to end."""
        if not self._closed:
            self._closed = True
            self._tasks.put(None)
            if self._thread is None:
                self._run()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _run_until(self, future: "Future[T]") -> None:
        """Run what was submitted up to the task of a future, that included."""
        while not future.done():
            task = self._tasks.get()
            assert task is not None
            task()
