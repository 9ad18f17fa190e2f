"""The folder of a pipeline.

    <output>/<name>/
        pipeline.yaml           the resolved configuration of the last run
        stages/<stage>/         output of a complete stage, with stage.json
        work/<stage>-<digest>/  of a stage that is not complete: output/, scratch/ and seconds.json
        runs/<stage>-<digest>/  of each stage's MLflow run; a stage that trains has all of it here
        runs/pipeline/          of the pipeline's own
        references.json         what names in settings meant when a stage was first run with them

A stage's output becomes visible under ``stages`` by one rename, when its files and its record are
on the disk.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dqrm.data.files import sync, write_json
from dqrm.pipelines.record import RECORD_FILE, read_record

CONFIG_FILE = "pipeline.yaml"
"""Written first of all."""

_REFERENCES = "references.json"
_SECONDS = "seconds.json"
_DIGEST_CHARACTERS = 12


class PipelineFolder:
    """Owns the folder of a pipeline for the length of a ``with`` block; one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            ValueError: it holds something else, or another process runs the pipeline.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        strange = [path for path in self.path.iterdir() if not path.name.startswith(".")]
        if strange and not (self.path / CONFIG_FILE).is_file():
            raise ValueError(
                f"{self.path}: holds {strange[0].name}, which is of no pipeline; give this one "
                "another name"
            )
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ValueError(f"{self.path}: another process runs this pipeline") from None
        for left in (self.path / "stages").glob(".*.old"):
            shutil.rmtree(left)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._lock)

    def stage(self, key: str) -> Path:
        """Where the output of a complete stage is."""
        return self.path / "stages" / key

    def work(self, key: str, digest: str) -> Path:
        """Where a stage that is not complete works."""
        return self.path / "work" / f"{key}-{digest[:_DIGEST_CHARACTERS]}"

    def run_dir(self, key: str, digest: str) -> Path:
        """Folder of the MLflow run of a stage."""
        return self.path / "runs" / f"{key}-{digest[:_DIGEST_CHARACTERS]}"

    @property
    def pipeline_run_dir(self) -> Path:
        """Folder of the MLflow run of the pipeline."""
        return self.path / "runs" / "pipeline"

    def forget(self, key: str) -> None:
        """Have a stage run again, from its beginning and as another MLflow run."""
        (self.stage(key) / RECORD_FILE).unlink(missing_ok=True)
        self._write_references({k: v for k, v in self._read_references().items() if k != key})
        for parent in ("work", "runs"):
            for folder in self._of_stage(parent, key):
                if parent == "work":
                    shutil.rmtree(folder)
                else:
                    folder.rename(_free_name(folder))

    def references(self, key: str, digest: str) -> dict[str, str] | None:
        """What a stage's references meant when it was first run, if that is known.

        Args:
            key: of the stage.
            digest: of all else that decides its result.
        """
        kept = self._read_references().get(key)
        if kept is None or kept["digest"] != digest:
            return None
        meant: dict[str, str] = kept["references"]
        return meant

    def keep_references(self, key: str, digest: str, references: dict[str, str]) -> None:
        """Write down what a stage's references mean."""
        entry = {"digest": digest, "references": references}
        self._write_references({**self._read_references(), key: entry})

    def _read_references(self) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = json.loads((self.path / _REFERENCES).read_text("utf-8"))
        except FileNotFoundError:
            return {}
        return kept

    def _write_references(self, kept: dict[str, Any]) -> None:
        if kept != self._read_references():
            write_json(self.path / _REFERENCES, kept)

    def seconds_spent(self, key: str, digest: str) -> float:
        """How long attempts at a stage took that were stopped, as far as they could say."""
        try:
            return float(json.loads((self.work(key, digest) / _SECONDS).read_text("utf-8")))
        except FileNotFoundError:
            return 0.0

    def keep_seconds(self, key: str, digest: str, seconds: float) -> None:
        """Write down how long all attempts at a stage took so far."""
        write_json(self.work(key, digest) / _SECONDS, seconds)

    def publish(self, key: str, digest: str) -> None:
        """Make the finished output of a stage the visible one.

        Its work folder is dropped, and those that other settings of the stage left unfinished.
        """
        work, target = self.work(key, digest), self.stage(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            # A folder cannot be renamed onto a full one: move the old one away first.
            old = target.with_name(f".{key}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            (work / "output").rename(target)
            shutil.rmtree(old)
        else:
            (work / "output").rename(target)
        sync(target.parent)
        for folder in self._of_stage("work", key):
            shutil.rmtree(folder)

    def _of_stage(self, parent: str, key: str) -> list[Path]:
        """Folders of a stage below ``parent``, one for each of its settings."""
        found = (self.path / parent).glob(f"{key}-*")
        return [path for path in found if len(path.name) == len(key) + 1 + _DIGEST_CHARACTERS]

    def finished_unpublished(self, key: str, digest: str) -> bool:
        """Whether a kill came after the stage was done and before it was published."""
        record = read_record(self.work(key, digest) / "output")
        return record is not None and record.digest == digest

    def prepare(self, key: str, digest: str) -> tuple[Path, Path]:
        """Empty the output folder of a stage that begins; return it and the scratch folder.

        Work of the same stage under other settings stays: it may have been these that were meant.
        """
        work = self.work(key, digest)
        output, scratch = work / "output", work / "scratch"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        scratch.mkdir(exist_ok=True)
        return output, scratch


def _free_name(folder: Path) -> Path:
    number = 1
    while (free := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return free
