"""Pictures of speed."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from dqrm.bench.panels import plot_panels
from dqrm.bench.speed.report import rate_text, shown
from dqrm.bench.speed.study import Case

_COLOURS = {"ours": "C0", "peer": "C7", "limit": "C3"}


def plot_cases(cases: Sequence[Case], path: Path) -> None:
    """Draw a panel of bars for each case: work per CPU-second, with the quartiles of the turns."""
    plot_panels(cases, _draw, path, inches=2.8)


def _draw(axis: Axes, case: Case) -> None:
    found = sorted(shown(case), key=lambda measured: measured.cpu.median, reverse=True)
    rates = [measured.rate_per_cpu_second for measured in found]
    low = [case.work_per_call / measured.cpu.upper_quartile for measured in found]
    high = [case.work_per_call / measured.cpu.lower_quartile for measured in found]
    bars = axis.barh(
        [measured.name for measured in found],
        rates,
        color=[_COLOURS[measured.role] for measured in found],
        xerr=[
            [rate - end for rate, end in zip(rates, low, strict=True)],
            [end - rate for rate, end in zip(rates, high, strict=True)],
        ],
        error_kw={"elinewidth": 1},
    )
    axis.bar_label(bars, [rate_text(rate) for rate in rates], padding=4, fontsize=8)
    axis.margins(x=0.15)
    axis.set_title(case.label, fontsize=9)
    axis.set_xlabel(f"{case.unit} per CPU-second")
    axis.tick_params(labelsize=8)
