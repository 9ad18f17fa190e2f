"""``dqrm jobs serve``: starts the jobs of a file when their time comes.

The file is the truth and is read again when it changes. Times that have come are first decided on
and written down, then run, each by a process of its own (``dqrm jobs run``) that writes down what
became of it. So a server can be killed at any moment: runs that go on are left alone, the next
server finds what was decided, and what passed meanwhile counts as missed.

The loop is ours, not APScheduler's: its next times live in memory or in a store of its own, and
they are those of the machine's clock.
"""

import logging
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from dqrm.configuration import ConfigError
from dqrm.locks import held
from dqrm.pipelines.jobs.clock import Clock
from dqrm.pipelines.jobs.config import Job, JobsFile, load_jobs, require_one_machine
from dqrm.pipelines.jobs.hooks import tell_failure
from dqrm.pipelines.jobs.processes import STOP_SECONDS
from dqrm.pipelines.jobs.state import Event, JobFolder, JobState, Outcome, iso
from dqrm.training.stop import StopRequest, stop_on_signals

log = logging.getLogger(__name__)

LOOK_BACK = timedelta(days=31)
"""Times that passed longer ago are not looked for."""

_LONGEST_SLEEP = 1.0
_SHORTEST_SLEEP = 0.02
_MOST_FAILED_STARTS = 5
_RECORDING_SECONDS = 60.0
_MOST_LOG_BYTES = 1 << 20


def decide(job: Job, state: JobState, now: datetime, busy: bool) -> None:
    """Write into ``state`` what becomes of the times that have come since it was last asked.

    Args:
        job: the job.
        state: changed in place.
        now: the time.
        busy: whether a run goes on.
    """
    text = job.schedule.text
    if state.schedule != text or state.seen is None:
        # What the new schedule would have done before it was written down is not missed.
        state.schedule, state.seen = text, iso(now)
        return
    if state.paused:
        return
    due = job.schedule.between(max(datetime.fromisoformat(state.seen), now - LOOK_BACK), now)
    if not due:
        return
    state.seen = iso(due[-1])
    late = [time for time in due if now - time > job.grace]
    kept = [time for time in due if now - time <= job.grace]
    if job.missed == "all":
        kept = due
    elif job.missed == "once" and late and not kept:
        kept = late[-1:]
    if job.overlap == "skip":
        kept = [] if busy or state.pending else kept[-1:]
    for moment in due:
        if moment in kept:
            state.pending.append(iso(moment))
        else:
            outcome: Outcome = "missed" if moment in late else "skipped"
            state.events.append(Event(iso(moment), outcome))


def serve(file: Path, clock: Clock) -> int:
    """Start jobs when their time comes, until SIGINT or SIGTERM; return the signal's number.

    Runs that go on are asked to stop; the next server goes on with them.

    Raises:
        ConfigError: the file has faults.
        ValueError: another server serves it.
    """
    jobs = load_jobs(file)
    jobs.folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{jobs.folder}: another server starts the jobs of this folder"
    with held(jobs.folder / "serve.lock", refusal), stop_on_signals() as stop:
        return _Server(file, jobs, clock, stop).serve()


def _log_of_starts(folder: JobFolder) -> Path:
    """What runners wrote; begun anew when it has grown, with the last one beside it."""
    path = folder.path / "runner.log"
    if path.is_file() and path.stat().st_size > _MOST_LOG_BYTES:
        path.replace(path.with_suffix(".log.old"))
    return path


@dataclass
class _Child:
    """A process that runs a job."""

    process: subprocess.Popen[bytes]
    moment: str


