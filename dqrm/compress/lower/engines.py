"""What multiplies 8-bit inputs by integer weights: the same bits from each, at different speeds.

The project's own loops quantize, multiply and scale in one pass, and on AVX512-VNNI take half the
time of oneDNN's or less where an input has few rows. oneDNN knows AMX, which those loops do not.
oneDNN wants unsigned inputs: given signed ones, it runs its reference loops on processors without
AMX, a thousand times slower (torch 2.13, Zen 4).
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dqrm.kernels.cpu import native
from dqrm.kernels.int8 import CodeLayer, CodeStack
from dqrm.kernels.int8_reference import quantize_rows

_TRIAL_ROWS = 128
_TRIALS = 5


class Engine(Protocol):
    """A linear layer on integer codes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, float32 [B, N], of x, float32 [B, K]."""


class OnednnLinear:
    """The layer by oneDNN, whose sums are then scaled row by row; for processors with VNNI.

    The definition is dqrm.kernels.int8_reference: oneDNN gives the exact sums, rounded to float32.
    """

    def __init__(self, layer: CodeLayer) -> None:
        self._layer = layer
        outputs, inputs = layer.codes.shape
        self._packed: Any = torch.ops.onednn.qlinear_prepack(layer.codes, [_TRIAL_ROWS, inputs])
        self._ones = torch.ones(outputs)
        self._zeros = torch.zeros(outputs, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, float32 [B, N], of x, float32 [B, K]."""
        codes, scale = quantize_rows(x)
        if not len(x):
            return x.new_empty(0, len(self._ones))
        # A row that is not finite must become NaN, and its codes may be anything.
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes.nan_to_num_(0.0).add_(128.0).to(torch.uint8),
            1.0,
            128,
            self._packed,
            self._ones,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return (scale * self._layer.scale) * sums + self._layer.bias


def fastest_engine(layer: CodeLayer) -> Engine:
    """Return the faster engine for a layer; only on processors with AMX does that take a trial."""
    own = CodeStack([layer])
    module = native()
    if module is None or not module.has_amx():
        return own
    other = OnednnLinear(layer)
    x = torch.randn(_TRIAL_ROWS, layer.codes.shape[1], generator=torch.Generator().manual_seed(0))
    return other if _seconds(other.forward, x) < _seconds(own.forward, x) else own


def _seconds(forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    forward(x)
    spent = []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        forward(x)
        spent.append(time.perf_counter() - began)
    return min(spent)
