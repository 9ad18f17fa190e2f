"""Stacks of linear layers on integer codes, for inference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.int8_reference import int8_linear_reference, quantize_rows

__all__ = ["CodeLayer", "CodeStack", "code_stack_reference"]


class CodeLayer(NamedTuple):
    """One linear layer."""

    codes: Tensor
    """int8 [N, K], contiguous; K up to 131,072."""
    scale: Tensor
    """float32 [N], of the codes' rows."""
    bias: Tensor
    """float32 [N]."""
    relu: bool = False
    """Whether a ReLU follows."""


class CodeStack:
    """Linear layers on 8-bit inputs and integer weights, packed when this is made.

    The definition is dqrm.kernels.int8_reference, and results equal it bit for bit at every
    instruction set and number of threads: AVX512-VNNI multiplies 8-bit codes, other processors
    codes of 16 bits. A row of the input with NaN or infinity gives a row of NaN.

    Args:
        layers: in the order of the computation, at least one.

    Raises:
        ValueError: tensors of another type, shape or layout than CodeLayer says.
    """

    def __init__(self, layers: Sequence[CodeLayer]) -> None:
        self.layers = [CodeLayer(*layer) for layer in layers]
        _check(self.layers)
        self.in_features = self.layers[0].codes.shape[1]
        self.out_features = self.layers[-1].codes.shape[0]
        self._native: Any = None
        module = native()
        if module is None:
            announce_fallback()
            return
        self._native = module.Int8Stack(
            [capsule(layer.codes) for layer in self.layers],
            [capsule(layer.scale) for layer in self.layers],
            [capsule(layer.bias) for layer in self.layers],
            [layer.relu for layer in self.layers],
            isa_level(),
        )

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the output, float32 [B, out_features].

        Args:
            x: float32 [B, in_features]; rows may lie any distance apart.
            out: written and returned if given, likewise; must not overlap x.
        """
        if out is None:
            out = torch.empty(x.shape[0], self.out_features)
        for name, tensor, columns in (("x", x, self.in_features), ("out", out, self.out_features)):
            if tensor.dtype != torch.float32 or tensor.shape != (x.shape[0], columns):
                raise ValueError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, must be float32 "
                    f"[{x.shape[0]}, {columns}]"
                )
            if columns > 1 and tensor.stride(1) != 1:
                raise ValueError(f"{name}: the columns of a row must lie side by side")
        if self._native is None:
            return out.copy_(code_stack_reference(x, self.layers))
        self._native.forward(capsule(x), capsule(out), torch.get_num_threads())
        return out


@torch.no_grad()
def code_stack_reference(x: Tensor, layers: Sequence[CodeLayer]) -> Tensor:
    """Return what :meth:`CodeStack.forward` returns."""
    for codes, scale, bias, relu in layers:
        codes_x, scale_x = quantize_rows(x)
        x = int8_linear_reference(codes_x, scale_x, codes.float(), scale, bias)
        if relu:
            x = x.relu()
    return x


def _check(layers: Sequence[CodeLayer]) -> None:
    if not layers:
        raise ValueError("a stack needs at least one layer")
    width: int | None = None
    for number, (codes, scale, bias, _) in enumerate(layers):
        if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.is_contiguous():
            raise ValueError(f"layer {number}: codes must be contiguous int8 [N, K]")
        outputs, inputs = codes.shape
        if not outputs or not 0 < inputs <= 1 << 17:
            raise ValueError(f"layer {number}: codes of shape [{outputs}, {inputs}]")
        for name, tensor in (("scale", scale), ("bias", bias)):
            if tensor.dtype != torch.float32 or tensor.shape != (outputs,):
                raise ValueError(f"layer {number}: {name} must be float32 [{outputs}]")
            if not tensor.is_contiguous():
                raise ValueError(f"layer {number}: {name} must be contiguous")
        if width not in (None, inputs):
            raise ValueError(f"layer {number} takes {inputs} inputs, the one before gives {width}")
        width = outputs
