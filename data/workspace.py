"""The output folder while a data set is being prepared.

Everything unfinished lies in ``.work`` inside it, with the plan it belongs to. A killed run leaves
that folder; the same command continues it. Unfinished files are not forced to the disk, so after
the machine itself went down the same command starts anew.
"""

import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dqrm.data.files import write_json
from dqrm.data.manifest import MANIFEST_FILE, SPLITS, VOCABULARY_FOLDER, WORK_FOLDER

MALFORMED_FILE = "malformed.tsv"
_PLAN_FILE = "plan.json"
_BOOT_FILE = "boot.json"

_log = logging.getLogger(__name__)


class Workspace:
    """Owns the output folder for the length of a ``with`` block; one process at a time."""

    def __init__(self, output: Path, plan: dict[str, Any], *, overwrite: bool) -> None:
        """plan: JSON values that decide the content of the data set."""
        self.output = output
        self.path = output / WORK_FOLDER
        # Compared with what JSON gives back: tuples become lists.
        self._plan = json.loads(json.dumps(plan))
        self._overwrite = overwrite
        self._lock = -1

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            ValueError: it holds something else, or another process is preparing into it.
        """
        output = self.output
        complete = (output / MANIFEST_FILE).exists()
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output}: is a file; name a folder for the data set")
        if output.is_dir() and not complete and not self.path.exists() and any(output.iterdir()):
            raise ValueError(f"{output}: holds other files; name a new or empty folder")
        same = self._read(_PLAN_FILE) == self._plan
        if complete and not same and not self._overwrite:
            raise ValueError(f"{output}: holds a data set already; --overwrite replaces it")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ValueError(f"{output}: another process is preparing into it") from None
        if self._overwrite or not same:
            self._start_anew()
        elif self._read(_BOOT_FILE) != _boot():
            _log.info("%s: the machine restarted since; starting anew", output)
            self._clear()
        else:
            _log.info("%s: continuing an unfinished preparation", output)
        return self

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _start_anew(self) -> None:
        if (self.path / _PLAN_FILE).exists() and not self._overwrite:
            self._unlock()
            raise ValueError(
                f"{self.output}: holds an unfinished preparation of other sources or settings; "
                "run that one again to finish it, or --overwrite to drop it"
            )
        self._clear()

    def _clear(self) -> None:
        # The manifest first: without it the rest is not taken for a data set.
        (self.output / MANIFEST_FILE).unlink(missing_ok=True)
        for name in (*SPLITS, VOCABULARY_FOLDER):
            shutil.rmtree(self.output / name, ignore_errors=True)
        (self.output / MALFORMED_FILE).unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        write_json(self.path / _BOOT_FILE, _boot())
        write_json(self.path / _PLAN_FILE, self._plan)

    @property
    def lock(self) -> int:
        """Descriptor that holds the folder as long as any process has it open."""
        return self._lock

    def folder(self, name: str) -> Path:
        """A folder within the work folder, made if missing."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove(self) -> None:
        """Drop the work folder, and the output folder if nothing else is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _boot() -> dict[str, str]:
    """Differs after every start of the machine, where the system tells."""
    try:
        return {"boot": Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()}
    except OSError:
        return {}
