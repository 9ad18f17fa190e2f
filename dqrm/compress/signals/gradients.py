"""Gradients over batches, and the empirical Fisher information they give.

The diagonal of the Fisher information is taken with the gradients of mini-batches, as
arXiv 2204.09656 does: the size of a batch is a part of its definition. Batches of one row give the
per-sample one.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def batch_gradients(variables: Mapping[str, Tensor], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the gradient of every loss, by variable, float32 [losses, *variable.shape].

    Args:
        variables: leaves that require gradients.
        losses: scalars that depend on them; taken one after another, so that a generator holds
            the graph of one batch only.

    Raises:
        ValueError: there is no loss.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in variables}
    for loss in losses:
        for name, gradient in zip(variables, _gradients(loss, variables), strict=True):
            rows[name].append(gradient.float())
    if not all(rows.values()):
        raise ValueError("no batch to take gradients of")
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def fisher_diagonal(variables: Mapping[str, Tensor], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the mean squared gradient over the losses, by variable, float32, shaped as it is.

    Args:
        variables: leaves that require gradients.
        losses: scalars, one a batch, taken one after another.

    Raises:
        ValueError: there is no loss.
    """
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in variables.items()}
    count = 0
    for loss in losses:
        for name, gradient in zip(variables, _gradients(loss, variables), strict=True):
            sums[name].addcmul_(gradient.float(), gradient.float())
        count += 1
    if not count:
        raise ValueError("no batch to take gradients of")
    return {name: value.div_(count) for name, value in sums.items()}


def _gradients(loss: Tensor, variables: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    # A variable that the loss does not depend on has a gradient of zero.
    return torch.autograd.grad(loss, tuple(variables.values()), materialize_grads=True)
