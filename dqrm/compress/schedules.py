"""Values that change with the step.

A schedule is a function of the step and of nothing else: a resumed run goes on with it. Bits also
depend on how sensitive a weight was found to be at the time; what that came to is a
:class:`BitsState`, which a checkpoint holds.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """A number that changes with the step."""

    def at(self, step: int) -> float:
        """Return the value in ``step`` (0-based)."""


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def at(self, step: int) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """From ``start`` in step ``first`` in a line to ``end`` in step ``last``, and so on after."""

    start: float
    end: float
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"from step {self.first} to {self.last}: must be 0 <= first <= last")

    def at(self, step: int) -> float:
        """Return the value in ``step``; ``start`` before first, ``end`` from last on."""
        if step >= self.last:
            return self.end
        share = max(0, step - self.first) / (self.last - self.first)
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class Geometric:
    """Grows by ``factor`` every step until it is ``end`` in step ``last``."""

    end: float
    factor: float
    last: int

    def at(self, step: int) -> float:
        """Return the value in ``step``."""
        return self.end * self.factor ** min(0, step - self.last)


@dataclass(frozen=True)
class MoqBits:
    """Bits that go down by one at a time, ever more slowly (DeepSpeed's MoQ).

    The thresholds are step numbers, not distances: with a period T and a factor f, bits go down in
    the steps T, 2fT, (2f)^2 T, ... after ``offset``. A sensitive weight has a larger f and keeps
    its bits for longer.
    """

    start: int
    target: int
    period: int
    offset: int = 0
    """Steps before the first; weights are not quantized in them."""
    mix_ratio: float = 0.0
    """After each change the weight is part FP32, less by this share every step; 0: not at all."""

    def __post_init__(self) -> None:
        if not 1 <= self.target <= self.start <= 16:
            raise ValueError(
                f"start={self.start}, target={self.target}: must be 1 <= target <= start <= 16"
            )
        if self.period < 1 or self.offset < 0 or not 0 <= self.mix_ratio <= 1:
            raise ValueError(
                f"period={self.period}, offset={self.offset}, mix_ratio={self.mix_ratio}: must be "
                "1 or more, 0 or more, and from 0 to 1"
            )

    @property
    def steps_to_settle(self) -> int:
        """Steps after a change of bits in which the weight is part FP32."""
        return math.ceil(1 / self.mix_ratio) - 1 if self.mix_ratio else 0

    def last_transition(self, factor: int = 1) -> int:
        """Return the first step with the target's bits and nothing of FP32.

        Args:
            factor: f, the same at every transition.
        """
        changes = self.start - self.target
        last = self.offset
        if changes:
            last += self.period * (2 * factor) ** (changes - 1)
        return last + self.steps_to_settle

    def check(self, steps: int, factor: int = 1) -> None:
        """Refuse a schedule whose last transition is past ``steps`` optimizer steps."""
        last = self.last_transition(factor)
        if last >= steps:
            raise ValueError(
                f"bits go from {self.start} to {self.target} until step {last:,} "
                f"(period={self.period}, offset={self.offset}, factor {factor}), but training has "
                f"{steps:,} steps: lower period or start, or train longer"
            )

    def begin(self) -> "BitsState":
        """Return the state before the first step."""
        return BitsState(self.start, self.period, self.offset)


@dataclass
class BitsState:
    """Where a weight is in :class:`MoqBits`."""

    bits: int
    period: int
    """Step after the offset in which bits go down next."""
    changed: int
    """Step in which they did last."""

    def advance(self, schedule: MoqBits, step: int, factor: int = 1) -> None:
        """Go on to ``step``; steps before the present one change nothing.

        Args:
            schedule: of the bits.
            step: 0-based.
            factor: f of the next threshold.
        """
        while self.bits > schedule.target and step - schedule.offset >= self.period:
            self.changed = schedule.offset + self.period
            self.bits -= 1
            self.period *= 2 * factor

    def mix(self, schedule: MoqBits, step: int) -> float:
        """Return the share of FP32 in the weight of ``step``."""
        if step < schedule.offset:
            return 1.0
        if not schedule.mix_ratio:
            return 0.0
        return max(0.0, 1.0 - schedule.mix_ratio * (step - self.changed + 1))

    def tensor(self) -> Tensor:
        """Return the state as int64 [3]."""
        return torch.tensor([self.bits, self.period, self.changed])

    @classmethod
    def of(cls, tensor: Tensor) -> "BitsState":
        """Return the state that :meth:`tensor` gave."""
        bits, period, changed = tensor.tolist()
        return cls(bits, period, changed)


def period_factor(sensitivity: float | None) -> int:
    """Return f = 1 + floor(4 lambda), 1 to 5.

    Args:
        sensitivity: lambda, the block's largest curvature as a share of the largest of all
            blocks. 0 says it could not be found and counts as 1, the most careful; None that it
            was not looked for, and f is 1.

    Raises:
        ValueError: it is not from 0 to 1.
    """
    if sensitivity is None:
        return 1
    if not 0 <= sensitivity <= 1:
        raise ValueError(f"sensitivity {sensitivity}: must be from 0 to 1")
    return 1 + math.floor(4 * (sensitivity or 1.0))
