"""Forward and backward of a whole stack of linear layers, one native call each."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from dqrm.kernels.mlp_chain import Chain, Run
from dqrm.kernels.mlp_engine import Gradients, int8_engine, int8_joins_others, plain_engine
from dqrm.kernels.mlp_int8_reference import is_int8
from dqrm.kernels.mlp_reference import (
    LayerSpec,
    Precision,
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
    """Linear layers with bias, ReLU and dropout, weights quantized in passing, without autograd.

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
        parameters = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias)]
        self.gradient = torch.empty(sum(tensor.numel() for tensor in parameters))
        """float32, of all parameters one after the other, overwritten by every backward."""
        parts = torch.split(self.gradient, [tensor.numel() for tensor in parameters])
        views = [part.view(tensor.shape) for part, tensor in zip(parts, parameters, strict=True)]
        self.gradients = list(zip(views[::2], views[1::2], strict=True))
        """Of each layer's (weight, bias), views of it."""
        self.in_features = self.layers[0].weight.shape[1]
        self.out_features = self.layers[-1].weight.shape[0]
        self._chain = _chain(self.layers, self.gradients, precision)
        self._batch: int | None = None

    def forward(
        self,
        x: Tensor,
        *,
        out: Tensor | None = None,
        training: bool = True,
        key: int | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """Return the output, float32 [B, out_features].

        Args:
            x: float32 [B, in_features]; rows may lie any distance apart.
            out: written and returned if given, likewise; must not overlap x.
            training: drop units and keep what backward needs.
            key: decides the units that are dropped, where there is dropout; equal keys drop the
                same ones. From :func:`dqrm.kernels.rounding.step_key`.
            first_row: number of the first row, so that parts of a batch drop what it drops whole.
        """
        _check_rows("x", x, x.shape[0] if x.dim() else 0, self.in_features)
        if out is None:
            out = torch.empty(x.shape[0], self.out_features)
        else:
            _check_rows("out", out, x.shape[0], self.out_features)
        if key is None and training and any(layer.dropout for layer in self.layers):
            raise ValueError("layers with dropout draw random bits: forward needs a key")
        self._chain.forward(x, out, training, key or 0, first_row)
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
                It may be that of forward.
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
        if key is None and self.precision == "int8":
            raise ValueError("precision='int8' rounds stochastically: backward needs a key")
        self._chain.backward(grad_y, out, key or 0)
        return out


def _chain(layers: Sequence[LayerSpec], gradients: Gradients, precision: StackPrecision) -> Chain:
    """Split a stack where its layers' kind changes and where units are dropped."""
    int8 = [precision == "int8" and is_int8(layer) for layer in layers]
    starts = [
        number
        for number in range(len(layers))
        if not number or layers[number - 1].dropout or int8[number] != int8[number - 1]
    ]
    groups: list[list[range]] = []
    for first, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
        span, last = range(first, stop), groups[-1] if groups else []
        # Others join the INT8 layers beside them where one engine computes both.
        if (
            last
            and not layers[first - 1].dropout
            and int8_joins_others()
            and (len(last) == 1 if int8[first] else int8[last[-1].start])
        ):
            last.append(span)
        else:
            groups.append([span])
    return Chain([_run(group, int8, layers, gradients, precision) for group in groups])


def _run(
    group: list[range],
    int8: Sequence[bool],
    layers: Sequence[LayerSpec],
    gradients: Gradients,
    precision: StackPrecision,
) -> Run:
    first, stop = group[0].start, group[-1].stop
    part = layers[first:stop], gradients[first:stop]
    before, behind = (0 if int8[end.start] else len(end) for end in (group[0], group[-1]))
    return Run(
        int8_engine(*part, first, before=before, behind=behind)
        if any(int8[first:stop])
        else plain_engine(*part, "bf16" if precision == "int8" else precision),
        first,
        layers[first].weight.shape[1],
        layers[first - 1].dropout if first else 0.0,
    )


def _check_layers(layers: Sequence[LayerSpec]) -> None:
    if not layers:
        raise ValueError("a stack needs at least one layer")
    width: int | None = None
    for number, (weight, bias, bits, _, activation_bits, dropout) in enumerate(layers):
        if bits not in (4, 8, 32):
            raise ValueError(f"layer {number}: bits={bits}: must be 4, 8 or 32")
        if activation_bits != 32 and (activation_bits != 8 or bits == 32):
            raise ValueError(
                f"layer {number}: activation_bits={activation_bits}: must be 32, or 8 with a "
                "quantized weight"
            )
        if not 0.0 <= dropout < 1.0 or (dropout and number + 1 == len(layers)):
            raise ValueError(
                f"layer {number}: dropout={dropout}: must be at least 0 and below 1, and 0 in the "
                "last layer"
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
