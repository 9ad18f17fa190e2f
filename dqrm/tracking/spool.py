"""The journal of a run on disk, from which everything is uploaded.

A tracked run writes every record here first and a thread uploads from here, so that a store that
is away, or a process that is killed, loses nothing, and an upload by another process later is the
same code. Layout of ``<run folder>/spool``, gone once all of it is in the store::

    run.json        what is needed to create the run: store, experiment, name, start time, tags
    journal.jsonl   one record a line, appended by the trainer, never rewritten
    files/          copies of the artifacts the journal names
    state.json      how far the upload has come; rewritten atomically after each step
    lock            held (flock) by the one process that writes or uploads
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dqrm.data.files import write_json

FOLDER = "spool"
_VERSION = 1

# Larger files are linked instead of copied: copying 64 MiB takes the trainer some 50 ms.
_COPY_BYTES = 64 << 20
_READ_BYTES = 1 << 20

Record = dict[str, Any]


def now_ms() -> int:
    """Return milliseconds since 1970, the clock of MLflow."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class RunHeader:
    """What is needed to create the run in the store."""

    uri: str
    experiment: str
    run_name: str
    run_id: str | None
    """Run to continue; None creates one."""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    started_ms: int = field(default_factory=now_ms)
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag by which a run is found again whose creation was cut off before its id was known."""
    version: int = _VERSION


@dataclass
class UploadState:
    """How far the upload has come."""

    offset: int = 0
    """Bytes of the journal that are in the store."""
    experiment_id: str | None = None
    run_id: str | None = None
    creating: bool = False
    """A creation was begun; whether it succeeded must be asked before it is repeated."""
    stored_steps: dict[str, int] = field(default_factory=dict)
    """By metric, the last step that the store had when the run was last resumed."""
    rejected: int = 0
    ended: bool = False
    """The run's final status is in the store."""


class SpoolBusy(ValueError):
    """Another process writes to or uploads from this spool."""


class Spool:
    """The records of one run that are not yet known to be in the store.

    One process at a time holds a spool; ``append`` may be called from any of its threads.
    """

    def __init__(
        self, folder: Path, header: RunHeader, state: UploadState, lock: int, *, fresh: bool
    ) -> None:
        self.folder = folder
        self.fresh = fresh
        """Whether this object made the spool."""
        self.header = header
        self.state = state
        self._lock = lock
        self._mutex = threading.Lock()
        self._files = folder / "files"
        self._journal = os.open(
            folder / "journal.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        # The last writer may have been killed within a line.
        self._torn = bool(self.size) and os.pread(self._journal, 1, self.size - 1) != b"\n"

    @classmethod
    def open(cls, run_dir: Path, header: RunHeader | None = None) -> "Spool":
        """Take hold of the spool of ``run_dir``; make it from ``header`` when there is none.

        Raises:
            SpoolBusy: another process holds it.
            FileNotFoundError: there is none and no ``header`` was given.
            ValueError: it was written by a newer version, or it is damaged.
        """
        folder = run_dir / FOLDER
        if header is None and not (folder / "run.json").is_file():
            raise FileNotFoundError(f"{run_dir}: no records wait for upload")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            fresh = not (folder / "run.json").is_file()
            if fresh:
                if header is None:  # uploaded by another process since we looked
                    raise FileNotFoundError(f"{run_dir}: no records wait for upload")
                write_json(folder / "run.json", asdict(header))
            return cls(folder, *_read_headers(folder), lock, fresh=fresh)
        except BaseException:
            os.close(lock)
            raise

    def append(self, kind: str, **values: Any) -> None:
        """Add a record. It survives the death of this process once the call returns.

        Raises:
            OSError: the disk does not take it; the journal stays readable.
        """
        line = json.dumps({"t": kind, **values}, separators=(",", ":")).encode() + b"\n"
        with self._mutex:
            if self._torn:
                line = b"\n" + line
            written = os.write(self._journal, line)
            # A full disk takes part of a line: the next one must not continue it.
            self._torn = written != len(line)
        if self._torn:
            raise OSError(errno.ENOSPC, f"{self.folder}: disk full")

    def keep(self, path: Path) -> str:
        """Copy a file or folder into the spool; return its name for a record.

        Files over 64 MiB are hard-linked where the disk allows it: they must be replaced by
        renaming, not rewritten in place, until they are uploaded.
        """
        name = self.new_file(path.name)
        target = self.kept(name)
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_copy_or_link)
        else:
            _copy_or_link(path, target)
        return name

    def new_file(self, name: str) -> str:
        """Return the name, for a record, of a file that the caller will write."""
        folder = uuid.uuid4().hex
        (self._files / folder).mkdir(parents=True)
        return f"{folder}/{name}"

    def kept(self, name: str) -> Path:
        """Return the path of a file kept under ``name``."""
        return self._files / name

    def discard(self, name: str) -> None:
        """Remove a kept file that is in the store now."""
        shutil.rmtree((self._files / name).parent, ignore_errors=True)

    @property
    def size(self) -> int:
        """Bytes of the journal."""
        return os.fstat(self._journal).st_size

    def records(self, offset: int) -> Iterator[tuple[Record, int]]:
        """Yield the whole records from byte ``offset`` on, each with the offset behind it.

        Lines that are not records (half-written when a disk was full) are skipped.
        """
        rest = b""
        position = offset
        while chunk := os.pread(self._journal, _READ_BYTES, position):
            position += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict) and "t" in record:
                        yield record, offset

    def save_state(self) -> None:
        """Write down how far the upload has come."""
        write_json(self.folder / "state.json", asdict(self.state))

    def close(self) -> None:
        """Let go of the spool; what is in it stays for a later upload."""
        with contextlib.suppress(OSError):
            os.fsync(self._journal)
        os.close(self._journal)
        os.close(self._lock)

    def remove(self) -> None:
        """Remove the spool, all of which is in the store, and let go of it."""
        # Renamed first: a process killed within the removal leaves no half spool behind.
        done = self.folder.with_name(f".{FOLDER}.done")
        shutil.rmtree(done, ignore_errors=True)
        self.folder.rename(done)
        self.close()
        shutil.rmtree(done, ignore_errors=True)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise SpoolBusy(
            f"{folder} is in use by process {holder}: wait for that run or upload to end"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _read_headers(folder: Path) -> tuple[RunHeader, UploadState]:
    path = folder / "run.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != _VERSION:
            raise ValueError(
                f"{path}: version {values['version']} is not {_VERSION}; upload it with the "
                "version of dqrm that wrote it"
            )
        header = RunHeader(**values)
        path = folder / "state.json"
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return header, UploadState(**saved)
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def _copy_or_link(source: str | Path, target: str | Path) -> None:
    if Path(source).stat().st_size > _COPY_BYTES:
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)
