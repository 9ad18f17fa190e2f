"""How long training would take, from a few steps taken here."""

import time
from typing import Any

import torch

from dqrm.pipelines.text.finetune import Recipe, Training, make_optimizer, train_step
from dqrm.pipelines.text.labelled import LabelledText
from dqrm.pipelines.text.sensitivity import schedules_that_ask

_STEPS = 3


def make_random(skeleton: Any) -> Any:
    """Return a model of the skeleton's shape with random values, to take time with."""
    return type(skeleton)(skeleton.config)


def step_seconds(
    model: Any, training: Training, recipe: Recipe, sample: LabelledText, steps: int
) -> float:
    """Return the mean seconds of a training step.

    Args:
        model: changed by it.
        training: objective and compression, not attached yet.
        recipe: of the training.
        sample: rows of the training data, as many as a few batches.
        steps: of the whole training, for schedules.
    """
    training.compression.attach(model, steps)
    for transform in schedules_that_ask(training.compression):
        # The time of a step does not depend on it.
        transform.set_sensitivity(dict.fromkeys(dict(model.named_modules()), 0.01))
    model.train(recipe.dropout)
    optimizer = make_optimizer(model, recipe)
    batches = sample.text.shuffled(recipe.batch_size, 0, 0)[:_STEPS]
    taken = []
    # The first batch twice: what is made once is made in the step that does not count.
    for step, rows in enumerate([batches[0], *batches]):
        began = time.monotonic()
        at = min(step, steps - 1)
        train_step(model, optimizer, training, sample.batch(rows), at, 0.0, recipe)
        taken.append(time.monotonic() - began)
    return sum(taken[1:]) / len(taken[1:])


def sample_rows(count: int, recipe: Recipe) -> list[int]:
    """Return which of ``count`` training rows to take the time of."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return sorted(order[: _STEPS * recipe.batch_size])


def training_seconds(per_step: float, steps: int, dev_rows: int, recipe: Recipe) -> float:
    """Return the seconds of a training with its selections.

    A forward counts as a third of a step.
    """
    selections = recipe.epochs + (steps // recipe.eval_every if recipe.eval_every else 0)
    return per_step * (steps + selections * dev_rows / recipe.batch_size / 3)
