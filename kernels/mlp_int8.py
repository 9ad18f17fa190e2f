"""The engine of stacks whose products are INT8; see dqrm.kernels.mlp_int8_reference."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from dqrm.kernels.cpu import isa_level, native
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.mlp_int8_reference import (
    SavedInt8,
    int8_backward_reference,
    int8_forward_reference,
    int8_runs,
)
from dqrm.kernels.mlp_reference import LayerSpec

Gradients = Sequence[tuple[Tensor, Tensor]]


class Engine(Protocol):
    """Computes consecutive layers without random bits."""

    def forward(self, x: Tensor, out: Tensor, training: bool) -> None:
        """Write the output of ``x``."""

    def backward(self, grad_y: Tensor, grad_x: Tensor | None) -> None:
        """Write the gradients."""


class Int8Engine:
    """Runs of INT8 layers by INT8 products, the layers between them by another engine.

    Args:
        layers: of the whole stack.
        gradients: written by backward.
        other: makes the engine of layers that are not INT8.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        gradients: Gradients,
        other: Callable[[Sequence[LayerSpec], Gradients], Engine],
    ) -> None:
        module = native()
        fast = module is not None and module.has_avx512_vnni() and isa_level() == "avx512"
        self._widths: list[int] = []
        self._engines: list[Engine | _NativeInt8 | _TorchInt8] = []
        for first, stop, int8 in int8_runs(layers):
            part = layers[first:stop], gradients[first:stop]
            if not int8:
                self._engines.append(other(*part))
            elif module is not None and fast:
                self._engines.append(_NativeInt8(*part, first, module))
            else:
                self._engines.append(_TorchInt8(*part, first))
            self._widths.append(layers[first].weight.shape[1])
        self._between: list[Tensor] = []
        self._between_gradients: list[Tensor] = []

    def forward(self, x: Tensor, out: Tensor, training: bool) -> None:
        """Write the output of ``x``."""
        if not self._between or self._between[0].shape[0] != x.shape[0]:
            self._between, self._between_gradients = (
                [torch.empty(x.shape[0], width) for width in self._widths[1:]] for _ in range(2)
            )
        for engine, to in zip(self._engines, [*self._between, out], strict=True):
            engine.forward(x, to, training)
            x = to

    def backward(self, grad_y: Tensor, grad_x: Tensor | None, key: int) -> None:
        """Write the gradients; ``key`` is that of the random bits."""
        to = [grad_x, *self._between_gradients]
        for engine, grad in zip(reversed(self._engines), reversed(to), strict=True):
            if isinstance(engine, _NativeInt8 | _TorchInt8):
                engine.backward(grad_y, grad, key)
            else:
                engine.backward(grad_y, grad)
            if grad is not None:
                grad_y = grad


class _NativeInt8:
    def __init__(
        self, layers: Sequence[LayerSpec], gradients: Gradients, first: int, module: ModuleType
    ) -> None:
        self._layers = layers
        self._gradients = gradients
        self._first = first
        self._module = module
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._bind()

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for layer in self._layers for tensor in layer[:2]]

    def _bind(self) -> None:
        self._bound = self._addresses()
        self._native: Any = self._module.Int8TrainingStack(
            [capsule(layer.weight) for layer in self._layers],
            [capsule(layer.bias) for layer in self._layers],
            [capsule(weight) for weight, _ in self._gradients],
            [capsule(bias) for _, bias in self._gradients],
            [layer.bits for layer in self._layers],
            [layer.relu for layer in self._layers],
            self._first,
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

    def backward(self, grad_y: Tensor, grad_x: Tensor | None, key: int) -> None:
        self._native.backward(
            capsule(grad_y),
            None if grad_x is None else capsule(grad_x),
            capsule(self._workspace),
            key,
            torch.get_num_threads(),
        )


class _TorchInt8:
    def __init__(self, layers: Sequence[LayerSpec], gradients: Gradients, first: int) -> None:
        self._layers = layers
        self._gradients = gradients
        self._first = first
        self._saved: SavedInt8 | None = None

    def forward(self, x: Tensor, out: Tensor, training: bool) -> None:
        y, saved = int8_forward_reference(x, self._layers)
        out.copy_(y)
        self._saved = saved if training else None

    def backward(self, grad_y: Tensor, grad_x: Tensor | None, key: int) -> None:
        assert self._saved is not None
        got, gradients = int8_backward_reference(
            grad_y, self._layers, self._saved, key, self._first
        )
        if grad_x is not None:
            grad_x.copy_(got)
        for mine, theirs in zip(self._gradients, gradients, strict=True):
            mine[0].copy_(theirs[0])
            mine[1].copy_(theirs[1])
