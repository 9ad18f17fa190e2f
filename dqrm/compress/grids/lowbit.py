"""Ternary and binary grids (arXiv 2206.01859, section 3.1), a scale for each group.

    ternary   delta = 0.7 mean|w|,  code = sign(w) where |w| > delta else 0,
              scale = mean of |w| over |w| > delta
    binary    code = sign(w) with sign(0) = +1,  scale = mean|w|

The binary scale is the least-squares one; the ternary threshold is near it for weights that look
normal or uniform. Means are over ``kept`` weights where that is given; others get code 0.
"""

import torch
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
    delta = TERNARY_THRESHOLD * _mean(magnitude, kept)
    # Not "magnitude > delta": a NaN must not become a zero.
    large = ~(magnitude <= delta)
    if kept is not None:
        large &= kept
    codes = _sign(view).mul_(large)
    return codes, _mean(magnitude, large).clamp_min_(SMALLEST_MAX_ABS)


def binarize(view: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes -1, 1 (0 where not kept) as ``view`` and scales [..., 1], float32.

    Args:
        view: float32 [..., size]; the last dimension is a group.
        kept: bool, as view.
    """
    codes = _sign(view)
    if kept is not None:
        codes.mul_(kept)
    return codes, _mean(view.abs(), kept).clamp_min_(SMALLEST_MAX_ABS)


def _sign(view: Tensor) -> Tensor:
    """-1 or 1, NaN for NaN."""
    signs = torch.where(view < 0, -1.0, 1.0)
    return torch.where(view.isnan(), view, signs)


def _mean(magnitude: Tensor, kept: Tensor | None) -> Tensor:
    """Means over the kept of each group, 0 of none, [..., 1]."""
    if kept is None:
        return magnitude.mean(dim=-1, keepdim=True)
    count = kept.sum(dim=-1, keepdim=True).clamp_min_(1)
    return torch.where(kept, magnitude, 0.0).sum(dim=-1, keepdim=True) / count
