"""Row-sparse gradients as one run of bytes, and the sum of several: one native call each.

The bytes are defined in :mod:`dqrm.kernels.row_messages_reference`. All results are the same bits
at every level and for any number of threads. Symbols: N rows, D values a row.
"""

import torch
from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.row_codecs_reference import code_bytes
from dqrm.kernels.row_messages_reference import (
    MalformedRowsError,
    encode_rows_reference,
    merge_messages_reference,
)
from dqrm.kernels.tables import RowGradient

__all__ = [
    "MalformedRowsError",
    "encode_rows",
    "hash_bytes",
    "merge_messages",
    "order_rows",
    "row_message_bound",
]

_BITS = (32, 16, 8, 4)


def row_message_bound(count: int, dim: int, bits: int) -> int:
    """Return the most bytes that ``count`` rows may take, whatever their numbers."""
    return -(-count // 4) + 8 * count + count * (code_bytes(dim, bits) + (2 if bits <= 8 else 0))


def order_rows(gradient: RowGradient, more: RowGradient, groups: int) -> tuple[Tensor, Tensor]:
    """Order the rows of two gradients, which share none, by row % groups and then by row.

    Args:
        gradient: rows that ascend, none negative.
        more: the same; its rows are numbered after those of ``gradient``.
        groups: at least 1.

    Returns:
        The numbers, int64 [all rows], and how many there are of each group, int64 [groups].

    Raises:
        ValueError: a row is negative, or there are not as many values as rows.
    """
    order = torch.empty(len(gradient.rows) + len(more.rows), dtype=torch.int64)
    counts = torch.empty(groups, dtype=torch.int64)
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        rows = torch.cat([gradient.rows, more.rows])
        if len(rows) and int(rows.min()) < 0:
            raise ValueError("rows: negative")
        by_row = rows.argsort()
        order.copy_(by_row[(rows[by_row] % groups).argsort(stable=True)])
        counts.copy_((rows % groups).bincount(minlength=groups))
        return order, counts
    native.order_rows(
        capsule(gradient.rows),
        capsule(gradient.values),
        capsule(more.rows),
        capsule(more.values),
        capsule(order),
        capsule(counts),
    )
    return order, counts


def encode_rows(
    gradient: RowGradient,
    out: Tensor,
    *,
    bits: int,
    stride: int = 1,
    offset: int = 0,
    more: RowGradient | None = None,
    order: Tensor | None = None,
    slots: Tensor | None = None,
    residual: Tensor | None = None,
    key: int | None = None,
    threads: int = 1,
) -> tuple[int, int | None]:
    """Encode rows into the caller's memory.

    A row with a slot is encoded with its residual added, rounded to nearest, and its residual
    becomes what was lost. Other rows are rounded stochastically where there is a key, and what they
    lose is forgotten.

    Args:
        gradient: distinct rows (int64 [N], ascending) and values (float32 [N, D]), contiguous.
        out: uint8, contiguous, with room for :func:`row_message_bound`; written.
        bits: of a value: 32, 16 (bfloat16), 8 or 4.
        stride: the rows that are encoded all have the same remainder by it ...
        offset: ... and this is it.
        more: further rows, without slots.
        order: int64, what to encode, from :func:`order_rows`; None for all of ``gradient``.
        slots: int64 [N], where in ``residual`` each row's is; -1 for none.
        residual: float32 [S, D], contiguous, read and written.
        key: of stochastic rounding, from :func:`dqrm.kernels.rounding.step_key`.
        threads: to share the work.

    Returns:
        The bytes written, and the first row in the message with NaN or infinity, or None.

    Raises:
        ValueError: an argument is not as above, or the rows do not ascend.
    """
    rows, values = gradient
    if rows.dtype != torch.int64 or values.dtype != torch.float32 or values.dim() != 2:
        raise ValueError("gradient: must be int64 [N] rows and float32 [N, D] values")
    if bits not in _BITS:
        raise ValueError(f"bits={bits}: must be one of {_BITS}")
    if more is not None and order is None:
        raise ValueError("more: needs an order")
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        return _encode_plainly(
            gradient, out, bits, stride, offset, more, order, slots, residual, key
        )
    size, bad = native.encode_row_message(
        capsule(rows),
        capsule(values),
        None if more is None else capsule(more.rows),
        None if more is None else capsule(more.values),
        None if order is None else capsule(order),
        None if slots is None else capsule(slots),
        None if residual is None else capsule(residual),
        bits,
        stride,
        offset,
        key,
        capsule(out),
        threads,
        cpu.isa_level(),
    )
    if size < 0:
        raise ValueError("gradient: its rows must ascend without repeats, none negative")
    return size, None if bad < 0 else bad


def merge_messages(
    buffer: Tensor,
    messages: list[tuple[int, int, int, int]],
    out: RowGradient,
    *,
    bits: int,
    limit: int,
    stride: int = 1,
    alpha: float = 1.0,
    threads: int = 1,
) -> RowGradient:
    """Sum what some messages hold, row by row: alpha times each value, in the messages' order.

    Args:
        buffer: uint8, contiguous, where the messages lie.
        messages: begin, size, rows and offset of each.
        out: memory for the result: rows int64 and values float32 [., D], contiguous, with room for
            all rows of all messages.
        bits: of a value, as they were encoded.
        limit: all rows are below it.
        stride: as they were encoded.
        alpha: factor, in float32.
        threads: to share the work.

    Returns:
        The distinct rows, ascending, and their sums: views of ``out``.

    Raises:
        MalformedRowsError: a message does not hold as many rows as it should, and nothing else.
        ValueError: an argument is not as above.
    """
    dim = out.values.shape[1]
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        payloads = [
            (buffer[begin : begin + size].numpy().tobytes(), count, offset)
            for begin, size, count, offset in messages
        ]
        merged = merge_messages_reference(payloads, dim, bits, limit, stride, alpha)
        count = len(merged.rows)
        out.rows[:count], out.values[:count] = merged
    else:
        count = native.merge_row_messages(
            capsule(buffer),
            capsule(torch.tensor(messages, dtype=torch.int64).view(len(messages), 4)),
            bits,
            stride,
            limit,
            alpha,
            capsule(out.rows),
            capsule(out.values),
            threads,
            cpu.isa_level(),
        )
        if count < 0:
            raise MalformedRowsError(-1 - count)
    return RowGradient(out.rows[:count], out.values[:count])


def hash_bytes(data: Tensor) -> int:
    """Return XXH64 (seed 0) of contiguous uint8 memory."""
    native = cpu.native()
    if native is None:
        from dqrm.kernels.xxh64 import xxh64_reference

        cpu.announce_fallback()
        return xxh64_reference(data.numpy().tobytes())
    return int(native.hash_bytes(capsule(data)))


def _encode_plainly(
    gradient: RowGradient,
    out: Tensor,
    bits: int,
    stride: int,
    offset: int,
    more: RowGradient | None,
    order: Tensor | None,
    slots: Tensor | None,
    residual: Tensor | None,
    key: int | None,
) -> tuple[int, int | None]:
    """Do what :func:`encode_rows` does with the plain twin."""
    rows, values = gradient
    if more is not None:
        rows, values = torch.cat([rows, more.rows]), torch.cat([values, more.values])
        if slots is not None:
            slots = torch.cat([slots, torch.full_like(more.rows, -1)])
    if order is not None:
        rows, values = rows[order], values[order]
        slots = None if slots is None else slots[order]
    ascending = bool((rows.diff() > 0).all()) and (not len(rows) or int(rows[0]) >= 0)
    if not ascending or bool((rows % stride != offset).any()):
        raise ValueError("gradient: its rows must ascend without repeats, none negative")
    payload, bad = encode_rows_reference(
        RowGradient(rows, values), bits, stride=stride, slots=slots, residual=residual, key=key
    )
    out[: len(payload)] = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[
        : len(payload)
    ]
    return len(payload), bad
