"""Forward and backward of a whole stack of linear layers, one native call each."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.mlp_int8 import Gradients, Int8Engine
from dqrm.kernels.mlp_reference import (
    LayerSpec,
    Precision,
    SavedForward,
    mlp_backward_reference,
    mlp_forward_reference,
)

__all__ = [
    "DenseStack",
    "LayerSpec",
    "Precision",
    "StackPrecision",
    "mlp_backward_reference",
    "mlp_forward_reference",
]

StackPrecision = Literal["fp32", "bf16", "int8"]


class DenseStack:
    """Linear layers with bias and ReLU, weights quantized in passing, without autograd.

    Arithmetic and rounding are those of dqrm.kernels.mlp_reference, except for the order of
    sums; layers with integer inputs have the bits of that definition, as long as their sums are
    below 2^24 (always up to 1,040 inputs). "bf16" runs natively on processors with AVX512-BF16.
    One with AMX multiplies faster through oneDNN: there torch's bfloat16 products are used, which
    round their results once more. Where there is no fast bfloat16 at all, "bf16" computes in FP32.

    "int8" multiplies INT8 by INT8 forward and backward, with gradients rounded stochastically, as
    dqrm.kernels.mlp_int8_reference defines it: natively on processors with AVX512-VNNI, in the
    same integers by torch elsewhere. Layers without quantized weights, with fewer than 32 inputs
    or with one output are those of "bf16".

    Results do not depend on the number of threads. NaN and infinity propagate, in "int8" both as
    NaN; the native bfloat16 products take denormals for zero.

    Args:
        layers: in the order of the computation, at least one. The tensors are read at every
            forward, so that updates in place are seen.
        precision: of the operands of products; all tensors outside are float32.

    Raises:
        ValueError: a tensor of another type, shape or layout than LayerSpec says.
    """

    def __init__(self, layers: Sequence[LayerSpec], precision: StackPrecision = "fp32") -> None:
        if precision not in get_args(StackPrecision):
            raise ValueError(f"precision={precision!r}: must be 'fp32', 'bf16' or 'int8'")
        self.layers = [LayerSpec(*layer) for layer in layers]
        _check_layers(self.layers)
        if precision == "int8" and any(layer.activation_bits != 32 for layer in self.layers):
            raise ValueError("precision='int8' rounds inputs its own way: set activation_bits=32")
        self.precision = precision
        self.gradients = [
            (torch.empty_like(layer.weight), torch.empty_like(layer.bias)) for layer in self.layers
        ]
        """Gradients of each layer's (weight, bias), overwritten by every backward."""
        self.in_features = self.layers[0].weight.shape[1]
        self.out_features = self.layers[-1].weight.shape[0]
        self._engine: Int8Engine | _NativeEngine | _TorchEngine
        if precision == "int8":
            self._engine = Int8Engine(
                self.layers, self.gradients, lambda some, theirs: _engine(some, theirs, "bf16")
            )
        else:
            self._engine = _engine(self.layers, self.gradients, precision)
        self._batch: int | None = None

    def forward(self, x: Tensor, *, out: Tensor | None = None, training: bool = True) -> Tensor:
        """Return the output, float32 [B, out_features].

        Args:
            x: float32 [B, in_features]; rows may lie any distance apart.
            out: written and returned if given, likewise; must not overlap x.
            training: keep what backward needs.
        """
        _check_rows("x", x, x.shape[0] if x.dim() else 0, self.in_features)
        if out is None:
            out = torch.empty(x.shape[0], self.out_features)
        else:
            _check_rows("out", out, x.shape[0], self.out_features)
        self._engine.forward(x, out, training)
        self._batch = x.shape[0] if training else None
        return out

    def backward(
        self,
        grad_y: Tensor,
        need_grad_input: bool = True,
        *,
        out: Tensor | None = None,
        key: int | None = None,
    ) -> Tensor | None:
        """Write :attr:`gradients` and return the gradient of x, float32 [B, in_features].

        Belongs to the last forward, and may be called once more with another gradient.

        Args:
            grad_y: float32 [B, out_features]; rows may lie any distance apart.
            need_grad_input: whether to compute the gradient of x; None is returned if not.
            out: written and returned if given; must not overlap grad_y.
            key: decides the random bits of "int8", which needs it; equal keys give equal bits.
                From :func:`dqrm.kernels.rounding.step_key`.
        """
        if self._batch is None:
            raise RuntimeError("backward needs a forward(training=True) before it")
        _check_rows("grad_y", grad_y, self._batch, self.out_features)
        if not need_grad_input:
            out = None
        elif out is None:
            out = torch.empty(self._batch, self.in_features)
        else:
            _check_rows("out", out, self._batch, self.in_features)
        if not isinstance(self._engine, Int8Engine):
            self._engine.backward(grad_y, out)
        elif key is None:
            raise ValueError("precision='int8' rounds stochastically: backward needs a key")
        else:
            self._engine.backward(grad_y, out, key)
        return out


