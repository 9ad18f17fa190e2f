"""Rows kept as integer codes and a step of their own, with no copy in full precision beside.

A row of D elements is a bfloat16 step, lower byte first, followed by its codes of 8 or 4 bits as
dqrm.kernels.code_layout packs them.

    value    w = step * code        exact: 8 significant bits times at most 7
    codes    |code| <= n = 2**(bits-1) - 1
    d = 16   18 bytes at 8 bits, 10 at 4; 64 in FP32

Step and codes share a cache line three times out of four (d = 16, 8 bits); kept apart they never
would. bfloat16 has the range of float32, which float16 steps of small weights would leave.

A written row keeps its step while it fits. Elements that did not change then keep their codes, and
all others pay for one stochastic rounding of their change; a new step rounds every element anew.

    grow     max|w| > n * step           the new step leaves room for HEADROOM * max|w|
    shrink   max|w| < SHRINK * n * step  the same new step
"""

import torch
from torch import Tensor

from dqrm.kernels.code_layout import pack, packed_dtype, packed_row_bytes, unpack
from dqrm.kernels.rounding import BFLOAT16_NAN, round_to_integer_reference

STEP_BYTES = 2
"""A bfloat16."""

HEADROOM = 1.25
SHRINK = 0.5

SMALLEST_MAX_ABS = 1e-8
"""Stands in for the largest magnitude of an all-zero row, so that no step is zero or denormal."""


def row_bytes(dim: int, bits: int) -> int:
    """Return the bytes of one row of ``dim`` codes of 8 or 4 bits and its step."""
    return STEP_BYTES + packed_row_bytes(dim, bits)


def read_steps_reference(rows: Tensor) -> Tensor:
    """Return the steps of encoded rows (uint8 [U, row_bytes]), float32 [U]."""
    upper = rows[:, 0].to(torch.int32) | rows[:, 1].to(torch.int32) << 8
    return (upper << 16).view(torch.float32)


def read_codes_reference(rows: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes of encoded rows (uint8 [U, row_bytes]), float32 [U, dim]."""
    packed = rows[:, STEP_BYTES:]
    return unpack(packed.view(packed_dtype(bits)), bits, dim)


def read_rows_reference(rows: Tensor, bits: int, dim: int) -> Tensor:
    """Return the values of encoded rows (uint8 [U, row_bytes]), float32 [U, dim]."""
    return read_steps_reference(rows).unsqueeze(1) * read_codes_reference(rows, bits, dim)


def write_rows_reference(values: Tensor, steps: Tensor, random: Tensor, bits: int) -> Tensor:
    """Encode rows.

    A row with an element that is not finite becomes a row of NaN.

    Args:
        values: float32 [U, D], what the rows are to hold.
        steps: float32 [U], their present steps; 0 for rows that hold nothing yet.
        random: int64 [U, D] below 2**32, for the rounding.
        bits: 8 or 4.

    Returns:
        uint8 [U, row_bytes].
    """
    largest = 2 ** (bits - 1) - 1
    max_abs = values.abs().amax(dim=1)
    range_ = steps * largest
    keep = (max_abs <= range_) & (max_abs >= range_ * SHRINK) & (steps > 0)
    fresh = _bfloat16_above(max_abs.clamp_min(SMALLEST_MAX_ABS) * (HEADROOM / largest))
    steps = torch.where(keep, steps, fresh)
    finite = max_abs.isfinite()
    codes = round_to_integer_reference(values / steps.unsqueeze(1), random)
    codes = torch.where(finite.unsqueeze(1), codes, 0)
    upper = torch.where(finite, steps.view(torch.int32) >> 16, BFLOAT16_NAN)
    step_bytes = torch.stack([upper & 255, upper >> 8], dim=1).to(torch.uint8)
    return torch.cat([step_bytes, pack(codes, bits).view(torch.uint8)], dim=1)


def _bfloat16_above(values: Tensor) -> Tensor:
    """Return the smallest bfloat16 not below each positive value, as float32."""
    bits = (values.view(torch.int32) + 0xFFFF) & -0x10000
    return bits.view(torch.float32)
