"""Cases as people read them."""

from collections.abc import Iterable, Sequence

from dqrm.bench.exchange.bars import JUDGED, Verdict
from dqrm.bench.exchange.messages import LARGE, LARGE_BYTES
from dqrm.bench.exchange.plan import Case, Measured
from dqrm.bench.exchange.steps import ALONE

Table = tuple[list[str], list[list[str]]]


def reference(case: Case) -> Measured | None:
    """Return the contestant whose time others are compared with."""
    if case.part == "rows":
        return case.of(f"{JUDGED}, {case.backend}")
    return case.of(ALONE) if case.part == "steps" else None


def title(case: Case) -> str:
    """Name a case in a line."""
    what = {
        "rows": "exchange of touched rows, from pooled gradients to updated tables",
        "messages": "collectives on their own",
        "steps": "whole training steps",
    }[case.part]
    parts = [what, f"{case.processes} processes over {case.backend}"]
    if case.network:
        parts.append(f"a machine each, joined at {case.network}")
    if case.batch:
        parts.append(f"batch {case.batch} each, {case.indices} ids")
    if case.touched_rows:
        parts.append(f"{case.touched_rows:,.0f} distinct rows")
    return ", ".join(parts)


def case_table(case: Case) -> Table:
    """Return the header and the lines of a case: everybody's time and bytes."""
    base = reference(case)
    counted = any(found.sent_bytes for found in case.measured)
    calculated = any(found.formula_bytes for found in case.measured)
    seen = any(found.interface_bytes for found in case.measured)
    header = ["", "wall ms", "quartiles", "least", "CPU ms"]
    header += [] if base is None else [f"of {base.name}"]
    header += ["kB sent"] if counted else []
    header += ["calculated kB"] if calculated else []
    header += ["interface kB", "headers kB"] if seen else []
    lines = []
    for found in case.measured:
        wall = found.wall
        line = [
            found.name,
            f"{1e3 * wall.median:.3f}",
            f"{1e3 * wall.lower_quartile:.3f}-{1e3 * wall.upper_quartile:.3f}",
            f"{1e3 * wall.smallest:.3f}",
            f"{1e3 * found.cpu.median:.3f}",
        ]
        if base is not None:
            line.append(f"{found.slower_than(base).median:.2f}x")
        if counted:
            line.append(_kilobytes(found.sent_bytes))
        if calculated:
            line.append(_kilobytes(found.formula_bytes))
        if seen:
            line += [_kilobytes(found.interface_bytes), _kilobytes(found.header_bytes)]
        lines.append(line)
    return header, lines


def phase_table(case: Case) -> Table:
    """Return the header and the lines of where the time of each contestant goes."""
    telling = [found for found in case.measured if found.phases]
    names = list(dict.fromkeys(name for found in telling for name in found.phases))
    lines = [
        [found.name, *(_milliseconds(found.phases.get(name)) for name in names)]
        for found in telling
    ]
    return ["ms of a call, rank 0", *names], lines


BAR_HEADER = ["", "ours", "against", "is", "to reach", ""]


def bar_lines(found: Iterable[Verdict]) -> list[list[str]]:
    """Return a line for every bar that was measured."""
    return [
        [
            bar.key,
            bar.ours,
            bar.against or "-",
            _value(bar, bar.value),
            ("<= " if bar.at_most else ">= ") + _value(bar, bar.bound),
            "met" if bar.met else "short",
        ]
        for bar in found
    ]


def dense_on_paper(cases: Sequence[Case]) -> list[str]:
    """Return what an all-reduce of the tables' whole gradient would take, in words."""
    large = [
        found
        for case in cases
        for found in case.measured
        if case.part == "messages" and found.name.startswith(LARGE)
    ]
    lines = []
    for case in cases:
        ours = reference(case) if case.part == "rows" else None
        if ours is None or not ours.sent_bytes:
            continue
        share = 2 * (case.processes - 1) / case.processes
        dense = share * 4 * case.dim * case.rows
        line = (
            f"{case.key}: an all-reduce of all {case.rows:,} rows would send {dense / 1e6:,.0f} MB"
            f" a rank, {dense / ours.sent_bytes:,.0f} times ours"
        )
        if large:
            best = min(large, key=lambda found: found.wall.median)
            seconds = dense / (share * LARGE_BYTES / best.wall.median)
            line += (
                f"; at the rate of {best.name} that is {1e3 * seconds:,.0f} ms, "
                f"{seconds / ours.wall.median:,.0f} times ours"
            )
        lines.append(line)
    return lines


def _value(bar: Verdict, value: float) -> str:
    if bar.quantity == "seconds":
        return f"{1e3 * value:.2f} ms"
    if bar.quantity == "interface":
        return f"{100 * value:.2f} % off"
    return f"{value:.2f}x {'fewer bytes' if bar.quantity == 'bytes' else 'faster'}"


def _kilobytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e3:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"
