"""A linear layer trained on a low-bit weight grid."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqrm.compress import grids


class QuantLinear(nn.Linear):
    """``nn.Linear`` whose weight is fake-quantized with one exact scale per output channel.

    The bias stays in FP32: on the weight's grid it could not exceed 8/7 of the channel's
    largest weight, a constraint nobody asked for, to save a few bytes.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bits: 4 or 8.
    """

    def __init__(self, in_features: int, out_features: int, bits: int) -> None:
        super().__init__(in_features, out_features)
        self.bits = bits
        self.largest = grids.largest_code(bits)

    def scale(self) -> Tensor:
        """Return the scale of each output channel, float32 [out_features, 1]."""
        max_abs = self.weight.detach().abs().amax(dim=1, keepdim=True)
        return grids.scale_of(max_abs, self.largest)

    def codes(self) -> Tensor:
        """Return the codes of the weight, float32 [out_features, in_features]."""
        with torch.no_grad():
            return grids.quantize(self.weight.detach(), self.scale(), self.largest)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ w_hat.T + bias``, [..., out_features]."""
        weight = grids.fake_quantize(self.weight, self.scale(), self.bits)
        return functional.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """Return what repr() adds to the class name."""
        return f"{super().extra_repr()}, bits={self.bits}"
