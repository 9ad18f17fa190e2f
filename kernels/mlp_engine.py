"""What computes the layers of a stack, natively or in plain torch."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.mlp_int8_reference import int8_backward_reference, int8_forward_reference
from dqrm.kernels.mlp_reference import (
    LayerSpec,
    Precision,
    mlp_backward_reference,
    mlp_forward_reference,
)

Saved = TypeVar("Saved")

Gradients = Sequence[tuple[Tensor, Tensor]]
"""Gradients of each layer's (weight, bias)."""


class Engine(Protocol):
    """Computes consecutive layers."""

    def forward(self, x: Tensor, out: Tensor, training: bool) -> None:
        """Write the output of ``x``; ``training`` keeps what backward needs."""

    def backward(self, grad_y: Tensor, grad_x: Tensor | None, key: int) -> None:
        """Write the gradients of ``x``, where wanted, and of the layers."""


class NativeEngine:
    """A native stack and its workspace.

    Args:
        layers: whose tensors the stack reads.
        make: makes the native stack of those tensors, as they lie in memory now.
        random: whether its backward takes a key.
    """

    def __init__(
        self, layers: Sequence[LayerSpec], make: Callable[[], Any], *, random: bool = False
    ) -> None:
        self._layers = layers
        self._make = make
        self._random = random
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._bind()

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for layer in self._layers for tensor in layer[:2]]

    def _bind(self) -> None:
        self._bound = self._addresses()
        self._native = self._make()

    def forward(self, x: Tensor, out: Tensor, training: bool) -> None:
        """Write the output of ``x``."""
        # Assigning to a parameter's data gives it other memory.
        if self._addresses() != self._bound:
            self._bind()
        needed = self._native.workspace_bytes(x.shape[0], training)
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        self._native.forward(
            capsule(x), capsule(out), capsule(self._workspace), training, torch.get_num_threads()
        )

    def backward(self, grad_y: Tensor, grad_x: Tensor | None, key: int) -> None:
        """Write the gradients."""
        self._native.backward(
            capsule(grad_y),
            None if grad_x is None else capsule(grad_x),
            capsule(self._workspace),
            *([key] if self._random else []),
            torch.get_num_threads(),
        )


class TorchEngine(Generic[Saved]):
    """A definition in plain torch.

    Args:
        gradients: written by backward.
        forward: maps x to y and what backward needs.
        backward: maps the gradient of y, that and the key to the gradients of x and the layers.
    """

    def __init__(
        self,
        gradients: Gradients,
        forward: Callable[[Tensor], tuple[Tensor, Saved]],
        backward: Callable[[Tensor, Saved, int], tuple[Tensor, Gradients]],
    ) -> None:
        self._gradients = gradients
        self._forward = forward
        self._backward = backward
        self._saved: Saved | None = None

    def forward(self, x: Tensor, out: Tensor, training: bool) -> None:
        """Write the output of ``x``."""
        y, saved = self._forward(x)
        out.copy_(y)
        self._saved = saved if training else None

    def backward(self, grad_y: Tensor, grad_x: Tensor | None, key: int) -> None:
        """Write the gradients."""
        assert self._saved is not None
        got, gradients = self._backward(grad_y, self._saved, key)
        if grad_x is not None:
            grad_x.copy_(got)
        for mine, theirs in zip(self._gradients, gradients, strict=True):
            mine[0].copy_(theirs[0])
            mine[1].copy_(theirs[1])


def plain_engine(layers: Sequence[LayerSpec], gradients: Gradients, precision: Precision) -> Engine:
    """Return the fastest engine of layers that multiply floats, or integers of "bf16" and FP32."""
    module = native()
    bf16 = precision == "bf16"
    if module is None or (bf16 and module.has_amx()):
        if module is None:
            announce_fallback()
        return TorchEngine(
            gradients,
            lambda x: mlp_forward_reference(x, layers, precision, torch.mm),
            lambda grad_y, saved, _: mlp_backward_reference(grad_y, layers, saved, torch.mm),
        )
    fast = module.has_fast_avx512_bf16() and isa_level() == "avx512"

    def make() -> Any:
        return module.MlpStack(
            *_capsules(layers, gradients),
            [layer.bits for layer in layers],
            [layer.activation_bits for layer in layers],
            [layer.relu for layer in layers],
            bf16 and fast,
            level,
        )

    level = isa_level()
    return NativeEngine(layers, make)


def int8_joins_others() -> bool:
    """Return whether :func:`int8_engine` also computes layers beside those that are INT8."""
    module = native()
    return module is not None and _has_int8(module) and not module.has_amx()


def int8_engine(
    layers: Sequence[LayerSpec],
    gradients: Gradients,
    first: int,
    *,
    before: int = 0,
    behind: int = 0,
) -> Engine:
    """Return the fastest engine of INT8 layers.

    Args:
        layers: in the order of the computation.
        gradients: written by backward.
        first: the number of layers[0] in its stack.
        before: how many layers at the beginning are not INT8; see :func:`int8_joins_others`.
        behind: how many at the end.
    """
    module = native()
    if module is None or not _has_int8(module):
        return TorchEngine(
            gradients,
            lambda x: int8_forward_reference(x, layers),
            lambda grad_y, saved, key: int8_backward_reference(grad_y, layers, saved, key, first),
        )

    def make() -> Any:
        return module.Int8TrainingStack(
            *_capsules(layers, gradients),
            [layer.bits for layer in layers],
            [layer.relu for layer in layers],
            first,
            before,
            behind,
        )

    return NativeEngine(layers, make, random=True)


def _has_int8(module: ModuleType) -> bool:
    return bool(module.has_avx512_vnni()) and isa_level() == "avx512"


def _capsules(layers: Sequence[LayerSpec], gradients: Gradients) -> tuple[list[object], ...]:
    return (
        [capsule(layer.weight) for layer in layers],
        [capsule(layer.bias) for layer in layers],
        [capsule(weight) for weight, _ in gradients],
        [capsule(bias) for _, bias in gradients],
    )
