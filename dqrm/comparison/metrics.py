"""How metrics are called, written and judged."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dqrm.text import bytes_text

Better = Literal["higher", "lower", "near 1", "neither"]
Kind = Literal["score", "bytes", "count", "rate", "seconds", "times"]


@dataclass(frozen=True)
class Metric:
    """A column of the table."""

    key: str
    """Its name in MLflow."""
    title: str
    better: Better
    kind: Kind = "score"

    def text(self, value: float) -> str:
        """Return a value as people read it."""
        if not math.isfinite(value):
            return str(value)
        match self.kind:
            case "bytes":
                return bytes_text(value)
            case "count" | "rate":
                return f"{value:,.0f}"
            case "seconds":
                return f"{1000 * value:.2f} ms"
            case "times":
                return f"{value:.1f} x"
        return f"{value:.4f}"

    def cost(self, value: float) -> float:
        """Return a number that is lower for a better value; NaN where none is better."""
        match self.better:
            case "higher":
                return -value
            case "lower":
                return value
            case "near 1":
                return abs(value - 1)
        return math.nan


_KNOWN = (
    Metric("test/auc", "test AUC", "higher"),
    Metric("test/log_loss", "test log loss", "lower"),
    Metric("test/accuracy", "test accuracy", "higher"),
    Metric("test/f1", "test F1", "higher"),
    Metric("test/matthews", "test Matthews", "higher"),
    Metric("test/pearson", "test Pearson", "higher"),
    Metric("test/spearman", "test Spearman", "higher"),
    Metric("test/calibration", "calibration", "near 1"),
    Metric("best/val_auc", "validation AUC", "higher"),
    Metric("best/val_log_loss", "validation log loss", "lower"),
    Metric("best/val_accuracy", "validation accuracy", "higher"),
    Metric("best/step", "best step", "neither", "count"),
    Metric("size/packed_bytes", "packed size", "lower", "bytes"),
    Metric("size/fp32_bytes", "FP32 size", "neither", "bytes"),
    Metric("size/training_bytes", "training memory", "lower", "bytes"),
    Metric("size/parameters", "parameters", "neither", "count"),
    Metric("size/encoder_bytes", "encoder", "lower", "bytes"),
    Metric("size/lowered_bytes", "packed size, lowered", "lower", "bytes"),
    Metric("perf/samples_per_second", "samples/s", "higher", "rate"),
    Metric("perf/step_seconds", "step", "lower", "seconds"),
    Metric("perf/cpu_step_seconds", "CPU time, step", "lower", "seconds"),
    Metric("comm/sent_bytes_per_step", "sent a step", "lower", "bytes"),
    Metric("comm/ratio", "exchange ratio", "higher", "times"),
)
_BY_KEY = {metric.key: metric for metric in _KNOWN}

_SHORT = (
    *("test/auc", "test/log_loss", "test/accuracy", "test/matthews", "test/pearson"),
    *("best/val_auc", "test/calibration", "size/packed_bytes", "size/encoder_bytes"),
    *("perf/samples_per_second", "comm/sent_bytes_per_step"),
)
"""Columns of the table on a terminal."""

_LOWER = ("loss", "seconds", "bytes", "_ms", "error", "entropy", "difference")
_HIGHER = ("auc", "accuracy", "f1", "matthews", "pearson", "spearman", "per_second", "ratio")
_TESTED = ("test/auc", "test/accuracy", "test/pearson", "test/matthews")
_VALIDATED = ("best/val_auc", "best/val_accuracy", "best/val_pearson", "best/val_matthews")
_SIZE = ("size/packed_bytes", "size/lowered_bytes", "size/encoder_bytes", "size/fp32_bytes")


def higher_is_better(key: str) -> bool:
    """Whether runs are sorted by this metric from high to low."""
    known = _BY_KEY.get(key)
    if known is not None:
        return known.better == "higher"
    last = key.rpartition("/")[2]
    return any(word in last for word in _HIGHER) and not any(word in last for word in _LOWER)


def metric_of(key: str) -> Metric:
    """Return how a metric is shown; one that is not known goes by its own name."""
    return _BY_KEY.get(key) or Metric(key, key, "higher" if higher_is_better(key) else "lower")


def columns(runs: Iterable[Mapping[str, float]], *, short: bool) -> list[Metric]:
    """Return the metrics that any of the runs has, in the order they are shown.

    One that is neither good nor bad, as the size in FP32, is of interest only where it differs.
    """
    of_runs = list(runs)
    present = {key for metrics in of_runs for key in metrics}
    if short and "test/auc" in present:
        present.discard("test/accuracy")
    return [
        metric
        for metric in _KNOWN
        if metric.key in present
        and (metric.key in _SHORT or not short)
        and (metric.better != "neither" or _differs(metric, of_runs))
    ]


def _differs(metric: Metric, runs: Sequence[Mapping[str, float]]) -> bool:
    return len({run.get(metric.key) for run in runs}) > 1


def outcome(metrics: Mapping[str, float]) -> str:
    """Return the metrics that are known here in a line; empty where there are none."""
    shown = columns([metrics], short=True)
    return ", ".join(f"{metric.title} {metric.text(metrics[metric.key])}" for metric in shown)


def quality_metric(runs: Sequence[Mapping[str, float]]) -> Metric | None:
    """Return the metric of the test that most of the runs have, or failing that of validation.

    A few runs that were stopped before their test do not keep the others from being shown by it.
    """
    tested = _most_common(runs, _TESTED)
    if tested is not None and 2 * sum(tested.key in metrics for metrics in runs) >= len(runs):
        return tested
    return _most_common(runs, _VALIDATED) or tested


def size_metric(runs: Sequence[Mapping[str, float]]) -> Metric | None:
    """Return the size that most of the runs have."""
    return _most_common(runs, _SIZE)


def _most_common(runs: Sequence[Mapping[str, float]], keys: Sequence[str]) -> Metric | None:
    counts = {key: sum(key in metrics for metrics in runs) for key in keys}
    best = max(keys, key=lambda key: counts[key])
    return metric_of(best) if counts[best] else None


def best_texts(metric: Metric, values: Sequence[float | None]) -> set[str]:
    """Return how the best value is written; empty where there is nothing to be better than.

    Runs that read the same as the best one are as good: more digits would tell noise apart.
    """
    measured = [value for value in values if value is not None and math.isfinite(value)]
    if metric.better == "neither" or len({metric.text(value) for value in measured}) < 2:
        return set()
    return {metric.text(min(measured, key=metric.cost))}
