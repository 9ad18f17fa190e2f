"""What takes part in a comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from dqrm.bench.speed.traffic import Traffic

Role = Literal["ours", "peer", "limit"]
Call = Callable[[int], object]


class Unavailable(RuntimeError):
    """A contestant cannot take part here; the message says why, and what to do about it."""


class Contestant(Protocol):
    """Holds weights; one is used for all traffic on tables of one shape."""

    def start(self, traffic: Traffic) -> Call:
        """Prepare batches in the form this contestant likes best and return its work.

        What comes back does the work once, on the batch whose number it is given. Nothing of
        the preparation is timed.
        """


@runtime_checkable
class Phased(Protocol):
    """A contestant that can tell where its time goes."""

    def phases(self, call: Call) -> dict[str, float]:
        """Return the CPU seconds of the phases of what ``start`` returned."""


@dataclass(frozen=True)
class Entry:
    """A contestant before it is built."""

    name: str
    role: Role
    build: Callable[[], Contestant]
    """Raises Unavailable."""
    bytes_needed: int = 0
    """Memory its tables and optimizer take."""
    row_bytes: int = 0
    """Stored bytes of one row; 0 where it looks up none."""
