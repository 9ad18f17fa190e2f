"""The parts without tables: interaction and MLPs, forward and backward."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dqrm.bench.speed.contestants import Call, Entry
from dqrm.bench.speed.torch_model import TorchInteraction, torch_mlp
from dqrm.bench.speed.traffic import Shape, Traffic
from dqrm.kernels.interaction import interaction_backward, interaction_forward, interaction_width
from dqrm.kernels.mlp import DenseStack, LayerSpec, StackPrecision
from dqrm.models import dlrm
from dqrm.models.config import ModelConfig

NUM_DENSE = 13
RING = 4
"""Batches of activations that are taken in turn: as in training, the last layer's lie in a cache
that is not the nearest."""

Precision = Literal["fp32", "autocast", "bf16"]


def mlp_widths(shape: Shape) -> tuple[list[int], list[int]]:
    """Return the widths of the bottom and the top MLP of the Criteo Kaggle recipe."""
    model = ModelConfig(embedding_dim=shape.dim)
    bottom = [NUM_DENSE, *model.bottom_mlp, shape.dim]
    return bottom, [dlrm.interaction_width(model, len(shape.rows)), *model.top_mlp, 1]


def mlp_flops(shape: Shape, batch: int) -> float:
    """Return the multiplications and additions of both MLPs, forward and backward.

    The bottom MLP's input needs no gradient.
    """
    bottom, top = mlp_widths(shape)
    layers = [*itertools.pairwise(bottom), *itertools.pairwise(top)]
    forward = 2.0 * batch * sum(fan_in * fan_out for fan_in, fan_out in layers)
    return 3.0 * forward - 2.0 * batch * bottom[0] * bottom[1]


class OurInteraction:
    """Our loops on buffers that are there, as our training step calls them."""

    def start(self, traffic: Traffic) -> Call:
        """Draw vectors and gradients."""
        vectors, grad_out = _vectors(traffic, torch.float32)
        out, grad_vectors = torch.empty_like(grad_out), torch.empty_like(vectors[0])

        def call(number: int) -> None:
            interaction_forward(vectors[number % RING], out)
            interaction_backward(vectors[number % RING], grad_out, grad_vectors)

        return call


class PeerInteraction:
    """The products in torch's operators and autograd.

    Args:
        shape: tables, whose number decides the size.
        dtype: of vectors and gradients.
        compiled: by torch.compile.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, compiled: bool) -> None:
        self.dtype = dtype
        self.compiled = compiled
        self.module = TorchInteraction(len(shape.rows) + 1)

    def start(self, traffic: Traffic) -> Call:
        """Draw vectors and gradients; compile anew, for one batch and one number of threads."""
        ring, gradient = _vectors(traffic, self.dtype)
        for vectors in ring:
            vectors.requires_grad_()
        interact: Any = self.module
        if self.compiled:
            interact = torch.compile(self.module, dynamic=False)

        def call(number: int) -> None:
            vectors = ring[number % RING]
            interact(vectors).backward(gradient)
            vectors.grad = None

        return call


