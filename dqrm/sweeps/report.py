"""What a sweep leaves behind: the table of trials, the best configuration, plots, a summary."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dqrm.config import RunConfig
from dqrm.configuration import load, to_yaml
from dqrm.data.files import save_figure, write_json, write_text
from dqrm.sweeps.folder import SweepFolder
from dqrm.sweeps.plots import plot_history, plot_slices
from dqrm.sweeps.study import BEST_STEP, ERROR, SweepStudy, overrides
from dqrm.tracking.base import Tracker
from dqrm.training.run import TrainResult

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_WORDS = {
    "COMPLETE": "finished",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "cut off",
}


@dataclass(frozen=True)
class TrialRow:
    """A trial as it stands in tables."""

    number: int
    outcome: str
    """finished, pruned, failed or cut off."""
    value: float | None
    """What was selected by: validation AUC or log loss; of a pruned one the best so far."""
    best_step: int | None
    params: dict[str, Any]
    error: str


@dataclass(frozen=True)
class Report:
    """What a sweep came to."""

    folder: str
    metric: str
    """val_auc or val_log_loss."""
    rows: tuple[TrialRow, ...]
    """Of all trials, in their order."""
    best: TrialRow | None
    test: dict[str, float] | None
    """Of the best trial, measured once; None before the end, or without a test split."""
    importance: dict[str, float]
    run_id: str | None
    tracking_uri: str | None

    def ranked(self) -> list[TrialRow]:
        """Finished trials, the best first."""
        sign = -1 if self.metric == "val_auc" else 1
        done = [row for row in self.rows if row.outcome == "finished"]
        return sorted(done, key=lambda row: sign * (row.value or 0.0))

    def count(self, outcome: str) -> int:
        """How many trials ended so."""
        return sum(row.outcome == outcome for row in self.rows)


def keep_progress(folder: SweepFolder, study: SweepStudy) -> None:
    """Write the table of trials, and the best configuration so far."""
    rows = [_row(trial, study.select) for trial in study.trials]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list(folder.space.searches)
    writer.writerow(["trial", "outcome", f"val_{study.select}", "best_step", *keys, "error"])
    for row in rows:
        values = [row.params.get(key) for key in keys]
        writer.writerow([row.number, row.outcome, row.value, row.best_step, *values, row.error])
    write_text(folder.path / "trials.csv", text.getvalue())
    best = study.best
    if best is not None:
        config = load(RunConfig, folder.path / "base.yaml", overrides(best.params))
        path = folder.path / "best.yaml"
        heading = (
            f"# dqrm train --config {path}\n#\n# Trial {best.number} of the sweep {folder.name}: "
            f"validation {study.select} {best.value:.4f}.\n\n"
        )
        write_text(path, heading + to_yaml(config))


def write_report(
    folder: SweepFolder, study: SweepStudy, tracker: Tracker, tested: TrainResult | None
) -> Report:
    """Write all that the folder keeps, record it, and return it.

    Args:
        folder: of the sweep.
        study: its trials.
        tracker: of the sweep's run.
        tested: the run of the best trial if it was tested just now.
    """
    keep_progress(folder, study)
    rows = tuple(_row(trial, study.select) for trial in study.trials)
    best = study.best
    report = Report(
        folder=str(folder.path),
        metric=f"val_{study.select}",
        rows=rows,
        best=rows[best.number] if best is not None else None,
        test=_test_of(folder, best, tested),
        importance=study.importance(),
        run_id=tracker.run_id,
        tracking_uri=tracker.uri,
    )
    _plot(folder, report)
    write_json(folder.path / "summary.json", asdict(report))
    for name in ("trials.csv", "best.yaml", "summary.json"):
        if (folder.path / name).is_file():
            tracker.log_artifact(folder.path / name)
    if report.best is not None:
        for path in sorted((folder.path / "plots").iterdir()):
            tracker.log_artifact(path, "plots")
        shares = {f"importance/{key}": share for key, share in report.importance.items()}
        tracker.log_metrics(shares, step=len(rows))
        tracker.describe(_outcome(report))
    return report


def _row(trial: "FrozenTrial", select: str) -> TrialRow:
    value = trial.value
    if trial.state.name == "PRUNED" and trial.intermediate_values:
        choose = max if select == "auc" else min
        value = choose(trial.intermediate_values.values())
    return TrialRow(
        number=trial.number,
        outcome=_WORDS[trial.state.name],
        value=value,
        best_step=trial.user_attrs.get(BEST_STEP),
        params=dict(trial.params),
        error=trial.user_attrs.get(ERROR, ""),
    )


def _test_of(
    folder: SweepFolder, best: "FrozenTrial | None", tested: TrainResult | None
) -> dict[str, float] | None:
    if tested is not None:
        return tested.test.as_dict() if tested.test is not None else None
    summary = folder.trial(best.number) / "summary.json" if best is not None else None
    if summary is None or not summary.is_file():
        return None
    test: dict[str, float] | None = json.loads(summary.read_text(encoding="utf-8"))["test"]
    return test


def _plot(folder: SweepFolder, report: Report) -> None:
    if report.best is None:
        return
    plots = folder.path / "plots"
    plots.mkdir(exist_ok=True)
    save_figure(plot_history(report.rows, report.metric), plots / "history.png")
    slices = plot_slices(report.rows, folder.space, report.metric, report.importance)
    save_figure(slices, plots / "slices.png")


def _outcome(report: Report) -> str:
    assert report.best is not None
    best = report.best
    counts = f"{report.count('pruned')} pruned, {report.count('failed')} failed"
    lines = [
        f"{len(report.rows)} trials, {counts}.",
        f"Best is trial {best.number}: {report.metric} {best.value:.4f} with "
        f"{' '.join(overrides(best.params))}.",
    ]
    return "\n".join(lines)
