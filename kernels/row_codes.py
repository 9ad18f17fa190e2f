"""Rows kept as integer codes and a step of their own, with no copy in full precision beside.

A row of D elements is a bfloat16 step followed by its codes, two's complement: one byte each at 8
bits; at 4 bits byte j holds element j in its low half and element j + ceil(D/2) in its high half.

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

from dqrm.kernels.rounding import round_to_integer_reference

STEP_BYTES = 2
"""A bfloat16."""

HEADROOM = 1.25
SHRINK = 0.5

SMALLEST_MAX_ABS = 1e-8
"""Stands in for the largest magnitude of an all-zero row, so that no step is zero or denormal."""


def row_bytes(dim: int, bits: int) -> int:
    """Return the bytes of one row of ``dim`` codes of 8 or 4 bits and its step."""
    return STEP_BYTES + -(-dim * bits // 8)


def read_steps_reference(rows: Tensor) -> Tensor:
    """Return the steps of encoded rows (uint8 [U, row_bytes]), float32 [U]."""
    upper = rows[:, 0].to(torch.int32) | rows[:, 1].to(torch.int32) << 8
    return (upper << 16).view(torch.float32)


def read_codes_reference(rows: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes of encoded rows (uint8 [U, row_bytes]), float32 [U, dim]."""
    packed = rows[:, STEP_BYTES:]
    if bits == 8:
        return packed.view(torch.int8).float()
    halves = torch.cat([packed & 15, packed >> 4], dim=1)[:, :dim]
    # Sign-extend: the upper half of the unsigned range stands for the negative codes.
    return ((halves ^ 8).to(torch.int8) - 8).float()


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
    codes = torch.where(finite.unsqueeze(1), codes, 0).clamp_(-largest, largest).to(torch.int8)
    steps = torch.where(finite, steps, torch.nan).to(torch.bfloat16)
    if bits == 8:
        packed = codes.view(torch.uint8)
    else:
        half = -(-codes.shape[1] // 2)
        low, high = codes[:, :half] & 15, codes[:, half:] & 15
        high = torch.nn.functional.pad(high, (0, half - high.shape[1]))
        packed = (low | (high << 4)).view(torch.uint8)
    return torch.cat([steps.unsqueeze(1).view(torch.uint8), packed], dim=1)


def _bfloat16_above(values: Tensor) -> Tensor:
    """Return the smallest bfloat16 not below each positive value, as float32."""
    bits = (values.view(torch.int32) + 0xFFFF) & -0x10000
    return bits.view(torch.float32)
