"""Training of a sequence classifier or regressor: AdamW, warm-up, linear decay, selection.

The one loop for text models. What they are trained for is an objective: labels, or a teacher. What
is done to their weights meanwhile is a compression, which may be empty.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqrm.compress.transforms.base import Compression
from dqrm.pipelines.stage import Interrupted
from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.classifier import predict_text
from dqrm.pipelines.text.objective import Objective
from dqrm.pipelines.text.quality import measure_text
from dqrm.pipelines.text.sensitivity import ROWS as SENSITIVITY_ROWS
from dqrm.pipelines.text.sensitivity import tell_sensitivity
from dqrm.pipelines.text.state import (
    TextState,
    load_best,
    load_state,
    save_best,
    save_state,
)
from dqrm.tracking.base import Tracker
from dqrm.training.step import TrainingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune."""

    epochs: int
    batch_size: int
    lr: float
    """At the end of the warm-up."""
    warmup: float
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float
    """Of matrices; vectors (biases, norms) have none."""
    max_grad_norm: float
    max_steps: int | None
    eval_every: int | None
    """Steps between selections, besides the end of every epoch."""
    freeze_embeddings: bool
    dropout: bool
    """Drop activations at random in training, as much as the model's configuration says."""
    bf16: bool
    seed: int
    select_by: str
    """Metric of the best model: more is better."""
    save_seconds: float
    """Between states on the disk."""


@dataclass(frozen=True)
class LabelledText:
    """Encoded sentences and what is true of them."""

    text: EncodedText
    labels: Tensor
    """int64 [rows], or float32 [rows] of a regression."""


@dataclass(frozen=True)
class Training:
    """What a model is trained for, and what is done to its weights meanwhile."""

    objective: Objective
    compression: Compression
    """Not attached yet."""


