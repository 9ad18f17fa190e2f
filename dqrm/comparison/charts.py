"""What is drawn of a comparison."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dqrm.comparison.differences import Group
from dqrm.comparison.metrics import quality_metric, size_metric
from dqrm.comparison.record import ComparedRun
from dqrm.comparison.scales import linear, logarithmic, plain, root, whole
from dqrm.comparison.svg import Canvas, Mark, rows_svg
from dqrm.text import bytes_text
from dqrm.tracking.measurements import TableMeasurement

_MOST_TABLES = 12
_MOST_ROWS = 30


_QUALITY = ("val/auc", "val/accuracy", "val/matthews", "val/pearson")
_LOSS = ("val/log_loss", "val/loss")
_CURVES = {
    "val/auc": "Validation AUC",
    "val/accuracy": "Validation accuracy",
    "val/matthews": "Validation Matthews",
    "val/pearson": "Validation Pearson",
    "val/log_loss": "Validation log loss",
    "val/loss": "Validation loss",
}


@dataclass(frozen=True)
class Chart:
    """A picture with its heading, or the reason why there is none."""

    title: str
    svg: str = ""
    note: str = ""
    """A line below the picture."""
    missing: str = ""
    """Why it is left out."""


def charts(groups: Sequence[Group]) -> list[Chart]:
    """Return all pictures of the groups' runs; a group is one colour."""
    runs = [(number, run) for number, group in enumerate(groups) for run in group.runs]
    quality = next((key for key in _QUALITY if any(key in r.curves for _, r in runs)), _QUALITY[0])
    loss = next((key for key in _LOSS if any(key in run.curves for _, run in runs)), _LOSS[0])
    return [
        _curves(runs, quality, _CURVES[quality], max),
        _curves(runs, loss, _CURVES[loss], min),
        _quality_against_size(runs),
        _traffic(runs),
        _reliability(runs),
        _calibration(runs),
        _table_errors(groups),
        _table_sizes(groups),
    ]


Numbered = Sequence[tuple[int, ComparedRun]]
"""Runs with the number of their group."""


def _curves(
    runs: Numbered, key: str, title: str, pick: Callable[..., tuple[float, float]]
) -> Chart:
    measured = [
        (group, run, [point for point in run.curves[key] if math.isfinite(point[1])])
        for group, run in runs
        if key in run.curves
    ]
    # Runs that do not say how long an epoch is can only be drawn among themselves.
    epochs = any(run.steps_per_epoch for _, run, _ in measured)
    unit = "epoch" if epochs else "step"
    drawn = []
    for group, run, curve in measured:
        steps = run.steps_per_epoch if epochs else 1
        if steps and curve:
            drawn.append((group, run, [(step / steps, value) for step, value in curve]))
    heading = f"{title} against {unit}"
    if not drawn:
        return Chart(heading, missing="no run was validated during its training")
    x = whole(at for _, _, points in drawn for at, _ in points)
    y = linear(value for _, _, points in drawn for _, value in points)
    canvas = Canvas(x, y, unit, title, plain(x), plain(y))
    for group, run, points in drawn:
        canvas.line(points, group)
        best = pick(points, key=lambda point: point[1])
        for point in points:
            label = f"{run.name}: {point[1]:.4f}, {unit} {point[0]:.3g}"
            canvas.dot(point, group, label, radius=2.2)
        canvas.dot(best, group, run.name, radius=8, ring=True)
        canvas.dot(best, group, f"{run.name}: best, {best[1]:.4f}, {unit} {best[0]:.3g}")
    left_out = len(measured) - len(drawn)
    rest = f" {left_out} runs do not say how long their epochs are." if left_out else ""
    return Chart(heading, canvas.svg(heading), f"Rings mark the best {unit} of each run.{rest}")


