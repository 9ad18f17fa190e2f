"""Where values lie along an axis, and which of them are written there."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "log", "root"]

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_ROOT_TICKS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Scale:
    """Maps values from ``low`` to ``high`` onto 0 to 1."""

    kind: Kind
    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at ``low`` and 1 at ``high``."""
        low, high, at = (self._bent(number) for number in (self.low, self.high, value))
        return (at - low) / (high - low)

    def _bent(self, value: float) -> float:
        match self.kind:
            case "log":
                return math.log10(value)
            case "root":
                return math.sqrt(max(value, 0.0))
        return value


def linear(values: Iterable[float], *, count: int = 5, include: Sequence[float] = ()) -> Scale:
    """Return a scale over the values with some air, and about ``count`` round ticks.

    Args:
        values: finite; at least one.
        count: of ticks.
        include: values that have to be on the axis, which begins or ends there.
    """
    found = [*values, *include]
    low, high = min(found), max(found)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (
        low if low in include else low - air,
        high if high in include else high + air,
    )
    step = _round_step((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Scale("linear", low, high, tuple(step * number for number in range(first, last + 1)))


def whole(values: Iterable[float], *, count: int = 6) -> Scale:
    """Return a scale from zero over whole numbers, such as epochs."""
    high = max(max(values), 1.0)
    step = max(1.0, _round_step(high / count))
    step = math.ceil(step)
    ticks = tuple(float(n) for n in range(0, math.floor(high + 1e-9) + 1, step))
    return Scale("linear", 0.0, 1.03 * high, ticks)


def logarithmic(values: Iterable[float], doubling: float = 10.0) -> Scale:
    """Return a scale for values above zero, ticks at 1, 2 and 5 times the powers of ten.

    Args:
        values: above zero; at least one.
        doubling: 2.0 puts the ticks on powers of two, as bytes are counted.
    """
    found = list(values)
    low, high = min(found), max(found)
    ratio = max(high / low, 2.0) ** 0.12
    low, high = low / ratio, high * ratio
    if doubling == 2.0:
        first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
        every = max(1, math.ceil((last - first + 1) / 5))
        ticks = [2.0**n for n in range(first, last + 1) if n % every == 0]
    else:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = (1, 2, 5) if high / low < 300 else (1,)
        ticks = [step * 10.0**n for n in range(first, last + 1) for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    return Scale("log", low, high, tuple(inside or dict.fromkeys((min(found), max(found)))))


def root(high: float) -> Scale:
    """Return a scale from zero on which small shares have more room than large ones."""
    top = min(1.0, high * 1.05)
    ticks = [tick for tick in _ROOT_TICKS if tick <= top]
    return Scale("root", 0.0, top, tuple(ticks))


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * min((s for s in _STEPS if s * power >= step * 0.999), default=10.0)


def plain(scale: Scale) -> Callable[[float], str]:
    """Return how ticks of a scale are written, with as many digits as tell them apart."""
    gaps = [b - a for a, b in zip(scale.ticks, scale.ticks[1:], strict=False)]
    gap = min(gaps, default=1.0)
    digits = next((n for n in range(7) if abs(round(gap, n) - gap) < 1e-3 * gap), 6)
    if scale.kind == "root":
        return lambda value: f"{value:g}"
    return lambda value: f"{value:,.{digits}f}"
