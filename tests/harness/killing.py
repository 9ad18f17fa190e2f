"""Commands that are killed once they have written something."""

import subprocess
import sys
import time
from pathlib import Path

SECONDS = 180
"""After which a command that wrote nothing fails the test."""


def kill_once_written(pattern: str, *arguments: str) -> None:
    """Run ``dqrm`` with ``arguments`` and kill it as soon as a file or folder matches ``pattern``.

    Args:
        pattern: for Path.glob, below the current folder.
        arguments: of the command line.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "dqrm", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not list(Path().glob(pattern)):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
