"""What the exchange is to reach, and whether it does."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from dqrm.bench.exchange.plan import Case, Measured, Part
from dqrm.bench.exchange.steps import ALONE, CODECS

JUDGED = "INT8 with residuals"
SPARSE = "sparse all-reduce"
GATHERS = ("raw FP32 gather", "distinct FP32 gather")
QUANTIZED = "INT8 rows, INT8 MLPs"
Quantity = Literal["time", "bytes", "seconds", "interface"]


@dataclass(frozen=True)
class Bar:
    """What a contestant of ours is to reach.

    Names are without the backend, which is the world's; of rivals the fastest counts.
    """

    part: Part
    quantity: Quantity
    """time: how many times faster than the rivals. bytes: how many times fewer. seconds: of one
    call. interface: how far the bytes that the network interface counted may be from the meter's.
    """
    bound: float
    ours: tuple[str, ...]
    against: tuple[str, ...] = ()
    batch: int | None = None
    """None holds at every batch size."""
    network: str | None = None
    """None holds everywhere, "" on loopback only."""
    processes: int | None = None

    @property
    def at_most(self) -> bool:
        """Whether the bound is one from above."""
        return self.quantity in ("seconds", "interface")


_ROWS = ("INT8 with residuals", "INT8")
BARS = (
    Bar("rows", "time", 10.0, _ROWS, (SPARSE,), batch=2048, network=""),
    Bar("rows", "time", 2.0, _ROWS, GATHERS, batch=2048, network=""),
    Bar("rows", "bytes", 5.0, ("INT8", "INT4 with residuals"), (SPARSE,), batch=2048),
    Bar("rows", "seconds", 2e-3, _ROWS, batch=2048, network=""),
    Bar("rows", "time", 4.0, _ROWS, (SPARSE,), batch=128, network=""),
    Bar("rows", "seconds", 0.6e-3, _ROWS, batch=128, network=""),
    Bar("steps", "time", 1 / 1.2, (QUANTIZED,), (ALONE,), batch=2048, network="", processes=2),
    Bar("rows", "time", 2.0, _ROWS, ("FP32",), batch=2048, network="1gbit"),
    Bar("rows", "interface", 0.02, (*_ROWS, "INT4 with residuals", "FP32"), batch=2048),
    Bar("steps", "interface", 0.02, tuple(CODECS), batch=2048),
)


@dataclass(frozen=True)
class Verdict:
    """A bar beside what was measured."""

    key: str
    """Of the case."""
    quantity: Quantity
    ours: str
    against: str
    value: float
    bound: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether the bar is reached."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def verdicts(cases: Iterable[Case]) -> Iterator[Verdict]:
    """Yield every bar that was measured."""
    for case in cases:
        for bar in BARS:
            if (
                bar.part != case.part
                or bar.batch not in (None, case.batch)
                or bar.network not in (None, case.network)
                or bar.processes not in (None, case.processes)
            ):
                continue
            for ours in bar.ours:
                found = case.of(f"{ours}, {case.backend}") or case.of(ours)
                rivals = [m for m in case.measured if m.name.partition(", ")[0] in bar.against]
                rivals += [m for m in case.measured if m.name in bar.against and m not in rivals]
                verdict = None if found is None else _judge(bar, case.key, found, rivals)
                if verdict is not None:
                    yield verdict


def _judge(bar: Bar, key: str, ours: Measured, rivals: list[Measured]) -> Verdict | None:
    value, against = None, ""
    if bar.quantity == "seconds":
        value = ours.wall.median
    elif bar.quantity == "interface" and ours.interface_bytes and ours.sent_bytes:
        value = abs(ours.interface_bytes / ours.sent_bytes - 1)
    elif bar.quantity == "time" and rivals:
        best = min(rivals, key=lambda rival: rival.wall.median)
        value, against = best.slower_than(ours).median, best.name
    elif bar.quantity == "bytes" and rivals and ours.sent_bytes:
        least = min(rivals, key=lambda rival: rival.formula_bytes or 0.0)
        if least.formula_bytes:
            value, against = least.formula_bytes / ours.sent_bytes, least.name
    if value is None:
        return None
    return Verdict(key, bar.quantity, ours.name, against, value, bar.bound, bar.at_most)
