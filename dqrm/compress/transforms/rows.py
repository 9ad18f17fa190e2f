"""Rows of an embedding on a grid: those that are looked up while training, all when frozen.

A row's scales depend on the row alone. So quantizing what was looked up gives what looking up in a
quantized table would, without a copy of the table at every step.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import WeightRecord, set_weight_record, weight_record

_HOOK = "_row_quantizer"


class RowStep(Protocol):
    """Puts rows on a grid."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [N, D] on the grid, with a gradient."""

    def quantized(self, weight: Tensor) -> tuple[Tensor, WeightRecord]:
        """Return all rows [R, D] on the grid and how they are to be stored."""


def rows_apart(granularity: Granularity) -> Granularity:
    """Return the granularity of an embedding: one scale a row in place of one for several."""
    return granularity if granularity.kind == "k_groups" else Granularity("row")


def quantize_rows_of(name: str, module: nn.Embedding, step: RowStep) -> None:
    """Quantize looked-up rows from now on.

    Raises:
        ValueError: they are quantized already.
    """
    if hasattr(module, _HOOK):
        raise ValueError(f"{name}: two transforms of one kind match it")
    if weight_record(module) is not None:
        raise ValueError(f"{name}: its weight was compressed before")

    def quantize(module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
        return step(rows.reshape(-1, rows.shape[-1])).view(rows.shape)

    setattr(module, _HOOK, module.register_forward_hook(quantize))


@torch.no_grad()
def settle_rows(module: nn.Embedding, step: RowStep) -> None:
    """Put the whole table on the grid and record it; again has no effect."""
    hook = getattr(module, _HOOK, None)
    if hook is None:
        return
    hook.remove()
    delattr(module, _HOOK)
    value, record = step.quantized(module.weight)
    module.weight.copy_(value)
    set_weight_record(module, record)
