"""MLP layers as integer codes, with the arithmetic of training on quantized inputs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dqrm.kernels.int8 import CodeLayer, CodeStack
from dqrm.kernels.int8_reference import int8_linear_reference, quantize_rows
from dqrm.serving.prepared import PreparedModule


class PackedLinear(nn.Module):
    """A linear layer whose weight is codes and whose input is quantized row by row.

    Args:
        codes: int8 [out_features, in_features].
        scale: float32 [out_features].
        bias: float32 [out_features].
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, out_features] of float32 [B, in_features], by torch operators."""
        codes_x, scale_x = quantize_rows(input)
        return int8_linear_reference(codes_x, scale_x, self.codes.float(), self.scale, self.bias)


class PackedMlp(PreparedModule[list[Callable[[Tensor], Tensor]]], nn.Sequential):
    """Layers in a row, of which neighbouring PackedLinear and ReLU run as one integer stack."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the last layer, with the same bits as one layer at a time."""
        if torch.compiler.is_compiling():
            value: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return value
        for run in self.prepared():
            input = run(input)
        return input

    def _prepare(self) -> list[Callable[[Tensor], Tensor]]:
        runs: list[Callable[[Tensor], Tensor]] = []
        layers: list[CodeLayer] = []
        for module in [*self, None]:
            if isinstance(module, PackedLinear):
                layers.append(CodeLayer(module.codes, module.scale, module.bias))
            elif isinstance(module, nn.ReLU) and layers:
                layers[-1] = layers[-1]._replace(relu=True)
            else:
                if layers:
                    runs.append(CodeStack(layers).forward)
                    layers = []
                if module is not None:
                    runs.append(module)
        return runs
