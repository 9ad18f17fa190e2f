"""The comparison as text for a terminal."""

import statistics
from collections.abc import Sequence

from dqrm.comparison.differences import Group, differences
from dqrm.comparison.metrics import Metric, best_texts, columns
from dqrm.comparison.record import ComparedRun
from dqrm.text import shortened, table

_SHOWN_VALUE = 24
_SHOWN_NAME = 36
_SPACE = 2


def comparison_text(runs: Sequence[ComparedRun], groups: Sequence[Group], width: int) -> str:
    """Return metrics, means over seeds where there are some, and differences of settings.

    Args:
        runs: in the order of the rows.
        groups: the same runs, by their settings.
        width: characters of a line; tables that are wider become several.
    """
    parts = [_metrics(runs, width)]
    if len(groups) < len(runs):
        parts.append(_means(groups, width))
    parts.append(_settings(groups, width))
    return "\n\n".join(parts) + "\n"


def _metrics(runs: Sequence[ComparedRun], width: int) -> str:
    shown = columns([run.metrics for run in runs], short=True)
    if not shown:
        return "none of these runs has metrics yet"
    rows = [[shortened(run.name, _SHOWN_NAME)] for run in runs]
    for metric in shown:
        values = [run.metrics.get(metric.key) for run in runs]
        best = best_texts(metric, values)
        for row, value in zip(rows, values, strict=True):
            row.append(_marked(metric, value, best))
    header = ["run", *(f"{metric.title} " for metric in shown)]
    if any(run.status != "FINISHED" for run in runs):
        header.append("status")
        for row, run in zip(rows, runs, strict=True):
            row.append(run.status.lower())
    marked = any(cell.endswith("*") for row in rows for cell in row[1:])
    return _tables(header, rows, width) + ("\n* best of its column" if marked else "")


def _marked(metric: Metric, value: float | None, best: set[str]) -> str:
    if value is None:
        return "- "
    text = metric.text(value)
    return text + ("*" if text in best else " ")


def _means(groups: Sequence[Group], width: int) -> str:
    shown = columns([run.metrics for group in groups for run in group.runs], short=True)
    rows = [
        [
            f"{shortened(group.name, _SHOWN_NAME)} ({len(group.runs)})",
            *(mean_text(metric, group) for metric in shown),
        ]
        for group in groups
    ]
    header = ["mean over runs", *(metric.title for metric in shown)]
    return _tables(header, rows, width) + "\n+- standard deviation over seeds"


def mean_text(metric: Metric, group: Group) -> str:
    """Return the mean of a metric over a group's runs, and the deviation where there is one."""
    values = group.values(metric.key)
    if not values:
        return "-"
    text = metric.text(statistics.mean(values))
    if len(values) < 2 or metric.kind not in ("score", "rate"):
        return text
    return f"{text} +- {metric.text(statistics.stdev(values))}"


def _settings(groups: Sequence[Group], width: int) -> str:
    if len(groups) < 2:
        return "no settings differ"
    unequal, partial = differences([group.settings for group in groups])
    more = f"settings known of some runs only: {len(partial)}" if partial else ""
    if not unequal:
        return more or "no settings differ"
    header = ["setting", *(shortened(group.name, _SHOWN_VALUE) for group in groups)]
    rows = [[found.key, *found.texts(_SHOWN_VALUE)] for found in unequal]
    return _tables(header, rows, width) + (f"\n{more}" if more else "")


def _tables(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Return as many tables below each other as it takes to fit; all have the first column."""
    lines = [header, *rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
    chosen: list[list[int]] = [[0]]
    left = width - widths[0]
    for number in range(1, len(header)):
        needed = widths[number] + _SPACE
        if needed > left and len(chosen[-1]) > 1:
            chosen.append([0])
            left = width - widths[0]
        chosen[-1].append(number)
        left -= needed
    return "\n\n".join(
        table([header[n] for n in numbers], [[row[n] for n in numbers] for row in rows])
        for numbers in chosen
    )
