"""Symmetric integer grids: scales, codes, fake quantization and packing, as pure functions.

With b bits and n = 2**(b-1) - 1, a weight w and a scale s (arXiv 2410.20046, section 3; the
max-abs form of the authors' code, not the asymmetric range of their figure 2):

    scale   s     = max(max|w|, 1e-8) / n
    code    q     = clamp(round_half_even(w / s), -n - 1, n)
    value   w_hat = s * q

Right after the scale is taken no code is -n - 1; with a stale scale it can be.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dqrm.compress.grids.rounding import Rounding, round_codes
from dqrm.compress.grids.straight_through import straight_through

SMALLEST_MAX_ABS = 1e-8
"""Stands in for the range of all-zero weights (same constant as the paper's code)."""


def largest_code(bits: int) -> int:
    """Return n = 2**(bits-1) - 1, the largest code: 7 for 4 bits, 127 for 8."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits={bits}: must be from 2 to 16")
    return (1 << (bits - 1)) - 1


def scale_of(max_abs: Tensor, largest: Tensor | int) -> Tensor:
    """Return the scale of weights whose largest magnitude is ``max_abs`` (float32, any shape)."""
    return max_abs.clamp_min(SMALLEST_MAX_ABS) / largest


def quantize(
    weight: Tensor, scale: Tensor, largest: Tensor | int, rounding: Rounding = "nearest"
) -> Tensor:
    """Return integer codes in float32, in [-largest-1, largest]; scale broadcasts to weight."""
    codes = round_codes(weight / scale, rounding)
    if isinstance(largest, int):
        codes = codes.clamp_(-largest - 1, largest)
    else:
        codes = torch.clamp(codes, -largest - 1, largest)
    # Adding zero turns -0.0 into 0.0, the only zero a packed code can say.
    return codes.add_(0.0)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``scale * codes`` in float32, the one expression training and serving share."""
    return scale * codes


def inside_grid(weight: Tensor, scale: Tensor, largest: Tensor | int) -> Tensor:
    """Return whether each weight rounds to a code without being clamped (bool, as weight)."""
    ratio = weight / scale
    return (ratio >= -largest - 1.5) & (ratio <= largest + 0.5)


def fake_quantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return ``weight`` on the grid, with the straight-through gradient.

    Args:
        weight: float32, any shape.
        scale: float32, broadcasts to weight; receives no gradient.
        bits: 2 to 16.
    """
    largest = largest_code(bits)
    return straight_through(weight, dequantize(quantize(weight.detach(), scale, largest), scale))


def largest_codes(bits: Sequence[int]) -> Tensor:
    """Return the largest code of each table (float32 [T]); 1 stands in for 32-bit tables."""
    return torch.tensor([1 if b == 32 else largest_code(b) for b in bits], dtype=torch.float32)
