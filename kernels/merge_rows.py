"""Row-sparse gradients with each row once: sort by radix, sum the values of equal rows.

Symbols: N rows with repeats, U distinct ones, D values a row.
"""

import torch
from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.tables import RowGradient
from dqrm.kernels.tables import merge_rows as merge_rows_reference

__all__ = ["merge_rows", "merge_rows_reference"]


def merge_rows(
    rows: Tensor,
    values: Tensor,
    *,
    out_rows: Tensor | None = None,
    out_values: Tensor | None = None,
) -> RowGradient:
    """Sum the values of equal rows.

    Values are added to zero one after the other, in the order in which they occur: the bits are
    the same at every level and for any number of threads, and those of ``index_add_``. NaN and
    infinity stay in the sums of their row.

    Args:
        rows: int64 [N], none negative; N times the largest row must stay below 2**63.
        values: float32 [N, D].
        out_rows: int64 [at least N], memory for the result; it shares none with the input.
        out_values: float32 [at least N, D], the same. Without them every call allocates, and
            touching fresh memory takes longer than the work.

    Returns:
        The U distinct rows, ascending, and the sums of their values: views of the memory given.

    Raises:
        ValueError: a row is negative, or a dtype or shape is not as above; nothing was written.
    """
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows: must be int64 [N], is {_shown(rows)}")
    if values.dtype != torch.float32 or values.dim() != 2 or len(values) != len(rows):
        raise ValueError(f"values: must be float32 [{len(rows)}, D], is {_shown(values)}")
    if out_rows is None:
        out_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if out_values is None:
        out_values = torch.empty_like(values, memory_format=torch.contiguous_format)
    if out_rows.dtype != torch.int64 or out_rows.dim() != 1 or len(out_rows) < len(rows):
        raise ValueError(
            f"out_rows: must be int64 with room for {len(rows)}, is {_shown(out_rows)}"
        )
    dim = values.shape[1]
    room = out_values.dim() == 2 and len(out_values) >= len(rows) and out_values.shape[1] == dim
    if out_values.dtype != torch.float32 or not room or not out_values.is_contiguous():
        raise ValueError(
            f"out_values: must be contiguous float32 with room for [{len(rows)}, {dim}], is "
            f"{_shown(out_values)}"
        )
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        if len(rows) and int(rows.min()) < 0:
            raise ValueError(f"rows: {int(rows.min())} is negative")
        merged = merge_rows_reference(rows, values)
        count = len(merged.rows)
        out_rows[:count], out_values[:count] = merged
    else:
        count = native.merge_rows(
            capsule(rows.contiguous()),
            capsule(values.contiguous()),
            capsule(out_rows),
            capsule(out_values),
            torch.get_num_threads(),
            cpu.isa_level(),
        )
    return RowGradient(out_rows[:count], out_values[:count])


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
