"""The time by which schedules are kept: that of the machine, or a faster one for a rehearsal.

``DQRM_JOBS_CLOCK="2026-11-01T00:00:00+00:00 @ 1795000000 x 86400"`` lets it be the first date at
that second since 1970 of the machine, and lets a day pass in every second from then on. A server
that is started again with the same value goes on in the same time.
"""

import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

VARIABLE = "DQRM_JOBS_CLOCK"

_TEXT = re.compile(r"(\S+) @ ([0-9.]+) x ([0-9.]+)")


@dataclass(frozen=True)
class Clock:
    """Shows ``start`` at the machine's ``origin`` and runs at ``speed`` times its pace."""

    start: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    origin: float = 0.0
    """Seconds since 1970."""
    speed: float = 1.0

    @classmethod
    def from_environment(cls) -> Self:
        """The clock that the variable sets, or that of the machine."""
        text = os.environ.get(VARIABLE)
        if not text:
            return cls()
        match = _TEXT.fullmatch(text.strip())
        try:
            if match is None:
                raise ValueError
            start = datetime.fromisoformat(match[1])
            speed = float(match[3])
            if start.tzinfo is None or speed <= 0:
                raise ValueError
            return cls(start, float(match[2]), speed)
        except ValueError:
            raise ValueError(
                f"{VARIABLE}={text}: write TIME+00:00 @ SECONDS x SPEED, where SECONDS since 1970 "
                "is when the clock shows TIME"
            ) from None

    def now(self) -> datetime:
        """The time, in UTC."""
        passed = (time.time() - self.origin) * self.speed
        return (self.start + timedelta(seconds=passed)).astimezone(UTC)

    def seconds_until(self, moment: datetime) -> float:
        """Seconds of the machine until ``moment``; negative when it has passed."""
        return (moment - self.now()).total_seconds() / self.speed
