"""The figures of a study: a row an arm, means over seeds, differences to the rival."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dqrm.study.arms import Arm
from dqrm.study.outcome import Outcome, Point
from dqrm.study.statistics import Estimate
from dqrm.study.study import Answered
from dqrm.study.verdict import METRICS, Metric, Verdict


@dataclass(frozen=True)
class Peak:
    """Where validation AUC is best in a run, and what is left of it at the end."""

    epoch: Estimate
    auc: Estimate
    lost: Estimate
    """AUC at the peak less that of the last validation."""


@dataclass(frozen=True)
class AtEqualTime:
    """What an arm has reached when the quickest one is done."""

    steps: float
    """Mean over seeds."""
    auc: Estimate
    """Best validation AUC up to then."""
    log_loss: Estimate


@dataclass(frozen=True)
class Row:
    """An arm over its seeds."""

    key: str
    title: str
    test: dict[Metric, Estimate]
    validation: dict[Metric, Estimate]
    to_rival: dict[Metric, Estimate]
    """Differences of the test, seed by seed; empty of the rival itself."""
    peak: Peak | None
    """None where nothing was trained."""
    at_equal_time: AtEqualTime | None
    fp32_bytes: int
    packed_bytes: int
    training_bytes: int
    peak_bytes: float | None
    cpu_step_seconds: Estimate | None
    sent_bytes: float | None
    ratio: float | None


@dataclass(frozen=True)
class Summary:
    """A case in figures."""

    label: str
    rival: str | None
    """Title of the rival; None where it has no outcome."""
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    """Of every arm beside the rival, ours first."""
    budget_seconds: float | None
    """CPU seconds of training that arms are compared at."""
    at_equal_time: Verdict | None
    """Of ours beside the rival, by validation AUC at that time."""

    def row(self, key: str) -> Row | None:
        """Return the row of an arm, if it has one."""
        return next((row for row in self.rows if row.key == key), None)


def summarize(answered: Answered) -> Summary:
    """Return the figures of a case; arms without an outcome have no row."""
    rival_key, ours = answered.case.question.rival, answered.case.question.ours
    rival = answered.outcomes.get(rival_key, [])
    budget = _budget([answered.outcomes[arm.key] for arm in answered.arms])
    rows = tuple(
        _row(arm, answered.outcomes[arm.key], rival, budget, arm.key == rival_key)
        for arm in answered.arms
        if answered.outcomes[arm.key]
    )
    title = next((arm.title for arm in answered.arms if arm.key == rival_key and rival), None)
    ordered = sorted(rows, key=lambda row: row.key != ours)
    verdicts = tuple(
        Verdict(row.title, title, metric, row.to_rival[metric])
        for row in ordered
        for metric in METRICS
        if title is not None and metric in row.to_rival
    )
    pair = [next((row for row in rows if row.key == key), None) for key in (ours, rival_key)]
    return Summary(answered.case.label, title, rows, verdicts, budget, _at_equal_time(*pair))


def _at_equal_time(own: Row | None, rival: Row | None) -> Verdict | None:
    if own is None or rival is None or own.at_equal_time is None or rival.at_equal_time is None:
        return None
    mine, theirs = own.at_equal_time.auc.values, rival.at_equal_time.auc.values
    if len(mine) != len(theirs):
        return None
    difference = Estimate.of([a - b for a, b in zip(mine, theirs, strict=True)])
    return Verdict(own.title, rival.title, "auc", difference)


def _row(
    arm: Arm, outcomes: list[Outcome], rival: list[Outcome], budget: float | None, is_rival: bool
) -> Row:
    of_rival = {outcome.seed: outcome for outcome in rival}
    paired = [(o, of_rival[o.seed]) for o in outcomes if o.seed in of_rival and not is_rival]
    first, curves = outcomes[0], [o.curve for o in outcomes if o.curve]
    steps = [o.cpu_step_seconds for o in outcomes if o.cpu_step_seconds is not None]
    peaks = [o.peak_bytes for o in outcomes if o.peak_bytes is not None]
    return Row(
        key=arm.key,
        title=arm.title,
        test={m: Estimate.of([o.test[m] for o in outcomes]) for m in METRICS},
        validation={m: Estimate.of([o.validation[m] for o in outcomes]) for m in METRICS},
        to_rival={
            metric: Estimate.of([own.test[metric] - other.test[metric] for own, other in paired])
            for metric in METRICS
            if paired
        },
        peak=_peak(curves) if curves else None,
        at_equal_time=_at(curves, budget) if curves and budget is not None else None,
        fp32_bytes=first.fp32_bytes,
        packed_bytes=first.packed_bytes,
        training_bytes=first.training_bytes,
        peak_bytes=statistics.fmean(peaks) if peaks else None,
        cpu_step_seconds=Estimate.of(steps) if steps else None,
        sent_bytes=first.sent_bytes,
        ratio=first.ratio,
    )


def _peak(curves: Sequence[Sequence[Point]]) -> Peak:
    best = [max(curve, key=lambda point: point.auc) for curve in curves]
    return Peak(
        epoch=Estimate.of([point.epoch for point in best]),
        auc=Estimate.of([point.auc for point in best]),
        lost=Estimate.of([p.auc - c[-1].auc for p, c in zip(best, curves, strict=True)]),
    )


def _budget(arms: Sequence[Sequence[Outcome]]) -> float | None:
    """CPU seconds in which the quickest arm trained as many steps as any."""
    trained = [outcomes for outcomes in arms if outcomes and outcomes[0].curve]
    most = max((o.steps for outcomes in trained for o in outcomes), default=0)
    return min(
        (
            statistics.fmean(o.curve[-1].cpu_seconds for o in outcomes)
            for outcomes in trained
            if outcomes[0].steps == most
        ),
        default=None,
    )


def _at(curves: Sequence[Sequence[Point]], budget: float) -> AtEqualTime:
    reached = [_reached(curve, budget) for curve in curves]
    return AtEqualTime(
        steps=statistics.fmean(step for step, _, _ in reached),
        auc=Estimate.of([auc for _, auc, _ in reached]),
        log_loss=Estimate.of([loss for _, _, loss in reached]),
    )


def _reached(curve: Sequence[Point], budget: float) -> tuple[float, float, float]:
    """Return steps, best AUC and lowest log loss within the budget.

    Between two validations the curve counts as straight, and before the first as that.
    """
    within = [point for point in curve if point.cpu_seconds <= budget]
    after = next((point for point in curve if point.cpu_seconds > budget), None)
    step = float(within[-1].step) if within else 0.0
    auc, loss = [p.auc for p in within], [p.log_loss for p in within]
    if after is not None:
        if within:
            before = within[-1]
            share = (budget - before.cpu_seconds) / (after.cpu_seconds - before.cpu_seconds)
            step += share * (after.step - before.step)
            auc.append(before.auc + share * (after.auc - before.auc))
            loss.append(before.log_loss + share * (after.log_loss - before.log_loss))
        else:
            step = after.step * budget / after.cpu_seconds
            auc, loss = [after.auc], [after.log_loss]
    return step, max(auc), min(loss)
