"""Pictures of a run: curves by step, and how well probabilities match what happened."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]

_TRAIN, _VALIDATION = "tab:blue", "tab:orange"


def plot_curves(history: History) -> "Figure":
    """Draw training and validation log loss, and validation AUC, against the step.

    Args:
        history: one mapping for each time something was measured, with ``step`` and any of
            ``train/loss``, ``val/log_loss`` (nats per row) and ``val/auc``.
    """
    figure = new_figure(width=9.0)
    loss, auc = figure.subplots(1, 2)
    _line(loss, history, "train/loss", "training batch", _TRAIN)
    _line(loss, history, "val/log_loss", "validation", _VALIDATION)
    _label(loss, "Log loss", "step", "log loss (nats per row)")
    steps, values = _line(auc, history, "val/auc", "validation", _VALIDATION)
    title = "AUC"
    if len(values):
        best = int(np.argmax(values))
        auc.plot(steps[best], values[best], "o", color=_VALIDATION)
        title = f"AUC, best {values[best]:.4f} at step {steps[best]:g}"
    _label(auc, title, "step", "area under the ROC curve")
    return figure


def plot_calibration(p: npt.ArrayLike, y: npt.ArrayLike, *, max_bins: int = 20) -> "Figure":
    """Draw the observed rate against the predicted one in bins of equally many rows.

    Args:
        p: predicted probabilities [rows].
        y: labels, 0 or 1 [rows].
        max_bins: fewer are drawn where predictions repeat. The bar below each point is the
            number of its rows.

    Raises:
        ValueError: the arrays are empty or differ in length.
    """
    mean, rate, error, counts = calibration_bins(p, y, max_bins)
    figure = new_figure(width=5.5, height=4.8)
    points, bars = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top = max(float(np.max(mean)), float(np.max(rate + error))) * 1.05 or 1.0
    points.plot([0, top], [0, top], color="0.6", linewidth=1, label="perfect")
    points.errorbar(mean, rate, yerr=error, fmt="o-", color=_VALIDATION, label="model, +-2 s.e.")
    points.set_ylim(0, top)
    _label(points, "Calibration", "", "observed rate of positives")
    bars.bar(mean, counts, width=top / 60, color="0.5")
    _label(bars, "", "predicted probability (mean of the bin)", "rows")
    figure.align_ylabels()
    return figure


def calibration_bins(
    p: npt.ArrayLike, y: npt.ArrayLike, max_bins: int
) -> tuple[
    npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]
]:
    """Return mean prediction, rate of positives, two standard errors and rows of each bin.

    Bins hold equally many rows, but equal predictions are never parted.
    """
    p, y = np.asarray(p, dtype=np.float64).ravel(), np.asarray(y, dtype=np.float64).ravel()
    if len(p) == 0 or len(p) != len(y):
        raise ValueError(f"need as many labels as predictions, got {len(y)} and {len(p)}")
    inner = np.quantile(p, np.linspace(0, 1, max_bins + 1)[1:-1])
    bins = np.searchsorted(np.unique(inner), p, side="left")
    counts = np.bincount(bins)
    used = counts > 0
    counts = counts[used]
    mean = np.bincount(bins, weights=p)[used] / counts
    rate = np.bincount(bins, weights=y)[used] / counts
    return mean, rate, 2 * np.sqrt(rate * (1 - rate) / counts), counts


def new_figure(width: float, height: float = 3.6) -> "Figure":
    """An empty figure of that size in inches."""
    # Not pyplot: it would keep every figure and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _line(
    axes: "Axes", history: History, key: str, label: str, color: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    if len(points):
        marker = "." if len(points) < 30 else ""
        axes.plot(steps, values, color=color, label=label, marker=marker, linewidth=1.2)
    return steps, values


def _label(axes: "Axes", title: str, x: str, y: str) -> Any:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
