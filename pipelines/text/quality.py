"""Metrics of GLUE's tasks."""

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor


def measure_text(logits: Tensor, labels: Tensor, classes: int | None) -> dict[str, float]:
    """Return the metrics of a split.

    ``loss`` always; ``accuracy``, ``matthews`` and, of two classes, ``f1`` of the second one;
    ``pearson`` and ``spearman`` of a regression. NaN where a split does not define one.

    Args:
        logits: float32 [rows, outputs].
        labels: int64 [rows], or float32 [rows] of a regression.
        classes: their number; None for a regression.
    """
    if classes is None:
        predicted, actual = logits[:, 0].double().numpy(), labels.double().numpy()
        return {
            "loss": float(((predicted - actual) ** 2).mean()),
            "pearson": _correlation(predicted, actual),
            "spearman": _correlation(_ranks(predicted), _ranks(actual)),
        }
    chosen = logits.argmax(1)
    table = torch.bincount(labels * classes + chosen, minlength=classes * classes)
    # Rows are the true classes, columns the predicted ones.
    confusion = table.reshape(classes, classes).double()
    measured = {
        "loss": float(torch.nn.functional.cross_entropy(logits.float(), labels)),
        "accuracy": float(confusion.diagonal().sum() / confusion.sum()),
        "matthews": _matthews(confusion),
    }
    if classes == 2:
        found, wrong, missed = confusion[1, 1], confusion[0, 1], confusion[1, 0]
        whole = float(2 * found + wrong + missed)
        measured["f1"] = float(2 * found) / whole if whole else math.nan
    return measured


def _matthews(confusion: Tensor) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004, the R_K statistic)."""
    actual, predicted, rows = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = float(confusion.diagonal().sum() * rows - actual @ predicted)
    spread = float((rows**2 - predicted @ predicted) * (rows**2 - actual @ actual))
    return covariance / math.sqrt(spread) if spread else 0.0


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return pd.Series(values).rank().to_numpy()
