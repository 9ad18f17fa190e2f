"""What people read of a study: tables, sentences, pictures, and everything measured as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqrm.data.files import write_json, write_text
from dqrm.study.document import Block, Heading, Image, Paragraph, Table, to_html, to_markdown
from dqrm.study.plots import PICTURES
from dqrm.study.statistics import Estimate
from dqrm.study.study import Study
from dqrm.study.summary import Row, Summary, summarize
from dqrm.study.verdict import METRICS, RULE, difference_text
from dqrm.tracking.base import Tracker
from dqrm.tracking.environment import environment_tags

_EQUAL_TIME = (
    "Equal time is {seconds:.1f} CPU seconds of training steps, in which the quickest arm took all "
    "its steps: each arm counts with its best validation up to there, between two validations on "
    "the straight line."
)


@dataclass(frozen=True)
class Report:
    """A study in words and figures."""

    title: str
    blocks: tuple[Block, ...]
    record: dict[str, Any]
    """Everything measured, for JSON."""


def make_report(study: Study, pictures: bool = True) -> Report:
    """Return the report of what is complete; draws pictures into the study's folder."""
    plan, summaries = study.plan, [summarize(one) for one in study.answered]
    question = plan.cases[0].question
    claim = Paragraph(f"The claim: {question.claim}")
    blocks: list[Block] = [claim, Paragraph(_seeds_text(plan.seeds))]
    if not study.complete:
        blocks.append(Paragraph("Not all runs are complete; figures are of those that are."))
    for summary in summaries:
        blocks += _case(summary, question.ours)
    blocks.append(Paragraph(RULE))
    blocks += [Paragraph(note) for note in question.notes]
    if study.failed:
        blocks.append(Heading("Failed"))
        blocks += [Paragraph(f"{name}: {reason}") for name, reason in study.failed.items()]
    if pictures and any(summary.rows for summary in summaries):
        plan.folder.mkdir(parents=True, exist_ok=True)
        for name in question.pictures:
            caption, draw = PICTURES[name]
            path = plan.folder / f"{name}.png"
            draw(study.answered, summaries, path)
            blocks.append(Image(path, caption))
    record = {
        "study": plan.kind,
        "environment": environment_tags(),
        "seeds": plan.seeds,
        "claim": question.claim,
        "failed": study.failed,
        "cases": [
            {
                "label": summary.label,
                "config": one.case.base.model_dump(mode="json"),
                "data": one.case.dataset.manifest.digest,
                "chosen": None if one.chosen is None else one.chosen.title,
                "rows": [asdict(row) for row in summary.rows],
                "verdicts": [
                    {**asdict(verdict), "ruling": verdict.ruling, "sentence": verdict.sentence}
                    for verdict in summary.verdicts
                ],
                "budget_cpu_seconds": summary.budget_seconds,
                "outcomes": {
                    key: [asdict(outcome) for outcome in outcomes]
                    for key, outcomes in one.outcomes.items()
                },
            }
            for one, summary in zip(study.answered, summaries, strict=True)
        ],
    }
    title = f"Study {plan.folder.name}"
    return Report(title, tuple(blocks), json.loads(json.dumps(record)))


def write_report(report: Report, folder: Path) -> None:
    """Write report.md, report.html and report.json beside the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", to_markdown(report.title, report.blocks))
    write_text(folder / "report.html", to_html(report.title, report.blocks))
    write_json(folder / "report.json", report.record)


def record_in(tracker: Tracker, report: Report, folder: Path) -> None:
    """Put the figures and the report into the study's MLflow run."""
    figures = {
        f"{row['key']}/test_{metric}": row["test"][metric]["mean"]
        for case in report.record["cases"]
        for row in case["rows"]
        for metric in METRICS
        if not case["label"]
    }
    tracker.log_metrics(figures, step=0)
    tracker.describe(
        " ".join(b.text for b in report.blocks if isinstance(b, Paragraph) if b.verdict)
    )
    for path in sorted(folder.iterdir()):
        if path.is_file():
            tracker.log_artifact(path, "report")


def _case(summary: Summary, ours: str) -> list[Block]:
    blocks: list[Block] = [Heading(summary.label)] if summary.label else []
    if not summary.rows:
        return [*blocks, Paragraph("Nothing is complete yet.")]
    own = summary.row(ours)
    for verdict in summary.verdicts:
        if own is not None and verdict.arm == own.title:
            blocks.append(Paragraph(verdict.sentence, verdict=True))
    if summary.at_equal_time is not None:
        sentence = f"On validation at equal time: {summary.at_equal_time.sentence}"
        blocks.append(Paragraph(sentence, verdict=True))
    sentences = _overfitting(summary, ours)
    blocks += [Paragraph(sentence, verdict=True) for sentence in sentences]
    blocks.append(_quality(summary))
    blocks += _differences(summary)
    if any(row.peak is not None for row in summary.rows):
        blocks.append(_training(summary))
        if summary.budget_seconds is not None:
            blocks.append(Paragraph(_EQUAL_TIME.format(seconds=summary.budget_seconds)))
    blocks.append(_cost(summary))
    return blocks


