"""Schedules in the five fields of cron, which all schedulers read."""

import re
from collections.abc import Sequence
from datetime import timedelta

from dqrm.pipelines.jobs.config import Job
from dqrm.pipelines.jobs.schedule import MONTHS, WEEKDAYS, cron_fields


def crontab_fields(name: str, job: Job) -> tuple[str, str, str, str, str]:
    """The schedule of a job in five fields, in its own time zone.

    Raises ValueError for an interval that five fields cannot say.
    """
    schedule = job.schedule
    if schedule.cron is not None:
        minute, hour, day, month, weekday = cron_fields(schedule.cron)
        # Not every cron takes names in lists and ranges.
        month = _numbered(month, MONTHS, 1)
        return (minute, hour, day, month, _numbered(weekday, WEEKDAYS, 0))
    assert schedule.every is not None
    minutes, rest = divmod(schedule.every, timedelta(minutes=1))
    if not rest:
        if minutes == 1:
            return "*", "*", "*", "*", "*"
        if minutes < 60 and 60 % minutes == 0:
            return f"*/{minutes}", "*", "*", "*", "*"
        hours, rest_minutes = divmod(minutes, 60)
        if hours == 1 and not rest_minutes:
            return "0", "*", "*", "*", "*"
        if hours and not rest_minutes and hours < 24 and 24 % hours == 0:
            return "0", f"*/{hours}", "*", "*", "*"
        if minutes == 24 * 60:
            return "0", "0", "*", "*", "*"
        if minutes == 7 * 24 * 60:  # 1 January 1970 was a Thursday
            return "0", "0", "*", "*", "4"
    raise ValueError(
        f"jobs.{name}.schedule.every: only parts of an hour or a day, a day and a week can be said "
        "in the five fields of cron"
    )


def _numbered(field: str, names: Sequence[str], first: int) -> str:
    return re.sub("[a-z]+", lambda match: str(names.index(match[0]) + first), field)


def zone(job: Job) -> str:
    """Time zone of the fields."""
    return job.schedule.timezone if job.schedule.cron is not None else "UTC"
