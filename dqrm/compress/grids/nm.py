"""N:M patterns: of every ``group`` weights next to each other along the inputs, ``keep`` stay.

A 2:4 pattern is keep=2, group=4. The projection keeps the largest magnitudes, which is the nearest
matrix of the pattern; of equal magnitudes the first stays, so that a group keeps exactly ``keep``.
A last group that is not full counts as if it were filled up with zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dqrm.compress.grids.granularity import Granularity

_LARGEST_COMPARED = 16
"""Groups up to this size are ranked by comparing all pairs, larger ones by sorting: at 16 the
pairs take a third of the time (1536 x 384 on one core of a Zen 4, 2026-11-21)."""


@dataclass(frozen=True)
class NM:
    """A pattern of ``keep`` weights among ``group``."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group:
            raise ValueError(f"keep={self.keep}, group={self.group}: must be 1 <= keep < group")

    def view(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as groups [R, ceil(C / group), group], filled up with zeros."""
        return Granularity("k_groups", self.group).view(weight)

    def mask(self, weight: Tensor) -> Tensor:
        """Return the weights that stay (bool, as ``weight``); NaN counts as the largest.

        Args:
            weight: float32 [R, ...].
        """
        groups = Granularity("k_groups", self.group)
        view = groups.view(weight.detach().abs())
        filled = groups.filled(weight)
        if filled is not None:
            view = view.masked_fill(~filled, -1.0)
        kept = (
            _compared(view, self.keep) if self.group <= _LARGEST_COMPARED else _sorted(view, self)
        )
        return groups.restore(kept, weight.shape)

    def holds(self, weight: Tensor) -> bool:
        """Return whether no group has more than ``keep`` weights other than zero."""
        view = self.view(weight.detach())
        return view.numel() == 0 or int((view != 0).sum(dim=-1).max()) <= self.keep

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


def project(weight: Tensor, pattern: NM) -> Tensor:
    """Return the matrix of ``pattern`` nearest to ``weight`` in the sum of squares."""
    return weight.masked_fill(~pattern.mask(weight), 0.0)


def _compared(view: Tensor, keep: int) -> Tensor:
    """The first ``keep`` by magnitude and place, from the ranks of all pairs."""
    group = view.shape[-1]
    magnitude = view.reshape(-1, group).T.contiguous()
    magnitude.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    # The first of a pair is behind the later one until it is found not to be.
    rank = torch.empty_like(magnitude, dtype=torch.uint8)
    for first in range(group):
        rank[first] = group - 1 - first
    for first in range(group - 1):
        for later in range(first + 1, group):
            ahead = (magnitude[first] >= magnitude[later]).view(torch.uint8)
            rank[later] += ahead
            rank[first] -= ahead
    return (rank < keep).T.reshape(view.shape)


def _sorted(view: Tensor, pattern: NM) -> Tensor:
    magnitude = view.nan_to_num(nan=torch.inf, posinf=torch.inf)
    order = magnitude.argsort(dim=-1, descending=True, stable=True)[..., : pattern.keep]
    return torch.zeros_like(view, dtype=torch.bool).scatter_(-1, order, True)
