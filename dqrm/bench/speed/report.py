"""Studies as people read them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dqrm.bench.speed.bars import Verdict
from dqrm.bench.speed.study import Case, Measured

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def case_rows(case: Case) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of a case's table: ours, peers, the limits."""
    ours = [found.name for found in case.measured if found.role == "ours"]
    moves = any(found.gigabytes_per_second for found in case.measured)
    header = ["", "CPU ms", "quartiles", "wall ms", f"{case.unit}/CPU-s"]
    header += ["GB/s"] if moves else []
    header += [f"{name} is" for name in ours]
    lines = []
    for found in shown(case):
        line = [
            found.name,
            f"{1e3 * found.cpu.median:.3f}",
            f"{1e3 * found.cpu.lower_quartile:.3f}-{1e3 * found.cpu.upper_quartile:.3f}",
            f"{1e3 * found.wall.median:.3f}",
            rate_text(found.rate_per_cpu_second),
        ]
        if moves:
            moved = found.gigabytes_per_second
            line.append("-" if moved is None else f"{moved:.2f}")
        line += [_ratio(found, name) for name in ours]
        lines.append(line)
    return header, lines


def phase_rows(case: Case) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of where our time goes; no lines if nobody can tell."""
    telling = [found for found in shown(case) if found.phases]
    header = ["CPU ms", *(found.name for found in telling)]
    names = dict.fromkeys(name for found in telling for name in found.phases)
    return header, [
        [name, *(f"{1e3 * found.phases.get(name, 0.0):.3f}" for found in telling)] for name in names
    ]


def shown(case: Case) -> list[Measured]:
    """Return ours, then peers, each by CPU time, then the fastest of each limit."""
    by_time = sorted(case.measured, key=lambda found: found.cpu.median)
    limits: dict[str, Measured] = {}
    for found in by_time:
        if found.role == "limit":
            limits.setdefault(found.name.partition(",")[0], found)
    rest = [found for found in by_time if found.role != "limit"]
    return [*sorted(rest, key=lambda found: found.role != "ours"), *limits.values()]


def rate_text(rate: float) -> str:
    """Return ``81.7 M``: three digits and a decimal prefix."""
    factor, prefix = next((pair for pair in _PREFIXES if rate >= pair[0]), _PREFIXES[-1])
    return f"{rate / factor:.3g} {prefix}".rstrip()


def _ratio(found: Measured, name: str) -> str:
    spread = found.slower_than.get(name)
    return "-" if spread is None else f"{spread.median:.2f}x"


def bar_lines(cases: Iterable[Case]) -> list[list[str]]:
    """Return a line for every bar that was measured: case, who, against whom, ratio, verdict."""
    return [
        [
            case.key,
            bar.ours,
            bar.against,
            f"{bar.ratio:.2f}x",
            f"{bar.at_least:.2f}x" + (f", goal {bar.goal:g}x" if bar.goal else ""),
            _verdict(bar),
        ]
        for case in cases
        for bar in case.bars
    ]


BAR_HEADER = ["", "ours", "against", "is", "to reach", ""]


def _verdict(bar: Verdict) -> str:
    if not bar.met:
        return "short"
    return "goal" if bar.goal and bar.ratio >= bar.goal else "met"


def as_record(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the cases as plain values for JSON."""
    records = []
    for case in cases:
        record = {"key": case.key, **asdict(case)}
        for bar, verdict in zip(record["bars"], case.bars, strict=True):
            bar["met"] = verdict.met
        records.append(record)
    return records


def as_metrics(cases: Iterable[Case]) -> dict[str, float]:
    """Return what MLflow charts: for each case and contestant its CPU time and rate."""
    metrics: dict[str, float] = {}
    for case in cases:
        for found in case.measured:
            name = "".join(c if c.isalnum() or c in "-." else "_" for c in found.name)
            metrics[f"{case.key}/{name}/cpu_seconds"] = found.cpu.median
            metrics[f"{case.key}/{name}/wall_seconds"] = found.wall.median
            metrics[f"{case.key}/{name}/per_cpu_second"] = found.rate_per_cpu_second
    return metrics
