"""Layers on integer codes, for inference: they take the places of a model's own."""

import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from dqrm.compress.lower.engines import Engine, fastest_engine
from dqrm.kernels.int8 import CodeLayer
from dqrm.serving.prepared import PreparedModule


class Int8Linear(PreparedModule[Engine]):
    """A linear layer on integer codes whose input is quantized token by token.

    The output is that of dqrm.kernels.int8_reference, bit for bit. No gradient passes.

    Args:
        codes: int8 [N, K].
        scale: float32 [N].
        bias: float32 [N], or None.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.shared: SharedInput | None = None

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.codes.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.codes.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Return float32 [..., N] of a float tensor [..., K]."""
        if self.shared is not None:
            return self.shared.output(self, input)
        return run_engine(self.prepared(), input, self.out_features)

    def layer(self) -> CodeLayer:
        """The layer as an engine takes it."""
        bias = torch.zeros(self.out_features) if self.bias is None else self.bias
        return CodeLayer(self.codes, self.scale, bias)

    def _prepare(self) -> Engine:
        return fastest_engine(self.layer())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(_keeping_dtype(fn), recurse)

    def __getstate__(self) -> dict[str, Any]:
        # What is shared belongs to the layers it was made of, not to their copies.
        return super().__getstate__() | {"shared": None}

    def extra_repr(self) -> str:
        """Return what repr() adds to the class name."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves tensors, but leaves those it would convert: rounded scales fit no codes."""
    return lambda tensor: tensor if fn(tensor[:0]).dtype != tensor.dtype else fn(tensor)


def run_engine(engine: Engine, input: Tensor, outputs: int) -> Tensor:
    """Return float32 [..., outputs] of a float tensor [..., K]."""
    rows = input.detach().reshape(-1, input.shape[-1]).float()
    return engine.forward(rows).view(*input.shape[:-1], outputs)


class SharedInput:
    """Layers that are given one tensor after the other: one product gives the outputs of all.

    The first of them computes it, the others take their part. Where they turn out to be given
    different tensors, each goes its own way from then on.
    """

    def __init__(self, layers: list[Int8Linear]) -> None:
        self._layers = layers
        parts = [layer.layer() for layer in layers]
        self._engine = fastest_engine(
            CodeLayer(
                torch.cat([part.codes for part in parts]),
                torch.cat([part.scale for part in parts]),
                torch.cat([part.bias for part in parts]),
            )
        )
        self._ends = torch.tensor([len(part.scale) for part in parts]).cumsum(0).tolist()
        # Each thread that runs the model has its own product.
        self._local = threading.local()

    def output(self, layer: Int8Linear, input: Tensor) -> Tensor:
        """Return the output of one of the layers, float32 [..., N], rows further apart than N."""
        position = self._layers.index(layer)
        if position == 0:
            self._local.input, self._local.version = input, _version(input)
            self._local.result = run_engine(self._engine, input, self._ends[-1])
        elif (
            getattr(self._local, "input", None) is not input
            or _version(input) != self._local.version
        ):
            for other in self._layers:
                other.shared = None
            return layer.forward(input)
        begin = self._ends[position - 1] if position else 0
        part: Tensor = self._local.result[..., begin : self._ends[position]]
        if position == len(self._layers) - 1:
            del self._local.input, self._local.result
        return part


def _version(tensor: Tensor) -> int:
    """Changes when the tensor is written to; tensors of inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def _of_rows(values: Tensor, rows: Tensor) -> Tensor:
    """What [R, 1] says of each row, or the one value of [1, 1]."""
    return values[0] if len(values) == 1 else values[rows]


class CodeEmbedding(nn.Module):
    """A table of integer codes with a scale a row.

    Args:
        codes: int8 [R, D].
        scale: float32 [R, 1], or [1, 1] for one scale in all.
        zero: the code of 0, float32 as scale; None for 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of ``input`` (int64 [...]), float32 [..., D]."""
        codes = self.codes[input]
        if self.zero is not None:
            codes = codes - _of_rows(self.zero, input)
        return _of_rows(self.scale, input) * codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(_keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Return what repr() adds to the class name."""
        return f"{len(self.codes)}, {self.codes.shape[1]}"
