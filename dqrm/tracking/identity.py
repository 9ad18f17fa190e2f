"""Which MLflow run a run folder belongs to."""

import json
from dataclasses import dataclass
from pathlib import Path

IDENTITY = "tracking.json"


@dataclass(frozen=True)
class RecordedRun:
    """The MLflow run that a run folder was recorded in."""

    uri: str
    experiment: str
    experiment_id: str
    run_id: str
    run_name: str


def recorded_run(run_dir: Path) -> RecordedRun | None:
    """Return the MLflow run of a run folder, or None when the store never knew it."""
    path = run_dir / IDENTITY
    try:
        return RecordedRun(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
