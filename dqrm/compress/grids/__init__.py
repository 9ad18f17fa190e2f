"""Grids that weights are trained and stored on, as pure functions of tensors.

The names of the symmetric grid and of its packing are here; the other grids, the views that share
scales, N:M patterns and the records of what was done to a weight are in modules of their own.
"""

from dqrm.compress.grids.symmetric import (
    SMALLEST_MAX_ABS,
    dequantize,
    fake_quantize,
    inside_grid,
    largest_code,
    largest_codes,
    quantize,
    scale_of,
)
from dqrm.kernels.code_layout import pack, packed_row_bytes, unpack

__all__ = [
    "SMALLEST_MAX_ABS",
    "dequantize",
    "fake_quantize",
    "inside_grid",
    "largest_code",
    "largest_codes",
    "pack",
    "packed_row_bytes",
    "quantize",
    "scale_of",
    "unpack",
]
