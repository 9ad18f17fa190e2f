"""A run as a comparison sees it, wherever it was read from."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dqrm.tracking.measurements import Measurements

COMPARISON_TAG = "dqrm.comparison"
"""Set on runs of MLflow that hold a comparison of others."""

COMPARISON_FILE = "comparison.json"
"""In folders that hold a comparison."""

Curve = tuple[tuple[int, float], ...]
"""(step, value), steps ascending."""

_NOT_SETTINGS = ("bits", "seed", "world_size", "steps_per_epoch")
"""Parameters that a run writes beside its settings, for MLflow's pages."""

_PACE = ("perf/", "comm/")
_DRAWN = ("val/", "train/loss", *_PACE)


@dataclass(frozen=True)
class ComparedRun:
    """What one run was, and what it came to."""

    name: str
    status: str
    """FINISHED, FAILED, KILLED or RUNNING; UNFINISHED of a folder without a result."""
    source: str
    """The folder or the store it was read from."""
    settings: Mapping[str, str]
    """Dotted keys and values, as MLflow's parameters."""
    metrics: Mapping[str, float]
    """By name; the last value, and of speeds and traffic the median over the run."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Metrics that were measured at several steps, by name."""
    measurements: Measurements | None = None
    steps_per_epoch: int | None = None
    run_id: str | None = None
    """In MLflow, where it was recorded there."""
    experiment: str | None = None
    """Of that run."""
    url: str | None = None
    """Page of the run."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else is known of it, as command, commit and processor."""


def settings_of(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters that are settings."""
    return {key: value for key, value in parameters.items() if key not in _NOT_SETTINGS}


def is_drawn(metric: str) -> bool:
    """Whether the course of a metric over the run is of interest."""
    return metric.startswith(_DRAWN)


def with_medians(metrics: Mapping[str, float], curves: Mapping[str, Curve]) -> dict[str, float]:
    """Return the metrics with speeds and traffic as medians over the run.

    Their last value is that of the last few steps, and the first ones hold the warm-up.
    """
    medians = {
        name: statistics.median(value for _, value in curve)
        for name, curve in curves.items()
        if name.startswith(_PACE) and curve
    }
    return {**metrics, **medians}


def distinct(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Return the runs, those that share a name with a part of their id, or a number, behind it."""
    names = [run.name for run in runs]
    taken: set[str] = set()
    result = []
    for number, run in enumerate(runs, start=1):
        name = run.name
        if names.count(name) > 1:
            name = f"{name} ({run.run_id[:8] if run.run_id else number})"
        if name in taken:
            name = f"{run.name} ({number})"
        taken.add(name)
        result.append(replace(run, name=name))
    return result
