"""Locks between processes; the system frees those of a process that is killed."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Hold the file ``path``, made when it is not there, while the block runs.

    Raises ValueError, with ``refusal``, when another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(refusal) from None
        yield
    finally:
        os.close(descriptor)
