"""Differences of two models on the same rows: against definitions, and their error rates."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from sklearn.metrics import log_loss, roc_auc_score

from dqrm.training.paired import PairedDifference, compare_auc, compare_log_loss


def scored(rows, seed, noise=(1.0, 1.0), decimals=6):
    """Labels and the logits of two models that see the same, each through noise of its own."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(1 - taste))).astype(np.float32)
    first, second = (taste - 1 + amount * rng.normal(size=rows) for amount in noise)
    return [torch.from_numpy(np.round(x, decimals)) for x in (labels, first, second)]


def by_definition(labels, first, second):
    """DeLong, Clarke-Pearson, equations 3 to 6, pair by pair."""
    tens, ones = [], []
    for scores in (first.numpy(), second.numpy()):
        x, y = scores[labels == 1][:, None], scores[labels == 0][None, :]
        psi = (x > y) + 0.5 * (x == y)
        tens.append(psi.mean(1))
        ones.append(psi.mean(0))
    s10, s01 = np.cov(tens), np.cov(ones)
    contrast = np.array([-1.0, 1.0])
    covariance = s10 / len(tens[0]) + s01 / len(ones[0])
    return [t.mean() for t in tens], math.sqrt(contrast @ covariance @ contrast)


@pytest.mark.parametrize("decimals", [0, 1, 6], ids=["many-ties", "ties", "few-ties"])
def test_auc_equals_its_definition(decimals):
    labels, first, second = scored(400, 1, (1.0, 0.5), decimals=decimals)
    found = compare_auc(labels, first, second)
    areas, error = by_definition(labels, first, second)
    assert (found.first, found.second) == pytest.approx(areas, abs=1e-12)
    assert found.standard_error == pytest.approx(error, rel=1e-10)
    assert found.second == pytest.approx(roc_auc_score(labels, second), abs=1e-12)


def test_log_loss_equals_the_paired_t_test():
    labels, first, second = scored(5000, 2, (0.3, 0.32))
    found = compare_log_loss(labels, first, second)
    probability = 1 / (1 + np.exp(-second.numpy()))
    assert found.second == pytest.approx(log_loss(labels, probability), abs=1e-12)
    # The normal distribution stands for Student's: 5,000 rows.
    logits, y = (np.stack([first, second]), labels.numpy())
    losses = np.logaddexp(0, logits) - logits * y
    theirs = ttest_rel(losses[1], losses[0])
    assert found.difference / found.standard_error == pytest.approx(theirs.statistic, rel=1e-9)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("compare", [compare_auc, compare_log_loss])
def test_equal_models_are_told_apart_as_often_as_promised(compare):
    values = [compare(*scored(200, seed)).p_value for seed in range(240)]
    # 5 % of 240 is 12, with a standard deviation of 3.4.
    assert 1 <= sum(value < 0.05 for value in values) <= 26
    assert 0.4 < np.mean(values) < 0.6


@pytest.mark.parametrize("compare", [compare_auc, compare_log_loss])
def test_a_difference_is_found_and_a_margin_proven_with_enough_rows(compare):
    better = compare(*scored(20000, 3, (0.6, 0.3)))
    assert better.better()
    assert better.gain > 0
    low, high = better.interval()
    assert low < better.difference < high
    assert (low > 0) == (compare is compare_auc)
    assert not compare(*scored(60, 4)).not_worse(0.005)
    equal = compare(*scored(30000, 4))
    assert equal.not_worse(0.03)
    assert not equal.better()
    worse = compare(*scored(20000, 5, (0.3, 0.6)))
    assert not worse.not_worse(0.005)
    assert worse.not_worse(0.2)
    assert worse.p_value < 1e-6


def test_a_model_is_as_good_as_itself():
    labels, first, _ = scored(500, 6)
    for compare in (compare_auc, compare_log_loss):
        same = compare(labels, first, first)
        assert (same.difference, same.standard_error, same.p_value) == (0.0, 0.0, 1.0)
        assert same.not_worse(1e-9)
        assert not same.better()
    # Confident mistakes stay finite.
    far = compare_log_loss(labels, first, torch.where(labels > 0, -500.0, 500.0).double())
    assert far.second == pytest.approx(500)


def test_what_cannot_be_compared_is_refused():
    labels, first, second = scored(50, 7)
    with pytest.raises(ValueError, match="same rows"):
        compare_auc(labels, first[:-1], second)
    with pytest.raises(ValueError, match="0 or 1"):
        compare_log_loss(labels + 1, first, second)
    with pytest.raises(ValueError, match="second model's scores are not all finite"):
        compare_auc(labels, first, second / 0)
    with pytest.raises(ValueError, match="two rows of each class"):
        compare_auc(torch.zeros(50), first, second)
    with pytest.raises(ValueError, match="margin=0"):
        PairedDifference(0.5, 0.5, 0.1, True).not_worse(0)
