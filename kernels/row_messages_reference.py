"""Row-sparse gradients as bytes, in plain PyTorch: the definition.

Symbols: N rows, D values a row. A payload is

    control  ceil(N / 4) bytes: two bits a row, four rows a byte, the first row lowest
    gaps     1, 2, 3 or 8 bytes a row for control 0, 1, 2, 3, lower byte first
    scales   bfloat16 [N], where a value has 8 or 4 bits
    codes    N rows of ceil(D * bits / 8) bytes

Rows ascend without repeats. The gap of row r after row p is r // W - p // W - 1, with p // W = -1
before the first; W is 1 except where every W-th row is sent, and then r % W is known.

Values of 8 and 4 bits are those of :mod:`dqrm.kernels.row_codecs_reference`; of 16 bits bfloat16,
rounded to nearest, ties to even; of 32 bits float32.
"""

import torch
from torch import Tensor

from dqrm.kernels.rounding import random_bits_reference
from dqrm.kernels.row_codecs_reference import (
    code_bytes,
    dequantize_rows_reference,
    quantize_rows_reference,
)
from dqrm.kernels.tables import RowGradient

_GAP_BYTES = (1, 2, 3, 8)


class MalformedRowsError(ValueError):
    """A payload does not hold the rows it should."""

    def __init__(self, message: int) -> None:
        super().__init__(f"message {message} does not hold the rows that its header promises")
        self.message = message
        """Its place among the merged ones."""


def pack_keys_reference(rows: Tensor, stride: int = 1) -> bytes:
    """Return control bytes and gaps of rows (int64 [N]) with equal remainders by ``stride``."""
    control = bytearray(-(-len(rows) // 4))
    gaps = bytearray()
    previous = -1
    for i, row in enumerate(rows.tolist()):
        gap = row // stride - previous - 1
        previous = row // stride
        code = sum(gap > most for most in (0xFF, 0xFFFF, 0xFFFFFF))
        control[i // 4] |= code << (2 * (i % 4))
        gaps += gap.to_bytes(_GAP_BYTES[code], "little")
    return bytes(control + gaps)


def unpack_keys_reference(
    payload: bytes, count: int, limit: int, stride: int = 1, offset: int = 0
) -> tuple[Tensor, int]:
    """Return ``count`` rows below ``limit`` (int64 [count]) and the bytes they took.

    Raises:
        ValueError: the payload holds no such rows.
    """
    at = -(-count // 4)
    if at > len(payload):
        raise ValueError("the control bytes are cut off")
    rows = []
    key = -1
    for i in range(count):
        size = _GAP_BYTES[payload[i // 4] >> (2 * (i % 4)) & 3]
        if at + size > len(payload):
            raise ValueError(f"row {i} is cut off")
        key += 1 + int.from_bytes(payload[at : at + size], "little")
        at += size
        if key * stride + offset >= limit:
            raise ValueError(f"row {i} is not below {limit}")
        rows.append(key * stride + offset)
    return torch.tensor(rows, dtype=torch.int64), at


def encode_values_reference(
    values: Tensor, bits: int, random: Tensor | None = None
) -> tuple[bytes, Tensor]:
    """Return scales and codes of rows of values (float32 [N, D]), and what was lost (the same)."""
    finite = values.isfinite().all(dim=1, keepdim=True)
    if bits >= 16:
        sent = values.to(torch.bfloat16) if bits == 16 else values
        lost = torch.where(finite & sent.isfinite().all(dim=1, keepdim=True), values - sent, 0.0)
        return sent.contiguous().view(torch.uint8).numpy().tobytes(), lost
    codes, scales, lost = quantize_rows_reference(values, bits=bits, random=random)
    return scales.view(torch.uint8).numpy().tobytes() + codes.numpy().tobytes(), lost


def encode_rows_reference(
    gradient: RowGradient,
    bits: int,
    *,
    stride: int = 1,
    slots: Tensor | None = None,
    residual: Tensor | None = None,
    key: int | None = None,
) -> tuple[bytes, int | None]:
    """Do what :func:`dqrm.kernels.row_messages.encode_rows` does for ascending rows."""
    rows, values = gradient
    count, dim = values.shape
    kept = torch.zeros(count, dtype=torch.bool) if slots is None else slots >= 0
    values = values.clone()
    if slots is not None and residual is not None:
        values[kept] += residual[slots[kept]]
    parts: list[tuple[bytes, bytes]] = [(b"", b"")] * count
    scale_bytes = 2 if bits <= 8 else 0
    for mask, of_mask in ((kept, None), (~kept, key)):
        if not bool(mask.any()):
            continue
        random = None if of_mask is None else random_bits_reference(of_mask, rows[mask], 0, dim)
        body, lost = encode_values_reference(values[mask], bits, random)
        if mask is kept and slots is not None and residual is not None:
            residual[slots[kept]] = lost
        numbers = mask.nonzero().view(-1).tolist()
        codes_at, size = scale_bytes * len(numbers), code_bytes(dim, bits)
        for i, number in enumerate(numbers):
            scale = body[scale_bytes * i : scale_bytes * (i + 1)]
            parts[number] = scale, body[codes_at + size * i : codes_at + size * (i + 1)]
    sent = values.to(torch.bfloat16) if bits == 16 else values
    bad = (~sent.isfinite().all(dim=1)).nonzero()
    payload = pack_keys_reference(rows, stride)
    payload += b"".join(scale for scale, _ in parts) + b"".join(codes for _, codes in parts)
    return payload, int(rows[bad[0]]) if len(bad) else None


def decode_rows_reference(
    payload: bytes,
    count: int,
    dim: int,
    bits: int,
    limit: int,
    stride: int = 1,
    offset: int = 0,
    alpha: float = 1.0,
) -> RowGradient:
    """Return the rows of a payload and alpha times their values.

    Raises:
        ValueError: the payload holds no such rows.
    """
    rows, at = unpack_keys_reference(payload, count, limit, stride, offset)
    size = code_bytes(dim, bits)
    scale_bytes = 2 if bits <= 8 else 0
    if len(payload) != at + count * (size + scale_bytes):
        raise ValueError("too few or too many bytes of values")
    if count == 0:
        return RowGradient(rows, torch.zeros(0, dim))
    behind = at + count * scale_bytes
    codes = torch.frombuffer(bytearray(payload[behind:]), dtype=torch.uint8)
    if bits >= 16:
        dtype = torch.bfloat16 if bits == 16 else torch.float32
        return RowGradient(rows, codes.view(dtype).view(count, dim).float() * alpha)
    scales = torch.frombuffer(bytearray(payload[at:behind]), dtype=torch.bfloat16)
    values = dequantize_rows_reference(codes.view(count, size), scales, dim, bits=bits, alpha=alpha)
    return RowGradient(rows, values)


def merge_messages_reference(
    payloads: list[tuple[bytes, int, int]],
    dim: int,
    bits: int,
    limit: int,
    stride: int,
    alpha: float,
) -> RowGradient:
    """Merge (payload, count, offset) of each message, values added in their order.

    Raises:
        MalformedRowsError: one does not hold what it should.
    """
    decoded = []
    for number, (payload, count, offset) in enumerate(payloads):
        try:
            decoded.append(
                decode_rows_reference(payload, count, dim, bits, limit, stride, offset, alpha)
            )
        except ValueError as error:
            raise MalformedRowsError(number) from error
    union = torch.unique(torch.cat([part.rows for part in decoded]))
    values = torch.zeros(len(union), dim)
    for part in decoded:
        values.index_add_(0, torch.searchsorted(union, part.rows), part.values)
    return RowGradient(union, values)
