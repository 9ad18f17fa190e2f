"""Pictures of a sweep: how the best value rose, and what each key had to do with it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dqrm.sweeps.space import Choices, Space
from dqrm.tracking.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dqrm.sweeps.report import TrialRow

_NAMES = {"val_auc": "validation AUC", "val_log_loss": "validation log loss (nats per row)"}
_COLORS = {"finished": "tab:blue", "pruned": "0.6"}
_COLUMNS = 3
_MARGIN, _LOG_MARGIN = 0.05, 1.2


def plot_history(rows: "Sequence[TrialRow]", metric: str) -> "Figure":
    """Draw the value of each trial, and the best so far."""
    figure = new_figure(width=7.0)
    axes = figure.subplots()
    better = max if metric == "val_auc" else min
    values = [(row.number, row.value) for row in rows if row.outcome == "finished"]
    numbers = [number for number, value in values if value is not None]
    best = list(itertools.accumulate((v for _, v in values if v is not None), better))
    axes.step(numbers, best, where="post", color="tab:orange", label="best")
    _points(axes, rows, [row.number for row in rows])
    axes.set_title(f"{_NAMES[metric]} by trial")
    axes.set_xlabel("trial")
    axes.set_ylabel(_NAMES[metric])
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure


def plot_slices(
    rows: "Sequence[TrialRow]", space: Space, metric: str, importance: Mapping[str, float]
) -> "Figure":
    """Draw value against each key that was searched, the most important first."""
    keys = sorted(space.searches, key=lambda key: -importance.get(key, 0.0))
    columns = min(_COLUMNS, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = new_figure(width=3.6 * columns + 0.6, height=3.2 * lines + 0.3)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(keys):
            axes.set_axis_off()
            continue
        key = keys[place]
        search = space.searches[key]
        positions: list[Any]
        if isinstance(search, Choices):
            positions = [search.values.index(row.params[key]) for row in rows]
            axes.set_xticks(range(len(search.values)), search.values)
            axes.set_xlim(-0.5, len(search.values) - 0.5)
        else:
            positions = [row.params[key] for row in rows]
            low, high = float(search.low), float(search.high)
            if search.log:
                axes.set_xscale("log")
                axes.set_xlim(low / _LOG_MARGIN, high * _LOG_MARGIN)
            else:
                axes.set_xlim(low - _MARGIN * (high - low), high + _MARGIN * (high - low))
        _points(axes, rows, positions)
        share = f" ({100 * importance[key]:.0f} %)" if key in importance else ""
        axes.set_title(f"{key}{share}", fontsize="medium")
        axes.grid(alpha=0.3)
        if place % columns == 0:
            axes.set_ylabel(_NAMES[metric])
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _points(axes: "Axes", rows: "Sequence[TrialRow]", positions: Sequence[Any]) -> None:
    for outcome, color in _COLORS.items():
        shown = [
            (position, row.value)
            for position, row in zip(positions, rows, strict=True)
            if row.outcome == outcome and row.value is not None
        ]
        if shown:
            axes.plot(*zip(*shown, strict=True), "o", color=color, label=outcome, markersize=4)
