"""Ways to compress a weight, each with the bytes it takes and the loss it is expected to cost."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import Grid, WeightRecord, dequantize, fit_record
from dqrm.compress.lower.packing import pack_weight
from dqrm.compress.signals.allocate import Candidate


@dataclass(frozen=True)
class WeightOption:
    """A grid, a pattern, or both."""

    grid: Grid
    """fp32 where only a pattern is meant."""
    bits: int
    """Of a code; 32 for fp32."""
    granularity: Granularity = Granularity("row")  # noqa: RUF009
    pattern: NM | None = None
    full_range: bool = False
    """Of a symmetric or asymmetric grid (see :func:`dqrm.compress.grids.record.fit`)."""

    def applied(self, weight: Tensor) -> tuple[Tensor, int]:
        """Return ``weight`` as it would be without any training, and its bytes on the disk."""
        kept = None if self.pattern is None else self.pattern.mask(weight)
        if self.grid == "fp32":
            codes = weight if kept is None else torch.where(kept, weight, 0.0)
            record = WeightRecord("fp32", self.bits, self.granularity, torch.empty(0))
        else:
            codes, record = fit_record(
                weight,
                self.grid,
                self.bits,
                self.granularity,
                kept,
                full_range=self.full_range,
            )
        record = replace(record, mask=self.pattern)
        return dequantize(codes, record), pack_weight(codes, record).nbytes

    def candidate(self, weight: Tensor, curvature: Tensor) -> Candidate:
        """Return the bytes, and what the loss is expected to rise by.

        Args:
            weight: float32 [out, in].
            curvature: what stands for the diagonal of the Hessian, float32 [out, in] or [].
        """
        value, nbytes = self.applied(weight)
        return Candidate(nbytes, second_order_loss(curvature, weight, value))


def second_order_loss(curvature: Tensor, weight: Tensor, candidate: Tensor) -> float:
    """Return what the loss is expected to rise by with ``candidate`` in the place of ``weight``.

    Half the squared error weighted by the diagonal of the Hessian, of which the Fisher information
    and an average of the trace are estimates. Sums over any set of rows or matrices add up.

    Args:
        curvature: float32, of the weight's shape or one value for all.
        weight: float32.
        candidate: float32, of its shape.
    """
    error = (candidate - weight).double()
    return float((curvature.double() * error * error).sum() / 2)
