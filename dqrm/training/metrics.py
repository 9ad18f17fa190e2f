"""Quality of predicted probabilities."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Quality on one split. NaN where a split cannot define a metric (one class only)."""

    auc: float
    """Area under the ROC curve; ties count half."""
    log_loss: float
    """Mean binary cross-entropy, in nats."""
    normalized_entropy: float
    """Log loss over that of always predicting the split's positive rate; below 1 is useful."""
    accuracy: float
    """Share of rows on the right side of probability 0.5."""
    calibration: float
    """Mean prediction over positive rate; 1 is unbiased."""
    positive_rate: float
    """Share of positive labels."""
    num_rows: int
    """Rows measured."""

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Return the metrics as numbers, names behind ``prefix`` (for example ``"val/"``)."""
        return {f"{prefix}{name}": float(value) for name, value in asdict(self).items()}


def measure(logits: Tensor, labels: Tensor) -> Metrics:
    """Return the metrics of a split.

    Args:
        logits: float32 [rows].
        labels: float32 [rows], 0 or 1.
    """
    num_rows = labels.numel()
    if num_rows == 0:
        raise ValueError("cannot measure a split without rows")
    wide, target = logits.double(), labels.double()
    # log(1 + exp(-|x|)) + max(x, 0) - x * y stays finite for every finite logit.
    losses = wide.clamp_min(0) - wide * target + torch.log1p(torch.exp(-wide.abs()))
    loss = float(losses.mean())
    rate = float(target.mean())
    entropy = -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)
    return Metrics(
        auc=auc(logits, labels),
        log_loss=loss,
        normalized_entropy=loss / entropy if entropy else math.nan,
        accuracy=float(((wide > 0) == (target > 0.5)).double().mean()),
        calibration=float(torch.sigmoid(wide).mean()) / rate if rate else math.nan,
        positive_rate=rate,
        num_rows=num_rows,
    )


def auc(scores: Tensor, labels: Tensor) -> float:
    """Return the exact area under the ROC curve; NaN when only one class is present.

    The probability that a positive outranks a negative, ties counting half (Mann-Whitney U).

    Args:
        scores: float [rows].
        labels: float [rows], 0 or 1.
    """
    positives = int(labels.sum())
    negatives = labels.numel() - positives
    if positives == 0 or negatives == 0:
        return math.nan
    ordered, order = torch.sort(scores)
    _, counts = torch.unique_consecutive(ordered, return_counts=True)
    # Rows with equal scores share the mean of the ranks they take together.
    rank = torch.cumsum(counts, 0).double() - (counts.double() - 1) / 2
    ranks = rank.repeat_interleave(counts)
    rank_sum = float(ranks[labels[order] > 0.5].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
