"""What is known of a job from one process to the next.

    <folder>/<job>/
        state.json      JobState; each change replaces the file as a whole
        lock            held (flock) by the process that runs the job, for as long as it does
        logs/<run>.log  what the tries of a run wrote
        runs/<run>/     its MLflow records (spool, tracking.json), and output/ of its pipeline

A killed process frees its locks. What it was doing stands in the state.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from dqrm.data.files import write_json

Outcome = Literal[
    "succeeded",
    "failed",
    "timed out",
    "gate not met",
    "interrupted",
    "killed",
    "skipped",
    "missed",
]

MOST_EVENTS = 1000
"""Older ones leave the state; their runs stay in MLflow."""

_LOCK_SECONDS = 1.0
_POLL_SECONDS = 0.1


class JobBusy(ValueError):
    """The last run of the job is not done."""


@dataclass(frozen=True)
class Event:
    """What became of one time of the schedule, or of one run by hand."""

    scheduled: str
    outcome: Outcome
    run: str | None = None
    """Name of the run; None when there was none."""
    began: str | None = None
    seconds: float = 0.0
    tries: int = 0
    run_id: str | None = None
    """In MLflow."""
    detail: str = ""
    attempts: list[str] = field(default_factory=list)
    """How each try ended."""
    hook_fault: str = ""
    """Why nobody could be told of the failure."""


@dataclass(frozen=True)
class Running:
    """A run that began."""

    run: str
    scheduled: str
    began: str
    starts: int = 1
    """How often it was begun; more than once after its process was killed."""


@dataclass
class JobState:
    """What is known of a job."""

    paused: bool = False
    schedule: str | None = None
    """Text of the schedule that ``seen`` is about."""
    seen: str | None = None
    """Times of the schedule up to this one are decided on."""
    pending: list[str] = field(default_factory=list)
    """Times that are to be run, the one that runs among them until its outcome is known."""
    running: Running | None = None
    events: list[Event] = field(default_factory=list)


def iso(moment: datetime) -> str:
    """``2026-11-20T02:30:00+00:00``: a time as the state keeps it."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def run_name(moment: datetime) -> str:
    """``20261120T023000Z``: a time as part of a file's name."""
    return moment.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


class JobFolder:
    """The folder of one job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.path.name

    def log(self, run: str) -> Path:
        """File with what a run wrote."""
        return self.path / "logs" / f"{run}.log"

    def run_dir(self, run: str) -> Path:
        """Folder of a run."""
        return self.path / "runs" / run

    def read(self) -> JobState:
        """The state; that of a job that never ran when there is none."""
        path = self.path / "state.json"
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            running = tree.pop("running")
            return JobState(
                **{key: tree[key] for key in ("paused", "schedule", "seen", "pending")},
                running=Running(**running) if running else None,
                events=[Event(**event) for event in tree["events"]],
            )
        except FileNotFoundError:
            return JobState()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({error})") from error

    @contextlib.contextmanager
    def changing(self) -> Iterator[JobState]:
        """Yield the state and keep what the block made of it; one process at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            state = self.read()
            before = asdict(state)
            yield state
            del state.events[:-MOST_EVENTS]
            after = asdict(state)
            if after != before:
                write_json(self.path / "state.json", after)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def lock(self, wait: bool, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold the job, so that no other process runs it.

        Args:
            wait: wait until the process that runs it is done.
            stopped: asked while waiting; True gives up.

        Raises:
            JobBusy: another process runs it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        # Somebody may just be looking whether it is held.
        deadline = time.monotonic() + _LOCK_SECONDS
        try:
            while not _locked(descriptor, fcntl.LOCK_EX):
                if stopped() or (not wait and time.monotonic() > deadline):
                    raise JobBusy(f"{self.name}: the last run is not done")
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def held(self) -> bool:
        """Whether a process runs the job."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not _locked(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
