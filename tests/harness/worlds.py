"""Runs functions as the ranks of a world of real processes, under a watchdog.

    from worlds import run_world

    def rows_agree(rank: int, world_size: int, *, rows: int) -> float:
        total = torch.ones(rows)
        dist.all_reduce(total)
        torch.testing.assert_close(total, torch.full((rows,), float(world_size)))
        return total.sum().item()

    def test_rows_agree() -> None:
        assert run_world(rows_agree, 2, backend="gloo", rows=5) == [10.0, 10.0]

The function must be at the top level of its module, which every rank imports from its file. It is
called with a default process group, one torch thread, and torchrun's variables set (RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). What it returns is pickled. An
exception, an exit or a hang in any rank fails the test with the tracebacks and the output of every
rank. Ranks are forked from a server that has torch imported already, so that a world costs tens of
milliseconds and no import; start a world once all the same, and check many things in it.

`run_ranks` is for worlds in which ranks are meant to fail: it returns what became of each.
"""

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

_PRELOADED = [
    *("torch", "torch.distributed", "torch.nn.parallel", "numpy", "pytest"),
    "dqrm.training.run",
]
# Hung ranks write where they hang this long before they are killed.
_LAST_WORDS_SECONDS = 2.0


class WorldError(AssertionError):
    """A rank did not return; the message holds what every rank said."""


@dataclass(frozen=True)
class Outcome:
    """What became of one rank."""

    rank: int
    result: Any
    """What the function returned; None when it did not return."""
    error: str | None
    """The traceback of what it raised."""
    exit_code: int | None
    """0 after returning, 1 after raising, minus the signal's number, None when it had to be killed
    for hanging."""
    seconds: float
    """From the first call of the function in any rank to the end of this one, 0.1 s exact."""
    output: str
    """What the rank wrote to its standard streams."""

    @property
    def returned(self) -> bool:
        """Whether the function returned."""
        return self.exit_code == 0 and self.error is None


def run_world(
    function: Callable[..., Any],
    world_size: int,
    *,
    backend: str | None = "gloo",
    timeout: float = 60.0,
    operation_timeout: float = 20.0,
    environment: Mapping[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Call ``function(rank, world_size, **arguments)`` in every rank and return their results.

    Args:
        function: at the top level of a module that has a file.
        world_size: number of processes.
        backend: of the default process group, as in `dqrm.comm.process_group.init`; None calls the
            function without a process group.
        timeout: seconds after which the ranks are killed and the test fails.
        operation_timeout: seconds that the process group waits for other ranks.
        environment: variables set in every rank before anything else.
        arguments: pickled and passed on.

    Raises WorldError when a rank raised, died or hung.
    """
    outcomes = run_ranks(
        function,
        world_size,
        backend=backend,
        timeout=timeout,
        operation_timeout=operation_timeout,
        environment=environment,
        **arguments,
    )
    if not all(outcome.returned for outcome in outcomes):
        raise WorldError(_report(function, timeout, outcomes))
    return [outcome.result for outcome in outcomes]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *,
    backend: str | None = "gloo",
    timeout: float = 60.0,
    operation_timeout: float = 20.0,
    environment: Mapping[str, str] | None = None,
    **arguments: Any,
) -> list[Outcome]:
    """Like `run_world`, but return the outcome of every rank, whatever it is."""
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # Held by this process, as torchrun's agent holds it: it outlives any rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        world = _World(
            Path(folder), world_size, store.port, backend, timeout, operation_timeout,
            dict(environment or {}), _source_of(function), arguments,
        )  # fmt: skip
        return _supervise(context, world)


@dataclass(frozen=True)
class _Source:
    """Where ranks find the function: pytest's module names cannot be imported elsewhere."""

    file: Path
    module: str
    name: str


@dataclass(frozen=True)
class _World:
    folder: Path
    size: int
    port: int
    backend: str | None
    timeout: float
    operation_timeout: float
    environment: dict[str, str]
    source: _Source
    arguments: dict[str, Any]


def _source_of(function: Callable[..., Any]) -> _Source:
    module = sys.modules[function.__module__]
    name = function.__qualname__
    if getattr(module, name, None) is not function or module.__file__ is None:
        raise ValueError(f"{name} is not at the top level of a module with a file")
    return _Source(Path(module.__file__).resolve(), function.__module__, name)


def _supervise(context: ForkServerContext, world: _World) -> list[Outcome]:
    processes: list[BaseProcess] = [
        context.Process(target=_rank_main, args=(world, rank)) for rank in range(world.size)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + world.timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = {rank for rank, process in enumerate(processes) if process.is_alive()}
    finally:
        for process in processes:
            if process.pid is not None and process.is_alive():
                process.kill()
        for process in processes:
            if process.pid is not None:
                process.join()
    started = [path.stat().st_mtime for path in world.folder.glob("*.started")]
    first = min(started, default=0.0)
    return [
        _outcome(world.folder, rank, None if rank in hung else process.exitcode, first)
        for rank, process in enumerate(processes)
    ]


def _outcome(folder: Path, rank: int, exit_code: int | None, first: float) -> Outcome:
    result, error, seconds = None, None, 0.0
    written = folder / f"{rank}.pickle"
    if written.exists():
        result, error = pickle.loads(written.read_bytes())
        seconds = written.stat().st_mtime - first
    log = folder / f"{rank}.log"
    output = log.read_text(errors="replace") if log.exists() else ""
    return Outcome(rank, result, error, exit_code, seconds, output)


def _rank_main(world: _World, rank: int) -> None:
    with (world.folder / f"{rank}.log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable(file=2)
    faulthandler.dump_traceback_later(max(0.1, world.timeout - _LAST_WORDS_SECONDS), file=2)
    os.environ.update(
        world.environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world.size),
        LOCAL_WORLD_SIZE=str(world.size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(world.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    outcome: tuple[Any, str | None]
    try:
        outcome = (_call(world, rank), None)
    except BaseException:
        outcome = (None, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    part = world.folder / f"{rank}.part"
    part.write_bytes(pickle.dumps(outcome))
    part.rename(world.folder / f"{rank}.pickle")
    if outcome[1] is not None:
        # After a failure nothing is torn down in order: others may wait for ever.
        os._exit(1)


def _call(world: _World, rank: int) -> Any:
    import torch
    from torch import distributed

    from dqrm.comm import process_group

    torch.set_num_threads(1)
    module = _load(world.source)
    if world.backend is not None:
        process_group.init(world.backend, timeout=world.operation_timeout)
    (world.folder / f"{rank}.started").touch()
    result = getattr(module, world.source.name)(rank, world.size, **world.arguments)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return result


def _load(source: _Source) -> ModuleType:
    if source.module in sys.modules:
        return sys.modules[source.module]
    spec = importlib.util.spec_from_file_location(source.module, source.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.module] = module
    spec.loader.exec_module(module)
    return module


def _report(function: Callable[..., Any], timeout: float, outcomes: list[Outcome]) -> str:
    parts = [f"{function.__name__} in {len(outcomes)} processes:"]
    for outcome in outcomes:
        if outcome.exit_code is None:
            state = f"hung, killed after {timeout:g} s"
        elif outcome.exit_code < 0:
            state = f"killed by {signal.Signals(-outcome.exit_code).name}"
        else:
            state = "returned" if outcome.returned else f"failed (exit {outcome.exit_code})"
        parts.append(f"--- rank {outcome.rank}: {state}")
        parts += [text.rstrip() for text in (outcome.error, outcome.output) if text]
    return "\n".join(parts)