def _overfitting(summary: Summary, ours: str) -> list[str]:
    """How far FP32 and our arm fall behind their own best by the end, where both trained."""
    full, own = summary.row("fp32"), summary.row(ours)
    if full is None or own is None or full.peak is None or own.peak is None:
        return []
    if full.peak.lost.mean == own.peak.lost.mean == 0:
        return []
    sentences = [
        f"{row.title} is best at epoch {row.peak.epoch.mean:.1f}, with a validation AUC of "
        f"{row.peak.auc.mean:.4f}, and has lost {_interval(row.peak.lost)} of it at the end."
        for row in (full, own)
        if row.peak is not None
    ]
    pairs = list(zip(full.peak.lost.values, own.peak.lost.values, strict=False))
    less = Estimate.of([a - b for a, b in pairs])
    if less.half_width is not None and len(pairs) == len(full.peak.lost.values):
        decided = abs(less.mean) > less.half_width
        who = (own if less.mean > 0 else full).title
        sentences.append(
            f"Training too long costs {who} less: by {difference_text(less)}."
            if decided
            else f"Training too long costs neither of them less: {difference_text(less)}."
        )
    return sentences


def _quality(summary: Summary) -> Table:
    rows = [
        (
            row.title,
            _plus_minus(row.test["auc"]),
            _plus_minus(row.test["log_loss"]),
            f"{row.validation['auc'].mean:.4f}",
            f"{row.validation['log_loss'].mean:.4f}",
            f"{row.packed_bytes / 1024:,.1f}",
        )
        for row in summary.rows
    ]
    header = ("", "test AUC", "test log loss", "validation AUC", "log loss", "packed KiB")
    return Table(header, tuple(rows))


def _differences(summary: Summary) -> list[Block]:
    """How arms stand beside the rival; nothing where it has no outcome."""
    compared = [row for row in summary.rows if row.to_rival]
    if summary.rival is None or not compared:
        return []
    rulings = {(v.arm, v.metric): v.ruling for v in summary.verdicts}
    lines = []
    for row in compared:
        line = [row.title]
        for metric, difference in row.to_rival.items():
            line += [_plus_minus(difference, "+"), rulings[row.title, metric]]
        lines.append(tuple(line))
    header = ("", "AUC", "ruling", "log loss", "ruling")
    return [
        Paragraph(f"Test, less {summary.rival} with the same seed:"),
        Table(header, tuple(lines)),
    ]


def _training(summary: Summary) -> Table:
    header = (
        *("", "best epoch", "AUC there", "lost at the end"),
        *("AUC at equal time", "log loss", "steps"),
    )
    rows = []
    for row in summary.rows:
        if row.peak is None:
            continue
        line = [row.title, f"{row.peak.epoch.mean:.1f}", f"{row.peak.auc.mean:.4f}"]
        line.append(_interval(row.peak.lost))
        if row.at_equal_time is None:
            line += ["-", "-", "-"]
        else:
            at = row.at_equal_time
            line += [_plus_minus(at.auc), _plus_minus(at.log_loss), f"{at.steps:,.0f}"]
        rows.append(tuple(line))
    return Table(header, tuple(rows))


def _cost(summary: Summary) -> Table:
    columns: list[tuple[str, Callable[[Row], str | None]]] = [
        ("CPU ms a step", _step_text),
        ("training KiB", lambda row: f"{row.training_bytes / 1024:,.1f}"),
        ("peak MiB", lambda row: _number(row.peak_bytes, 2**20)),
        ("x smaller", lambda row: f"{row.fp32_bytes / row.packed_bytes:.1f}"),
        ("sent KiB a step", lambda row: _number(row.sent_bytes, 1024)),
        ("ratio", lambda row: _number(row.ratio, 1)),
    ]
    used = [(name, text) for name, text in columns if any(text(row) for row in summary.rows)]
    return Table(
        ("", *(name for name, _ in used)),
        tuple((row.title, *(text(row) or "-" for _, text in used)) for row in summary.rows),
    )


def _step_text(row: Row) -> str | None:
    return None if row.cpu_step_seconds is None else f"{1000 * row.cpu_step_seconds.mean:.3f}"


def _number(value: float | None, unit: int) -> str | None:
    return None if value is None else f"{value / unit:,.1f}"


def _plus_minus(value: Estimate, sign: str = "") -> str:
    mean = f"{value.mean:{sign}.4f}"
    return mean if value.half_width is None else f"{mean} +- {value.half_width:.4f}"


def _interval(value: Estimate) -> str:
    if value.half_width is None:
        return f"{value.mean:.4f}"
    return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"


def _seeds_text(seeds: Sequence[int]) -> str:
    listed = ", ".join(map(str, seeds))
    intervals = " as means with 95 % intervals" if len(seeds) > 1 else ""
    return (
        f"Seed{'s' if len(seeds) > 1 else ''} {listed}{intervals}. Every run is selected on "
        "validation, epoch by epoch, and tested once."
    )
