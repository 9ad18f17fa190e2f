"""Pictures of a study."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from dqrm.data.files import save_figure
from dqrm.study.statistics import Estimate
from dqrm.study.study import Answered
from dqrm.study.summary import Row, Summary
from dqrm.study.verdict import Metric

_MIB = 1024**2
_LABELS: dict[Metric, str] = {"auc": "AUC", "log_loss": "log loss (nats)"}
_STYLES = ("-", "--", ":")

Across = Literal["epoch", "cpu_seconds"]


def _curves(answered: Sequence[Answered], summaries: Sequence[Summary], path: Path) -> None:
    """Validation against epochs: the mean over seeds, and a band from lowest to highest."""
    _against(answered, path, "epoch", "Epoch")


def _seconds(answered: Sequence[Answered], summaries: Sequence[Summary], path: Path) -> None:
    """The same against CPU seconds of training, with the budget of the comparison."""
    budgets = [summary.budget_seconds for summary in summaries]
    _against(answered, path, "cpu_seconds", "CPU seconds of training steps", budgets)


def _against(
    answered: Sequence[Answered],
    path: Path,
    across: Across,
    label: str,
    marks: Sequence[float | None] = (),
) -> None:
    figure = Figure(figsize=(12, 4.6 * len(answered)), layout="constrained")
    panels = figure.subplots(len(answered), 2, squeeze=False)
    for number, (one, pair) in enumerate(zip(answered, panels, strict=True)):
        for axis, metric in zip(pair, _LABELS, strict=True):
            _draw_curves(axis, one, metric, across)
            if marks and (mark := marks[number]) is not None:
                axis.axvline(mark, color="0.4", linewidth=0.8, linestyle=":")
            _label(axis, one.case.label, label, f"Validation {_LABELS[metric]}")
        if across == "epoch":
            for axis in pair:
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        pair[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _draw_curves(axis: Axes, one: Answered, metric: Metric, across: Across) -> None:
    for number, arm in enumerate(one.arms):
        curves = [outcome.curve for outcome in one.outcomes[arm.key] if outcome.curve]
        if not curves:
            continue
        points = list(zip(*curves, strict=False))
        x = [sum(getattr(p, across) for p in at) / len(at) for at in points]
        y = [[getattr(p, metric) for p in at] for at in points]
        mean = [sum(values) / len(values) for values in y]
        colour, style = f"C{number % 10}", _STYLES[number // 10 % len(_STYLES)]
        axis.plot(x, mean, color=colour, linestyle=style, marker="o", markersize=3, label=arm.title)
        axis.fill_between(
            x, [min(v) for v in y], [max(v) for v in y], color=colour, alpha=0.15, linewidth=0
        )


def _size(answered: Sequence[Answered], summaries: Sequence[Summary], path: Path) -> None:
    """Test quality against the packed size."""
    _scatter(summaries, path, lambda row: row.packed_bytes / _MIB, "Packed model (MiB)")


def _memory(answered: Sequence[Answered], summaries: Sequence[Summary], path: Path) -> None:
    """Test quality against the state that training keeps."""
    label = "Weights, optimizer and maxima in training (MiB)"
    _scatter(summaries, path, lambda row: row.training_bytes / _MIB, label)


def _step_time(answered: Sequence[Answered], summaries: Sequence[Summary], path: Path) -> None:
    """Test quality against the time of a step."""

    def milliseconds(row: Row) -> float | None:
        return None if row.cpu_step_seconds is None else 1000 * row.cpu_step_seconds.mean

    _scatter(summaries, path, milliseconds, "CPU milliseconds a step")


def _wire(answered: Sequence[Answered], summaries: Sequence[Summary], path: Path) -> None:
    """Test quality against what is sent."""

    def kibibytes(row: Row) -> float | None:
        return None if row.sent_bytes is None else row.sent_bytes / 1024

    _scatter(summaries, path, kibibytes, "Sent in a step by each rank (KiB)")


def _scatter(
    summaries: Sequence[Summary],
    path: Path,
    across: Callable[[Row], float | None],
    label: str,
) -> None:
    figure = Figure(figsize=(12, 4.8 * len(summaries)), layout="constrained")
    panels = figure.subplots(len(summaries), 2, squeeze=False)
    for summary, pair in zip(summaries, panels, strict=True):
        for axis, metric in zip(pair, _LABELS, strict=True):
            for number, row in enumerate(summary.rows):
                x = across(row)
                if x is not None:
                    marker = "os^"[number // 10 % 3]
                    _bar(axis, x, row.test[metric], f"C{number % 10}", row.title, marker)
            _plain_log(axis)
            _label(axis, summary.label, label, f"Test {_LABELS[metric]}")
        pair[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _plain_log(axis: Axes) -> None:
    """Scale the x axis by logarithms, with plain numbers that do not run into each other."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _bags(answered: Sequence[Answered], summaries: Sequence[Summary], path: Path) -> None:
    """Test quality of each arm from case to case."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    titles = {row.key: row.title for summary in summaries for row in summary.rows}
    places = range(len(summaries))
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, _LABELS, strict=True):
        for number, (key, title) in enumerate(titles.items()):
            rows = [(at, s.row(key)) for at, s in zip(places, summaries, strict=True)]
            found = [(at, row.test[metric]) for at, row in rows if row is not None]
            axis.errorbar(
                [at + 0.06 * number for at, _ in found],
                [value.mean for _, value in found],
                yerr=[value.half_width or 0.0 for _, value in found],
                color=f"C{number}",
                marker="o",
                capsize=3,
                label=title,
            )
        axis.set_xticks(list(places), [summary.label for summary in summaries])
        _label(axis, "", "", f"Test {_LABELS[metric]}")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _bar(axis: Axes, x: float, value: Estimate, colour: str, title: str, marker: str) -> None:
    error = None if value.half_width is None else [value.half_width]
    axis.errorbar(
        [x], [value.mean], yerr=error, color=colour, marker=marker, capsize=3, label=title
    )


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


Picture = Callable[[Sequence[Answered], Sequence[Summary], Path], None]

PICTURES: dict[str, tuple[str, Picture]] = {
    "curves": ("Validation by epoch: mean over seeds, band from lowest to highest", _curves),
    "seconds": (
        "Validation by CPU time of training steps; dotted: the time of the comparison",
        _seconds,
    ),
    "size": ("Test quality against packed size, with 95 % intervals", _size),
    "memory": ("Test quality against training memory, with 95 % intervals", _memory),
    "step-time": ("Test quality against the time of a step, with 95 % intervals", _step_time),
    "wire": ("Test quality against bytes sent, with 95 % intervals", _wire),
    "bags": ("Test quality by length of bags, with 95 % intervals", _bags),
}
"""Caption and drawing of each picture, by the name of its file."""
