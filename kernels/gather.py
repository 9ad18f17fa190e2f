"""Reading random rows and nothing else: the limit that memory sets to every look-up."""

import torch
from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.dlpack import capsule


def gather_rows(table: Tensor, rows: Tensor, out: Tensor, *, ahead: int = 0) -> None:
    """Read ``rows`` of ``table`` and write as many bytes for each as a look-up would.

    Where the widths are equal this is ``index_select``. A narrower row, as a packed one is, is
    read whole, folded to four bytes by exclusive or, and these are repeated over ``out``'s row:
    the memory traffic of unpacking it, without the arithmetic.

    Args:
        table: uint8 [R, row_bytes], contiguous.
        rows: int64 [N].
        out: uint8 [N, out_bytes], contiguous; written.
        ahead: rows between asking for a row and reading it; 0 does not ask.

    Raises:
        IndexError: a number in ``rows`` is outside the table; nothing is written.
        RuntimeError: the compiled kernels are missing; a limit in plain Python is none.
    """
    native = cpu.native()
    if native is None:
        raise RuntimeError(f"the compiled kernels are missing: {cpu.unavailable_reason()}")
    native.gather_rows(
        capsule(table), capsule(rows), capsule(out), ahead, torch.get_num_threads(), cpu.isa_level()
    )


def gather_rows_reference(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """Define :func:`gather_rows` in plain PyTorch."""
    values = table.index_select(0, rows)
    row_bytes, out_bytes = table.shape[1], out.shape[1]
    if row_bytes == out_bytes:
        out.copy_(values)
        return
    folded = torch.zeros(len(rows), 4, dtype=torch.uint8)
    whole = row_bytes - row_bytes % 8
    for begin in range(0, whole, 4):
        folded ^= values[:, begin : begin + 4]
    for at in range(whole, row_bytes):
        folded[:, 0] ^= values[:, at]
    out.copy_(folded.repeat(1, -(-out_bytes // 4))[:, :out_bytes])
