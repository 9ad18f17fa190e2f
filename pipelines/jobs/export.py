"""Files that have cron, systemd or Kubernetes start jobs in place of ``dqrm jobs serve``.

Each calls ``dqrm jobs run``, so lock, retries, time-out, gate and record are the same; only a job
on several nodes trains without it. What a scheduler cannot do is refused, or said in the file.
"""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from dqrm.pipelines.jobs.config import Job, require_one_machine
from dqrm.pipelines.jobs.crontab import crontab_fields, zone
from dqrm.pipelines.jobs.kubernetes import kubernetes_files
from dqrm.pipelines.jobs.place import STOP_SECONDS, URI_VARIABLE, Place, named_store
from dqrm.pipelines.jobs.schedule import WEEKDAYS

Target = Literal["cron", "systemd", "k8s"]

_LOWEST = (0, 0, 1, 1)


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
        if to != "k8s":
            require_one_machine(name, job)
    targets: dict[Target, Callable[[Mapping[str, Job], Place], dict[str, str]]] = {
        "cron": _cron,
        "systemd": _systemd,
        "k8s": kubernetes_files,
    }
    return targets[to](jobs, place)


def _cron(jobs: Mapping[str, Job], place: Place) -> dict[str, str]:
    lines = [
        "# Add these lines with `crontab -e`. Cron does not catch up on missed runs.",
        "# CRON_TZ is for cronie and its kin; other crons, Debian's among them, go by the time",
        "# zone of the machine, which must then be the one named here.",
    ]
    if store := named_store(jobs):
        lines.append(f"{URI_VARIABLE}={store}")
    last = ""
    for name, job in jobs.items():
        if zone(job) != last:
            last = zone(job)
            lines.append(f"CRON_TZ={last}")
        command = shlex.join([*place.command, name, "--file", str(place.file)])
        # Cron ends the command at a percent sign.
        escaped = command.replace("%", r"\%")
        lines.append(f"{' '.join(crontab_fields(name, job))} {escaped}")
    return {"crontab": "\n".join(lines) + "\n"}


def _systemd(jobs: Mapping[str, Job], place: Place) -> dict[str, str]:
    files = {}
    store = named_store(jobs)
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
                    f"TimeoutStopSec={STOP_SECONDS}",
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
    return f"{days} *-{month}-{day} {hour}:{minute}:00 {zone(job)}".lstrip()


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
