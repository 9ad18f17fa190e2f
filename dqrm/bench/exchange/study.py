"""Starts the workers of a study on this machine, a core each, and reads what they measured."""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dqrm.bench.exchange.plan import Case, Plan
from dqrm.bench.speed.traffic import kaggle_shape
from dqrm.comm.backends import probe_oneccl
from dqrm.launch import start_workers
from dqrm.runtime import available_cores, available_memory_bytes

log = logging.getLogger(__name__)

MODULE = "dqrm.bench.exchange.worker"
_GIB = 1024**3
_BESIDE_TABLES = 1.5 * _GIB
"""Of each process: torch, batches, buffers."""


def usable_backends(wanted: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Return which of the backends can be used, and why the others cannot."""
    if "ccl" not in wanted:
        return tuple(wanted), ""
    found = probe_oneccl()
    if found.usable:
        return tuple(wanted), ""
    return tuple(name for name in wanted if name != "ccl"), f"ccl: left out: {found.detail}"


def check_room(plan: Plan, processes: int) -> None:
    """Refuse a plan whose tables do not fit.

    Raises:
        ValueError: they do not.
    """
    need = processes * (kaggle_shape(plan.dim, plan.scale, None).fp32_bytes + _BESIDE_TABLES)
    free = available_memory_bytes()
    if free is not None and need > free:
        raise ValueError(
            f"{processes} processes with tables of their own need {need / _GIB:.1f} GiB, "
            f"{free / _GIB:.1f} GiB are free: make the tables smaller with --scale"
        )


def run_exchange(plan: Plan, processes: int) -> Iterator[list[Case]]:
    """Measure part by part, each in a world of its own, and yield the cases of each.

    Raises:
        ValueError: the tables do not fit into memory.
        RuntimeError: a worker failed; it has said why.
    """
    check_room(plan, processes)
    cores = available_cores()
    if cores.count < processes:
        log.warning(
            "%d processes share %d cores (%s): times will be those of waiting",
            processes, cores.count, cores.reason,
        )  # fmt: skip
    for part in plan.parts:
        with tempfile.TemporaryDirectory(prefix="dqrm-exchange-") as folder:
            files = Path(folder) / "plan.json", Path(folder) / "cases.json"
            replace(plan, parts=(part,)).write(files[0])
            code = start_workers(processes, [str(file) for file in files], module=MODULE)
            if code:
                raise RuntimeError(f"{part}: a worker ended with exit code {code}")
            yield read_cases(files[1])


def read_cases(path: Path) -> list[Case]:
    """Return what rank 0 wrote."""
    return [Case.from_dict(plain) for plain in json.loads(path.read_text(encoding="utf-8"))]