class _Server:
    def __init__(self, file: Path, jobs: JobsFile, clock: Clock, stop: StopRequest) -> None:
        self.file = file.absolute()
        self.jobs = jobs
        self.clock = clock
        self.stop = stop
        self.children: dict[str, _Child] = {}
        self.failed_starts: dict[str, int] = {}
        self.not_before: dict[str, float] = {}
        self.faults: dict[str, str] = {}
        self.faulty = False
        self.stamp = self._stamp()

    def serve(self) -> int:
        log.info("serving %d jobs of %s", len(self.jobs.jobs), self.file)
        while self.stop.signal is None:
            self._reload()
            for name, job in self.jobs.jobs.items():
                self._guarded(name, job)
            time.sleep(self._sleep())
        self._stop_children()
        return self.stop.signal

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self.file.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _reload(self) -> None:
        stamp = self._stamp()
        if stamp == self.stamp:
            return
        self.stamp = stamp
        try:
            jobs = load_jobs(self.file)
            if jobs.folder != self.jobs.folder:
                raise ConfigError(f"folder={jobs.folder}: start the server again for another one")
        except (OSError, ValueError) as error:
            self.faulty = True
            log.error("%s; nothing is started until this is mended", error)
            return
        self.jobs, self.faulty = jobs, False
        log.info("read %s again: %s", self.file, ", ".join(jobs.jobs))

    def _guarded(self, name: str, job: Job) -> None:
        """Keep what is wrong with one job from the others."""
        try:
            self._serve_job(name, job)
            self.faults.pop(name, None)
        except (OSError, ValueError) as error:
            if self.faults.get(name) != str(error):
                log.error("%s: %s", name, error)
            self.faults[name] = str(error)

    def _serve_job(self, name: str, job: Job) -> None:
        require_one_machine(name, job)
        folder = JobFolder(self.jobs.folder / name)
        alive = self._alive(name, folder)
        busy = alive or folder.held()
        with folder.changing() as state:
            decide(job, state, self.clock.now(), busy)
            moment = state.pending[0] if state.pending and not state.paused else None
        ready = time.monotonic() >= self.not_before.get(name, 0.0)
        if moment is not None and not busy and ready and not self.faulty:
            self._start(name, moment, folder)

    def _start(self, name: str, moment: str, folder: JobFolder) -> None:
        command = [
            *(sys.executable, "-m", "dqrm", "jobs", "run", name),
            *("--file", str(self.file), "--date", moment),
        ]
        with _log_of_starts(folder).open("ab") as file:
            # In a session of its own: Ctrl-C in the terminal is for the server alone.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        log.info("%s: started for %s", name, moment)
        self.children[name] = _Child(process, moment)

    def _alive(self, name: str, folder: JobFolder) -> bool:
        child = self.children.get(name)
        if child is None:
            return False
        code = child.process.poll()
        if code is None:
            return True
        del self.children[name]
        state = folder.read()
        decided = child.moment not in state.pending
        if decided:
            self.failed_starts.pop(name, None)
            last = next((e for e in reversed(state.events) if e.scheduled == child.moment), None)
            log.info("%s: %s for %s", name, last.outcome if last else "done", child.moment)
        elif code >= 0 and not folder.held():
            self._could_not_start(name, child, code, folder)
        return False

    def _could_not_start(self, name: str, child: _Child, code: int, folder: JobFolder) -> None:
        failed = self.failed_starts.get(name, 0) + 1
        self.failed_starts[name] = failed
        self.not_before[name] = time.monotonic() + 2**failed
        log.error("%s: exit code %d; see %s", name, code, folder.path / "runner.log")
        if failed < _MOST_FAILED_STARTS or self.faulty:
            return
        del self.failed_starts[name]
        event = Event(child.moment, "failed", detail=f"could not be started: exit code {code}")
        with folder.changing() as state:
            state.events.append(event)
            state.pending = [moment for moment in state.pending if moment != child.moment]
        job = self.jobs.jobs.get(name)
        if job is not None and job.on_failure is not None:
            # An address that does not answer must not keep other jobs from their time.
            what = (job.on_failure, event, folder, self.file.parent, None)
            threading.Thread(target=tell_failure, args=what, name="hook").start()

    def _sleep(self) -> float:
        now = self.clock.now()
        following = [next(job.schedule.after(now), None) for job in self.jobs.jobs.values()]
        waits = [self.clock.seconds_until(moment) for moment in following if moment is not None]
        return min([_LONGEST_SLEEP, *(max(wait, _SHORTEST_SLEEP) for wait in waits)])

    def _stop_children(self) -> None:
        for child in self.children.values():
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS + _RECORDING_SECONDS
        for name, child in self.children.items():
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("%s: did not stop; process %d is left", name, child.process.pid)
