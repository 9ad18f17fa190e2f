"""GPTQ: rounding one column after another, what each loses made up for by those behind it.

arXiv 2210.17323. With the Hessian H = X^T X of the squared error of a linear layer's output, the
error of a rounded column is spread over the columns not rounded yet by the rows of the upper
Cholesky factor of H^-1.
"""

import torch
from torch import Tensor

from dqrm.compress.grids import symmetric
from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import WeightRecord, codes, dequantize, fit, max_abs

_BLOCK = 128
"""Columns whose errors reach the rest of the matrix together (the paper's lazy batches)."""


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    granularity: Granularity,
    kept: Tensor | None = None,
    *,
    full_range: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the weight on the grid, float32 [out, in], and its scales.

    Scales are those of the weight as it was; those of k_groups are taken when their columns are
    reached, with the errors of earlier ones in them, unless act_order is set.

    Args:
        weight: float32 [out, in].
        gram: float64 [in, in]: X^T X of the inputs.
        bits: of a code.
        granularity: of the scales.
        kept: bool [out, in]: other weights are zero and stay it; what they would make up for, the
            kept ones behind them do.
        full_range: of the scales (see :func:`dqrm.compress.grids.record.fit`).
        damping: added to the diagonal of ``gram``, as a share of its mean.
        act_order: round the columns with the largest inputs first.

    Raises:
        ValueError: inputs depend on each other so closely that ``damping`` is too small.
    """
    columns = weight.shape[1]
    hessian = gram.double().clone()
    diagonal = hessian.diagonal()
    diagonal.add_(damping * diagonal.mean())
    # An input that is always zero costs nothing and teaches nothing.
    diagonal[diagonal == 0] = 1.0
    order = torch.arange(columns)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])

    _, scale = fit(weight, "symmetric", bits, granularity, full_range=full_range)
    grouped = granularity.kind == "k_groups" and not act_order
    group = granularity.size if grouped else 0
    spread = _spread(scale, granularity, weight)[:, order].double()
    largest = symmetric.largest_code(bits)
    left = weight.double()[:, order]
    stays = torch.ones_like(left) if kept is None else kept[:, order].double()
    rounded = torch.zeros_like(left)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.zeros(len(weight), end - begin, dtype=torch.float64)
        for column in range(begin, end):
            if grouped and column % group == 0:
                # Errors of this block have not reached the columns behind it.
                ahead = left[:, column : column + group].clone()
                done = factor[begin:column, column : column + group]
                ahead[:, max(0, end - column) :] -= (errors[:, : column - begin] @ done)[
                    :, max(0, end - column) :
                ]
                ahead *= stays[:, column : column + group]
                fresh = symmetric.scale_of(max_abs(ahead.float()), largest + full_range)
                scale[:, column // group] = fresh
                spread[:, column : column + group] = fresh.double()
            value, step = left[:, column], spread[:, column]
            rounded[:, column] = symmetric.quantize(value, step, largest) * step * stays[:, column]
            error = (value - rounded[:, column]) / factor[column, column]
            errors[:, column - begin] = error
            left[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
        left[:, end:] -= errors @ factor[begin:end, end:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    record = WeightRecord("symmetric", bits, granularity, scale)
    return dequantize(codes(result.float(), record), record), scale


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, float64 as it came."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            "GPTQ cannot invert the products of the inputs: raise damping, or look at more samples"
        ) from error
    return factor


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Return the squared error of the outputs, summed over the rows that ``gram`` is of."""
    error = (weight - rounded).double()
    return float(((error @ gram) * error).sum())


def _spread(scale: Tensor, granularity: Granularity, weight: Tensor) -> Tensor:
    """The scale of every weight, as ``weight``."""
    view = granularity.view(torch.ones_like(weight)) * scale
    return granularity.restore(view, weight.shape)
