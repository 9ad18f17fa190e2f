"""Ternary and binary grids (arXiv 2206.01859, section 3.1), a scale for each group.

    ternary   delta = 0.7 mean|w|,  code = sign(w) where |w| > delta else 0,
              scale = mean of |w| over |w| > delta
    binary    code = sign(w) with sign(0) = +1,  scale = mean|w|

The binary scale is the least-squares one; the ternary threshold is near it for weights that look
normal or uniform. Means are over ``kept`` weights where that is given; others get code 0. A group
with a NaN or an infinity has a scale that is NaN.
"""

from torch import Tensor

from dqrm.compress.grids.symmetric import SMALLEST_MAX_ABS

TERNARY_THRESHOLD = 0.7
"""Of the mean magnitude (arXiv 1605.04711, section 3.1)."""


def ternarize(view: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes -1, 0, 1 as ``view`` and scales [..., 1], float32.

    Args:
        view: float32 [..., size]; the last dimension is a group.
        kept: bool, as view.
    """
    magnitude = view.abs()
    if kept is not None:
        magnitude *= kept
    mean = _mean(magnitude, kept)
    # Products with 0 and 1 in place of masks: sums over booleans are ten times slower.
    large = (magnitude > TERNARY_THRESHOLD * mean).to(view.dtype)
    scale = magnitude.mul_(large).sum(dim=-1, keepdim=True)
    scale /= large.sum(dim=-1, keepdim=True).clamp_min_(1)
    # Nothing is larger than a threshold that is not finite; times 0 it is NaN.
    return large.mul_(view.sign()), scale.clamp_min_(SMALLEST_MAX_ABS) + 0.0 * mean


def binarize(view: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes -1, 1 (0 where not kept) as ``view`` and scales [..., 1], float32.

    Args:
        view: float32 [..., size]; the last dimension is a group.
        kept: bool, as view.
    """
    magnitude = view.abs()
    codes = (view >= 0).to(view.dtype).mul_(2).sub_(1)
    if kept is not None:
        magnitude *= kept
        codes *= kept
    mean = _mean(magnitude, kept)
    return codes, mean.clamp_min(SMALLEST_MAX_ABS) + 0.0 * mean


def _mean(magnitude: Tensor, kept: Tensor | None) -> Tensor:
    """Means of each group over its kept weights, others being 0; 0 of none. [..., 1]."""
    total = magnitude.sum(dim=-1, keepdim=True)
    if kept is None:
        return total / max(1, magnitude.shape[-1])
    return total / kept.to(magnitude.dtype).sum(dim=-1, keepdim=True).clamp_min_(1)
