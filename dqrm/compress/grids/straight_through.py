"""The gradient of everything that rounds: that of the identity (arXiv 1308.3432)."""

from typing import Any

import torch
from torch import Tensor


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, whose gradient is handed to ``source`` as it is.

    Args:
        source: what value was computed from.
        value: of the same shape, without a gradient of its own.
    """
    passed: Tensor = _StraightThrough.apply(source, value)  # type: ignore[no-untyped-call]
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None
