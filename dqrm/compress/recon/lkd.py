"""Layer-by-layer distillation: a layer on its grids learns to answer as the original one.

ZeroQuant, arXiv 2206.01861, section 4.3. All parameters of the layer learn, through the grids by
the straight-through estimator: biases and norms make up for what rounding does, and weights near a
threshold cross it. Everything else of the model is left alone, so two layers are all that has to
be in memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqrm.compress.recon.capture import LayerStream, masked_mean_square


@dataclass(frozen=True)
class LkdRecipe:
    """How a layer learns."""

    steps: int
    lr: float
    """Of AdamW, without weight decay; falls to 0 along a cosine."""
    seed: int
    """Of the order of batches."""


@dataclass(frozen=True)
class LayerLoss:
    """Mean squared error of a layer's outputs over valid tokens, relative to their mean square."""

    start: float
    end: float


def distil_layer(
    student: nn.Module,
    teacher: nn.Module,
    student_inputs: LayerStream,
    teacher_inputs: LayerStream,
    valid: Sequence[Tensor],
    recipe: LkdRecipe,
) -> LayerLoss:
    """Train the parameters of ``student``, in place.

    Where training ends with a larger error than it began, the layer keeps what it began with.

    Args:
        student: a layer whose weights are latent, behind their grids; in evaluation mode.
        teacher: the layer as it was.
        student_inputs: what ``student`` learns on; the teacher's own stream in the paper.
        teacher_inputs: what ``teacher`` answers to.
        valid: bool [rows, tokens] of each batch; padding is no part of the error.
        recipe: how.
    """
    parameters = list(student.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    start = relative_loss(student, teacher, student_inputs, teacher_inputs, valid)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    for step in range(recipe.steps):
        if not order:
            order = torch.randperm(len(valid), generator=generator).tolist()
        batch = order.pop()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        with torch.no_grad():
            wanted = teacher_inputs.call(teacher, batch)
        loss = masked_mean_square(student_inputs.call(student, batch) - wanted, valid[batch])
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    end = relative_loss(student, teacher, student_inputs, teacher_inputs, valid)
    # Not "end > start": an error that is not a number is no improvement.
    if not end <= start:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        end = start
    return LayerLoss(start, end)


@torch.no_grad()
def relative_loss(
    student: nn.Module,
    teacher: nn.Module,
    student_inputs: LayerStream,
    teacher_inputs: LayerStream,
    valid: Sequence[Tensor],
) -> float:
    """Return the squared error of a layer's outputs over valid tokens, relative to their squares.

    Arguments are those of :func:`distil_layer`.
    """
    error = scale = 0.0
    for batch, tokens in enumerate(valid):
        wanted = teacher_inputs.call(teacher, batch)
        given = student_inputs.call(student, batch)
        error += float(((given - wanted).square().mean(-1) * tokens).sum())
        scale += float((wanted.square().mean(-1) * tokens).sum())
    return error / max(scale, 1e-30)
