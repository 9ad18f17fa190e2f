"""Intervals, verdicts and comparisons at equal time, on numbers whose answers are known."""

import pytest
from scipy import stats

from dqrm.study.outcome import Point
from dqrm.study.statistics import Estimate, t_cdf, t_quantile
from dqrm.study.summary import _reached
from dqrm.study.verdict import Verdict


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 31])
def test_students_t_is_that_of_scipy(freedom):
    for t in (-3.0, -0.5, 0.0, 0.1, 1.0, 4.3, 30.0):
        assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
    for probability in (0.001, 0.3, 0.5, 0.9, 0.975, 0.9995):
        expected = stats.t.ppf(probability, freedom)
        assert t_quantile(probability, freedom) == pytest.approx(expected, abs=1e-7)


def test_an_estimate_is_that_of_scipy():
    values = [0.7512, 0.7498, 0.7530, 0.7501]
    estimate = Estimate.of(values)
    low, high = stats.t.interval(0.95, 3, loc=estimate.mean, scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    one = Estimate.of([0.5])
    assert (one.mean, one.half_width, one.low, one.high) == (0.5, None, 0.5, 0.5)
    assert Estimate.of([0.25, 0.25]).half_width == 0.0


def test_refused():
    with pytest.raises(ValueError, match="freedom"):
        t_cdf(1.0, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_quantile(1.0, 3)


@pytest.mark.parametrize(
    ("differences", "metric", "ruling", "words"),
    [
        ((0.004, 0.005, 0.006), "auc", "better", "INT4 wins over tuned FP32: AUC"),
        ((0.004, 0.005, 0.006), "log_loss", "worse", "tuned FP32 wins over INT4: log loss"),
        ((-0.004, -0.005, -0.006), "auc", "worse", "tuned FP32 wins over INT4: AUC of INT4"),
        ((-0.004, -0.005, -0.006), "log_loss", "better", "INT4 wins over tuned FP32"),
        ((0.0004, 0.0005, 0.0005), "auc", "better", "wins over tuned FP32 by little"),
        ((0.0001, -0.0002, 0.0001), "auc", "as good", "tuned FP32 is as good as INT4"),
        (
            (0.003, -0.002, 0.001),
            "auc",
            "undecided",
            "Undecided: INT4 is ahead of tuned FP32, but AUC",
        ),
        ((0.03,), "auc", "one seed", "with one seed, which proves nothing"),
        ((0.0, 0.0, 0.0), "auc", "as good", "+0.0000 [+0.0000, +0.0000], is not significant"),
    ],
)
def test_the_rule_rules(differences, metric, ruling, words):
    verdict = Verdict("INT4", "tuned FP32", metric, Estimate.of(differences))
    assert verdict.ruling == ruling
    assert words in verdict.sentence
    if len(differences) > 1:
        decided = bool(stats.ttest_1samp(differences, 0).pvalue < 0.05)
        assert decided == (ruling in ("better", "worse"))


def test_what_is_reached_at_equal_time():
    curve = [
        Point(100, 1.0, 12.0, 10.0, 0.70, 0.50),
        Point(200, 2.0, 24.0, 20.0, 0.74, 0.48),
        Point(300, 3.0, 36.0, 30.0, 0.72, 0.52),
    ]
    assert _reached(curve, 30.0) == (300.0, 0.74, 0.48)
    # Half-way to the second validation.
    assert _reached(curve, 15.0) == pytest.approx((150.0, 0.72, 0.49))
    # The better one before, not the straight line down.
    assert _reached(curve, 25.0) == pytest.approx((250.0, 0.74, 0.48))
    assert _reached(curve, 5.0) == pytest.approx((50.0, 0.70, 0.50))
