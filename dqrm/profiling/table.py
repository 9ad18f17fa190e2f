"""A profile as people read it: a table of up to 100 columns, or one with everything."""

from collections.abc import Iterator

from dqrm.profiling.roofline import Machine
from dqrm.profiling.tree import Node, Profile
from dqrm.text import bytes_text, shortened, table

_NAME_LETTERS, _KIND_LETTERS = 24, 14

_ALONE = 20
"""Interruptions a second up to which a process has its cores for itself."""

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

_COLUMNS = ("module", "kind", "params", "FLOPs", "ms", "time", "self", "roof", "bound")
_ALL_COLUMNS = (
    *("module", "kind", "calls", "parameters", "params", "bytes", "MACs", "non-zero", "FLOPs"),
    *("FLOPs", "moved", "FLOP/B", "ms", "time", "self ms", "self", "GFLOP/s", "roof", "bound"),
)


def profile_text(profile: Profile, forward: str, depth: int | None, detailed: bool) -> str:
    """Return the heading, the table, and what the times are compared with.

    Args:
        profile: of a model.
        forward: what the forward was of.
        depth: levels shown; all without.
        detailed: all columns, however wide.
    """
    tree, threads = profile.tree, profile.machine.threads
    heading = (
        f"one forward of {forward}, {threads} thread{'s' if threads > 1 else ''}\n"
        f"{count_text(tree.parameters)} parameters, {bytes_text(tree.bytes)}; "
        f"{count_text(tree.macs)} MACs, {count_text(tree.flops)} FLOPs; "
        f"{bytes_text(tree.moved_bytes)} moved, {_number(tree.intensity)} FLOP/B"
    )
    row = _detailed_row if detailed else _row
    rows = [row(node, level, tree) for level, node in _walk(tree, 0, depth)]
    shown = table(_ALL_COLUMNS if detailed else _COLUMNS, rows, left=2)
    text = f"{heading}\n\n{shown}\n\n{_times(profile)}\n{_machine(profile.machine)}"
    if profile.interruptions > _ALONE:
        text += (
            f"\ninterrupted {profile.interruptions:.0f} times a second by other programs: "
            "times are too long, rates too low"
        )
    return text


def count_text(count: float) -> str:
    """``12.3M``: three digits or more, with the largest of K, M, G and T that leaves 1 or more."""
    units = ("", "K", "M", "G", "T", "P")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count /= 1000
        power += 1
    return f"{count:.0f}" if power == 0 else f"{count:.3g}{units[power]}"


def _row(node: Node, level: int, whole: Node) -> tuple[str, ...]:
    indent = "  " * level
    return (
        indent + shortened(node.name or "model", max(8, _NAME_LETTERS - len(indent))),
        shortened(node.kind, _KIND_LETTERS),
        _share(node.parameters, whole.parameters),
        _share(node.flops, whole.flops),
        _milliseconds(node.seconds),
        _share(node.seconds, whole.seconds),
        _share(node.own_seconds, whole.seconds),
        _share(node.roofline, 1, digits=0),
        node.bound or "",
    )


def _detailed_row(node: Node, level: int, whole: Node) -> tuple[str, ...]:
    return (
        "  " * level + (node.name or "model"),
        node.kind,
        str(node.calls),
        f"{node.parameters:,}",
        _share(node.parameters, whole.parameters),
        bytes_text(node.bytes),
        f"{node.macs:,}",
        _share(node.kept_macs, node.macs),
        f"{node.flops:,}",
        _share(node.flops, whole.flops),
        bytes_text(node.moved_bytes),
        _number(node.intensity),
        _milliseconds(node.seconds),
        _share(node.seconds, whole.seconds),
        _milliseconds(node.own_seconds),
        _share(node.own_seconds, whole.seconds),
        _number(node.gflops),
        _share(node.roofline, 1, digits=0),
        node.bound or "",
    )


def _times(profile: Profile) -> str:
    wall, plain = 1000 * profile.wall_seconds, 1000 * profile.plain_seconds
    inside = 1000 * (profile.tree.seconds or 0.0)
    outside = max(0.0, wall - inside)
    return (
        f"{wall:.3f} ms from outside, {plain:.3f} ms without clocks in the modules; "
        f"{outside:.3f} ms ({_share(outside, wall)}) in no module"
    )


def _machine(machine: Machine) -> str:
    peaks = ", ".join(
        f"{_TYPES.get(name, name)} {1e-9 * peak:.0f} GFLOP/s"
        for name, peak in machine.peak_flops.items()
    )
    return (
        f"roof, measured now: {peaks + '; ' if peaks else ''}memory {1e-9 * machine.bandwidth:.1f} "
        f"GB/s; a call {1e6 * machine.call_seconds:.1f} us"
    )


def _share(part: float | None, whole: float | None, digits: int = 1) -> str:
    return "" if part is None or not whole else f"{100 * part / whole:.{digits}f}%"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3f}"


def _number(value: float | None) -> str:
    return "" if not value else f"{value:.1f}"


def _walk(node: Node, level: int, depth: int | None) -> Iterator[tuple[int, Node]]:
    yield level, node
    if depth is None or level < depth:
        for child in node.children:
            yield from _walk(child, level + 1, depth)
