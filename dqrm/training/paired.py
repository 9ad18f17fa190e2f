"""Whether one model is better than another on the same rows, or only luckier.

Both differences come with the standard error that pairing allows: what makes a row hard for both
models cancels. Rows count as independent; where many belong to one user or one day, the true error
is larger than the one given here.

AUC: E. R. DeLong, D. M. DeLong, D. L. Clarke-Pearson, Comparing the areas under two or more
correlated receiver operating characteristic curves, Biometrics 44 (1988), equations 3 to 6, by the
midranks of X. Sun, W. Xu, IEEE Signal Processing Letters 21 (2014), in O(n log n).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class PairedDifference:
    """A metric of two models on the same rows."""

    first: float
    second: float
    standard_error: float
    """Of the difference; 0 when the models say the same."""
    larger_is_better: bool

    @property
    def difference(self) -> float:
        """Second less first."""
        return self.second - self.first

    @property
    def gain(self) -> float:
        """By how much the second is better; negative when it is worse."""
        return self.difference if self.larger_is_better else -self.difference

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the difference."""
        width = NormalDist().inv_cdf((1 + confidence) / 2) * self.standard_error
        return self.difference - width, self.difference + width

    @property
    def p_value(self) -> float:
        """Probability of a difference this large, either way, between models equally good."""
        if self.standard_error == 0:
            return 1.0 if self.difference == 0 else 0.0
        return math.erfc(abs(self.difference) / self.standard_error / math.sqrt(2))

    def better(self, confidence: float = 0.95) -> bool:
        """Whether the second is better, beyond chance (one-sided)."""
        return self._least_gain(confidence) > 0

    def not_worse(self, margin: float, confidence: float = 0.95) -> bool:
        """Whether the second is worse by no more than ``margin``, beyond chance (one-sided).

        A test of non-inferiority: few rows leave it unproven, and the answer is no. ``margin`` is
        positive, in units of the metric.
        """
        if not margin > 0:
            raise ValueError(f"margin={margin}: must be greater than 0")
        return self._least_gain(confidence) > -margin

    def _least_gain(self, confidence: float) -> float:
        return self.gain - NormalDist().inv_cdf(confidence) * self.standard_error


def compare_auc(labels: Tensor, first: Tensor, second: Tensor) -> PairedDifference:
    """Compare the areas under the ROC curves of two models.

    Args:
        labels: float or integer [rows], 0 or 1; at least two rows of each.
        first: scores of the one model, float [rows].
        second: scores of the other, float [rows].
    """
    _check(labels, first, second)
    positive = labels > 0.5
    if min(int(positive.sum()), int((~positive).sum())) < 2:
        raise ValueError("comparing AUC takes at least two rows of each class")
    areas, of_positives, of_negatives = zip(
        *(_placements(scores.double(), positive) for scores in (first, second)), strict=True
    )
    variance = sum(
        float(torch.var(values[1] - values[0])) / values[0].numel()
        for values in (of_positives, of_negatives)
    )
    return PairedDifference(areas[0], areas[1], math.sqrt(variance), larger_is_better=True)


def compare_log_loss(labels: Tensor, first: Tensor, second: Tensor) -> PairedDifference:
    """Compare the mean binary cross-entropies, in nats, of two models.

    Args:
        labels: float or integer [rows], 0 or 1; at least two rows.
        first: logits of the one model, float [rows].
        second: logits of the other, float [rows].
    """
    _check(labels, first, second)
    if labels.numel() < 2:
        raise ValueError("comparing log loss takes at least two rows")
    target = labels.double()
    losses = [softplus(logits.double()) - logits.double() * target for logits in (first, second)]
    error = math.sqrt(float(torch.var(losses[1] - losses[0])) / target.numel())
    means = [float(loss.mean()) for loss in losses]
    return PairedDifference(means[0], means[1], error, larger_is_better=False)


def _placements(scores: Tensor, positive: Tensor) -> tuple[float, Tensor, Tensor]:
    """The area, each positive's share of negatives below it, and the other way round."""
    ranks = _midranks(scores)
    positives, negatives = scores[positive], scores[~positive]
    below = (ranks[positive] - _midranks(positives)) / negatives.numel()
    above = 1 - (ranks[~positive] - _midranks(negatives)) / positives.numel()
    return float(below.mean()), below, above


def _midranks(scores: Tensor) -> Tensor:
    """Ranks from 1; equal scores share the mean of those they take together."""
    ordered, order = torch.sort(scores)
    _, counts = torch.unique_consecutive(ordered, return_counts=True)
    ranks = torch.cumsum(counts, 0).double() - (counts.double() - 1) / 2
    return torch.empty_like(scores, dtype=torch.float64).scatter_(
        0, order, ranks.repeat_interleave(counts)
    )


def _check(labels: Tensor, first: Tensor, second: Tensor) -> None:
    if not labels.shape == first.shape == second.shape or labels.dim() != 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} and scores {tuple(first.shape)}, {tuple(second.shape)} "
            "must be vectors of the same rows"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError("labels must be 0 or 1")
    for name, scores in (("first", first), ("second", second)):
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"the {name} model's scores are not all finite")
