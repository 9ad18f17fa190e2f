"""Runs groups over shapes, batch sizes, index distributions and thread counts."""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from dqrm.bench.speed.bars import Verdict, verdicts
from dqrm.bench.speed.contestants import Contestant, Entry, Phased, Role, Unavailable
from dqrm.bench.speed.groups import Group
from dqrm.bench.speed.pages import huge_page_bytes, huge_pages_forced
from dqrm.bench.speed.peers import peer_versions
from dqrm.bench.speed.timing import Runner, Spread, Timing, take_turns
from dqrm.bench.speed.traffic import (
    RING_LOOKUPS,
    IndexKind,
    Traffic,
    default_max_rows,
    make_traffic,
)
from dqrm.runtime import available_memory_bytes
from dqrm.tracking.environment import environment_tags

log = logging.getLogger(__name__)

_GIB = 1024**3
_SPARE_BYTES = 1 * _GIB
"""Left to batches, activations and the system when tables are built."""


@dataclass(frozen=True)
class Plan:
    """What to measure and how long."""

    batches: tuple[int, ...] = (128, 2048)
    dims: tuple[int, ...] = (16,)
    kinds: tuple[IndexKind, ...] = ("uniform", "zipf")
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 15
    scale: float = 1.0
    """Share of each table's rows."""
    max_rows: int | None = None
    """Largest table; None is ``default_max_rows``."""
    seed: int = 0
    turn_seconds: float = 0.02
    ring_lookups: int = RING_LOOKUPS


@dataclass(frozen=True)
class Measured:
    """One contestant of a case."""

    name: str
    role: Role
    cpu: Spread
    """Seconds of one call, all threads together."""
    wall: Spread
    rate_per_cpu_second: float
    """Units of work a CPU-second, at the median."""
    rate_per_second: float
    """Units of work a wall second, at the median."""
    gigabytes_per_second: float | None
    """Bytes of looked-up rows moved a wall second; None where no rows are looked up."""
    slower_than: dict[str, Spread]
    """For each of ours that ran, this one's CPU time over its, round by round."""
    timing: Timing
    phases: dict[str, float]
    """CPU seconds of each part of one call, where the contestant can tell."""


@dataclass
class Case:
    """All contestants on the same work."""

    group: str
    title: str
    unit: str
    batch: int
    dim: int
    indices: IndexKind | None
    threads: int
    tables: int
    rows: int
    work_per_call: float
    measured: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Who did not take part, and why."""
    bars: list[Verdict] = field(default_factory=list)
    huge_page_bytes: int = 0
    """Memory of the process that lay in huge pages."""

    @property
    def label(self) -> str:
        """Name the case in a line."""
        parts = [self.title, f"d={self.dim}", f"batch {self.batch}"]
        if self.indices is not None:
            parts.append(f"{self.indices} ids")
        parts.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join(parts)

    @property
    def key(self) -> str:
        """Name the case in the record."""
        parts = [
            self.group,
            f"d{self.dim}",
            f"b{self.batch}",
            self.indices or "",
            f"t{self.threads}",
        ]
        return "/".join(part for part in parts if part)


def environment(plan: Plan) -> dict[str, Any]:
    """Return what a report must say: versions, processor, date, load, memory pages, settings."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tags": environment_tags(),
        "peers": peer_versions(),
        "load_average": os.getloadavg(),
        "huge_pages_forced": huge_pages_forced(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "plan": asdict(plan),
    }