def _vectors(traffic: Traffic, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return vectors [B, F, D] and the gradient of their interaction."""
    count, dim = len(traffic.shape.rows) + 1, traffic.shape.dim
    ring = [torch.randn(traffic.batch, count, dim, dtype=dtype) for _ in range(RING)]
    return ring, torch.randn(traffic.batch, interaction_width(count, dim), dtype=dtype)


class OurMlps:
    """Our MLPs, called as our training step calls them.

    Args:
        shape: tables, whose number and width decide the top MLP's input.
        bits: of the weights' grid; 32 for none.
        precision: of the products.
    """

    def __init__(
        self, shape: Shape, bits: Literal[4, 32], precision: StackPrecision = "bf16"
    ) -> None:
        bottom, top = mlp_widths(shape)
        self.bottom = _stack(torch_mlp(bottom, final_relu=True), bits, precision)
        self.top = _stack(torch_mlp(top), bits, precision)

    def start(self, traffic: Traffic) -> Call:
        """Draw inputs and gradients, and make what is written to."""
        ring, gradients = _activations(traffic, torch.float32)
        outputs = [torch.empty_like(gradient) for gradient in gradients]
        grad_input = torch.empty_like(ring[0][1])
        bottom, top = self.bottom, self.top

        def call(number: int) -> None:
            for_bottom, for_top = ring[number % RING]
            bottom.forward(for_bottom, out=outputs[0])
            bottom.backward(gradients[0], need_grad_input=False, key=number)
            top.forward(for_top, out=outputs[1])
            top.backward(gradients[1], out=grad_input, key=number)

        return call


def _stack(mlp: nn.Sequential, bits: int, precision: StackPrecision) -> DenseStack:
    """Return torch's layers as one of our stacks."""
    layers = list(mlp)
    return DenseStack(
        [
            LayerSpec(layer.weight.detach(), layer.bias.detach(), bits, place + 1 < len(layers))
            for place, layer in enumerate(layers)
            if isinstance(layer, nn.Linear)
        ],
        precision,
    )


class PeerMlps:
    """The MLPs in torch's layers and autograd.

    Args:
        shape: tables, whose number and width decide the top MLP's input.
        precision: "autocast" keeps FP32 weights, "bf16" has bfloat16 ones.
        compiled: by torch.compile.
    """

    def __init__(self, shape: Shape, precision: Precision, compiled: bool) -> None:
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.autocast = precision == "autocast"
        self.compiled = compiled
        bottom, top = mlp_widths(shape)
        self.mlps = (
            torch_mlp(bottom, final_relu=True).to(self.dtype),
            torch_mlp(top).to(self.dtype),
        )

    def start(self, traffic: Traffic) -> Call:
        """Draw inputs and gradients; compile anew, for one batch and one number of threads."""
        calls: Any = self.mlps
        if self.compiled:
            calls = [torch.compile(mlp, dynamic=False) for mlp in self.mlps]
        ring, gradients = _activations(traffic, self.dtype)
        for _, for_top in ring:
            for_top.requires_grad_()
        parameters = [parameter for mlp in self.mlps for parameter in mlp.parameters()]
        autocast = self.autocast

        def call(number: int) -> None:
            inputs = ring[number % RING]
            for mlp, given, gradient in zip(calls, inputs, gradients, strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = mlp(given)
                torch.autograd.backward(output, gradient.to(output.dtype))
            inputs[1].grad = None
            for parameter in parameters:
                parameter.grad = None

        return call


def _activations(
    traffic: Traffic, dtype: torch.dtype
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Return inputs of the bottom and the top MLP, and the gradients of their outputs.

    Only the top's input gets a gradient.
    """
    bottom, top = mlp_widths(traffic.shape)
    ring = [
        (
            torch.randn(traffic.batch, bottom[0], dtype=dtype),
            torch.randn(traffic.batch, top[0], dtype=dtype),
        )
        for _ in range(RING)
    ]
    return ring, (torch.randn(traffic.batch, bottom[-1]), torch.randn(traffic.batch, 1))


class SquareProducts:
    """As many multiplications as the MLPs', in products of the size libraries multiply fastest.

    Args:
        shape: tables, whose number and width decide the top MLP's input.
        dtype: torch.bfloat16, or torch.int8 with sums in int32.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    def start(self, traffic: Traffic) -> Call:
        """Draw two factors of ``_SIDE`` inner and outer columns."""
        rows = round(mlp_flops(self.shape, traffic.batch) / (2 * _SIDE * _SIDE))
        left, right = (torch.randint(-9, 9, (n, _SIDE)).to(self.dtype) for n in (rows, _SIDE))
        multiply: Any = torch.mm if self.dtype == torch.bfloat16 else torch._int_mm

        def call(number: int) -> None:
            multiply(left, right)

        return call


_SIDE = 1024


def interaction_entries(shape: Shape) -> list[Entry]:
    """Return everybody who forms the pairwise products."""

    def peer(dtype: torch.dtype, compiled: bool) -> Callable[[], PeerInteraction]:
        return lambda: PeerInteraction(shape, dtype, compiled)

    return [
        Entry("dqrm", "ours", OurInteraction),
        Entry("torch.compile FP32", "peer", peer(torch.float32, True)),
        Entry("torch.compile BF16", "peer", peer(torch.bfloat16, True)),
        Entry("torch eager FP32", "peer", peer(torch.float32, False)),
        Entry("torch eager BF16", "peer", peer(torch.bfloat16, False)),
    ]


def mlp_entries(shape: Shape) -> list[Entry]:
    """Return everybody who runs the MLPs."""

    def peer(precision: Precision, compiled: bool) -> Callable[[], PeerMlps]:
        return lambda: PeerMlps(shape, precision, compiled)

    return [
        Entry("dqrm INT4", "ours", lambda: OurMlps(shape, 4)),
        Entry("dqrm int8", "ours", lambda: OurMlps(shape, 4, "int8")),
        Entry("dqrm BF16", "ours", lambda: OurMlps(shape, 32)),
        Entry("torch autocast", "peer", peer("autocast", False)),
        Entry("torch BF16", "peer", peer("bf16", False)),
        Entry("torch.compile autocast", "peer", peer("autocast", True)),
        Entry("torch.compile BF16", "peer", peer("bf16", True)),
        Entry("torch FP32", "peer", peer("fp32", False)),
        Entry("one BF16 product", "limit", lambda: SquareProducts(shape, torch.bfloat16)),
        Entry("one INT8 product", "limit", lambda: SquareProducts(shape, torch.int8)),
    ]
