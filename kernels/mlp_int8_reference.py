"""Linear layers with INT8 products in plain PyTorch: the definition the native loops are held to.

Layer l maps x [B, K] to y [B, N] by the codes [N, K] and scales s_w [N] of its weight. Every
operand of a product is put on a grid of 8 bits, and products are summed exactly:

    s_x[b] = max(max |x[b]|, 1e-8) / 127        qx = round(x * (1 / s_x)), ties to even
    y = (qx @ codes.T) * (s_x * s_w) + bias     then the ReLU, if any

    g = dy, zero where the ReLU gave 0
    s_g[b] = max |g[b] * s_w| / 127             qg = stochastic((g * s_w) * (1 / s_g))
    dx = s_g * (qg @ codes)
    h = g * s_x                                 by blocks of rows, one scale a column and block:
    s_h[n] = max |h[:, n]| / 127                qh = stochastic(h * (1 / s_h))
    dw = sum over blocks of s_h * (qh.T @ qx)   db = sum of g's rows, in FP32

The gradients are straight-through, as in dqrm.kernels.mlp_reference. Where s_g or s_h would be
below 1e-30, it is 0 and so are the codes. stochastic(v) = floor(v + u), limited to [-128, 127],
with u in (0, 1): gradients are right on average over the random bits, up to 2**-17 of a step of
the grid (stochastic rounding: arXiv 1502.02551; a scale for every row: arXiv 2304.13013). u is

    (16 bits + 1/2) / 2**16, the bits those of dqrm.kernels.rounding for
    row      b + 2**32 * l                      l counts all layers of the stack
    element  n // 32 * 16 + n % 16              lower half for n % 32 < 16, upper half otherwise

and the same for qg[b, n] and qh[b, n], which no product ever brings together.

A row of x with a NaN or an infinity gives NaN in the whole row of y, and likewise back.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dqrm.kernels.mlp_reference import (
    SMALLEST_MAX_ABS,
    LayerSpec,
    SavedForward,
    codes_and_scale,
    mlp_backward_reference,
    mlp_forward_reference,
)
from dqrm.kernels.rounding import random_bits_reference

FEWEST_INPUTS: Final = 32
"""Layers with fewer inputs gain nothing by INT8."""
LONGEST_SUM: Final = 65536
"""Most terms of a sum of 32 bits."""
SMALLEST_SCALE: Final = 1e-30
"""Smaller scales of gradients count as zero."""

_LARGEST = 127.0


class SavedInt8(NamedTuple):
    """What backward needs of a forward through INT8 layers."""

    inputs: list[Tensor]
    """Codes of x, float32 [B, K_l]."""
    input_scales: list[Tensor]
    """float32 [B] of each layer."""
    outputs: list[Tensor]
    """float32 [B, N_l], after the ReLU."""
    codes: list[Tensor]
    """float32 [N, K] of each layer."""
    scales: list[Tensor]
    """float32 [N] of each layer."""


class LayerRun(NamedTuple):
    """Consecutive layers of a stack that are computed alike."""

    first: int
    stop: int
    int8: bool


def int8_runs(layers: Sequence[LayerSpec]) -> list[LayerRun]:
    """Return the runs of layers that are INT8 and that are not, in order."""
    runs: list[LayerRun] = []
    for int8, run in groupby(layers, is_int8):
        first = runs[-1].stop if runs else 0
        runs.append(LayerRun(first, first + len(list(run)), int8))
    return runs


def is_int8(layer: LayerSpec) -> bool:
    """Return whether the weight is quantized, of 32 to 65536 inputs and 2 to 65536 outputs."""
    outputs, inputs = layer.weight.shape
    return (
        layer.bits != 32 and FEWEST_INPUTS <= inputs <= LONGEST_SUM and 1 < outputs <= LONGEST_SUM
    )


def block_rows(batch: int) -> int:
    """Return how many rows of a batch share a scale of dw."""
    sixteenth = (batch + 15) // 16
    return min(128, max(64, (sixteenth + 3) // 4 * 4))


@torch.no_grad()
def int8_forward_reference(x: Tensor, layers: Sequence[LayerSpec]) -> tuple[Tensor, SavedInt8]:
    """Return the output float32 [B, N_last] and what :func:`int8_backward_reference` needs.

    Args:
        x: float32 [B, K_0].
        layers: quantized ones, in the order of the computation.
    """
    saved = SavedInt8([], [], [], [], [])
    value = x
    for weight, bias, bits, relu, *_ in layers:
        codes, scale = codes_and_scale(weight, bits)
        scale = _finite_or_nan(scale)
        found = _finite_or_nan(value.abs().amax(dim=1))
        input_scale = found.clamp_min(SMALLEST_MAX_ABS) / _LARGEST
        rounded = (value * (1.0 / input_scale)[:, None]).round().clamp(-128.0, 127.0)
        value = _product(rounded, codes.T) * (input_scale[:, None] * scale) + bias
        if relu:
            value = value.relu()
        for into, tensor in zip(saved, (rounded, input_scale, value, codes, scale), strict=True):
            into.append(tensor)
    return value, saved


@torch.no_grad()
def int8_backward_reference(
    grad_y: Tensor,
    layers: Sequence[LayerSpec],
    saved: SavedInt8,
    key: int,
    first_layer: int = 0,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x, float32 [B, K_0], and of each layer's (weight, bias).

    Args:
        grad_y: float32 [B, N_last].
        layers: as given to :func:`int8_forward_reference`.
        saved: what that returned.
        key: of the random bits, from :func:`dqrm.kernels.rounding.step_key`.
        first_layer: the number of layers[0] in the stack it is in.
    """
    gradients: list[tuple[Tensor, Tensor]] = []
    grad = grad_y
    batch = grad_y.shape[0]
    for number in range(len(layers) - 1, -1, -1):
        if layers[number].relu:
            grad = grad.masked_fill(saved.outputs[number] <= 0, 0.0)
        chances = _chances(key, first_layer + number, *grad.shape)
        qg, s_g = _stochastic(grad * saved.scales[number], chances, dim=1)
        weighted = grad * saved.input_scales[number][:, None]
        weight_gradient = torch.zeros_like(saved.codes[number])
        for begin in range(0, batch, block_rows(batch)):
            rows = slice(begin, begin + block_rows(batch))
            qh, s_h = _stochastic(weighted[rows], chances[rows], dim=0)
            part = _product(qh.T, saved.inputs[number][rows])
            weight_gradient = part * s_h.T + weight_gradient
        gradients.append((weight_gradient, grad.sum(dim=0)))
        grad = _product(qg, saved.codes[number]) * s_g
    return grad, gradients[::-1]


def stack_forward_reference(
    x: Tensor, layers: Sequence[LayerSpec]
) -> tuple[Tensor, list[SavedInt8 | SavedForward]]:
    """Return the output of a whole stack, and what backward needs of every run.

    Layers that are not INT8 compute in bfloat16.
    """
    saved: list[SavedInt8 | SavedForward] = []
    for run in int8_runs(layers):
        part = layers[run.first : run.stop]
        kept: SavedInt8 | SavedForward
        if run.int8:
            x, kept = int8_forward_reference(x, part)
        else:
            x, kept = mlp_forward_reference(x, part, "bf16")
        saved.append(kept)
    return x, saved


def stack_backward_reference(
    grad_y: Tensor,
    layers: Sequence[LayerSpec],
    saved: Sequence[SavedInt8 | SavedForward],
    key: int,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x and of each layer's (weight, bias) of a whole stack."""
    gradients: list[tuple[Tensor, Tensor]] = []
    for run, kept in zip(reversed(int8_runs(layers)), reversed(saved), strict=True):
        part = layers[run.first : run.stop]
        if isinstance(kept, SavedInt8):
            grad_y, got = int8_backward_reference(grad_y, part, kept, key, run.first)
        else:
            grad_y, got = mlp_backward_reference(grad_y, part, kept)
        gradients = got + gradients
    return grad_y, gradients


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The exact product of codes, rounded once to float32."""
    exact = torch.float32 if left.shape[1] * 128 * 128 <= 1 << 24 else torch.float64
    return (left.to(exact) @ right.to(exact)).float()


def _finite_or_nan(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.nan)


def _chances(key: int, layer: int, batch: int, columns: int) -> Tensor:
    """u of every element, float32 [batch, columns]."""
    rows = torch.arange(batch) + (layer << 32)
    panels = (columns + 31) // 32
    bits = random_bits_reference(key, rows, 0, 16 * panels).view(batch, panels, 1, 16)
    halves = torch.cat([bits & 0xFFFF, bits >> 16], dim=2).reshape(batch, 32 * panels)
    return (halves[:, :columns].float() + 0.5) * 2.0**-16


def _stochastic(values: Tensor, chances: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the codes and, with ``dim`` kept, the scales of values on a grid of 8 bits."""
    scale = _finite_or_nan(values.abs().amax(dim=dim, keepdim=True)) / _LARGEST
    reciprocal = torch.where(scale < SMALLEST_SCALE, 0.0, 1.0 / scale)
    scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
    return (values * reciprocal + chances).floor().clamp(-128.0, 127.0), scale