def run_study(
    groups: Sequence[Group],
    plan: Plan,
    *,
    progress: Callable[[str, int, int], None],
    only: Sequence[str] = (),
) -> Iterator[Case]:
    """Measure, and yield every case as it is done.

    The contestants of a group are built once for each width, take turns on all traffic, and are
    let go before the next group.

    Args:
        groups: what to compare.
        plan: how.
        progress: told what is done, how many turns of how many.
        only: names of contestants; by default all.
    """
    for group in groups:
        for dim in plan.dims:
            shape = group.tables(dim, plan.scale, plan.max_rows or default_max_rows(dim))
            entries = [entry for entry in group.entries(shape) if not only or entry.name in only]
            built, skipped = _build(entries)
            try:
                for batch in plan.batches:
                    for kind in plan.kinds if group.skewed else plan.kinds[:1]:
                        traffic = make_traffic(
                            shape, batch * group.bags, kind, plan.seed, plan.ring_lookups
                        )
                        for threads in plan.threads:
                            case = _case(group, batch, traffic, threads, skipped)
                            _measure(case, group, built, traffic, plan, progress)
                            yield case
            finally:
                # A generator that holds on to tables would keep the next ones from fitting.
                built.clear()
                gc.collect()


def _build(entries: Sequence[Entry]) -> tuple[list[tuple[Entry, Contestant]], dict[str, str]]:
    built: list[tuple[Entry, Contestant]] = []
    skipped: dict[str, str] = {}
    for entry in entries:
        free = available_memory_bytes()
        if free is not None and entry.bytes_needed + _SPARE_BYTES > free:
            skipped[entry.name] = (
                f"needs {entry.bytes_needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free"
            )
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside peers
                built.append((entry, entry.build()))
        except Unavailable as error:
            skipped[entry.name] = str(error)
    for name, reason in skipped.items():
        log.warning("%s is left out: %s", name, reason)
    return built, skipped


def _case(
    group: Group, batch: int, traffic: Traffic, threads: int, skipped: dict[str, str]
) -> Case:
    return Case(
        group=group.name,
        title=group.title,
        unit=group.unit,
        batch=batch,
        dim=traffic.shape.dim,
        indices=traffic.kind if group.skewed else None,
        threads=threads,
        tables=len(traffic.shape.rows),
        rows=traffic.shape.total_rows,
        work_per_call=group.work(traffic),
        skipped=dict(skipped),
    )


def _measure(
    case: Case,
    group: Group,
    built: Sequence[tuple[Entry, Contestant]],
    traffic: Traffic,
    plan: Plan,
    progress: Callable[[str, int, int], None],
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runners = [Runner(entry.name, contestant.start(traffic)) for entry, contestant in built]
            timings = take_turns(
                runners,
                rounds=plan.rounds,
                turn_seconds=plan.turn_seconds,
                seed=plan.seed,
                progress=lambda done, total: progress(case.key, done, total),
            )
            phases = {
                runner.name: contestant.phases(runner.call)
                for runner, (_, contestant) in zip(runners, built, strict=True)
                if isinstance(contestant, Phased)
            }
    finally:
        torch.set_num_threads(before)
    case.huge_page_bytes = huge_page_bytes()
    ours = {
        entry.name: timing
        for (entry, _), timing in zip(built, timings, strict=True)
        if entry.role == "ours"
    }
    for (entry, _), timing in zip(built, timings, strict=True):
        cpu, wall = Spread.of(timing.cpu_seconds), Spread.of(timing.wall_seconds)
        moved = traffic.lookups * entry.row_bytes * group.row_passes
        if entry.role == "limit":
            moved = traffic.lookups * entry.row_bytes
        case.measured.append(
            Measured(
                name=entry.name,
                role=entry.role,
                cpu=cpu,
                wall=wall,
                rate_per_cpu_second=case.work_per_call / cpu.median,
                rate_per_second=case.work_per_call / wall.median,
                gigabytes_per_second=moved / wall.median / 1e9 if moved else None,
                slower_than={
                    name: Spread.of(
                        [
                            theirs / own
                            for theirs, own in zip(
                                timing.cpu_seconds, reference.cpu_seconds, strict=True
                            )
                        ]
                    )
                    for name, reference in ours.items()
                    if name != entry.name
                },
                timing=timing,
                phases=phases.get(entry.name, {}),
            )
        )
    medians = {found.name: found.cpu.median for found in case.measured}
    peers = [found.name for found in case.measured if found.role == "peer"]
    case.bars = verdicts(case.group, case.batch, case.dim, medians, peers)
