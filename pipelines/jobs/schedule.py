"""When a job runs: a cron expression in a time zone, or a fixed interval.

Cron expressions are read by APScheduler's CronTrigger after what cron and it understand
differently is settled here: the number 0 is Sunday for cron and Monday for APScheduler, and a day
of the month beside a day of the week means either for cron and both for APScheduler and systemd,
so that one is refused.
"""

import functools
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self
from zoneinfo import ZoneInfo

from pydantic import field_validator, model_validator

from dqrm.pipelines.jobs.durations import Duration, duration_text
from dqrm.settings import Settings

if TYPE_CHECKING:
    from apscheduler.triggers.cron import CronTrigger

WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = (*("jan", "feb", "mar", "apr", "may", "jun"), *("jul", "aug", "sep", "oct", "nov", "dec"))
_FIELDS = ("minute", "hour", "day of month", "month", "day of week")
_BOUNDS = {
    "minute": (0, 59),
    "hour": (0, 23),
    "day of month": (1, 31),
    "month": (1, 12),
    "day of week": (0, 7),
}
_PART = re.compile(r"(?:(\*)|(\w+)(?:-(\w+))?)(?:/(\d+))?")
_NAMED = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

_LARGEST_CHANGE = timedelta(hours=3)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Schedule(Settings):
    """When a job runs: ``cron`` or ``every``."""

    cron: str | None = None
    """Minute, hour, day of month, month and day of week, such as "30 2 * * *"; or "@daily"."""

    every: Duration | None = None
    """A fixed interval such as 6h, counted from the midnight of UTC that began 1970."""

    timezone: str = "UTC"
    """Time zone in which ``cron`` and the dates of the parameters are meant."""

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (LookupError, OSError, ValueError):
            raise ValueError("is no time zone; write such as Europe/Berlin or UTC") from None
        return name

    @field_validator("cron")
    @classmethod
    def _cron(cls, text: str | None) -> str | None:
        if text is not None:
            cron_fields(text)
        return text

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.cron is None) == (self.every is None):
            raise ValueError("give one of cron and every")
        if self.cron is not None and next(self.after(EPOCH), None) is None:
            raise ValueError(f"cron={self.cron}: that day never comes")
        return self

    @property
    def zone(self) -> ZoneInfo:
        """The time zone."""
        return ZoneInfo(self.timezone)

    @property
    def text(self) -> str:
        """Both, as a person reads it."""
        if self.every is not None:
            return f"every {duration_text(self.every)}"
        return f"{self.cron} {self.timezone}"

    def after(self, time: datetime) -> Iterator[datetime]:
        """Times (UTC) of the schedule later than ``time``, in order.

        An hour that the clocks repeat in autumn counts once where ``cron`` names the hour; a time
        that they leave out in spring is the same time after the change.
        """
        if self.every is not None:
            number = (time - EPOCH) // self.every
            while True:
                number += 1
                yield EPOCH + number * self.every
        assert self.cron is not None
        if cron_fields(self.cron)[1].startswith("*"):
            yield from _times(self.cron, self.zone, time)
            return
        # Local times as if no clock were ever changed, then what they are in UTC: none is left
        # out, as by CronTrigger where clocks change at midnight, and none comes twice.
        local = time.astimezone(self.zone).replace(tzinfo=UTC)
        for found in _times(self.cron, ZoneInfo("UTC"), local - _LARGEST_CHANGE):
            moment = found.replace(tzinfo=self.zone).astimezone(UTC)
            if moment > time:
                time = moment
                yield moment

    def between(self, start: datetime, end: datetime) -> list[datetime]:
        """Times later than ``start`` and not later than ``end``."""
        times = []
        for time in self.after(start):
            if time > end:
                break
            times.append(time)
        return times


def cron_fields(text: str) -> tuple[str, str, str, str, str]:
    """The five fields of a cron expression, checked, with weekdays as a list of names.

    Raises ValueError saying which field is wrong.
    """
    expression = _NAMED.get(text.strip().lower(), text)
    fields = expression.lower().split()
    if len(fields) != len(_FIELDS):
        raise ValueError(f"must have five fields ({', '.join(_FIELDS)}), such as 30 2 * * *")
    for name, field in zip(_FIELDS, fields, strict=True):
        for part in field.split(","):
            _check_part(name, part)
    minute, hour, day, month, weekday = fields
    if day != "*" and weekday != "*":
        raise ValueError(
            "names both a day of the month and a day of the week, which schedulers read "
            "differently; write two jobs"
        )
    return minute, hour, day, month, _weekdays(weekday)


def _check_part(field: str, part: str) -> None:
    match = _PART.fullmatch(part)
    low, high = _BOUNDS[field]
    if match is None or (match[4] and not match[1] and not match[3]):
        raise ValueError(f"{field}: {part} is not understood; write such as *, 5, 1-5, */15 or 1,3")
    if match[4] and not 1 <= int(match[4]) <= high:
        raise ValueError(f"{field}: a step is from 1 to {high}, not {match[4]}")
    ends = [_number(field, text) for text in match.group(2, 3) if text is not None]
    if any(not low <= number <= high for number in ends):
        raise ValueError(f"{field}: must be from {low} to {high}, not {part}")
    if ends != sorted(ends):
        raise ValueError(f"{field}: {part} ends before it begins")


def _number(field: str, text: str) -> int:
    if text.isdecimal():
        return int(text)
    names = {"month": MONTHS, "day of week": WEEKDAYS}.get(field, ())
    if text not in names:
        raise ValueError(f"{field}: {text} is not understood")
    return names.index(text) + (1 if field == "month" else 0)


def _weekdays(field: str) -> str:
    """``1-5`` as ``mon,tue,wed,thu,fri``; ``*`` stays."""
    if field == "*":
        return field
    numbers: set[int] = set()
    for part in field.split(","):
        match = _PART.fullmatch(part)
        assert match is not None
        start = 0 if match[1] else _number("day of week", match[2])
        end = 6 if match[1] else _number("day of week", match[3] or match[2])
        numbers |= {number % 7 for number in range(start, end + 1, int(match[4] or 1))}
    return ",".join(WEEKDAYS[number] for number in sorted(numbers))


def _times(cron: str, zone: ZoneInfo, after: datetime) -> Iterator[datetime]:
    trigger = _trigger(cron, zone)
    while True:
        # In UTC: adding to a local time forgets which of two equal ones it was.
        found = trigger.get_next_fire_time(None, after + timedelta(microseconds=1))
        if found is None:
            return
        after = found.astimezone(UTC)
        yield after


@functools.cache
def _trigger(text: str, zone: ZoneInfo) -> "CronTrigger":
    try:
        from apscheduler.triggers.cron import CronTrigger
    except ImportError as error:
        raise ValueError("schedules need APScheduler: pip install 'dqrm[jobs]'") from error
    expression = " ".join(cron_fields(text))
    return CronTrigger.from_crontab(expression, zone)
