"""Predictions and metrics of a model on a split."""

import torch
from torch import Tensor

from dqrm.data.dataset import Split
from dqrm.models.dlrm import DLRM
from dqrm.training.metrics import Metrics, measure


@torch.no_grad()
def predict(model: DLRM, split: Split, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the logits and labels of a split, float32 [rows] each, in file order.

    The model is put into evaluation mode for the time and back afterwards.
    """
    was_training = model.training
    model.eval()
    logits = torch.empty(split.num_rows)
    labels = torch.empty(split.num_rows)
    done = 0
    try:
        for batch in split.batches(batch_size):
            end = done + batch.label.numel()
            logits[done:end] = model(batch.dense, batch.indices, batch.offsets)
            labels[done:end] = batch.label
            done = end
    finally:
        model.train(was_training)
    return logits, labels


def evaluate(model: DLRM, split: Split, batch_size: int) -> Metrics:
    """Return the metrics of ``model`` on ``split``."""
    logits, labels = predict(model, split, batch_size)
    return measure(logits, labels)
