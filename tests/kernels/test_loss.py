"""The logit loss against torch's in double precision, and against itself at other levels."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from dqrm.kernels import loss
from dqrm.kernels.loss import bce_with_logits, bce_with_logits_reference

Levels = Callable[[], Iterator[str]]


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 2048])
def test_every_level_gives_torchs_loss_and_the_same_bits(each_level: Levels, rows: int) -> None:
    torch.manual_seed(rows)
    logits = torch.randn(rows, 1) * 8
    labels = (torch.rand(rows) < 0.3).float()
    expected, gradient = bce_with_logits_reference(logits, labels)
    results = []
    for level in each_level():
        got = torch.full_like(logits, math.nan)
        value = bce_with_logits(logits, labels, got)
        # Each part of a loss is within some units of 2^-24.
        assert value == pytest.approx(expected, rel=5e-7), level
        torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-7 / rows)
        results.append((value, got))
    for value, got in results[1:]:
        assert value == results[0][0]
        assert torch.equal(got, results[0][1])


def test_extreme_logits_and_soft_labels(each_level: Levels) -> None:
    logits = torch.tensor([0.0, -0.0, 1e-40, 1e-4, -1e-4, 87.0, -88.0, 104.0, -1e30, 1e30, 3e38])
    for label in (0.0, 0.25, 1.0):
        labels = torch.full_like(logits, label)
        for level in each_level():
            for row in range(len(logits)):
                z, y = logits[row : row + 1], labels[row : row + 1]
                got = torch.empty(1)
                expected, gradient = bce_with_logits_reference(z, y)
                value = bce_with_logits(z, y, got)
                assert value == pytest.approx(expected, rel=3e-7, abs=1e-37), (level, z, y)
                torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(each_level: Levels, bad: float) -> None:
    for row in (0, 21, 39):
        logits = torch.zeros(40)
        logits[row] = bad
        for label in (0.0, 1.0):
            for level in each_level():
                grad = torch.zeros(40)
                value = bce_with_logits(logits, torch.full((40,), label), grad)
                assert not math.isfinite(value), level
                assert grad[row].isnan() == math.isnan(bad), level
                assert grad.isfinite().sum() == (40 if math.isinf(bad) else 39), level


def test_the_gradient_may_replace_the_logits(each_level: Levels) -> None:
    for _ in each_level():
        logits, labels = torch.randn(33), torch.ones(33)
        expected = torch.empty(33)
        value = bce_with_logits(logits, labels, expected)
        assert bce_with_logits(logits, labels, logits) == value
        assert torch.equal(logits, expected)


def test_rows_may_be_a_part_of_those_the_mean_is_over(each_level: Levels) -> None:
    logits, labels = torch.randn(37), (torch.rand(37) < 0.5).float()
    for _ in each_level():
        whole, grad = torch.empty(37), torch.empty(37)
        expected = bce_with_logits(logits, labels, whole)
        got = 0.0
        for begin, end in ((0, 0), (0, 20), (20, 37)):
            part = slice(begin, end)
            got += bce_with_logits(logits[part], labels[part], grad[part], rows=37)
        assert got == pytest.approx(expected, rel=1e-6)
        assert torch.equal(grad, whole)


def test_no_rows_and_wrong_arguments(each_level: Levels) -> None:
    for _ in each_level():
        assert math.isnan(bce_with_logits(torch.empty(0), torch.empty(0), torch.empty(0)))
    ones = torch.ones(3)
    with pytest.raises(ValueError, match=r"labels: must be contiguous float32, is torch\.int64"):
        bce_with_logits(ones, ones.long(), ones)
    with pytest.raises(ValueError, match=r"\(3,\), labels \(2,\) and grad_out \(3,\) do not"):
        bce_with_logits(ones, ones[:2], ones)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "native", lambda: None)
    logits, labels, grad = torch.randn(5), torch.ones(5), torch.empty(5)
    expected, gradient = bce_with_logits_reference(logits, labels)
    assert bce_with_logits(logits, labels, grad) == expected
    assert torch.equal(grad, gradient)
