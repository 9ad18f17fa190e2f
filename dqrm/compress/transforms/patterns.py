"""The step that zeroes the weights an N:M pattern does not keep."""

from dataclasses import replace

from torch import Tensor, nn

from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import WeightRecord
from dqrm.compress.grids.straight_through import straight_through
from dqrm.compress.transforms.latent import WeightStep, weight_steps


class NMStep(WeightStep):
    """Keeps the weights of ``mask``, or all of them while there is none.

    Args:
        pattern: of the mask.
        dynamic: take the mask from the weight at every forward and pass gradients straight
            through; otherwise gradients are those of the weights that are kept.
    """

    def __init__(self, pattern: NM, *, dynamic: bool = False) -> None:
        super().__init__()
        self.pattern = pattern
        self.dynamic = dynamic
        self.mask: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weights that are kept, 0 for others."""
        if self.dynamic:
            self.mask = self.pattern.mask(weight)
            return straight_through(weight, weight.detach() * self.mask)
        return weight if self.mask is None else weight * self.mask

    def factors(self, weight: Tensor) -> Tensor:
        """Return 1 where the mask keeps ``weight`` and 0 elsewhere, of its type."""
        assert self.mask is not None
        return self.mask.to(weight.dtype)

    def described(self, record: WeightRecord, before: Tensor) -> WeightRecord:
        """Return ``record`` with the pattern."""
        return replace(record, mask=self.pattern)

    def keeps(self, record: WeightRecord) -> bool:
        """Return whether the weight is on no grid, and of no other pattern."""
        return record.grid == "fp32" and record.mask in (None, self.pattern)


def pattern_step(module: nn.Module) -> NMStep | None:
    """Return the step of a module's pattern, if it has one."""
    return next((step for step in weight_steps(module) if isinstance(step, NMStep)), None)
