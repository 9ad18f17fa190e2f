"""Training of a sequence classifier or regressor: AdamW, warm-up, linear decay, selection.

The one loop for text models. What they are trained for is an objective: labels, or a teacher. What
is done to their weights meanwhile is a compression, which may be empty.
"""

import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dqrm.compress.transforms.base import Compression
from dqrm.pipelines.stage import Interrupted
from dqrm.pipelines.text.classifier import predict_text
from dqrm.pipelines.text.labelled import LabelledText, TextBatch
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
from dqrm.training.config import ExchangeConfig
from dqrm.training.consensus import Consensus, Wishes
from dqrm.training.errors import TrainingError
from dqrm.training.world import World

if TYPE_CHECKING:
    from dqrm.pipelines.text.replicas import Replicas

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
        world: of processes that train the same model; each makes one of these. Rank 0 writes.
        exchange: of gradients between them.
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
        world: World | None = None,
        exchange: ExchangeConfig | None = None,
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
        self._world = world or World()
        self._replicas: Replicas | None = None
        if self._world.size > 1:
            self._replicas = _replicas(
                model, self._compression, exchange or ExchangeConfig(), self._world, recipe.seed
            )
            if not self._world.is_main:
                # Each drops activations of its own; rank 0 those it drops when it is alone.
                torch.manual_seed(recipe.seed + (self._world.rank << 32))
        saved = load_state(folder, model, self._compression, self._optimizer, self._replicas)
        self.state = saved or TextState()
        self._logged_step = self.state.step
        self._saved = time.monotonic()
        self._consensus = Consensus(self._world, self._wishes)
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
            drawn = torch.Generator().manual_seed(recipe.seed)
            rows = torch.randperm(len(self._train.text), generator=drawn)[:SENSITIVITY_ROWS]
            batch = self._train.batch(rows.tolist())
            tell_sensitivity(
                self._model, self._compression, batch.inputs, batch.labels, self._world
            )
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
        self._world.wait_for_all()
        load_best(self._folder, self._model, self._compression)
        self._compression.freeze()
        if self._replicas is not None:
            self._replicas.require_equal()
            self._replicas.exchange.close()
        return state.best

    def _step(self, rows: list[int]) -> None:
        state, recipe = self.state, self._recipe
        began = time.monotonic()
        rate = recipe.lr * rate_factor(state.step, self.steps, recipe.warmup)
        batch = self._train.batch(rows, self._world.rank, self._world.size)
        loss = train_step(
            self._model,
            self._optimizer,
            self._training,
            batch,
            state.step,
            rate,
            recipe,
            self._exchange_gradients if self._replicas is not None else None,
        )
        state.step += 1
        state.batch += 1
        _check_loss(loss, state.step)
        state.seconds += time.monotonic() - began
        state.samples += len(rows)
        state.loss_sum += loss * len(rows)
        state.loss_rows += len(rows)
        self._progress("training", state.step, self.steps, "steps")

    def _exchange_gradients(self, batch: TextBatch, loss: float) -> float:
        """Make gradients those of the whole batch, ask for wishes, return the whole loss."""
        assert self._replicas is not None
        exchange, step = self._replicas.exchange, self.state.step
        exchange.start_step(step)
        whole = self._consensus.start(loss / self._world.size, exchange)
        _check_loss(whole_loss := whole(), step + 1)
        self._replicas.reduce(batch.inputs)
        return whole_loss

    def _select(self) -> None:
        state, key = self.state, self._recipe.select_by
        logits = predict_text(
            self._model,
            self._dev.text,
            2 * self._recipe.batch_size,
            bf16=self._recipe.bf16,
            world=self._world,
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
            if self._world.is_main:
                save_best(self._folder, self._model, self._compression)
        exchanged: dict[str, float] = {}
        if self._replicas is not None and state.step > self._logged_step:
            exchanged = self._replicas.metrics(state.step - self._logged_step)
        self._logged_step = state.step
        self._tracker.log_metrics(
            {
                "train/loss": state.loss_sum / state.loss_rows,
                **{f"val/{name}": number for name, number in measured.items()},
                **self._compression.metrics(),
                **exchanged,
                "perf/samples_per_second": state.samples / state.seconds,
            },
            state.step,
        )
        remark = " (best so far)" if better else "" if final else " (not yet fully compressed)"
        log.info("step %d of %d: dev %s %.4f%s", state.step, self.steps, key, value, remark)
        state.loss_sum, state.loss_rows = 0.0, 0

    def _wishes(self) -> Wishes:
        due = time.monotonic() - self._saved >= self._recipe.save_seconds
        return Wishes(stop=self._stop() is not None, save=due)

    def _save_when_due(self) -> None:
        if self._replicas is None:
            self._consensus.ask_alone()
        granted = self._consensus.granted
        if any(granted):
            save_state(
                self._folder,
                self._model,
                self._compression,
                self._optimizer,
                self.state,
                self._replicas,
            )
            self._saved = time.monotonic()
        if granted.stop:
            # The signal may be another process's.
            raise Interrupted(self._stop() or signal.SIGTERM)


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    training: Training,
    batch: TextBatch,
    step: int,
    rate: float,
    recipe: Recipe,
    exchange: Callable[[TextBatch, float], float] | None = None,
) -> float:
    """Take a step on a batch; return its loss.

    Gradients are clipped first; what a compression adds to them is not, and is not exchanged: it
    is the same on all ranks.

    Args:
        model: in training mode, the compression attached.
        optimizer: of its parameters.
        training: objective and compression.
        batch: rows of this process; there may be none.
        step: 0-based.
        rate: learning rate.
        recipe: gives the largest norm of gradients.
        exchange: makes the gradients, and the loss it is given and returns, those of all processes.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    training.compression.before_forward(step)
    loss = 0.0
    if batch.inputs:
        objective = training.objective(model, batch.inputs, batch.labels, batch.share)
        torch.autograd.backward(objective)
        loss = float(objective.detach())
    if exchange is not None:
        loss = exchange(batch, loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    training.compression.after_backward()
    optimizer.step()
    training.compression.after_step(step, rate, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return loss


def _check_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss} at step {step}; lower the lr")


def _replicas(
    model: Any, compression: Compression, config: ExchangeConfig, world: World, seed: int
) -> "Replicas":
    # Imported by runs of several processes alone: it needs torch.distributed.
    from dqrm.pipelines.text.replicas import Replicas

    return Replicas(model, compression, config, world, seed)


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