def _quality_against_size(runs: Numbered) -> Chart:
    quality = quality_metric([run.metrics for _, run in runs])
    size = size_metric([run.metrics for _, run in runs])
    if quality is None or size is None:
        what = "quality" if quality is None else "size"
        return Chart("Quality against size", missing=f"no run recorded its {what}")
    heading = f"{_capital(quality.title)} against {size.title}"
    found = [
        (group, run, run.metrics[size.key], run.metrics[quality.key])
        for group, run in runs
        if size.key in run.metrics and math.isfinite(run.metrics.get(quality.key, math.nan))
    ]
    if not found:
        return Chart(heading, missing="no run recorded both")
    x = logarithmic((bytes_ for _, _, bytes_, _ in found), 2.0)
    y = linear(value for *_, value in found)
    canvas = Canvas(x, y, size.title, _capital(quality.title), _whole_bytes, plain(y))
    front = _front([(bytes_, value) for _, _, bytes_, value in found])
    if len(front) > 1:
        canvas.guide(list(_stairs(front)))
    for group, run, bytes_, value in found:
        label = f"{run.name}: {quality.text(value)} with {bytes_text(bytes_)}"
        canvas.dot((bytes_, value), group, label, radius=5.5)
    note = "No run is both smaller and better than those on the dashed line."
    return Chart(heading, canvas.svg(heading), note if len(front) > 1 else "")


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return those that none is left of and above, from left to right."""
    best = -math.inf
    front = []
    for size, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if value > best:
            front.append((size, value))
            best = value
    return front


def _stairs(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    for number, (x, y) in enumerate(points):
        if number:
            yield x, points[number - 1][1]
        yield x, y


def _traffic(runs: Numbered) -> Chart:
    heading = "Bytes on the wire against step time"
    sent, step = "comm/sent_bytes_per_step", "perf/step_seconds"
    found = [
        (group, run, run.metrics[sent], 1000 * run.metrics[step])
        for group, run in runs
        if run.metrics.get(sent, 0.0) > 0 and step in run.metrics
    ]
    if not found:
        return Chart(heading, missing="no run exchanged gradients between processes")
    x = logarithmic((bytes_ for _, _, bytes_, _ in found), 2.0)
    y = linear((ms for *_, ms in found), include=[0.0])
    title = "sent by a process in a step"
    canvas = Canvas(x, y, title, "ms a step", _whole_bytes, plain(y))
    for group, run, bytes_, ms in found:
        label = f"{run.name}: {bytes_text(bytes_)} and {ms:.2f} ms a step"
        canvas.dot((bytes_, ms), group, label, radius=5.5)
    return Chart(heading, canvas.svg(heading), "Medians over each run.")


def _reliability(runs: Numbered) -> Chart:
    heading = "Reliability"
    found = [
        (group, run, run.measurements.calibration)
        for group, run in runs
        if run.measurements and run.measurements.calibration
    ]
    if not found:
        return Chart(heading, missing="no run kept the calibration of its test split")
    bins = [bin_ for _, _, bins in found for bin_ in bins]
    scale = root(max(max(bin_.predicted, bin_.observed + bin_.error) for bin_ in bins))
    canvas = Canvas(
        *(scale, scale, "predicted probability", "observed rate of positives"),
        *(plain(scale), plain(scale)),
    )
    canvas.guide([(0.0, 0.0), (scale.high, scale.high)])
    for group, run, of_run in found:
        canvas.line([(bin_.predicted, bin_.observed) for bin_ in of_run], group, faint=True)
        for bin_ in of_run:
            low = max(0.0, bin_.observed - bin_.error)
            high = min(scale.high, bin_.observed + bin_.error)
            canvas.bar((bin_.predicted, low), (bin_.predicted, high), group)
            label = (
                f"{run.name}: {bin_.rows:,} rows predicted {bin_.predicted:.4f}, "
                f"observed {bin_.observed:.4f}"
            )
            canvas.dot((bin_.predicted, bin_.observed), group, label, radius=3)
    note = (
        "Test rows in bins of equally many; +- 2 standard errors. Both axes are stretched near "
        "zero. Below the dashed line a model promises too much."
    )
    return Chart(heading, canvas.svg(heading), note)


def _calibration(runs: Numbered) -> Chart:
    heading = "Calibration"
    key = "test/calibration"
    found = [(g, run) for g, run in runs if math.isfinite(run.metrics.get(key, math.nan))]
    if not found:
        return Chart(heading, missing="no run measured the calibration of its test split")
    rows = [
        (run.name, [Mark(run.metrics[key], group, f"{run.name}: {run.metrics[key]:.4f}")])
        for group, run in found[:_MOST_ROWS]
    ]
    scale = linear((mark.value for _, marks in rows for mark in marks), include=[1.0])
    # One is where it should be, not where the picture should end.
    scale = linear([scale.low, scale.high])
    svg = rows_svg(
        rows, scale, "mean prediction over rate of positives", plain(scale), heading, 1.0
    )
    note = "On the dashed line predictions are right on average."
    return Chart(heading, svg, note + _rest(len(found), _MOST_ROWS, "runs"))


def _table_errors(groups: Sequence[Group]) -> Chart:
    heading = "Rounding error by table"
    rows = _by_table(groups, lambda table: 100 * table.relative_error)
    if not rows:
        return Chart(heading, missing="no run kept what rounding changes in its tables")
    shown = sorted(rows, key=lambda row: -max(mark.value for mark in row[1]))[:_MOST_TABLES]
    scale = linear((mark.value for _, marks in shown for mark in marks), include=[0.0])
    title = "norm of the change, in percent of the weights'"
    svg = rows_svg(shown, scale, title, plain(scale), heading)
    note = "Means over seeds; full precision is left out."
    return Chart(
        heading, svg, note + _rest(len(rows), _MOST_TABLES, "tables, those that lose most")
    )


def _table_sizes(groups: Sequence[Group]) -> Chart:
    heading = "Packed size by table"
    rows = _by_table(groups, lambda table: float(table.packed_bytes))
    if not rows:
        return Chart(heading, missing="no run kept the sizes of its tables")
    shown = sorted(rows, key=lambda row: -max(mark.value for mark in row[1]))[:_MOST_TABLES]
    scale = logarithmic((mark.value for _, marks in shown for mark in marks), 2.0)
    svg = rows_svg(shown, scale, "bytes of codes and scales", _whole_bytes, heading)
    return Chart(heading, svg, _rest(len(rows), _MOST_TABLES, "tables, the largest").strip())


def _by_table(
    groups: Sequence[Group], value: Callable[[TableMeasurement], float]
) -> list[tuple[str, list[Mark]]]:
    """Return rows of marks, one for each group that has a value above zero of the table."""
    found: dict[str, list[Mark]] = {}
    for number, group in enumerate(groups):
        values: dict[str, list[float]] = {}
        for run in group.runs:
            for table in run.measurements.tables if run.measurements else ():
                values.setdefault(table.name, []).append(value(table))
        for name, of_table in values.items():
            mean = statistics.mean(of_table)
            if mean > 0:
                label = f"{group.name}, {name}: {mean:,.3g}"
                found.setdefault(name, []).append(Mark(mean, number, label))
    return list(found.items())


def _rest(count: int, most: int, what: str) -> str:
    return f" {most} of {count} {what}." if count > most else ""


def _whole_bytes(value: float) -> str:
    return bytes_text(value).replace(".0 ", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
