"""Pictures of studies."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dqrm.bench.accuracy import Arm

_METRICS = (("auc", "Validation AUC"), ("log_loss", "Validation log loss (nats)"))


def plot_validation(arms: Sequence[Arm], path: Path) -> None:
    """Draw validation AUC and log loss against epochs, a line a seed, a colour an arm."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    trained = [arm for arm in arms if arm.curves]
    for axis, (metric, label) in zip(axes, _METRICS, strict=True):
        for number, arm in enumerate(trained):
            for seed, curve in enumerate(arm.curves):
                axis.plot(
                    [point["epoch"] for point in curve],
                    [point[metric] for point in curve],
                    color=f"C{number}",
                    marker="o",
                    markersize=3,
                    label=arm.name if seed == 0 else None,
                )
        axis.set_xlabel("Epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
