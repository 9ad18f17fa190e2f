"""The file of jobs.

    jobs:
      nightly:
        schedule: {cron: "30 2 * * *", timezone: Europe/Berlin}
        pipeline: clicks.yaml
        overrides: ["stages.train.settings.data.path=data/{{ yesterday }}"]
        timeout: 4h
        retries: {times: 2, wait: 5m}
        gate: {metric: train/test/auc, at_least: 0.79}
        on_failure: {webhook: "https://chat.example.org/hook"}

Paths in it, and the folder of MLflow's default store, are relative to the folder of the file, as
schedulers start commands wherever they like.
"""

import re
import shlex
from datetime import date
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from dqrm.configuration import ConfigError, load
from dqrm.pipelines.jobs.durations import Duration, parse_duration
from dqrm.pipelines.jobs.schedule import Schedule
from dqrm.pipelines.jobs.templates import render
from dqrm.settings import Settings
from dqrm.tracking.config import TrackingConfig

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,50}[a-z0-9])?")
TRAIN = ("dqrm", "train")
"""How the command of a job on several nodes begins."""

_SAMPLE_DAY = date(2026, 1, 1)


class Retries(Settings):
    """What to do when a run fails."""

    times: NonNegativeInt = 0
    """How often to try again; 0 gives up at once."""

    wait: Duration = parse_duration("1m")
    """How long to wait before the first time."""

    factor: float = Field(default=2.0, ge=1)
    """How many times longer each further wait is."""


class Gate(Settings):
    """What a metric of the run must reach; a run that does not reach it has failed."""

    metric: str
    """Name in MLflow, such as train/test/auc."""

    at_least: float | None = None
    """Least value that is good enough."""

    at_most: float | None = None
    """Largest value that is good enough."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least or at_most")
        return self

    def met(self, value: float) -> bool:
        """Whether ``value`` is good enough; NaN never is."""
        low = value >= self.at_least if self.at_least is not None else True
        return low and (value <= self.at_most if self.at_most is not None else True)

    @property
    def text(self) -> str:
        """``auc >= 0.79``."""
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        parts = [f"{self.metric} {sign} {bound:g}" for sign, bound in bounds if bound is not None]
        return " and ".join(parts)


class Hook(Settings):
    """Who is told that a run failed: ``command`` or ``webhook``."""

    command: tuple[str, ...] | str | None = None
    """A command; it reads what happened, as JSON, from its standard input."""

    webhook: str | None = None
    """An address to which the same JSON is posted."""

    @field_validator("webhook")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        if address is not None and not address.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return address

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.command is None) == (self.webhook is None):
            raise ValueError("give one of command and webhook")
        if self.command is not None:
            split_command(self.command)
        return self


class Logs(Settings):
    """Which logs of runs are kept; that of the last run that failed always is."""

    keep: PositiveInt = 100
    """How many, the newest."""

    days: PositiveInt | None = None
    """How long."""


class Job(Settings):
    """What runs, when, and what becomes of it."""

    schedule: Schedule
    """When it runs."""

    pipeline: str | None = None
    """File of a pipeline, or the name of a shipped one; `dqrm pipeline run` runs it."""

    command: tuple[str, ...] | str | None = None
    """A command instead, as a list or as text in the quotes of a shell; no shell runs it."""

    overrides: tuple[str, ...] = ()
    """Settings of the pipeline, ``key.path=value``; dates as {{ yesterday }} or {{ date - 7 days }}
    may stand in them and in the command."""

    timeout: Duration | None = None
    """How long one try may take; it is then stopped, and killed if it does not stop."""

    retries: Retries = Retries()
    """What to do when a run fails."""

    overlap: Literal["skip", "queue"] = "skip"
    """What becomes of a run whose time comes while the last one is not done."""

    missed: Literal["once", "skip", "all"] = "once"
    """Which runs to catch up on that nothing was there to start: the latest, none, or each."""

    grace: Duration = parse_duration("5m")
    """How late a run may start before it counts as missed."""

    gate: Gate | None = None
    """What a metric of the run must reach."""

    on_failure: Hook | None = None
    """Who is told that a run failed."""

    logs: Logs = Logs()
    """Which logs of its runs are kept on disk; those in MLflow stay there."""

    nodes: PositiveInt = 1
    """Machines that a command `dqrm train` trains on together. More than one is for `dqrm jobs
    export --to k8s`, which then writes a TrainJob of Kubeflow."""

    processes: PositiveInt = 1
    """Processes on each of several nodes."""

    tracking: TrackingConfig = TrackingConfig()
    """Where its runs are recorded; a run of the pipeline is recorded in the same place."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.pipeline is None) == (self.command is None):
            raise ValueError("give one of pipeline and command")
        if self.overrides and self.pipeline is None:
            raise ValueError("overrides are of a pipeline; write what a command takes behind it")
        if self.missed == "all" and self.overlap == "skip":
            raise ValueError("missed=all catches up one after the other: it needs overlap=queue")
        if self.gate is not None and not self.tracking.enabled:
            raise ValueError("gate reads the metric from MLflow: it needs tracking.enabled")
        if self.pipeline is not None:
            for override in self.rendered_overrides(_SAMPLE_DAY):
                if "=" not in override:
                    raise ValueError(f"overrides: '{override}' is not key=value")
        else:
            self.rendered_command(_SAMPLE_DAY)
        trains = self.command is not None and split_command(self.command)[:2] == TRAIN
        if self.nodes > 1 and not trains:
            raise ValueError(f"nodes={self.nodes}: only a command `dqrm train` trains on several")
        if self.processes > 1 and self.nodes == 1:
            raise ValueError(
                f"processes={self.processes}: is of several nodes; for one machine write "
                f"`dqrm train --nproc {self.processes}`"
            )
        return self

    def rendered_overrides(self, day: date) -> list[str]:
        """The overrides with the dates of a run."""
        return [render(text, day) for text in self.overrides]

    def rendered_command(self, day: date) -> list[str]:
        """The command with the dates of a run."""
        assert self.command is not None
        return [render(word, day) for word in split_command(self.command)]


