"""A linear layer trained on a low-bit weight grid, and on 8-bit inputs if asked for."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.nn import functional

from dqrm.compress import grids
from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import fit
from dqrm.compress.grids.straight_through import straight_through
from dqrm.kernels.int8_reference import int8_linear_reference, quantize_rows

_A_ROW = Granularity("row")


class QuantLinear(nn.Linear):
    """``nn.Linear`` whose weight is fake-quantized with one exact scale per output channel.

    The bias stays in FP32: on the weight's grid it could not exceed 8/7 of the channel's
    largest weight, a constraint nobody asked for, to save a few bytes.

    With 8 activation bits every row of the input is fake-quantized as well, with its own exact
    scale; the output is then that of INT8 serving, bit for bit (dqrm.kernels.int8_reference).
    Gradients pass straight through both quantizations.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bits: 4 or 8.
        activation_bits: 8, or 32 to leave the input as it is.
    """

    def __init__(
        self, in_features: int, out_features: int, bits: int, activation_bits: int = 32
    ) -> None:
        super().__init__(in_features, out_features)
        self.bits = bits
        self.largest = grids.largest_code(bits)
        self.activation_bits = activation_bits

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, Tensor]:
        """Return codes of the weight [out_features, in_features] and scales [out_features, 1]."""
        return fit(self.weight, "symmetric", self.bits, _A_ROW)

    def scale(self) -> Tensor:
        """Return the scale of each output channel, float32 [out_features, 1]."""
        return self.quantized()[1]

    def codes(self) -> Tensor:
        """Return the codes of the weight, float32 [out_features, in_features]."""
        return self.quantized()[0]

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ w_hat.T + bias``, [..., out_features]."""
        codes, scale = self.quantized()
        if self.activation_bits == 32:
            weight = straight_through(self.weight, grids.dequantize(codes, scale))
            return functional.linear(input, weight, self.bias)
        rows: Tensor = _Int8Linear.apply(  # type: ignore[no-untyped-call]
            input.reshape(-1, self.in_features),
            self.weight,
            self.bias,
            scale,
            codes,
            self.largest,
        )
        return rows.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what repr() adds to the class name."""
        return f"{super().extra_repr()}, bits={self.bits}, activation_bits={self.activation_bits}"


class _Int8Linear(torch.autograd.Function):
    """Straight-through: gradients are those of the product of the quantized values."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        codes: Tensor,
        largest: int,
    ) -> Tensor:
        codes_x, scale_x = quantize_rows(x)
        ctx.save_for_backward(codes_x, scale_x, codes, scale)
        return int8_linear_reference(codes_x, scale_x, codes, scale[:, 0], bias, largest)

    @staticmethod
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        codes_x, scale_x, codes, scale = ctx.saved_tensors
        grad_x = grad @ grids.dequantize(codes, scale) if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ grids.dequantize(codes_x, scale_x)
        return grad_x, grad_weight, grad.sum(dim=0), None, None, None
