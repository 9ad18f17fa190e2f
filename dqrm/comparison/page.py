"""The comparison as one HTML file that needs nothing else.

Without scripts it is complete; a few lines sort the table and lift a group out of the pictures.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from dqrm.comparison.charts import charts
from dqrm.comparison.differences import Difference, Group, differences
from dqrm.comparison.metrics import Metric, best_texts, columns, metric_of, quality_metric
from dqrm.comparison.record import ComparedRun
from dqrm.comparison.svg import colour_class
from dqrm.comparison.table import mean_text

_STYLE = Path(__file__).with_name("report.css")
_SCRIPT = Path(__file__).with_name("report.js")

_TILES = {
    "size/packed_bytes": "smallest",
    "perf/samples_per_second": "fastest training",
    "comm/sent_bytes_per_step": "lightest exchange",
}
_SHOWN_VALUE = 36
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def comparison_page(
    runs: Sequence[ComparedRun], groups: Sequence[Group], title: str, command: str
) -> str:
    """Return the report.

    Args:
        runs: in the order of the table.
        groups: the same runs, by their settings; each is a colour.
        title: heading of the page.
        command: that makes it again.
    """
    numbers = {run.name: number for number, group in enumerate(groups) for run in group.runs}
    means = _means(groups) if len(groups) < len(runs) else ""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{datetime.now():%Y-%m-%d %H:%M} &middot; {_counts(runs, groups)}</p>',
        _tiles(groups),
        "<h2>Metrics</h2>",
        _metrics(runs, numbers),
        means,
        "<h2>Settings that differ</h2>",
        _settings(groups),
        "<h2>Pictures</h2>",
        _pictures(groups),
        "<h2>Runs</h2>",
        '<div class="runs">',
        *(_run(run, numbers[run.name]) for run in runs),
        "</div>",
        f"<footer>Made by <code>{escape(command)}</code></footer>",
    ]
    return _PAGE.format(
        policy=_POLICY,
        title=escape(title),
        style=_STYLE.read_text(encoding="utf-8"),
        body="\n".join(part for part in parts if part),
        script=_SCRIPT.read_text(encoding="utf-8"),
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{script}</script>
</body>
</html>
"""


def _counts(runs: Sequence[ComparedRun], groups: Sequence[Group]) -> str:
    text = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    if len(groups) < len(runs):
        text += f" with {len(groups)} setting{'s' if len(groups) != 1 else ''}"
    return text


