"""Metrics against scikit-learn and by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from dqrm.training.metrics import auc, measure


@pytest.mark.parametrize("levels", [3, 1000], ids=["many-ties", "few-ties"])
def test_equal_scikit_learn(levels):
    rng = np.random.default_rng(0)
    labels = (rng.random(5000) < 0.2).astype(np.float32)
    logits = (np.round((rng.normal(size=5000) + labels) * levels) / levels).astype(np.float32)
    metrics = measure(torch.from_numpy(logits), torch.from_numpy(labels))
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert metrics.auc == pytest.approx(roc_auc_score(labels, probability), abs=1e-12)
    assert metrics.log_loss == pytest.approx(log_loss(labels, probability), abs=1e-12)
    assert metrics.accuracy == np.mean((logits > 0) == (labels == 1))
    assert metrics.calibration == pytest.approx(probability.mean() / labels.mean())
    rate = labels.mean()
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert metrics.normalized_entropy == pytest.approx(metrics.log_loss / entropy)


def test_confident_mistakes_stay_finite():
    metrics = measure(torch.tensor([500.0, -500.0]), torch.tensor([0.0, 1.0]))
    assert metrics.log_loss == 500.0
    assert metrics.auc == 0.0


def test_one_class_has_no_auc():
    metrics = measure(torch.zeros(3), torch.zeros(3))
    assert math.isnan(metrics.auc)
    assert math.isnan(metrics.normalized_entropy)
    assert metrics.log_loss == pytest.approx(math.log(2))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="without rows"):
        measure(torch.empty(0), torch.empty(0))


def test_all_ties_are_worth_a_coin_flip():
    assert auc(torch.ones(10), torch.tensor([1.0, 0.0] * 5)) == 0.5
