"""Dense gradients as integer codes with one scale for every block of neighbouring values.

A block is encoded as a row of :mod:`dqrm.kernels.row_codecs` is; the last one may be shorter. A
block's number takes the place of a row's in stochastic rounding.
"""

import torch
from torch import Tensor

from dqrm.kernels.row_codecs import decode, encode
from dqrm.kernels.row_codecs_reference import code_bytes


def block_code_bytes(count: int, bits: int, block: int) -> int:
    """Return the bytes of the codes of ``count`` values, scales not counted."""
    blocks, rest = divmod(count, block)
    return blocks * code_bytes(block, bits) + code_bytes(rest, bits)


def quantize_blocks(
    values: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int = 8,
    block: int = 256,
    scale_dtype: torch.dtype = torch.float32,
    residual: Tensor | None = None,
    carried: bool = False,
    key: int | None = None,
    first_block: int = 0,
) -> int | None:
    """Encode values by blocks into the caller's memory.

    Args:
        values: float32 of any shape, contiguous.
        codes: uint8 or int8, block_code_bytes(values.numel(), bits, block) contiguous bytes.
        scales: one of scale_dtype a block, or their bytes as uint8; contiguous.
        bits: 8 or 4.
        block: values that share a scale.
        scale_dtype: float32 or bfloat16.
        residual: float32, as values; becomes what was lost. It may be ``values`` itself.
        carried: add the residual to the values first: it holds what earlier calls lost.
        key: of stochastic rounding, from :func:`dqrm.kernels.rounding.step_key`; None rounds to
            nearest.
        first_block: number of the first block, for values that are part of a larger tensor.

    Returns:
        The first block, from 0, that holds NaN or infinity, or None; see row_codecs.

    Raises:
        ValueError: an argument is not as above; nothing was written.
    """
    return encode(
        values, codes, scales, block, bits, scale_dtype, residual, carried, key, None, first_block
    )


def dequantize_blocks(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    bits: int = 8,
    block: int = 256,
    scale_dtype: torch.dtype = torch.float32,
    add: bool = False,
    alpha: float = 1.0,
) -> None:
    """Write, or add, (alpha * s) * q.

    Args:
        codes: as :func:`quantize_blocks` wrote them.
        scales: as :func:`quantize_blocks` wrote them.
        out: float32 of any shape, contiguous.
        bits: 8 or 4.
        block: values that share a scale.
        scale_dtype: what the scales are.
        add: add to ``out`` rather than overwrite it.
        alpha: factor, in float32.

    Raises:
        ValueError: an argument is not as above; nothing was written.
    """
    decode(codes, scales, out, None, block, bits, scale_dtype, add, alpha)
