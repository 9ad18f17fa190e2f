"""Projection to an N:M pattern and a weight grid at once (arXiv 2206.15014, section 3).

For a given scale s a kept weight takes its nearest code q and saves w^2 - (w - s q)^2 over a zero.
That grows with |w|, whatever the scale: the largest magnitudes are the ones to keep. What is left
is to fit codes and scale to each other by turns; each turn lowers the squared error.
"""

from torch import Tensor

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import Grid, fit
from dqrm.compress.grids.symmetric import SMALLEST_MAX_ABS, largest_code

ALTERNATIONS = 2
"""Least-squares scales taken after the one of the largest magnitude."""


def project_joint(
    weight: Tensor, pattern: NM, bits: int, granularity: Granularity, grid: Grid
) -> Tensor:
    """Return the nearest matrix found with the pattern and with kept values on the grid.

    Args:
        weight: float32 [R, ...].
        pattern: of the weights.
        bits: of a code.
        granularity: of the scales.
        grid: not fp32. Ternary and binary scales are least-squares ones already.
    """
    kept = pattern.mask(weight)
    codes, scale = fit(weight, grid, bits, granularity, kept)
    view = granularity.view(weight.masked_fill(~kept, 0.0))
    codes = granularity.view(codes)
    if grid == "symmetric":
        largest = largest_code(bits)
        for _ in range(ALTERNATIONS):
            products = (view * codes).sum(dim=-1, keepdim=True)
            scale = products / codes.square().sum(dim=-1, keepdim=True).clamp_min_(1)
            scale.clamp_min_(SMALLEST_MAX_ABS / largest)
            codes = (view / scale).round_().clamp_(-largest, largest)
    return granularity.restore(scale * codes, weight.shape)
