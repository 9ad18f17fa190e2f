"""Means over seeds with their uncertainty.

Seeds are few, so intervals are Student's: of the mean of n independent values with n - 1 degrees of
freedom. Differences between arms are taken seed by seed first: what a seed does to all cancels.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    values: tuple[float, ...]
    mean: float
    half_width: float | None
    """Of the 95 % confidence interval of the mean; None of a single value."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return that of at least one value."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(tuple(values), mean, None)
        error = statistics.stdev(values) / math.sqrt(len(values))
        quantile = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
        return cls(tuple(values), mean, quantile * error)

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean itself of a single value."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean itself of a single value."""
        return self.mean + (self.half_width or 0.0)


def t_cdf(t: float, freedom: int) -> float:
    """Probability that Student's t is at most ``t``.

    The finite sums for whole degrees of freedom: M. Abramowitz, I. A. Stegun, Handbook of
    Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    if freedom < 1:
        raise ValueError(f"freedom={freedom}: must be 1 or more")
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term = total = cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= (k - 1) / k * cosine**2
            total += term
        within = 2 / math.pi * (angle + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom, 2):
            term *= (k - 1) / k * cosine**2
            total += term
        within = sine * total
    return (1 + within) / 2


def t_quantile(probability: float, freedom: int) -> float:
    """Return the t below which Student's t is with ``probability``, 0 < probability < 1."""
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability}: must lie between 0 and 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2
