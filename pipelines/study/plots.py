"""Pictures of the study."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dqrm.data.files import save_figure
from dqrm.pipelines.study.run import BASELINE_LABEL
from dqrm.pipelines.study.table import Row
from dqrm.pipelines.study.tasks import TASKS

_MIB = 1024**2


def plot_quality(rows: Sequence[Row], tasks: Sequence[str], path: Path) -> None:
    """Draw quality against the size of the encoder: a panel a task, bars of the deviation."""
    figure = Figure(figsize=(5 * len(tasks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for number, row in enumerate(rows):
            quality = row.quality.get(task)
            if quality is None:
                continue
            colour = "black" if row.arm == BASELINE_LABEL else f"C{number - 1}"
            size = row.encoder_bytes / _MIB
            panel.errorbar(
                *(size, quality.mean, quality.deviation), marker="o", capsize=3, color=colour
            )
            panel.annotate(
                *(row.arm, (size, quality.mean)),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
            if row.arm == BASELINE_LABEL:
                panel.axhline(quality.mean, color=colour, linewidth=0.8, linestyle=":")
        panel.set_title(TASKS[task].title)
        panel.set_xscale("log")
        panel.set_xlabel("Encoder on disk (MiB)")
        panel.set_ylabel(f"Test {TASKS[task].metric} (%)")
        panel.grid(alpha=0.3)
    save_figure(figure, path)
