"""Commands in process groups of their own, ended as a whole."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dqrm.pipelines.jobs.leash import MARK, Leash, kill_group, kill_marked

STOP_SECONDS = 20.0
"""How long a command that was asked to stop may take to save what it has."""

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; the negative number of a signal."""
    timed_out: bool = False
    stopped: int | None = None
    """Number of the signal that had it stopped."""


def run_command(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: IO[bytes],
    timeout: float | None,
    stop: Callable[[], int | None],
) -> Ended:
    """Run a command to its end; nothing of its process group outlives the call, or this process.

    Args:
        command: program and arguments.
        folder: where it starts.
        environment: all its variables; MARK among them.
        log: file for both of its outputs.
        timeout: seconds after which it is asked to stop, and later killed.
        stop: number of the signal by which this process was asked to end, or None.

    Raises:
        OSError: it cannot be started.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    timed_out, stopped = False, None
    with Leash(environment[MARK]) as leash:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        leash.hold(process.pid)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                    break
                stopped = stop()
                timed_out = deadline is not None and time.monotonic() > deadline
                if stopped is not None or timed_out:
                    kill_group(process.pid, signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(STOP_SECONDS)
                    break
        finally:
            deaf = process.poll() is None
            kill_group(process.pid, signal.SIGKILL)
            process.wait()
            if deaf:  # it could not end those of its children that have sessions of their own
                kill_marked(environment[MARK])
    return Ended(process.returncode, timed_out, stopped)