class JobsFile(Settings):
    """Every job of a file."""

    folder: Path = Path("jobs")
    """Where state, logs and outputs of the runs are kept."""

    jobs: dict[str, Job] = Field(min_length=1)
    """The jobs by name."""

    @field_validator("jobs")
    @classmethod
    def _names(cls, jobs: dict[str, Job]) -> dict[str, Job]:
        for name in jobs:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"'{name}' cannot be the name of a job: use small letters, digits and hyphens, "
                    "52 at most"
                )
        return jobs


def split_command(command: str | tuple[str, ...]) -> tuple[str, ...]:
    """The words of a command.

    Raises ValueError when there is none, or a quote is not closed.
    """
    try:
        # Spaces in braces are not between words.
        words = tuple(_split(command)) if isinstance(command, str) else command
    except ValueError as error:
        raise ValueError(f"command: {error}") from None
    if not words or not words[0]:
        raise ValueError("command: is empty")
    return words


def _split(text: str) -> list[str]:
    braces: list[str] = []

    def keep(match: re.Match[str]) -> str:
        braces.append(match[0])
        return f"\0{len(braces) - 1}\0"

    words = shlex.split(re.sub(r"\{\{.*?\}\}", keep, text))
    return [re.sub("\0(\\d+)\0", lambda match: braces[int(match[1])], word) for word in words]


def load_jobs(file: Path) -> JobsFile:
    """Read a file of jobs; ``folder`` becomes absolute.

    Raises:
        ConfigError: for every fault, with file, line and field.
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(2, "no such file of jobs", str(file))
    loaded = load(JobsFile, file)
    return loaded.model_copy(update={"folder": file.absolute().parent / loaded.folder})


def require_one_machine(name: str, job: Job) -> None:
    """Raise ConfigError when this machine alone cannot run the job."""
    if job.nodes > 1:
        raise ConfigError(
            f"jobs.{name}.nodes={job.nodes}: only Kubernetes starts it on several machines: "
            "`dqrm jobs export --to k8s`"
        )


def find_job(jobs: JobsFile, name: str) -> Job:
    """The job of that name.

    Raises ConfigError naming those there are.
    """
    if name not in jobs.jobs:
        raise ConfigError(f"there is no job {name}; there are: {', '.join(jobs.jobs)}")
    return jobs.jobs[name]
