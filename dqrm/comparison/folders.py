"""Runs read from their folders, without MLflow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dqrm.comparison.metrics import columns
from dqrm.comparison.record import ComparedRun, Curve, is_drawn, settings_of, with_medians
from dqrm.tracking.identity import recorded_run
from dqrm.tracking.measurements import MEASUREMENTS_FILE, read_measurements
from dqrm.tracking.uri import page_of
from dqrm.tracking.values import flatten, numbers
from dqrm.yaml_text import parse_document

_CONFIG, _SUMMARY = "config.yaml", "summary.json"
_STAGE, _PIPELINE = "stage.json", "pipeline.yaml"
_OF_THE_PLACE = ("name", "output", "tracking")
_DIGEST_CHARACTERS = 12


def is_run_folder(path: Path) -> bool:
    """Whether ``path`` is the folder of a run, of a pipeline, or of one of its stages."""
    return any((path / name).is_file() for name in (_CONFIG, _STAGE, _PIPELINE))


def read_folder(path: Path) -> list[ComparedRun]:
    """Read a run, a stage of a pipeline, or the complete stages of one that measured a model.

    Raises:
        ValueError: a file is damaged, or a pipeline has no such stage.
    """
    if (path / _STAGE).is_file():
        return [_read_stage(path)]
    if not (path / _PIPELINE).is_file():
        return [_read_run(path)]
    stages = [_read_stage(file.parent) for file in sorted(path.glob(f"stages/*/{_STAGE}"))]
    measured = [stage for stage in stages if columns([stage.metrics], short=False)]
    if not measured:
        raise ValueError(f"{path}: no complete stage of this pipeline measured a model")
    return measured


def _read_run(path: Path) -> ComparedRun:
    settings = _settings(path / _CONFIG)
    summary = _json(path / _SUMMARY)
    measurements = read_measurements(path / MEASUREMENTS_FILE)
    state = _newest_state(path)
    measured = _curves(state.get("history", []))
    metrics = {name: curve[-1][1] for name, curve in measured.items()}
    curves = {name: curve for name, curve in measured.items() if is_drawn(name)}
    if summary:
        metrics |= numbers({f"test/{k}": v for k, v in (summary["test"] or {}).items()})
        sizes = ("fp32_bytes", "packed_bytes", "training_bytes")
        metrics |= numbers({f"size/{k}": summary.get(k) for k in sizes})
    known = {"world_size": str(summary["world_size"])} if "world_size" in summary else {}
    return ComparedRun(
        name=path.absolute().name,
        status="FINISHED" if summary else "UNFINISHED",
        source=str(path),
        settings=settings | known,
        metrics=with_medians(metrics, curves),
        curves=curves,
        measurements=measurements,
        steps_per_epoch=measurements.steps_per_epoch if measurements else _steps(state),
        **_identity(path),
    )


def _read_stage(path: Path) -> ComparedRun:
    record = _json(path / _STAGE)
    pipeline = path.absolute().parent.parent
    name = f"{pipeline.name}/{path.absolute().name}"
    digest = str(record.get("digest", ""))[:_DIGEST_CHARACTERS]
    run_dir = pipeline / "runs" / f"{path.absolute().name}-{digest}"
    if (run_dir / _CONFIG).is_file():
        # A stage that trains is a whole run; what it made is only linked to the stage.
        run = _read_run(run_dir)
        metrics = numbers(record["metrics"]) | dict(run.metrics)
        return ComparedRun(**{**vars(run), "name": name, "metrics": metrics, "source": str(path)})
    return ComparedRun(
        name=name,
        status="FINISHED",
        source=str(path),
        settings=_stage_settings(pipeline, path.absolute().name),
        metrics=numbers(record.get("metrics", {})),
        **_identity(run_dir),
    )


def _stage_settings(pipeline: Path, key: str) -> dict[str, str]:
    file = pipeline / _PIPELINE
    if not file.is_file():
        return {}
    tree = parse_document(file.read_text(encoding="utf-8"), str(file)).tree
    for stage in tree.get("stages", []):
        if (stage.get("name") or stage.get("stage")) == key:
            return dict(flatten({k: v for k, v in stage.items() if k != "name"}))
    return {}


def _settings(file: Path) -> dict[str, str]:
    tree = parse_document(file.read_text(encoding="utf-8"), str(file)).tree
    kept = {key: value for key, value in tree.items() if key not in _OF_THE_PLACE}
    return settings_of(dict(flatten(kept)))


def _identity(path: Path) -> dict[str, Any]:
    recorded = recorded_run(path)
    if recorded is None:
        return {}
    page = page_of(recorded.uri, recorded.experiment_id, recorded.run_id)
    return {"run_id": recorded.run_id, "experiment": recorded.experiment, "url": page}


def _newest_state(path: Path) -> dict[str, Any]:
    states = sorted(path.glob("checkpoints/step-*/state.json"))
    return _json(states[-1]) if states else {}


def _steps(state: Mapping[str, Any]) -> int | None:
    """Steps of an epoch, of a run that was stopped behind its first one."""
    epochs = state.get("epoch", 0)
    return (state["step"] - state["batch"]) // epochs if epochs else None


def _curves(history: list[dict[str, float]]) -> dict[str, Curve]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in numbers(entry).items():
            if name != "step":
                curves.setdefault(name, []).append((int(entry["step"]), value))
    return {name: tuple(points) for name, points in curves.items()}


def _json(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing where there is none."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    return fields
