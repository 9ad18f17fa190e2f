"""Rows of gradients as integer codes with a scale each, in plain PyTorch: the definition.

Symbols: N rows, D values a row, n = 2**(bits-1) - 1 the largest code (127 or 7).

    scale    s = max|row| / n in float32; as bfloat16 the next one that is not smaller
    code     q = clamp(round(v * (1 / s)), -n, n), 1 / s in float32
    value    s * q
    residual v - s * q, what was lost

A row whose scale is below 2**-126, and so one of zeros, has scale and codes zero. A row that holds
NaN or infinity has scale NaN and decodes to NaN, as it would have arrived without a codec; its
residual is zero, for error feedback must not remember it. Rounding is to the nearest integer, ties
to even, or stochastic with the random bits of :mod:`dqrm.kernels.rounding`.

Codes of 8 bits are a byte each; of 4 bits byte j of a row holds element j in its low half and
element j + ceil(D/2) in its high half.
"""

import torch
from torch import Tensor

from dqrm.kernels.rounding import random_bits_reference, round_to_integer_reference

_SMALLEST_SCALE = 2.0**-126


def code_bytes(dim: int, bits: int) -> int:
    """Return the bytes of one row's codes, its scale not counted."""
    return -(-dim * bits // 8)


def quantize_rows_reference(
    values: Tensor,
    *,
    bits: int = 8,
    scale_dtype: torch.dtype = torch.bfloat16,
    random: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode rows.

    Args:
        values: float32 [N, D], the residual added where there is one.
        bits: 8 or 4.
        scale_dtype: float32 or bfloat16.
        random: int64 [N, D] below 2**32 for stochastic rounding; None rounds to nearest.

    Returns:
        Codes, uint8 [N, code_bytes(D, bits)]; scales, scale_dtype [N]; residual, float32 [N, D].
    """
    largest = 2 ** (bits - 1) - 1
    max_abs = values.abs().amax(dim=1)
    finite = max_abs.isfinite()
    scale = torch.where(finite, max_abs, 0.0) / largest
    if scale_dtype == torch.bfloat16:
        scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    zero = scale < _SMALLEST_SCALE
    inverse = torch.where(zero, 0.0, 1.0 / scale)
    scale = torch.where(zero, 0.0, scale)
    clean = torch.where(finite.unsqueeze(1), values, 0.0)
    scaled = clean * inverse.unsqueeze(1)
    rounded = scaled.round() if random is None else round_to_integer_reference(scaled, random)
    # Adding zero turns -0.0 into 0.0, the only zero a code can say.
    codes = rounded.clamp_(-largest, largest).add_(0.0)
    residual = clean - scale.unsqueeze(1) * codes
    integers = codes.to(torch.int8)
    if bits == 4:
        half = -(-values.shape[1] // 2)
        low, high = integers[:, :half] & 15, integers[:, half:] & 15
        integers = low | (torch.nn.functional.pad(high, (0, half - high.shape[1])) << 4)
    scale = torch.where(finite, scale, torch.nan)
    if scale_dtype == torch.bfloat16:
        # Its upper bits are all there is; a conversion may choose another NaN.
        scale = (scale.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return integers.view(torch.uint8), scale, residual


def dequantize_rows_reference(
    codes: Tensor, scales: Tensor, dim: int, *, bits: int = 8, alpha: float = 1.0
) -> Tensor:
    """Decode rows.

    Args:
        codes: uint8 [N, code_bytes(D, bits)].
        scales: float32 or bfloat16 [N].
        dim: D.
        bits: 8 or 4.
        alpha: factor of the scales.

    Returns:
        float32 [N, D].
    """
    if bits == 8:
        integers = codes.view(torch.int8)
    else:
        halves = torch.cat([codes & 15, codes >> 4], dim=1)[:, :dim]
        integers = (halves ^ 8).to(torch.int8) - 8
    return (scales.float() * alpha).unsqueeze(1) * integers.float()


def encode_reference(
    values: Tensor,
    codes: Tensor,
    scales: Tensor,
    dim: int,
    bits: int,
    scale_dtype: torch.dtype,
    residual: Tensor | None,
    carried: bool,
    key: int | None,
    numbers: Tensor | None,
    first: int,
) -> int | None:
    """Do what :func:`dqrm.kernels.row_codecs.encode` does, codes and scales being bytes."""
    flat = values.reshape(-1)
    if carried and residual is not None:
        flat = flat + residual.view(-1)
    count = flat.numel()
    rows = -(-count // dim)
    padded = torch.nn.functional.pad(flat, (0, rows * dim - count)).view(rows, dim)
    random = None
    if key is not None:
        numbers = torch.arange(first, first + rows) if numbers is None else numbers
        random = random_bits_reference(key, numbers, 0, dim)
    whole = count // dim
    last = count - whole * dim
    not_finite = None
    for begin, end, width in ((0, whole, dim), (whole, rows, last)):
        if begin == end:
            continue
        part, scale, lost = quantize_rows_reference(
            padded[begin:end, :width],
            bits=bits,
            scale_dtype=scale_dtype,
            random=None if random is None else random[begin:end, :width],
        )
        at = begin * code_bytes(dim, bits)
        codes[at : at + part.numel()] = part.reshape(-1)
        size = scale_dtype.itemsize
        scales[begin * size : end * size] = scale.view(torch.uint8)
        if residual is not None:
            residual.view(-1)[begin * dim : begin * dim + lost.numel()] = lost.reshape(-1)
        bad = scale.isnan().nonzero()
        if not_finite is None and len(bad):
            not_finite = begin + int(bad[0])
    return not_finite


def decode_reference(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    rows: Tensor | None,
    dim: int,
    bits: int,
    scale_dtype: torch.dtype,
    add: bool,
    alpha: float,
) -> None:
    """Do what :func:`dqrm.kernels.row_codecs.decode` does, codes and scales being bytes."""
    scale = scales.clone().view(scale_dtype)
    count = out.numel() if rows is None else rows.numel() * dim
    whole = count // dim
    at = whole * code_bytes(dim, bits)
    decoded = dequantize_rows_reference(
        codes[:at].view(whole, code_bytes(dim, bits)), scale[:whole], dim, bits=bits, alpha=alpha
    ).view(-1)
    if count > whole * dim:
        rest = dequantize_rows_reference(
            codes[at:].view(1, -1), scale[whole:], count - whole * dim, bits=bits, alpha=alpha
        )
        decoded = torch.cat([decoded, rest.view(-1)])
    if rows is not None:
        bad = (rows < 0) | (rows >= len(out))
        if bool(bad.any()):
            position = int(bad.nonzero()[0])
            raise IndexError(
                f"rows: {int(rows[position])} at position {position} is outside the {len(out)} "
                "rows of out"
            )
        out.index_add_(0, rows, decoded.view(-1, dim))
    elif add:
        out.view(-1).add_(decoded)
    else:
        out.view(-1).copy_(decoded)
