"""Pictures of the exchange."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from dqrm.bench.exchange.plan import Case
from dqrm.bench.panels import plot_panels

_COLOURS = {"ours": "C0", "peer": "C7", "alone": "C2"}


def plot_exchange(cases: Sequence[Case], path: Path) -> None:
    """Draw a panel of bars for each case: wall time of a call, with the quartiles of the turns."""
    plot_panels(cases, _draw, path, inches=3.4)


def _draw(axis: Axes, case: Case) -> None:
    found = sorted(case.measured, key=lambda measured: -measured.wall.median)
    walls = [measured.wall for measured in found]
    bars = axis.barh(
        [measured.name for measured in found],
        [1e3 * wall.median for wall in walls],
        color=[_COLOURS[measured.role] for measured in found],
        xerr=[
            [1e3 * (wall.median - wall.lower_quartile) for wall in walls],
            [1e3 * (wall.upper_quartile - wall.median) for wall in walls],
        ],
        error_kw={"elinewidth": 1},
    )
    labels = []
    for measured in found:
        sent = measured.sent_bytes or measured.formula_bytes
        labels.append("" if sent is None else f"{sent / 1e3:,.0f} kB")
    axis.bar_label(bars, labels, padding=4, fontsize=7)
    axis.margins(x=0.15)
    axis.set_title(case.key, fontsize=9)
    axis.set_xlabel("ms a call, slowest rank")
    axis.tick_params(labelsize=7)
