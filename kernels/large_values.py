"""The values of large magnitude among many."""

import torch
from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.dlpack import capsule


def select_large(values: Tensor, threshold: float, indices: Tensor) -> tuple[int, int | None]:
    """Find the values whose magnitude is at least ``threshold``.

    Args:
        values: float32 [N], contiguous.
        threshold: not negative.
        indices: int64, contiguous; the places of the first values, ascending, as many as it has
            room for.

    Returns:
        How many there are, and the place of the first NaN or infinity, or None; the search ends
        there.
    """
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        return select_large_reference(values, threshold, indices)
    count, bad = native.select_large(capsule(values), threshold, capsule(indices), cpu.isa_level())
    return count, None if bad < 0 else bad


def select_large_reference(
    values: Tensor, threshold: float, indices: Tensor
) -> tuple[int, int | None]:
    """Define :func:`select_large` in plain PyTorch."""
    bad = (~values.isfinite()).nonzero().view(-1)
    end = int(bad[0]) if len(bad) else values.numel()
    limit = torch.tensor(threshold, dtype=torch.float32)
    found = (values[:end].abs() >= limit).nonzero().view(-1)
    room = min(len(found), len(indices))
    indices[:room] = found[:room]
    return len(found), end if len(bad) else None
