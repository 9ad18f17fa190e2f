"""Scales of a linear layer's input units that bring its output nearest to a target.

    minimise over d, c   || R - sum_u d_u X_u W_u^T - c ||^2 + damping * || d ||^2

X_u are the inputs of unit u, W_u the matrix columns for them, R what the output with every scale
at 1 lacks, and c a change of the bias. The unknowns are offsets from 1, so that damping pulls
towards the layer as it is (the least-squares mask tuning of arXiv 2204.09656, whose code damps
LSMR in the same way). Contributions of units are never made one by one: the normal equations need
X^T X and X^T (R W) only.
"""

import torch
from torch import Tensor


class UnitLeastSquares:
    """Adds up the normal equations of one layer, batch by batch.

    Args:
        weight: float32 [out, in] of the layer.
        unit_size: inputs of a unit, next to each other: the width of a head, or 1.
    """

    def __init__(self, weight: Tensor, unit_size: int) -> None:
        out_features, in_features = weight.shape
        self._weight = weight.detach()
        self._unit_size = unit_size
        self._gram = torch.zeros(in_features, in_features, dtype=torch.float64)
        self._target = torch.zeros(in_features, dtype=torch.float64)
        self._input_sum = torch.zeros(in_features, dtype=torch.float64)
        self._lack_sum = torch.zeros(out_features, dtype=torch.float64)
        self._rows = 0

    def add(self, inputs: Tensor, lack: Tensor) -> None:
        """Add rows.

        Args:
            inputs: float32 [rows, in].
            lack: float32 [rows, out]: target minus output.
        """
        self._gram += (inputs.T @ inputs).double()
        self._target += (inputs * (lack @ self._weight)).sum(0).double()
        self._input_sum += inputs.sum(0).double()
        self._lack_sum += lack.sum(0).double()
        self._rows += len(inputs)

    def solve(self, units: Tensor, damping: float, *, shift: bool) -> tuple[Tensor, Tensor]:
        """Return the scale of every unit, and what to add to the bias.

        Args:
            units: bool [units]: those that may change; the others keep 1.
            damping: of the offsets, in units of the mean diagonal of the normal equations.
            shift: whether the bias may change.

        Returns:
            float32 [units] and float32 [out].
        """
        weight = self._weight.double()
        gram, target = self._gram, self._target
        if shift:
            # With the best c, the problem is the one of what deviates from the means.
            mean_in, mean_lack = self._input_sum / self._rows, self._lack_sum / self._rows
            gram = gram - self._rows * torch.outer(mean_in, mean_in)
            target = target - self._rows * mean_in * (mean_lack @ weight)
        size = self._unit_size
        count = len(units)
        normal = (weight.T @ weight * gram).view(count, size, count, size)
        normal = normal.sum((1, 3))[units][:, units]
        right = target.view(count, size).sum(1)[units]
        offsets = torch.zeros(len(units), dtype=torch.float64)
        if units.any():
            ridge = damping * normal.diagonal().mean().clamp_min(1e-30)
            normal.diagonal().add_(ridge)
            offsets[units] = torch.linalg.solve(normal, right)
        bias = torch.zeros(len(weight), dtype=torch.float64)
        if shift:
            bias = mean_lack - weight @ (offsets.repeat_interleave(size) * mean_in)
        return (1 + offsets).float(), bias.float()
