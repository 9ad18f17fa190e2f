"""A picture with a panel for each case."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dqrm.data.files import save_figure

Case = TypeVar("Case")

_COLUMNS = 2


def plot_panels(
    cases: Sequence[Case], draw: Callable[[Axes, Case], None], path: Path, *, inches: float
) -> None:
    """Write a picture in which ``draw`` filled a panel, ``inches`` high, for every case."""
    rows = math.ceil(len(cases) / _COLUMNS)
    figure = Figure(figsize=(7 * _COLUMNS, inches * rows), layout="constrained")
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axis, case in zip(panels, cases, strict=False):
        draw(axis, case)
    for axis in panels[len(cases) :]:
        axis.set_axis_off()
    save_figure(figure, path, dpi=110)
