"""Runs trials as processes of their own, some at a time, and goes on where they were killed."""

import json
import logging
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dqrm.config import RunConfig
from dqrm.configuration import to_yaml
from dqrm.data.files import write_json, write_text
from dqrm.study.trials import USAGE, Trial
from dqrm.tracking.identity import recorded_run

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.5
_PID_DIGITS = 10


class StudyError(RuntimeError):
    """Trials failed; the message names them and says why."""


@dataclass(frozen=True)
class Ended:
    """A trial whose process has ended, or that found itself complete."""

    trial: Trial
    code: int
    """0, an exit code, or 128 and a signal's number."""


class Crew:
    """Trains trials, ``jobs`` at a time.

    Args:
        jobs: trials at a time.
        threads: of each, where the configuration does not say.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        self._jobs = jobs
        self._threads = threads
        self._stopping = threading.Event()
        self._ended: queue.Queue[Ended | Exception] = queue.Queue()

    def train(
        self,
        trials: Sequence[Trial],
        ended: Callable[[Ended], bool],
        stop: Callable[[], int | None],
    ) -> None:
        """Train until all are complete, one more is not wanted, or a signal came.

        Args:
            trials: that are not complete.
            ended: told of each that ended; returns whether to go on with the rest.
            stop: asked for the signal that ends the study, if one came.

        Raises:
            OSError: a trial could not be started.
        """
        error: Exception | None = None
        waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
        for trial in trials:
            waiting.put(trial)
        workers = [
            threading.Thread(target=self._work, args=(waiting,), daemon=True)
            for _ in range(min(self._jobs, len(trials)))
        ]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers) or not self._ended.empty():
                if stop() is not None:
                    self._stopping.set()
                try:
                    one = self._ended.get(timeout=_SECONDS_BETWEEN_LOOKS)
                except queue.Empty:
                    continue
                if isinstance(one, Exception):
                    error = one
                if isinstance(one, Exception) or not ended(one):
                    self._stopping.set()
        finally:
            # Whatever happened here, no run is left without its study.
            if any(worker.is_alive() for worker in workers):
                self._stopping.set()
                for worker in workers:
                    worker.join()
        if error is not None:
            raise error

    def _work(self, waiting: "queue.SimpleQueue[Trial]") -> None:
        while not self._stopping.is_set():
            try:
                trial = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                code = self._train(trial)
            except Exception as error:
                self._ended.put(error)
                return
            if code is not None:
                self._ended.put(Ended(trial, code))

    def _train(self, trial: Trial) -> int | None:
        """Train one; None if the study is to end before it could begin."""
        told = False
        while not self._stopping.is_set():
            with trial.locked() as lock:
                if lock is not None:
                    finished = (trial.run_dir / "summary.json").is_file()
                    return 0 if finished else self._run(trial, lock)
            if not told:
                log.info("waiting for %s, which process %s trains", trial.name, trial.holder)
                told = True
            self._stopping.wait(_SECONDS_BETWEEN_LOOKS)
        return None

    def _run(self, trial: Trial, lock: int) -> int:
        environment = dict(os.environ)
        if trial.state == "run":
            known = recorded_run(trial.run_dir)
            if known is not None:
                # Killed before its first checkpoint: it begins again as the same MLflow run.
                environment["MLFLOW_RUN_ID"] = known.run_id
            shutil.rmtree(trial.run_dir, ignore_errors=True)
            (trial.folder / USAGE).unlink(missing_ok=True)
        config = _with_threads(trial, self._threads)
        log.info("training %s, seed %d", trial.arm.title, trial.seed)
        file = trial.folder / "config.yaml"
        write_text(file, to_yaml(config))
        with (trial.folder / "log.txt").open("ab") as output:
            process = subprocess.Popen(
                _command(trial, str(file)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                # Ctrl-C is for the study, which hands it on.
                start_new_session=True,
            )
            os.pwrite(lock, f"{process.pid:<{_PID_DIGITS}}".encode(), 0)
            code, usage = _wait(process, self._stopping)
        _add_usage(trial, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
        return code


def why_failed(trial: Trial) -> str:
    """Return the last thing a trial said that reads like a reason."""
    lines = (trial.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("Error: ")]
    # The launcher of several processes only adds which of them it was.
    own = [line for line in said if "torch/distributed/elastic" not in line]
    return (errors or own or said or ["it said nothing"])[-1].removeprefix("Error: ")


def _command(trial: Trial, file: str) -> list[str]:
    arm = trial.arm
    python = [sys.executable, "-m"]
    if arm.module == "dqrm":
        several = ["--nproc", str(arm.processes)] if arm.processes > 1 else []
        return [*python, "dqrm", "train", "--config", file, "--resume", "auto", "-q", *several]
    if arm.processes > 1:
        python += ["dqrm.study.launch", str(arm.processes)]
    return [*python, arm.module, file, *arm.arguments]


def _with_threads(trial: Trial, threads: int) -> RunConfig:
    train = trial.config.train
    own = train.threads or max(1, threads // trial.arm.processes)
    return trial.config.model_copy(update={"train": train.model_copy(update={"threads": own})})


def _wait(
    process: "subprocess.Popen[bytes]", stopping: threading.Event
) -> tuple[int, resource.struct_rusage]:
    """Wait for a process; ask it to save and end once the study is to."""

    done = threading.Event()

    def ask() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            if stopping.is_set():
                os.killpg(process.pid, signal.SIGTERM)
                return

    threading.Thread(target=ask, daemon=True).start()
    # wait4, not Popen.wait: it says what this one process used.
    _, status, usage = os.wait4(process.pid, 0)
    done.set()
    process.returncode = code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code, usage


def _add_usage(trial: Trial, cpu_seconds: float, peak_bytes: int) -> None:
    file = trial.folder / USAGE
    before = {"attempts": 0, "cpu_seconds": 0.0, "peak_bytes": 0}
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
    write_json(
        file,
        {
            "attempts": before["attempts"] + 1,
            "cpu_seconds": before["cpu_seconds"] + cpu_seconds,
            "peak_bytes": max(before["peak_bytes"], peak_bytes),
        },
    )