def _tiles(groups: Sequence[Group]) -> str:
    """What a reader wants to know first: who leads in what."""
    every = [run.metrics for group in groups for run in group.runs]
    quality = quality_metric(every)
    shown = ([quality] if quality else []) + [metric_of(key) for key in _TILES]
    tiles = [tile for metric in shown for tile in _tile(metric, groups)]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(metric: Metric, groups: Sequence[Group]) -> Iterator[str]:
    measured = {number: _finite(group.values(metric.key)) for number, group in enumerate(groups)}
    order = sorted(
        (number for number, values in measured.items() if values),
        key=lambda number: metric.cost(statistics.mean(measured[number])),
    )
    means = {number: statistics.mean(measured[number]) for number in order}
    if len({metric.text(mean) for mean in means.values()}) < 2:
        return
    best, second, worst = order[0], order[1], order[-1]
    if _within_spread(measured[best], measured[second]):
        line = f"{groups[second].name} within the spread over seeds"
    else:
        line = _margin(metric, means[best], means[worst], groups[worst].name)
    unit = f"<small>{escape(metric.title)}</small>" if metric.kind == "rate" else ""
    yield (
        f'<div class="tile"><span class="soft">{_TILES.get(metric.key, f"best {metric.title}")}'
        f"</span><b>{escape(metric.text(means[best]))}{unit}</b>"
        f"{_key(best)}{escape(groups[best].name)}<p>{escape(line)}</p></div>"
    )


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _within_spread(best: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two means differ by no more than the seeds do, which says nothing then."""
    if min(len(best), len(second)) < 2:
        return False
    gap = abs(statistics.mean(best) - statistics.mean(second))
    spread = math.hypot(statistics.stdev(best), statistics.stdev(second))
    return spread > 0 and gap <= spread


def _margin(metric: Metric, best: float, worst: float, name: str) -> str:
    """What the best is held against: the worst."""
    text = f"against {metric.text(worst)} of {name}"
    if metric.kind == "score" or min(best, worst) <= 0:
        return text
    return f"{text} ({max(best, worst) / min(best, worst):.1f} x)"


def _metrics(runs: Sequence[ComparedRun], numbers: dict[str, int]) -> str:
    shown = columns([run.metrics for run in runs], short=False)
    if not shown:
        return '<p class="soft">None of these runs has metrics yet.</p>'
    best = {
        metric.key: best_texts(metric, [run.metrics.get(metric.key) for run in runs])
        for metric in shown
    }
    rows = []
    for run in runs:
        number = numbers[run.name]
        cells = [
            f'<th scope="row" data-value="{escape(run.name)}" title="{escape(run.name)}">'
            f"{_key(number)}{escape(run.name)}{_status(run)}</th>"
        ]
        cells += [_cell(metric, run.metrics.get(metric.key), best[metric.key]) for metric in shown]
        rows.append(f'<tr data-shows="{number}">{"".join(cells)}</tr>')
    heads = ["<th>run</th>"]
    heads += [
        f'<th data-first="{"descending" if metric.better == "higher" else "ascending"}">'
        f"{escape(metric.title)}</th>"
        for metric in shown
    ]
    note = "The best of each column is marked; speeds and traffic are medians over the run."
    return _sheet(heads, rows, "sorted") + f'<p class="note">{note}</p>'


def _status(run: ComparedRun) -> str:
    return "" if run.status == "FINISHED" else f" <small>{escape(run.status.lower())}</small>"


def _cell(metric: Metric, value: float | None, best: set[str]) -> str:
    if value is None:
        return '<td class="other">&ndash;</td>'
    text = metric.text(value)
    kind = ' class="best"' if text in best else ""
    sortable = f"{value!r}" if math.isfinite(value) else ""
    return f'<td{kind} data-value="{sortable}">{escape(text)}</td>'


def _means(groups: Sequence[Group]) -> str:
    shown = columns([run.metrics for group in groups for run in group.runs], short=True)
    heads = ["<th>mean over seeds</th>", "<th>runs</th>"]
    heads += [f"<th>{escape(metric.title)}</th>" for metric in shown]
    rows = []
    for number, group in enumerate(groups):
        cells = [f'<th scope="row">{_key(number)}{escape(group.name)}</th>']
        cells.append(f"<td>{len(group.runs)}</td>")
        for metric in shown:
            text = escape(mean_text(metric, group)).replace("+-", "&plusmn;")
            cells.append(f"<td>{text}</td>")
        rows.append(f'<tr data-shows="{number}">{"".join(cells)}</tr>')
    return "<br>" + _sheet(heads, rows) + '<p class="note">&plusmn; standard deviation.</p>'


def _settings(groups: Sequence[Group]) -> str:
    unequal, partial = differences([group.settings for group in groups])
    if not unequal and not partial:
        return '<p class="soft">None but the seed.</p>'
    heads = ["<th>setting</th>"]
    heads += [f"<th>{_key(n)}{escape(group.name)}</th>" for n, group in enumerate(groups)]
    parts = []
    if unequal:
        parts.append(_sheet(heads, [_setting(found) for found in unequal]))
    if partial:
        more = _sheet(heads, [_setting(found) for found in partial])
        line = f"Known of some runs only: {len(partial)}"
        parts.append(f"<details><summary>{line}</summary>{more}</details>")
    return "\n".join(parts)


def _setting(found: Difference) -> str:
    usual = statistics.mode(found.values)
    has_usual = found.values.count(usual) > 1
    cells = [f'<th scope="row" class="mono" title="{escape(found.key)}">{escape(found.key)}</th>']
    for value, shown in zip(found.values, found.texts(_SHOWN_VALUE), strict=True):
        if value is None:
            cells.append('<td class="other">&ndash;</td>')
            continue
        kind = ' class="other"' if has_usual and value == usual else ""
        cells.append(f'<td{kind} title="{escape(value)}">{escape(shown)}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _pictures(groups: Sequence[Group]) -> str:
    all_ = charts(groups)
    legend = "".join(
        f'<span data-shows="{number}">{_key(number)}{escape(group.name)}</span>'
        for number, group in enumerate(groups)
    )
    figures = "".join(
        f'<figure class="chart"><h3>{escape(chart.title)}</h3>\n{chart.svg}\n'
        + (f'<figcaption class="note">{escape(chart.note)}</figcaption>' if chart.note else "")
        + "</figure>\n"
        for chart in all_
        if chart.svg
    )
    missing = "".join(
        f"<li>{escape(chart.title)} is left out: {escape(chart.missing)}.</li>"
        for chart in all_
        if chart.missing
    )
    drawn = f'<div class="legend">{legend}</div>\n<div class="charts">\n{figures}</div>'
    return (drawn if figures else "") + (f"<ul>{missing}</ul>" if missing else "")


def _run(run: ComparedRun, number: int) -> str:
    facts = {"status": run.status.lower(), "read from": run.source, **run.facts}
    rows = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()]
    if run.run_id is not None:
        shown = f"<code>{escape(run.run_id)}</code>"
        if run.url is not None and run.url.startswith(("http://", "https://")):
            link = f'href="{escape(run.url)}" target="_blank" rel="noreferrer"'
            shown = f"<a {link}>{shown}</a>"
        rows.append(f"<dt>MLflow</dt><dd>{shown}</dd>")
    return (
        f'<section class="sheet run"><h3>{_key(number)}{escape(run.name)}</h3>'
        f"<dl>{''.join(rows)}</dl></section>"
    )


def _key(group: int) -> str:
    return f'<span class="key {colour_class(group)}"></span>'


def _sheet(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    return (
        f'<div class="sheet"><table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )
