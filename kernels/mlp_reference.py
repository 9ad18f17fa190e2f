"""A stack of linear layers in plain PyTorch: the definition that the native loops are held to.

Layer l maps x_l [B, K] to x_{l+1} [B, N]:

    z = scale * (x_l @ codes.T) + bias      scale [N] and codes [N, K]: the weight on its grid,
    x_{l+1} = max(z, 0) or z                or scale 1 and the weight itself

    g = dx_{l+1}, zero where a ReLU gave 0
    dx_l = (g * scale) @ codes              the straight-through gradient: the weight's is that
    dw = g.T @ x_l,  db = sum of g's rows   of its value on the grid

With 8 activation bits x_l is scale_x * q_x, quantized row by row as dqrm.kernels.int8_reference
says, and the products meet integers:

    z = (scale_x * scale) * (q_x @ codes.T) + bias,  dw = (g * scale_x).T @ q_x

In "bf16" the operands of the products are rounded to bfloat16: x_l, g, g * scale and unquantized
weights. Codes are exact in bfloat16, sums are FP32, and so are bias, scale, output and gradients.
Sums of integers are exact as far as FP32 is (see dqrm.kernels.int8_reference), so that z of an
integer layer has the bits of INT8 serving in either precision.
"""

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from dqrm.kernels.int8_reference import quantize_rows

Precision = Literal["fp32", "bf16"]

SMALLEST_MAX_ABS: Final = 1e-8
"""Stands in for the range of an all-zero row, as in dqrm.compress.grids."""


class LayerSpec(NamedTuple):
    """One linear layer."""

    weight: Tensor
    """float32 [N, K], contiguous."""
    bias: Tensor
    """float32 [N]."""
    bits: int = 32
    """4 or 8 quantizes the weight with one exact scale a row; 32 does not."""
    relu: bool = False
    """Whether a ReLU follows."""
    activation_bits: int = 32
    """8 quantizes the input of a layer with a quantized weight, row by row; 32 does not."""
    dropout: float = 0.0
    """Probability of zeroing an output (dqrm.kernels.dropout); the functions here drop nothing."""


class SavedForward(NamedTuple):
    """What backward needs of a forward."""

    activations: list[Tensor]
    """x_0 to x_{L-1}, [B, K_l], as the products saw them."""
    input_scales: list[Tensor | None]
    """float32 [B, 1] of each layer with an integer input."""
    zeros: list[Tensor | None]
    """bool [B, N] after each layer with a ReLU: where that gave 0."""
    scales: list[Tensor]
    """float32 [N] of each layer, with which backward multiplies the gradient."""
    codes: list[Tensor]
    """[N, K] of each layer, with which backward multiplies after that."""


Product = Callable[[Tensor, Tensor], Tensor]


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Products of two bfloat16 are exact in float32.
    return left.float() @ right.float()


def codes_and_scale(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes [N, K] of a weight and the scales [N] of its rows, float32.

    The arithmetic is that of dqrm.compress.grids: bit for bit ``QuantLinear.codes``.
    """
    largest = (1 << (bits - 1)) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_MAX_ABS) / largest
    codes = (weight / scale).round_().clamp_(-largest - 1, largest).add_(0.0)
    return codes, scale[:, 0]


@torch.no_grad()
def mlp_forward_reference(
    x: Tensor,
    layers: Sequence[LayerSpec],
    precision: Precision = "fp32",
    product: Product = _product,
) -> tuple[Tensor, SavedForward]:
    """Return the output float32 [B, N_last] and what :func:`mlp_backward_reference` needs.

    Args:
        x: float32 [B, K_0].
        layers: in the order of the computation.
        precision: of the operands.
        product: multiplies two operands that are not integers; the result may be of any float
            type.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    saved = SavedForward([], [], [], [], [])
    value = x
    for weight, bias, bits, relu, activation_bits, _ in layers:
        scale = torch.ones_like(bias)
        forward = backward = weight
        if bits != 32:
            codes, found = codes_and_scale(weight, bits)
            on_grid = found[:, None] * codes
            if precision == "bf16":
                forward, backward, scale = codes, codes, found
            elif activation_bits != 32:
                forward, backward = codes, on_grid
            else:
                forward = backward = on_grid
        factor, scale_x = scale, None
        if activation_bits != 32:
            value, scale_x = quantize_rows(value)
            factor = scale_x * found
        saved.activations.append(value.to(dtype))
        saved.input_scales.append(scale_x)
        saved.codes.append(backward.to(dtype))
        saved.scales.append(scale)
        multiply = product if scale_x is None else _product
        value = multiply(saved.activations[-1], forward.to(dtype).T).float() * factor + bias
        if relu:
            value = value.relu()
        saved.zeros.append(value <= 0 if relu else None)
    return value, saved


@torch.no_grad()
def mlp_backward_reference(
    grad_y: Tensor,
    layers: Sequence[LayerSpec],
    saved: SavedForward,
    product: Product = _product,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x, float32 [B, K_0], and of each layer's (weight, bias).

    Args:
        grad_y: float32 [B, N_last].
        layers: as given to :func:`mlp_forward_reference`.
        saved: what that returned.
        product: as there.
    """
    gradients: list[tuple[Tensor, Tensor]] = []
    grad = grad_y
    for number in range(len(layers) - 1, -1, -1):
        x, scale_x, zeros = (
            saved.activations[number],
            saved.input_scales[number],
            saved.zeros[number],
        )
        if zeros is not None:
            grad = grad.masked_fill(zeros, 0.0)
        above = grad if scale_x is None else grad * scale_x
        gradients.append((product(above.to(x.dtype).T, x).float(), grad.sum(dim=0)))
        scaled = (grad * saved.scales[number]).to(x.dtype)
        grad = product(scaled, saved.codes[number]).float()
    return grad, gradients[::-1]
