"""One run of a job: in a child process, under the job's lock, as one MLflow run.

The state says what is being run before it begins and what became of it as soon as that is known.
A run whose process was killed is run again under the same name, in the same MLflow run and, for a
pipeline, in the same output folder, where complete stages are not repeated.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dqrm.pipelines.jobs.clock import Clock
from dqrm.pipelines.jobs.config import Job, JobsFile, find_job, require_one_machine
from dqrm.pipelines.jobs.hooks import program_path, tell_failure
from dqrm.pipelines.jobs.leash import MARK, kill_marked
from dqrm.pipelines.jobs.processes import Ended, run_command
from dqrm.pipelines.jobs.pruning import prune_logs
from dqrm.pipelines.jobs.recording import RunRecord, settle
from dqrm.pipelines.jobs.state import (
    Event,
    JobFolder,
    JobState,
    Outcome,
    Running,
    iso,
    run_name,
)
from dqrm.tracking.base import Status
from dqrm.tracking.identity import recorded_run
from dqrm.training.stop import stop_on_signals

log = logging.getLogger(__name__)

MOST_STARTS = 3
"""A run whose process was killed as often is not begun again: it may be what kills it."""

_USAGE = 2
_GATE_NOT_MET = 3
_STOP_POLL_SECONDS = 0.1

STATUS: dict[Outcome, Status] = {
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "timed out": "FAILED",
    "gate not met": "FAILED",
    "interrupted": "KILLED",
    "killed": "KILLED",
}


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    event: Event
    interrupted: int | None = None
    """Number of the signal that ended it."""


def run_job(jobs: JobsFile, base: Path, name: str, moment: datetime, clock: Clock) -> Result:
    """Run a job for a time of its schedule, or for any other.

    Args:
        jobs: the file of jobs.
        base: folder of that file.
        name: name of the job.
        moment: the time it is run for; its date stands in the parameters.
        clock: how the time passes.

    Raises:
        JobBusy: it runs already, and its ``overlap`` is skip.
        ValueError: the run cannot be recorded.
    """
    job = find_job(jobs, name)
    require_one_machine(name, job)
    folder = JobFolder(jobs.folder / name)
    with (
        stop_on_signals() as stop,
        folder.lock(job.overlap == "queue", lambda: stop.signal is not None),
    ):
        running = _begin(folder, moment, clock)
        run = _Run(job, folder, base, running, moment, clock, lambda: stop.signal)
        if running.starts > MOST_STARTS:
            return Result(run.end("killed", f"its process was killed {MOST_STARTS} times"))
        return Result(run.carry_out(), stop.signal)


def _begin(folder: JobFolder, moment: datetime, clock: Clock) -> Running:
    """Say in the state what begins; clear up after a process that was killed."""
    with folder.changing() as state:
        before = state.running
        name = _free_name(state, moment)
        last = next((event for event in reversed(state.events) if event.run), None)
        again = before is not None and before.run == name
        if before is not None and not again:
            recorded = recorded_run(folder.run_dir(before.run))
            state.events.append(
                Event(
                    scheduled=before.scheduled,
                    outcome="killed",
                    run=before.run,
                    began=before.began,
                    run_id=recorded.run_id if recorded else None,
                    detail="by a signal",
                )
            )
        starts = before.starts + 1 if before is not None and again else 1
        state.running = Running(name, iso(moment), iso(clock.now()), starts)
        running = state.running
    if before is not None:
        left = kill_marked(_mark(folder, before))
        if left:
            log.warning("killed %d processes that %s left running", left, before.run)
        if not again:
            settle(folder, before.run, "killed", "KILLED")
    if last is not None and last.run and last.run != running.run:
        settle(folder, last.run, last.outcome, STATUS[last.outcome])
    return running


def _mark(folder: JobFolder, running: Running) -> str:
    # Told apart by start: what ends the last one must not touch the next.
    return f"{folder.run_dir(running.run)}#{running.starts}"


def _free_name(state: JobState, moment: datetime) -> str:
    """A run that did not succeed goes on; one that did is done again under another name."""
    name = base = run_name(moment)
    succeeded = {event.run for event in state.events if event.outcome == "succeeded"}
    number = 2
    while name in succeeded:
        name = f"{base}.{number}"
        number += 1
    return name


class _Run:
    """A run from its beginning to its outcome."""

    def __init__(
        self,
        job: Job,
        folder: JobFolder,
        base: Path,
        running: Running,
        moment: datetime,
        clock: Clock,
        stop: Callable[[], int | None],
    ) -> None:
        self.job = job
        self.folder = folder
        self.base = base
        self.running = running
        self.day = moment.astimezone(job.schedule.zone).date()
        self.clock = clock
        self.stop = stop
        self.began = time.monotonic()
        self.attempts: list[str] = []
        self.record: RunRecord | None = None

    def carry_out(self) -> Event:
        """Record, run and judge it."""
        try:
            self.record = RunRecord(self.job, self.folder, self.base, self.running, self.day)
        except ValueError as error:
            return self.end("failed", f"it cannot be recorded: {error}")
        outcome: Outcome = "failed"
        detail = "a defect of dqrm; its traceback is above"
        try:
            outcome, detail = self._try_all()
        except KeyboardInterrupt:
            outcome, detail = "interrupted", "by a second signal"
        finally:
            event = self.end(outcome, detail)
        return event

    def end(self, outcome: Outcome, detail: str) -> Event:
        """Say what became of it: in the state first, so that it is not run again."""
        event = Event(
            scheduled=self.running.scheduled,
            outcome=outcome,
            run=self.running.run,
            began=self.running.began,
            seconds=round(time.monotonic() - self.began, 3),
            tries=len(self.attempts),
            run_id=self.record.run_id if self.record else None,
            detail=detail,
            attempts=self.attempts,
        )
        with self.folder.changing() as state:
            state.running = None
            going_on = outcome == "interrupted" and event.scheduled in state.pending
            if not going_on:  # or a later start of the same run says how it ended
                state.events.append(event)
                state.pending = [time for time in state.pending if time != event.scheduled]
        log.log(
            logging.INFO if outcome == "succeeded" else logging.ERROR,
            "%s %s: %s%s",
            self.folder.name,
            self.running.run,
            outcome,
            f" ({detail})" if detail else "",
        )
        if outcome not in ("succeeded", "interrupted"):
            uri = self.record.uri if self.record else None
            event = tell_failure(self.job.on_failure, event, self.folder, self.base, uri)
        if self.record is None:
            settle(self.folder, self.running.run, outcome, STATUS[outcome])
        else:
            self.record.finish(event, STATUS[outcome])
        prune_logs(self.folder, self.job.logs)
        return event

    def _try_all(self) -> tuple[Outcome, str]:
        wait = self.job.retries.wait.total_seconds()
        for left in reversed(range(self.job.retries.times + 1)):
            began = time.monotonic()
            self.attempts.append("goes on")
            ended = self._try_once()
            self.attempts[-1] = f"{_words(ended)} after {time.monotonic() - began:.0f} s"
            if ended.stopped is not None:
                return "interrupted", f"by signal {ended.stopped}"
            if ended.code == 0 and not ended.timed_out:
                return self._judge()
            if ended.code == _GATE_NOT_MET:
                return "gate not met", "the command says so with its exit code"
            # The same settings would be as wrong the next time.
            if not left or (self.job.pipeline and ended.code == _USAGE):
                break
            log.warning("%s: %s; again in %.0f s", self.folder.name, _words(ended), wait)
            if self._waited(wait / self.clock.speed):
                return "interrupted", "while waiting for the next try"
            wait *= self.job.retries.factor
        return ("timed out" if ended.timed_out else "failed"), _words(ended)

    def _try_once(self) -> Ended:
        assert self.record is not None
        path = self.folder.log(self.running.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = self._command()
        with path.open("ab") as file:
            shown = " ".join(command)
            file.write(f"=== {iso(self.clock.now())} try {len(self.attempts)}: {shown}\n".encode())
            file.flush()
            try:
                ended = run_command(
                    command,
                    folder=self.base,
                    environment=self._environment(),
                    log=file,
                    timeout=self.job.timeout.total_seconds() if self.job.timeout else None,
                    stop=self.stop,
                )
            except OSError as error:
                ended = Ended(127)
                file.write(f"{error}\n".encode())
            file.write(f"=== {iso(self.clock.now())} {_words(ended)}\n".encode())
        return ended

    def _command(self) -> list[str]:
        if self.job.pipeline is None:
            return self.job.rendered_command(self.day)
        assert self.record is not None
        overrides = self.job.rendered_overrides(self.day)
        # A folder for each run, as MLflow runs are told apart by it.
        output = f"output={self.folder.run_dir(self.running.run) / 'output'}"
        return [
            *(sys.executable, "-m", "dqrm", "pipeline", "run", self.job.pipeline),
            *(output, *self.record.overrides(), *overrides),
        ]

    def _environment(self) -> dict[str, str]:
        assert self.record is not None
        return {
            **os.environ,
            **self.record.environment(),
            "PATH": program_path(),
            MARK: _mark(self.folder, self.running),
            "DQRM_JOB": self.folder.name,
            "DQRM_JOB_DATE": self.day.isoformat(),
            "DQRM_JOB_SCHEDULED": self.running.scheduled,
        }

    def _judge(self) -> tuple[Outcome, str]:
        gate = self.job.gate
        if gate is None:
            return "succeeded", ""
        assert self.record is not None
        try:
            value = self.record.metric(gate.metric)
        except (LookupError, OSError) as error:
            return "failed", f"gate {gate.text}: {error.args[0]}"
        detail = f"{gate.metric}={value:.6g}, gate {gate.text}"
        return ("succeeded" if gate.met(value) else "gate not met"), detail

    def _waited(self, seconds: float) -> bool:
        """Wait; True when a signal came."""
        deadline = time.monotonic() + seconds
        while self.stop() is None and time.monotonic() < deadline:
            time.sleep(min(_STOP_POLL_SECONDS, seconds))
        return self.stop() is not None


def _words(ended: Ended) -> str:
    if ended.timed_out:
        return "timed out"
    if ended.stopped is not None:
        return "stopped"
    return f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
