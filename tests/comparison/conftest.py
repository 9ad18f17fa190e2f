"""Run folders as training leaves them, and the command that compares them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from command_line import log_as_before, run_dqrm

Make = Callable[..., Path]

SETTINGS = {
    "data": {"path": "clicks", "batch_size": 64},
    "quant": {"bits": 4, "table_bits": {}},
    "train": {"seed": 0, "epochs": 3},
}


@pytest.fixture(autouse=True)
def _clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty current folder, none of MLflow's variables, and the log as it was."""
    for name in list(os.environ):
        if name.startswith("MLFLOW_") or name == "RANK":
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    with log_as_before():
        yield


@pytest.fixture
def dqrm() -> Callable[..., Result]:
    """Run a command line in this process."""
    return run_dqrm


@pytest.fixture
def make() -> Make:
    """Make a run's folder under ``runs``: a finished one unless told otherwise."""

    def run_folder(
        name: str,
        *,
        auc: float = 0.8,
        finished: bool = True,
        tested: bool = True,
        measured: bool = True,
        history: list[dict[str, float]] | None = None,
        **settings: Any,
    ) -> Path:
        path = Path("runs") / name
        step = path / "checkpoints" / "step-00000030"
        step.mkdir(parents=True)
        tree: dict[str, Any] = {"name": name, "output": "runs", "tracking": {"enabled": True}}
        tree |= {section: dict(values) for section, values in SETTINGS.items()}
        for key, value in settings.items():
            section, _, last = key.partition("__")
            tree[section][last] = value
        (path / "config.yaml").write_text(yaml.safe_dump(tree))
        state = {"step": 30, "epoch": 3, "batch": 0, "history": history or course(auc)}
        (step / "state.json").write_text(json.dumps(state))
        if finished:
            summary = {
                "test": {"auc": auc, "log_loss": 1 - auc, "calibration": 1.1} if tested else None,
                "fp32_bytes": 8000,
                "packed_bytes": 250 * tree["quant"]["bits"],
                "world_size": 1,
            }
            (path / "summary.json").write_text(json.dumps(summary))
        if finished and measured:
            (path / "measurements.json").write_text(json.dumps(measurements(tested)))
        return path

    return run_folder


def course(auc: float) -> list[dict[str, float]]:
    """Three epochs of ten steps, the second one the best."""
    values = (auc - 0.02, auc, auc - 0.01)
    return [
        {
            "step": 10 * epoch,
            "val/auc": value,
            "val/log_loss": 1 - value,
            "best/val_auc": max(values[:epoch]),
            "perf/samples_per_second": 1000.0 * epoch,
            "perf/step_seconds": 0.1 * epoch,
        }
        for epoch, value in enumerate(values, start=1)
    ]


def measurements(tested: bool) -> dict[str, Any]:
    bins = [
        {"predicted": 0.1, "observed": 0.12, "error": 0.02, "rows": 50},
        {"predicted": 0.6, "observed": 0.5, "error": 0.05, "rows": 50},
    ]
    table = {"name": "user", "rows": 10, "bits": 4, "fp32_bytes": 320, "packed_bytes": 44}
    return {
        "format_version": 1,
        "steps_per_epoch": 10,
        "calibration": bins if tested else [],
        "tables": [table | {"relative_error": 0.1}],
    }