class _NativeEngine:
    def __init__(
        self,
        layers: Sequence[LayerSpec],
        gradients: Gradients,
        module: ModuleType,
        bf16: bool,
    ) -> None:
        self._layers = layers
        self._gradients = gradients
        self._module = module
        self._bf16 = bf16
        self._level = isa_level()
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._bind()

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for layer in self._layers for tensor in layer[:2]]

    def _bind(self) -> None:
        self._bound = self._addresses()
        self._native: Any = self._module.MlpStack(
            [capsule(layer.weight) for layer in self._layers],
            [capsule(layer.bias) for layer in self._layers],
            [capsule(weight) for weight, _ in self._gradients],
            [capsule(bias) for _, bias in self._gradients],
            [layer.bits for layer in self._layers],
            [layer.activation_bits for layer in self._layers],
            [layer.relu for layer in self._layers],
            self._bf16,
            self._level,
        )

    def forward(self, x: Tensor, out: Tensor, training: bool) -> None:
        # Assigning to a parameter's data gives it other memory.
        if self._addresses() != self._bound:
            self._bind()
        needed = self._native.workspace_bytes(x.shape[0], training)
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        self._native.forward(
            capsule(x), capsule(out), capsule(self._workspace), training, torch.get_num_threads()
        )

    def backward(self, grad_y: Tensor, grad_x: Tensor | None) -> None:
        self._native.backward(
            capsule(grad_y),
            None if grad_x is None else capsule(grad_x),
            capsule(self._workspace),
            torch.get_num_threads(),
        )


class _TorchEngine:
    def __init__(
        self, layers: Sequence[LayerSpec], gradients: Gradients, precision: Precision
    ) -> None:
        self._layers = layers
        self._gradients = gradients
        self._precision: Precision = precision
        self._saved: SavedForward | None = None

    def forward(self, x: Tensor, out: Tensor, training: bool) -> None:
        y, saved = mlp_forward_reference(x, self._layers, self._precision, torch.mm)
        out.copy_(y)
        self._saved = saved if training else None

    def backward(self, grad_y: Tensor, grad_x: Tensor | None) -> None:
        assert self._saved is not None
        got, gradients = mlp_backward_reference(grad_y, self._layers, self._saved, torch.mm)
        if grad_x is not None:
            grad_x.copy_(got)
        for mine, theirs in zip(self._gradients, gradients, strict=True):
            mine[0].copy_(theirs[0])
            mine[1].copy_(theirs[1])


def _engine(
    layers: Sequence[LayerSpec], gradients: Gradients, precision: Precision
) -> _NativeEngine | _TorchEngine:
    module = native()
    if module is None:
        announce_fallback()
        return _TorchEngine(layers, gradients, precision)
    bf16 = precision == "bf16"
    if bf16 and module.has_amx():
        return _TorchEngine(layers, gradients, precision)
    fast = module.has_avx512_bf16() and isa_level() == "avx512"
    return _NativeEngine(layers, gradients, module, bf16 and fast)


def _check_layers(layers: Sequence[LayerSpec]) -> None:
    if not layers:
        raise ValueError("a stack needs at least one layer")
    width: int | None = None
    for number, (weight, bias, bits, _, activation_bits) in enumerate(layers):
        if bits not in (4, 8, 32):
            raise ValueError(f"layer {number}: bits={bits}: must be 4, 8 or 32")
        if activation_bits != 32 and (activation_bits != 8 or bits == 32):
            raise ValueError(
                f"layer {number}: activation_bits={activation_bits}: must be 32, or 8 with a "
                "quantized weight"
            )
        for name, tensor, dims in (("weight", weight, 2), ("bias", bias, 1)):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise ValueError(
                    f"layer {number}: {name} is {tensor.dtype} on {tensor.device}, "
                    "must be float32 on the CPU"
                )
            if tensor.dim() != dims or not tensor.is_contiguous() or not tensor.numel():
                raise ValueError(
                    f"layer {number}: {name} has shape {tuple(tensor.shape)}, must "
                    f"be contiguous with {dims} dimensions, none of them empty"
                )
        outputs, inputs = weight.shape
        if bias.shape[0] != outputs:
            raise ValueError(f"layer {number}: {bias.shape[0]} biases for {outputs} outputs")
        if width not in (None, inputs):
            raise ValueError(f"layer {number} takes {inputs} inputs, the one before gives {width}")
        width = outputs


def _check_rows(name: str, tensor: Tensor, rows: int, columns: int) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != (rows, columns):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, must be float32 "
            f"[{rows}, {columns}]"
        )
    if columns > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: the columns of a row must lie side by side")
