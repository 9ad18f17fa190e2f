"""Files that have cron, systemd or Kubernetes start jobs in place of ``dqrm jobs serve``.

Each calls ``dqrm jobs run``, so lock, retries, time-out, gate and record are the same. What a
scheduler cannot do is refused, or said in the file.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from dqrm.pipelines.jobs.config import Job
from dqrm.pipelines.jobs.schedule import MONTHS, WEEKDAYS, cron_fields
from dqrm.yaml_text import dump_document

Target = Literal["cron", "systemd", "k8s"]

URI_VARIABLE = "MLFLOW_TRACKING_URI"

_MOUNT = "/project"
_LOWEST = (0, 0, 1, 1)
_SHORTEST_DEADLINE = 10
_STOP_SECONDS = 90


@dataclass(frozen=True)
class Place:
    """Where the jobs are, for the scheduler that starts them."""

    file: Path
    """Absolute path of the file of jobs."""
    image: str | None = None
    """Container image with dqrm in it."""
    claim: str | None = None
    """Volume claim that holds the folder of the file."""

    @property
    def command(self) -> list[str]:
        """Start of the command line, with this environment's Python."""
        return [sys.executable, "-m", "dqrm", "jobs", "run"]


def export(jobs: Mapping[str, Job], to: Target, place: Place) -> dict[str, str]:
    """The files by name.

    Raises:
        ValueError: a job has a schedule or a rule that the target cannot keep.
    """
    for name, job in jobs.items():
        if job.missed == "all":
            raise ValueError(
                f"jobs.{name}.missed=all: {to} catches up on one missed run at most; choose "
                "another rule, or `dqrm jobs serve`"
            )
    targets: dict[Target, Callable[[Mapping[str, Job], Place], dict[str, str]]] = {
        "cron": _cron,
        "systemd": _systemd,
        "k8s": _kubernetes,
    }
    return targets[to](jobs, place)


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


def _zone(job: Job) -> str:
    return job.schedule.timezone if job.schedule.cron is not None else "UTC"


def _store(jobs: Mapping[str, Job]) -> str | None:
    """The store that this environment names and another would not."""
    uri = os.environ.get(URI_VARIABLE)
    used = any(job.tracking.enabled and job.tracking.uri is None for job in jobs.values())
    return uri if used and uri else None


def _cron(jobs: Mapping[str, Job], place: Place) -> dict[str, str]:
    lines = [
        "# Add these lines with `crontab -e`. Cron does not catch up on missed runs.",
        "# CRON_TZ is for cronie and its kin; other crons, Debian's among them, go by the time",
        "# zone of the machine, which must then be the one named here.",
    ]
    if store := _store(jobs):
        lines.append(f"{URI_VARIABLE}={store}")
    zone = ""
    for name, job in jobs.items():
        if _zone(job) != zone:
            zone = _zone(job)
            lines.append(f"CRON_TZ={zone}")
        command = shlex.join([*place.command, name, "--file", str(place.file)])
        # Cron ends the command at a percent sign.
        escaped = command.replace("%", r"\%")
        lines.append(f"{' '.join(crontab_fields(name, job))} {escaped}")
    return {"crontab": "\n".join(lines) + "\n"}


def _systemd(jobs: Mapping[str, Job], place: Place) -> dict[str, str]:
    files = {}
    store = _store(jobs)
    for name, job in jobs.items():
        command = " ".join(map(_unit_word, [*place.command, name, "--file", str(place.file)]))
        environment = [f"Environment={_quoted(f'{URI_VARIABLE}={store}')}"] if store else []
        files[f"dqrm-{name}.service"] = _unit(
            {
                "Unit": [f"Description=dqrm job {name}"],
                "Service": [
                    "Type=oneshot",
                    f"WorkingDirectory={_unit_path(place.file.parent)}",
                    *environment,
                    f"ExecStart={command}",
                    "TimeoutStartSec=infinity",
                    # It passes the signal on, waits for what is saved, and records the end.
                    "KillMode=mixed",
                    f"TimeoutStopSec={_STOP_SECONDS}",
                ],
            }
        )
        files[f"dqrm-{name}.timer"] = _unit(
            {
                "Unit": [f"Description=Schedule of dqrm job {name}"],
                "Timer": [
                    f"OnCalendar={on_calendar(name, job)}",
                    f"Persistent={'true' if job.missed == 'once' else 'false'}",
                    "AccuracySec=1s",
                ],
                "Install": ["WantedBy=timers.target"],
            }
        )
    return files


def on_calendar(name: str, job: Job) -> str:
    """The schedule as systemd's OnCalendar says it (systemd.time, CALENDAR EVENTS)."""
    *fields, weekday = crontab_fields(name, job)
    minute, hour, day, month = (
        ",".join(_calendar_part(part, lowest) for part in field.split(","))
        for field, lowest in zip(fields, _LOWEST, strict=True)
    )
    numbers = [] if weekday == "*" else [int(number) for number in weekday.split(",")]
    days = ",".join(WEEKDAYS[number].title() for number in numbers)
    return f"{days} *-{month}-{day} {hour}:{minute}:00 {_zone(job)}".lstrip()


def _calendar_part(part: str, lowest: int) -> str:
    span, _, step = part.partition("/")
    if step and span == "*":
        return f"{lowest}/{step}"
    return span.replace("-", "..") + (f"/{step}" if step else "")


def _unit(sections: Mapping[str, list[str]]) -> str:
    return "\n".join("\n".join([f"[{section}]", *lines, ""]) for section, lines in sections.items())


def _unit_word(word: str) -> str:
    """A word of a command line (systemd.service, COMMAND LINES)."""
    return _quoted(word.replace("$", "$$"))


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    plain = not any(letter.isspace() or letter in "\"';" for letter in word)
    return escaped if plain else f'"{escaped}"'


def _unit_path(path: Path) -> str:
    return str(path).replace("%", "%%")


def _kubernetes(jobs: Mapping[str, Job], place: Place) -> dict[str, str]:
    if place.image is None or place.claim is None:
        raise ValueError(
            "k8s needs --image, with dqrm in it, and --claim, a volume with the jobs' folder"
        )
    store = _store(jobs)
    return {
        f"dqrm-{name}.yaml": dump_document(_cron_job(name, job, place, store))
        for name, job in jobs.items()
    }


def _cron_job(name: str, job: Job, place: Place, store: str | None) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "job",
        "image": place.image,
        "command": ["dqrm", "jobs", "run", name, "--file", place.file.name],
        "workingDir": _MOUNT,
        "volumeMounts": [{"name": "project", "mountPath": _MOUNT}],
    }
    if store:
        container["env"] = [{"name": URI_VARIABLE, "value": store}]
    pod = {
        # Retries are the job's own: they are counted and recorded there.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _STOP_SECONDS,
        "containers": [container],
        "volumes": [{"name": "project", "persistentVolumeClaim": {"claimName": place.claim}}],
    }
    labels = {"app.kubernetes.io/name": "dqrm", "app.kubernetes.io/component": name}
    spec: dict[str, Any] = {
        "schedule": " ".join(crontab_fields(name, job)),
        "timeZone": _zone(job),
        # A second run waits for the first by itself.
        "concurrencyPolicy": "Forbid" if job.overlap == "skip" else "Allow",
        "jobTemplate": {
            "spec": {
                "backoffLimit": 0,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            }
        },
    }
    if job.missed == "skip":
        seconds = int(job.grace.total_seconds())
        spec["startingDeadlineSeconds"] = max(seconds, _SHORTEST_DEADLINE)
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": f"dqrm-{name}", "labels": labels},
        "spec": spec,
    }
