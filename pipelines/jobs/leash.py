"""Ends the command of a run when the process that runs it is killed.

Nobody can act after a SIGKILL, but the kernel closes a dead process's end of a pipe. A ``Leash`` is
a small process that holds the other end: it wakes when the runner is gone and kills the command's
process group, and what left the group (workers of torchrun have sessions of their own) by the mark
in its environment. Run as a program, this file is that process.

It is the runner that the command hangs on, not the server that started the runner.
"""

import contextlib
import os
import signal
import subprocess
import sys

MARK = "DQRM_JOB_RUN"
"""Variable by which the processes of a run are found again when their parent was killed."""

_DONE = b"done\n"


class Leash:
    """Holds a command to this process; a context manager around the command's life.

    Args:
        mark: value of ``MARK`` in the command's environment.
    """

    def __init__(self, mark: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, mark], stdin=subprocess.PIPE, start_new_session=True
        )

    def hold(self, group: int) -> None:
        """Name the command's process group."""
        self._write(f"{group}\n".encode())

    def __enter__(self) -> "Leash":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._write(_DONE)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _write(self, content: bytes) -> None:
        # A leash that somebody killed does not harm the run.
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(content)
            self._process.stdin.flush()


def kill_marked(mark: str) -> int:
    """Kill what a killed process left running of a run; return how many processes there were."""
    import psutil

    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                process.kill()
                count += 1
    return count


def kill_group(group: int, number: int) -> None:
    """Send a signal to a process group, if there is one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _watch(mark: str) -> None:
    # The runner's own end is for the runner to bring about; a signal to all is not for this.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    said = sys.stdin.buffer.read()
    if said.endswith(_DONE):
        return
    if said.strip():
        kill_group(int(said), signal.SIGKILL)
    kill_marked(mark)


if __name__ == "__main__":
    _watch(sys.argv[1])
