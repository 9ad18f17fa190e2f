"""What a text model is trained for: the labels of its task, a teacher's outputs, or both."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dqrm.compress.distill.losses import DistillWeights, Outputs, distill_loss
from dqrm.pipelines.text.labelled import WHOLE, Share


class Objective(Protocol):
    """A loss of a batch, with gradient."""

    def __call__(
        self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, share: Share = WHOLE
    ) -> Tensor:
        """Return it, float32 and 0-dimensional.

        Args:
            model: of transformers, with a head.
            inputs: of the model, [rows, tokens].
            labels: int64 [rows], or float32 [rows] of a regression.
            share: factors of the averages it is made of.
        """
        ...


class TaskLoss:
    """Cross-entropy of the classes, or the squared error of a regression.

    Args:
        regression: labels are values.
        bf16: multiply matrices in bf16.
    """

    def __init__(self, *, regression: bool, bf16: bool) -> None:
        self._regression = regression
        self._bf16 = bf16

    def __call__(
        self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, share: Share = WHOLE
    ) -> Tensor:
        """Return the loss of the model's logits."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            logits = model(**inputs).logits
        return share.rows * self.of(logits.float(), labels)

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits, float32 [rows, outputs]."""
        if self._regression:
            return torch.nn.functional.mse_loss(logits[:, 0], labels)
        return torch.nn.functional.cross_entropy(logits, labels)


class Distillation:
    """A teacher's logits, hidden states and attentions, and the labels where they have a weight.

    Args:
        teacher: of transformers; put into evaluation mode. Its tokens are the student's.
        weights: of the parts.
        layers: teacher layer of each student layer, from 0.
        label_weight: of the labels' loss.
        regression: labels are values.
        bf16: multiply matrices in bf16.
    """

    def __init__(
        self,
        teacher: Any,
        weights: DistillWeights,
        layers: Sequence[int],
        *,
        label_weight: float,
        regression: bool,
        bf16: bool,
    ) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._weights = weights
        self._layers = tuple(layers)
        self._label_weight = label_weight
        self._task = TaskLoss(regression=regression, bf16=bf16)
        self._regression = regression
        self._bf16 = bf16
        self._wanted = {
            "output_hidden_states": weights.hidden > 0,
            "output_attentions": weights.attention > 0,
        }

    def __call__(
        self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, share: Share = WHOLE
    ) -> Tensor:
        """Return the loss of the model's outputs against the teacher's."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            student = self._outputs(model, inputs)
            with torch.no_grad():
                teacher = self._outputs(self._teacher, inputs)
        weights = replace(
            self._weights,
            logits=share.rows * self._weights.logits,
            hidden=share.tokens * self._weights.hidden,
            attention=share.pairs * self._weights.attention,
        )
        loss = distill_loss(student, teacher, weights, self._layers, regression=self._regression)
        if self._label_weight:
            of_labels = share.rows * self._task.of(student.logits.float(), labels)
            loss = loss + self._label_weight * of_labels
        return loss

    def _outputs(self, model: Any, inputs: Mapping[str, Tensor]) -> Outputs:
        given = model(**inputs, **self._wanted)
        return Outputs(
            logits=given.logits,
            hidden=given.get("hidden_states") or (),
            attentions=given.get("attentions") or (),
            mask=inputs["attention_mask"],
        )
