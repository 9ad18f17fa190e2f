"""Does all communication of a process, in the order it was asked for.

Collectives must start in the same order on every rank. Multi-phase ones wait between their phases,
which is safe here and nowhere else: a callback that waits keeps the group's own thread from the
work it waits for (github.com/pytorch/pytorch/issues/48478).

Beside computation a thread of its own does the work. It needs a core of its own: on a single one
the two take turns by the milliseconds of the scheduler, which is longer than most exchanges. There
the caller does all of it when it waits for the first result; what waits in a row then travels
together (:mod:`dqrm.comm.rounds`).
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dqrm.comm.meter import Meter
from dqrm.comm.rounds import RoundTask, Send, run_together

T = TypeVar("T")


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


@dataclass(frozen=True)
class _Waiting:
    """Work that was asked for."""

    make: Callable[[], Generator[Any, Any, Any]]
    future: "Future[Any]"
    joins: bool
    """Whether it may run beside its neighbours."""


class Communication:
    """Runs what it is given one after the other.

    Args:
        meter: counts the time.
        overlap: on a thread of its own; else on the caller's, when it waits. The same on all ranks.
        send: the messages of tasks that go by rounds.
        name: of the thread.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        overlap: bool = True,
        send: Send[Any, Any] | None = None,
        name: str = "communication",
    ) -> None:
        self._meter = meter
        self._send = send
        self._tasks: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._waiting: deque[_Waiting] = deque()
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

        def whole() -> Generator[Any, Any, T]:
            yield from ()
            return function()

        return self._submit(whole, joins=False)

    def submit_rounds(self, make: Callable[[], Generator[Any, Any, T]]) -> Pending[T]:
        """Run a task that goes by rounds, after or beside those that were submitted before."""
        return self._submit(make, joins=True)

    def _submit(self, make: Callable[[], Generator[Any, Any, T]], *, joins: bool) -> Pending[T]:
        if self._closed:
            raise RuntimeError("communication was closed")
        future: Future[T] = Future()
        task = _Waiting(make, future, joins)
        if self._thread is None:
            self._waiting.append(task)
            return Pending(future, self._meter, self._run_until)
        self._tasks.put(task)
        return Pending(future, self._meter, None)

    def close(self, timeout: float | None = None) -> None:
        """Finish what was submitted, waiting at most ``timeout`` seconds for a thread to end."""
        if not self._closed:
            self._closed = True
            self._tasks.put(None)
            while self._waiting:
                self._run_waiting()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._run_tasks([task])

    def _run_until(self, future: "Future[T]") -> None:
        """Run what was submitted up to the task of a future, and what may run beside that."""
        while not future.done():
            self._run_waiting()

    def _run_waiting(self) -> None:
        """Run the first task that waits, and those behind it that may run beside it."""
        tasks = [self._waiting.popleft()]
        while tasks[0].joins and self._waiting and self._waiting[0].joins:
            tasks.append(self._waiting.popleft())
        self._run_tasks(tasks)

    def _run_tasks(self, tasks: list[_Waiting]) -> None:
        if self._broken is not None:
            for task in tasks:
                task.future.set_exception(self._broken)
            return
        begin = time.perf_counter()
        try:
            run_together([RoundTask(task.make(), task.future) for task in tasks], self._send)
        except BaseException as error:
            self._broken = error
        finally:
            self._meter.busy_seconds += time.perf_counter() - begin