class FineTuner:
    """Trains ``model`` in place, keeping in ``folder`` what a killed process goes on from.

    Models are selected from the step on at which the compression is finished, as each is then
    measured as it would be shipped.

    Args:
        model: of transformers, with a head for the labels.
        train: what to learn from.
        dev: what to select on.
        recipe: how.
        training: for what, and under which compression.
        folder: for states; a state that is there is gone on from.
        tracker: takes losses and dev metrics.
        stop: the signal that asked to end, or None.
        progress: takes phase, steps done, all of them, and their name.
    """

    def __init__(
        self,
        model: Any,
        train: LabelledText,
        dev: LabelledText,
        recipe: Recipe,
        training: Training,
        folder: Path,
        tracker: Tracker,
        stop: Callable[[], int | None],
        progress: Callable[[str, int, int, str], None],
    ) -> None:
        self._model = model
        self._train = train
        self._dev = dev
        self._recipe = recipe
        self._training = training
        self._compression = training.compression
        self._folder = folder
        self._tracker = tracker
        self._stop = stop
        self._progress = progress
        labels = model.config.num_labels
        self._classes = None if model.config.problem_type == "regression" else labels
        self._compression.attach(model, self.steps)
        self._optimizer = make_optimizer(model, recipe)
        saved = load_state(folder, model, self._compression, self._optimizer)
        self.state = saved or TextState()
        self._saved = time.monotonic()
        if self.state.step:
            log.info("going on at step %d", self.state.step)

    @property
    def steps(self) -> int:
        """All steps of the recipe."""
        return count_steps(len(self._train.text), self._recipe)

    def fit(self) -> dict[str, float]:
        """Train to the end, leave the selected model, frozen, and return its dev metrics.

        Raises:
            Interrupted: ``stop`` named a signal; the state is saved.
            TrainingError: the loss is no longer finite.
        """
        state, recipe = self.state, self._recipe
        if state.step == 0:
            rows = list(range(min(SENSITIVITY_ROWS, len(self._train.text))))
            batch, labels = self._train.text.batch(rows), self._train.labels[rows]
            tell_sensitivity(self._model, self._compression, batch, labels)
        self._model.train(recipe.dropout)
        while state.step < self.steps:
            batches = self._train.text.shuffled(recipe.batch_size, recipe.seed, state.epoch)
            while state.batch < len(batches) and state.step < self.steps:
                self._step(batches[state.batch])
                ended = state.batch == len(batches) or state.step == self.steps
                every = recipe.eval_every
                if ended or (every is not None and state.step % every == 0):
                    self._select()
                self._save_when_due()
            state.epoch, state.batch = state.epoch + 1, 0
        assert state.best is not None, "a compression is finished at the last step"
        load_best(self._folder, self._model, self._compression)
        self._compression.freeze()
        return state.best

    def _step(self, rows: list[int]) -> None:
        state, recipe = self.state, self._recipe
        began = time.monotonic()
        rate = recipe.lr * rate_factor(state.step, self.steps, recipe.warmup)
        inputs, labels = self._train.text.batch(rows), self._train.labels[rows]
        loss = train_step(
            self._model, self._optimizer, self._training, inputs, labels, state.step, rate, recipe
        )
        state.step += 1
        state.batch += 1
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {state.step}; lower the lr")
        state.seconds += time.monotonic() - began
        state.samples += len(rows)
        state.loss_sum += loss * len(rows)
        state.loss_rows += len(rows)
        self._progress("training", state.step, self.steps, "steps")

    def _select(self) -> None:
        state, key = self.state, self._recipe.select_by
        logits = predict_text(
            self._model, self._dev.text, 2 * self._recipe.batch_size, bf16=self._recipe.bf16
        )
        measured = measure_text(logits, self._dev.labels, self._classes)
        value = measured[key]
        final = self._compression.finished()
        # A model that cannot be measured (NaN) is only better than none.
        better = final and (
            state.best is None or math.isnan(state.best[key]) or value > state.best[key]
        )
        if better:
            state.best, state.best_step = measured, state.step
            save_best(self._folder, self._model, self._compression)
        self._tracker.log_metrics(
            {
                "train/loss": state.loss_sum / state.loss_rows,
                **{f"val/{name}": number for name, number in measured.items()},
                **self._compression.metrics(),
                "perf/samples_per_second": state.samples / state.seconds,
            },
            state.step,
        )
        remark = " (best so far)" if better else "" if final else " (not yet fully compressed)"
        log.info("step %d of %d: dev %s %.4f%s", state.step, self.steps, key, value, remark)
        state.loss_sum, state.loss_rows = 0.0, 0

    def _save_when_due(self) -> None:
        number = self._stop()
        if number is not None or time.monotonic() - self._saved >= self._recipe.save_seconds:
            save_state(self._folder, self._model, self._compression, self._optimizer, self.state)
            self._saved = time.monotonic()
        if number is not None:
            raise Interrupted(number)


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    training: Training,
    inputs: dict[str, Tensor],
    labels: Tensor,
    step: int,
    rate: float,
    recipe: Recipe,
) -> float:
    """Take a step on a batch; return its loss.

    Gradients are clipped first; what a compression adds to them is not.

    Args:
        model: in training mode, the compression attached.
        optimizer: of its parameters.
        training: objective and compression.
        inputs: of the model, [rows, tokens].
        labels: of the rows.
        step: 0-based.
        rate: learning rate.
        recipe: gives the largest norm of gradients.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    training.compression.before_forward(step)
    loss = training.objective(model, inputs, labels)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    training.compression.after_backward()
    optimizer.step()
    training.compression.after_step(step, rate, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def count_steps(rows: int, recipe: Recipe) -> int:
    """Steps over so many training rows."""
    steps = recipe.epochs * math.ceil(rows / recipe.batch_size)
    return min(steps, recipe.max_steps or steps)


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Learning rate at a step as a share of the largest: up to 1 in a line, then down to 0."""
    rising = int(steps * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / max(1, steps - rising)


def make_optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW over the parameters that are trained, word embeddings frozen if so asked."""
    if recipe.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
