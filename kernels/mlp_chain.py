"""Runs of layers one after another, each by an engine of its own, with dropout between them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dqrm.kernels.dropout import dropout_
from dqrm.kernels.mlp_engine import Engine

# Streams of random bits below are those of stochastic rounding, under the same key.
_DROPOUT_STREAM = 1 << 30


class Run(NamedTuple):
    """Consecutive layers of a stack that are computed alike, without dropout between them."""

    engine: Engine
    first: int
    """Number of the first layer."""
    inputs: int
    """Width of the first layer's input."""
    dropout: float
    """Probability of dropping an input."""


class Chain:
    """The runs of one stack.

    Args:
        runs: in the order of the computation; the first drops nothing.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor] = []
        # Key and first row of the last forward: what it dropped, backward drops.
        self._bits = 0, 0

    def forward(self, x: Tensor, out: Tensor, training: bool, key: int, first_row: int) -> None:
        """Write the output of ``x``; units are dropped in training only."""
        if not self._inputs or self._inputs[0].shape[0] != x.shape[0]:
            self._inputs, self._gradients = (
                [torch.empty(x.shape[0], run.inputs) for run in self._runs[1:]] for _ in range(2)
            )
        self._bits = key, first_row
        outputs = [*self._inputs, out]
        for run, to in zip(self._runs, outputs, strict=True):
            if training:
                self._drop(run, x)
            run.engine.forward(x, to, training)
            x = to

    def backward(self, grad_y: Tensor, grad_x: Tensor | None, key: int) -> None:
        """Write the gradients; what the last forward dropped passes nothing on."""
        for run, grad in zip(
            reversed(self._runs), [*reversed(self._gradients), grad_x], strict=True
        ):
            run.engine.backward(grad_y, grad, key)
            if grad is not None:
                self._drop(run, grad)
                grad_y = grad

    def _drop(self, run: Run, values: Tensor) -> None:
        if run.dropout:
            key, first_row = self._bits
            stream = _DROPOUT_STREAM + run.first
            dropout_(values, run.dropout, key, stream, first_row=first_row)
