"""Puts a comparison where the runs are: into MLflow, as a run that holds the report."""

import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dqrm.comparison.find import RUNS
from dqrm.comparison.metrics import best_texts, columns
from dqrm.comparison.record import COMPARISON_FILE, COMPARISON_TAG, ComparedRun
from dqrm.comparison.report import Report
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.identity import RecordedRun, recorded_run
from dqrm.tracking.tracker import start_tracker

_WIDTH = 120
_UNSAFE = str.maketrans({character: f"\\{character}" for character in r"\`*_[]<>|"})


def record_report(
    report: Report, uri: str | None = None, experiment: str | None = None
) -> tuple[Path, RecordedRun | None]:
    """Record text, page and JSON of a comparison as a run of its own.

    Args:
        report: what to record.
        uri: of the store; as everywhere when not given.
        experiment: the one that most of the runs are in when not given.

    Returns:
        The folder under ``runs`` that holds the files, and the run; None while the store does not
        answer (`dqrm tracking sync` uploads it then).
    """
    run_dir = _new_folder(RUNS)
    config = TrackingConfig(
        uri=uri,
        experiment=experiment or _usual_experiment(report.runs),
        system_metrics=False,
        tags={COMPARISON_TAG: report.title},
    )
    report.write_json(run_dir / COMPARISON_FILE)
    tracker = start_tracker(config, run_name=run_dir.name, run_dir=run_dir)
    complete = False
    try:
        tracker.log_params({"runs": ", ".join(run.name for run in report.runs)})
        report.write_html(run_dir / "report.html")
        (run_dir / "comparison.txt").write_text(report.text(_WIDTH), encoding="utf-8")
        for name in ("report.html", "comparison.txt", COMPARISON_FILE):
            tracker.log_artifact(run_dir / name)
        tracker.describe(description(report))
        complete = True
    finally:
        tracker.finish("FINISHED" if complete else "FAILED")
    return run_dir, recorded_run(run_dir)


def description(report: Report) -> str:
    """Return the comparison as Markdown, its runs linked, as MLflow shows it on the run's page."""
    shown = columns([run.metrics for run in report.runs], short=True)
    lines = [
        " | ".join(["run", *(metric.title for metric in shown)]),
        " | ".join(["---", *("---:" for _ in shown)]),
    ]
    best = {
        metric.key: best_texts(metric, [run.metrics.get(metric.key) for run in report.runs])
        for metric in shown
    }
    for run in report.runs:
        cells = [_linked(run)]
        for metric in shown:
            value = run.metrics.get(metric.key)
            text = "" if value is None else metric.text(value)
            cells.append(f"**{text}**" if text in best[metric.key] else text)
        lines.append(" | ".join(cells))
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{table}\n\nPictures and settings that differ: `report.html` under Artifacts."


def _linked(run: ComparedRun) -> str:
    name = run.name.translate(_UNSAFE)
    # Within MLflow's pages a link needs no address of the server.
    return f"[{name}](#{run.url.partition('#')[2]})" if run.url and "#" in run.url else name


def _usual_experiment(runs: Sequence[ComparedRun]) -> str | None:
    known = [run.experiment for run in runs if run.experiment]
    return statistics.mode(known) if known else None


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    name = f"comparison-{datetime.now():%Y%m%d-%H%M%S}"
    number = 0
    while True:
        path = parent / (f"{name}-{number}" if number else name)
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        return path
