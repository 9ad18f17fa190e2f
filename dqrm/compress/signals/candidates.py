"""Ways to compress a weight, each with the bytes it takes and the loss it is expected to cost."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import Grid, WeightRecord, dequantize, fit_record
from dqrm.compress.lower.packing import pack_weight
from dqrm.compress.signals.allocate import Candidate
from dqrm.compress.signals.gradients import fisher_loss


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

    def candidate(self, weight: Tensor, fisher: Tensor) -> Candidate:
        """Return the bytes, and what the loss is expected to rise by.

        Args:
            weight: float32 [out, in].
            fisher: mean squared gradient of the loss by ``weight``, float32 [out, in].
        """
        value, nbytes = self.applied(weight)
        return Candidate(nbytes, fisher_loss(fisher, weight, value))
