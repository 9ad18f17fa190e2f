"""Predictions and metrics of a model on a split."""

import torch
from torch import Tensor, nn

from dqrm.data.dataset import Split
from dqrm.training.metrics import Metrics, measure
from dqrm.training.world import World


@torch.no_grad()
def predict(
    model: nn.Module, split: Split, batch_size: int, world: World | None = None
) -> tuple[Tensor, Tensor]:
    """Return the logits and labels of a split, float32 [rows] each, in file order.

    ``model`` is called as a DLRM is. It is put into evaluation mode for the time and back
    afterwards. Ranks of a world share the work, and all get everything.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    found = torch.zeros(2, split.num_rows)
    logits, labels = found
    done = 0
    try:
        for batch in split.batches(batch_size, rank=world.rank, world_size=world.size):
            begin = done + batch.first_row
            end = begin + len(batch)
            logits[begin:end] = model(batch.dense, batch.indices, batch.offsets)
            labels[begin:end] = batch.label
            done += batch.whole_rows
    finally:
        model.train(was_training)
    world.sum_(found)
    return logits, labels


def evaluate(
    model: nn.Module, split: Split, batch_size: int, world: World | None = None
) -> Metrics:
    """Return the metrics of ``model`` on ``split``; see :func:`predict`."""
    logits, labels = predict(model, split, batch_size, world)
    return measure(logits, labels)
