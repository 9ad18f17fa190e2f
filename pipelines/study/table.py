"""Sums over seeds and tasks: a row for the baseline and for each arm."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dqrm.pipelines.study.run import BASELINE_LABEL, Measured

LATENCY = "1x64/1_thread"
"""Batch and threads of the latency that rows show."""


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of the sample; None of a single seed."""
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return that of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Row:
    """An arm, or the baseline."""

    arm: str
    quality: dict[str, Spread]
    """By task, its metric on the test rows, in hundredths."""
    to_baseline: dict[str, Spread]
    """By task, by how much that is more than the baseline's of the same seed."""
    encoder_bytes: float
    """Mean over tasks and seeds, as are all others."""
    times_smaller: float
    minutes: float
    latency_ms: float | None
    """Of a batch of one sentence, on one thread; None where none was measured."""
    times_faster: dict[str, float]
    """Than the baseline in fp32 and bf16."""


def rows(measured: Iterable[Measured], tasks: Sequence[str], arms: Sequence[str]) -> list[Row]:
    """Compare what was measured: the baseline, then arms in their order; empty without a baseline.

    Of what was not measured there is no row. An arm is held against the baseline seed by seed;
    seeds that one of them lacks are left out of the difference.
    """
    everything = list(measured)
    base = {(m.task, m.seed): m for m in everything if m.arm == BASELINE_LABEL}
    if not base:
        return []
    base_bytes = statistics.fmean(m.encoder_bytes for m in base.values())
    made = []
    for label in (BASELINE_LABEL, *arms):
        own = [m for m in everything if m.arm == label]
        if not own:
            continue
        size = statistics.fmean(m.encoder_bytes for m in own)
        timed = [m.latency[LATENCY] for m in own if LATENCY in m.latency]
        made.append(
            Row(
                arm=label,
                quality=_by_task(own, tasks, lambda m: 100 * m.metric),
                to_baseline=_by_task(
                    [m for m in own if label != BASELINE_LABEL and (m.task, m.seed) in base],
                    tasks,
                    lambda m: 100 * (m.metric - base[m.task, m.seed].metric),
                ),
                encoder_bytes=size,
                times_smaller=base_bytes / size,
                minutes=statistics.fmean(m.seconds for m in own) / 60,
                latency_ms=statistics.fmean(t["lowered_ms"] for t in timed) if timed else None,
                times_faster={
                    name: statistics.geometric_mean(t[f"times_{name}"] for t in timed)
                    for name in ("fp32", "bf16")
                    if timed
                },
            )
        )
    return made


def _by_task(
    measured: list[Measured], tasks: Sequence[str], value: Callable[[Measured], float]
) -> dict[str, Spread]:
    found = {task: [value(m) for m in measured if m.task == task] for task in tasks}
    return {task: Spread.of(values) for task, values in found.items() if values}
