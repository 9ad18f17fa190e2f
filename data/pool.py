"""Worker processes: bounded work in flight, what they used, and no orphans."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import (
    BaseContext,
    ForkContext,
    ForkProcess,
    ForkServerContext,
    ForkServerProcess,
)
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

Result = TypeVar("Result")

_POLL_SECONDS = 0.5

# Parameters of mallopt (malloc.h of glibc); 32 MiB is the largest threshold it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class WorkersLost(ValueError):
    """A worker process died; what is done so far stays, so that the next run continues."""


class _Process(ForkServerProcess):
    """A process that does not import the program's main module again.

    No task needs it, and a script that calls `prepare` outside ``if __name__ == "__main__"``
    would otherwise start over in every worker.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    """Forking a process that runs threads (torch, pyarrow) can deadlock; the fork server is a
    clean process with the libraries loaded, so that a worker starts in milliseconds.
    """

    Process = _Process


class _Forked(ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with warnings.catch_warnings():
            # Python 3.12 warns of any second thread; `_may_fork` knows which ones do no harm.
            warnings.simplefilter("ignore", DeprecationWarning)
            return ForkProcess._Popen(process_obj)


class _ForkContext(ForkContext):
    Process = _Forked


# Stops itself before a fork and may start again after it, in parent and child.
_FORK_SAFE_THREAD = "jemalloc_bg_thd"

_LARGEST_TO_FORK = 200 * 1024 * 1024
"""Resident bytes. What the parent holds would be counted, and slowly copied, in every worker."""


def use_one_thread() -> None:
    """Keep numpy, unless loaded already, from starting threads, so that workers can be forked.

    For programs that only prepare data: starting a fork server costs about 0.4 s of processor
    time, as much as preparing 500 000 rows.
    """
    if "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _may_fork() -> bool:
    """Whether this process is small and has no thread that a fork would leave behind."""
    if "torch" in sys.modules:
        return False
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        names = [(task / "comm").read_text(encoding="utf-8", errors="replace") for task in tasks]
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return False
    threads = sum(name.strip() != _FORK_SAFE_THREAD for name in names)
    return threads == 1 and resident * os.sysconf("SC_PAGE_SIZE") < _LARGEST_TO_FORK


def _context() -> BaseContext:
    if _may_fork():
        return _ForkContext()
    context = _Context()
    context.set_forkserver_preload(["dqrm.data.stages"])
    return context


@dataclass(frozen=True)
class Usage:
    """What one process had used when a task of it ended."""

    process: int
    cpu_seconds: float
    peak_bytes: int


@dataclass
class Pool:
    """Runs tasks in `workers` processes, or in this one when there is one worker.

    Functions and arguments must be picklable. Tasks can ask `should_stop` between steps.
    """

    workers: int
    lock: int = -1
    """Descriptor of this process's that workers must not keep open."""
    _executor: ProcessPoolExecutor | None = None
    _stop: Any = None
    _usage: dict[int, Usage] = field(default_factory=dict)

    def __enter__(self) -> Self:
        global _stop_event
        if self.workers > 1:
            context = _context()
            self._stop = context.Event()
            lock = self.lock if isinstance(context, ForkContext) else -1
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_start, initargs=(self._stop, lock)
            )
        else:
            self._stop = _stop_event = threading.Event()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stop.set()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def run(
        self,
        function: Callable[..., Result],
        tasks: Iterable[tuple[Any, ...]],
        idle: Callable[[], None] = lambda: None,
    ) -> Iterator[Result]:
        """Results of function(*task) as they come; tasks are taken in order, a few ahead.

        idle is called about twice a second meanwhile, in this process.

        Raises:
            WorkersLost: a worker was killed; or whatever the function raises.
        """
        if self._executor is None:
            for task in tasks:
                result, usage = _measured(function, task)
                self._usage[usage.process] = usage
                yield result
            return
        source = iter(tasks)
        pending: set[Future[tuple[Result, Usage]]] = set()
        try:
            while True:
                for task in source:
                    pending.add(self._executor.submit(_measured, function, task))
                    if len(pending) > self.workers:
                        break
                if not pending:
                    return
                done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    result, usage = future.result()
                    self._usage[usage.process] = usage
                    yield result
                if not done:
                    idle()
        except BrokenProcessPool:
            raise WorkersLost(
                "a worker process was killed, most likely for lack of memory or because a source "
                "was cut short; run the same command again to continue, with fewer workers or "
                "smaller shards"
            ) from None

    def finish(self) -> None:
        """Let running tasks end early and wait for them."""
        self._stop.set()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the workers, this process not counted."""
        return sum(u.cpu_seconds for u in self._usage.values() if u.process != os.getpid())

    @property
    def peak_bytes(self) -> int:
        """Sum of the workers' largest resident memory, this process not counted."""
        return sum(u.peak_bytes for u in self._usage.values() if u.process != os.getpid())


_stop_event: Any = threading.Event()


def should_stop() -> bool:
    """Whether the task running in this process should end early."""
    return bool(_stop_event.is_set())


def _start(stop: Any, lock: int) -> None:
    """First thing in a worker process; lock: descriptor to close, if any."""
    global _stop_event
    _stop_event = stop
    if lock >= 0:
        os.close(lock)
    # The parent process warns; what every worker would repeat helps nobody.
    logging.getLogger("dqrm").setLevel(logging.ERROR)
    # Control-C reaches every process of the terminal; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked worker has the parent's handler, which is not meant for it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _keep_freed_memory() -> None:
    """Let malloc use freed arrays again instead of giving them back to the system.

    Every shard needs arrays of the same sizes. Taking their pages anew was a quarter of the
    processor time of a shard on a virtual machine (2026-11, 1 million rows, hashed).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # Only glibc has it.
        mallopt(_M_MMAP_THRESHOLD, 32 * 1024 * 1024)
        mallopt(_M_TRIM_THRESHOLD, 256 * 1024 * 1024)


def _measured(function: Callable[..., Result], task: tuple[Any, ...]) -> tuple[Result, Usage]:
    result = function(*task)
    return result, Usage(os.getpid(), time.process_time(), peak_bytes())


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    try:
        # Unlike ru_maxrss this does not count the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:", 1)[1].split(None, 1)[0]) * 1024
    except (OSError, IndexError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
