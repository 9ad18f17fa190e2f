"""The record that a stage is complete: what it was made from and what it made."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from dqrm.data.files import finite_or_null, write_json

RECORD_FILE = "stage.json"

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class StageRecord:
    """Written into a stage's output folder, last of all."""

    stage: str
    """Kind of the stage."""
    digest: str
    """Of its settings, of what it read from outside, and of the outputs of earlier stages."""
    output_digest: str
    """Of the files it made, and of its metrics that are no times."""
    sizes: dict[str, int]
    """Bytes of each of those files."""
    metrics: dict[str, float]
    seconds: float
    """With those of attempts that a signal ended; a killed one could not say."""
    run_id: str | None
    """Its MLflow run, when the store had answered."""


def write_record(folder: Path, record: StageRecord) -> None:
    """Complete ``folder``."""
    fields = {"format_version": _FORMAT_VERSION, **asdict(record)}
    write_json(folder / RECORD_FILE, finite_or_null(fields))


def read_record(folder: Path) -> StageRecord | None:
    """The record of a complete folder; None where it is not complete or files are missing."""
    try:
        fields = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        version = fields.pop("format_version")
        for name, value in fields["metrics"].items():
            # JSON has no NaN: a metric that a split does not define was written as null.
            fields["metrics"][name] = math.nan if value is None else value
        record = StageRecord(**fields) if version == _FORMAT_VERSION else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if record is None or not all(_has(folder / n, size) for n, size in record.sizes.items()):
        return None
    return record


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
