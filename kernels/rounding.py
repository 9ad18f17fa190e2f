"""Stochastic rounding: random bits that depend on what is rounded and on nothing else.

A value between two neighbours of a grid goes to either with the probability that makes the result
right on average, so updates far below the grid's step still add up (arXiv 2212.05735, section 3).
A value on the grid stays what it is.

The bits are a hash of the seed, the optimizer step, the global row and the element in the row, not
the next draw of a generator: they are the same for any number of threads, any order of the rows,
and for a run that was resumed. All arithmetic is modulo 2**32, except ``mix64``.

    mix64(z)   splitmix64: z += 9E3779B97F4A7C15; z = (z ^ z >> 30) * BF58476D1CE4E5B9;
               z = (z ^ z >> 27) * 94D049BB133111EB; z ^ z >> 31
    mix32(x)   x = (x ^ x >> 16) * 21F0AAAD; x = (x ^ x >> 15) * 735A2D97; x ^ x >> 15
    key        mix64(mix64(seed) + step), its low half key0, its high half key1
    row key    mix32(mix32(low half of row ^ key0) ^ high half of row ^ key1)
    bits       mix32(row key + 9E3779B9 * element)

mix32 is the two-round hash with the least known bias (github.com/skeeto/hash-prospector).
"""

import torch
from torch import Tensor

BFLOAT16_NAN = 0x7FC0
"""The bits of the only NaN that is written."""

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN32 = 0x9E3779B9
_GOLDEN64 = 0x9E3779B97F4A7C15


def step_key(seed: int, step: int) -> int:
    """Return the key of one optimizer step, 64 bits, from a seed of 64 bits."""
    return mix64_reference((mix64_reference(seed & _MASK64) + step) & _MASK64)


def random_bits_reference(key: int, rows: Tensor, first: int, count: int) -> Tensor:
    """Return the random bits of ``count`` elements of each row, int64 [U, count] below 2**32.

    Args:
        key: what :func:`step_key` returned.
        rows: int64 [U], global row numbers.
        first: number of the first element.
        count: elements of a row.
    """
    row_key = _mix32((rows & _MASK32) ^ (key & _MASK32))
    row_key = _mix32(row_key ^ (rows >> 32 & _MASK32) ^ (key >> 32))
    elements = torch.arange(first, first + count) * _GOLDEN32
    return _mix32((row_key.unsqueeze(1) + elements) & _MASK32)


def round_to_integer_reference(values: Tensor, bits: Tensor) -> Tensor:
    """Return each value rounded down or up to an integer, float32.

    Args:
        values: float32, magnitude below 2**22.
        bits: int64 of the same shape, below 2**32; the upper 24 decide.
    """
    floor = values.floor()
    chance = (bits >> 8).to(torch.float32) * 2.0**-24
    return floor + (chance < values - floor)


def round_to_bfloat16_reference(values: Tensor, bits: Tensor) -> Tensor:
    """Return each value rounded towards or away from zero to bfloat16; NaN stays NaN.

    Args:
        values: float32.
        bits: int64 of the same shape, below 2**32; the upper 16 decide.
    """
    # Adding to the bits below bfloat16's carries into them with the wanted probability.
    carried = values.view(torch.int32) + (bits >> 16).to(torch.int32)
    upper = torch.where(values.isnan(), BFLOAT16_NAN, carried >> 16)
    return upper.to(torch.int16).view(torch.bfloat16)


def _mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)


def mix64_reference(z: int) -> int:
    """Return the next 64 bits of splitmix64."""
    z = (z + _GOLDEN64) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
