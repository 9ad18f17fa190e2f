"""Dropout whose random bits belong to the step, the stream, the sample and the unit.

    y = x * m / (1 - p)      m = 0 with probability p, else 1

The gradient of x is the same product again, made from the same key, so no mask is kept. Random
bits are those of dqrm.kernels.rounding: a resumed run drops the same units.
"""

import torch
from torch import Tensor

from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.rounding import random_bits_reference

_BITS = 24


def dropout_(
    values: Tensor, probability: float, key: int, stream: int = 0, *, first_row: int = 0
) -> Tensor:
    """Drop values in place and return them.

    NaN and infinity times zero are NaN, as in torch. Any number of threads and any instruction
    set give the same bits.

    Args:
        values: float32 [B, N], contiguous.
        probability: p of a value to become zero, 0 <= p < 1, exact to 2^-24.
        key: from :func:`dqrm.kernels.rounding.step_key`; equal keys drop the same values.
        stream: each has bits of its own under one key, 0 <= stream < 2^31.
        first_row: number of the first row, below 2^32; a row has the bits of its number.
    """
    if values.dtype != torch.float32 or values.dim() != 2 or not values.is_contiguous():
        raise ValueError(
            f"values is {values.dtype} of shape {tuple(values.shape)}, must be contiguous float32 "
            "with 2 dimensions"
        )
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"probability={probability}: must be at least 0 and below 1")
    module = native()
    if module is None:
        announce_fallback()
        return values.copy_(dropout_reference(values, probability, key, stream, first_row))
    module.dropout(
        capsule(values),
        _dropped(probability),
        _factor(probability),
        key,
        (stream << 32) + first_row,
        isa_level(),
        torch.get_num_threads(),
    )
    return values


def dropout_reference(
    values: Tensor, probability: float, key: int, stream: int = 0, first_row: int = 0
) -> Tensor:
    """Return what :func:`dropout_` writes, in plain torch: its definition, bit for bit."""
    rows = (stream << 32) + first_row + torch.arange(values.shape[0])
    bits = random_bits_reference(key, rows, 0, values.shape[1]) >> 8
    return values * torch.where(bits < _dropped(probability), 0.0, _factor(probability))


def _dropped(probability: float) -> int:
    return min(round(probability * (1 << _BITS)), (1 << _BITS) - 1)


def _factor(probability: float) -> float:
    return 1.0 / (1.0 - probability)
