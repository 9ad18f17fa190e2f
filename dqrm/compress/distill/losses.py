"""Losses between a student's and a teacher's outputs, as pure functions.

    B batch, S tokens, D hidden, H heads, C classes, L student layers

Padding takes no part in any of them: ``mask`` is true (1) at real tokens, of shape [B, S], and an
average is over real tokens alone. The teacher's tensors receive no gradient. Each loss is exactly 0
where student and teacher say the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LogitsAverage = Literal["batch", "elements"]


@dataclass(frozen=True)
class Outputs:
    """What a transformer of L layers said about a batch."""

    logits: Tensor
    """float [B, C]; [B, 1] of a regression."""
    hidden: Sequence[Tensor]
    """L + 1 of [B, S, D]: the embeddings' output, then that of each layer; may be empty."""
    attentions: Sequence[Tensor]
    """L of [B, H, S, S], probabilities over the last dimension; may be empty."""
    mask: Tensor
    """[B, S], 1 at real tokens."""


@dataclass(frozen=True)
class DistillWeights:
    """Factors of the parts of :func:`distill_loss`; a part of weight 0 is not computed."""

    logits: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    temperature: float = 1.0
    average: LogitsAverage = "batch"


def distill_loss(
    student: Outputs,
    teacher: Outputs,
    weights: DistillWeights,
    layers: Sequence[int],
    *,
    regression: bool = False,
) -> Tensor:
    """One-stage distillation: logits, hidden states and attentions at once (arXiv 2206.01859).

    The parts over layers are sums over the student's layers, as in the authors' code. The student's
    embedding output is held against what enters the teacher layer that its first layer maps to.

    Args:
        student: of L layers.
        teacher: of at least as many.
        weights: of the parts.
        layers: teacher layer of each student layer, from 0.
        regression: the logits are values.
    """
    total = torch.zeros(())
    if weights.logits:
        part = (
            logits_mse(student.logits, teacher.logits)
            if regression
            else soft_cross_entropy(
                student.logits, teacher.logits, weights.temperature, weights.average
            )
        )
        total = total + weights.logits * part
    if weights.hidden:
        # Position l + 1 of the hidden states is the output of layer l, position l its input.
        pairs = [(0, layers[0]), *((k + 1, layer + 1) for k, layer in enumerate(layers))]
        for ours, theirs in pairs:
            part = hidden_mse(student.hidden[ours], teacher.hidden[theirs], student.mask)
            total = total + weights.hidden * part
    if weights.attention:
        _require_attentions(student, "student", len(layers))
        _require_attentions(teacher, "teacher", max(layers, default=-1) + 1)
        for k, layer in enumerate(layers):
            part = attention_mse(student.attentions[k], teacher.attentions[layer], student.mask)
            total = total + weights.attention * part
    return total


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, average: LogitsAverage = "batch"
) -> Tensor:
    """Cross-entropy of the student's classes against the teacher's probabilities.

    The teacher's entropy is taken off: it has no gradient, and without it the loss is 0 exactly
    where both say the same. Multiplied by temperature ** 2, so that gradients keep their size
    (arXiv 1503.02531).

    Args:
        student: logits, float [B, C].
        teacher: logits, float [B, C].
        temperature: both logits are divided by it.
        average: ``batch`` sums over classes and averages over rows, as the textbooks do;
            ``elements`` averages over rows and classes, as XTC's scripts do: 1 / C of the former.

    Returns:
        float32, 0-dimensional.
    """
    _same_shape(student, teacher, "logits")
    ours = torch.log_softmax(student.float() / temperature, -1)
    theirs = torch.log_softmax(teacher.detach().float() / temperature, -1)
    terms = theirs.exp() * (theirs - ours)
    count = terms.shape[0] if average == "batch" else terms.numel()
    return temperature**2 * terms.sum() / count


def logits_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of a regression's values, float [B, C]; float32, 0-dimensional."""
    _same_shape(student, teacher, "logits")
    return torch.nn.functional.mse_loss(student.float(), teacher.detach().float())


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states [B, S, D] over real tokens; float32."""
    _same_shape(student, teacher, "hidden states")
    real = mask.to(torch.float32)[:, :, None]
    squares = (student.float() - teacher.detach().float()).square() * real
    return squares.sum() / (real.sum() * student.shape[-1])


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of attention probabilities [B, H, S, S]; float32.

    Over the pairs of real tokens alone: neither what padding looks at nor what looks at it counts.
    """
    _same_shape(student, teacher, "attentions")
    real = mask.to(torch.float32)
    pairs = (real[:, :, None] * real[:, None, :])[:, None]
    squares = (student.float() - teacher.detach().float()).square() * pairs
    return squares.sum() / (pairs.sum() * student.shape[1])


def _require_attentions(outputs: Outputs, whose: str, layers: int) -> None:
    """Refuse a model of ``layers`` layers or more that tells the attention of fewer.

    Those behind a layer without heads would move up by one, and the wrong ones be compared.
    """
    # Hidden states, where they are told, count the layers.
    layers = max(layers, len(outputs.hidden) - 1)
    found = len(outputs.attentions)
    if found < layers:
        raise ValueError(
            f"{found} of {layers} layers of the {whose} tell their attention, as those without "
            "heads have none: set attention: 0"
        )


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what} of the student are {list(student.shape)}, of the teacher "
            f"{list(teacher.shape)}: they must have one shape"
        )
