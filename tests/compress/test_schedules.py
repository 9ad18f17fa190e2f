"""Schedules against their closed forms."""

import pytest
import torch

from dqrm.compress.schedules import (
    BitsState,
    Constant,
    Geometric,
    Linear,
    MoqBits,
    period_factor,
)


def transitions(schedule, factor, steps):
    """(step, bits) of every change."""
    state = schedule.begin()
    found = []
    for step in range(steps):
        before = state.bits
        state.advance(schedule, step, factor)
        if state.bits != before:
            found.append((step, state.bits))
    return found


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("offset", [0, 7])
def test_bits_go_down_at_absolute_thresholds(factor, offset):
    schedule = MoqBits(7, 4, 5, offset)
    wanted = [(offset + 5 * (2 * factor) ** n, 6 - n) for n in range(3)]
    assert transitions(schedule, factor, 700) == wanted
    assert schedule.last_transition(factor) == wanted[-1][0]


def test_skipped_steps_come_to_the_same_state():
    schedule = MoqBits(16, 2, 3)
    jumped, walked = schedule.begin(), schedule.begin()
    for step in range(200):
        walked.advance(schedule, step)
    jumped.advance(schedule, 199)
    jumped.advance(schedule, 5)
    assert jumped == walked


def test_a_factor_told_later_counts_from_the_next_change_on():
    schedule = MoqBits(8, 5, 4)
    state = schedule.begin()
    state.advance(schedule, 4)
    assert (state.bits, state.period) == (7, 8)
    state.advance(schedule, 8, 3)
    assert (state.bits, state.period, state.changed) == (6, 48, 8)


def test_the_share_of_fp32_falls_and_starts_again():
    schedule = MoqBits(5, 4, 4, 2, 0.4)
    state = schedule.begin()
    shares = []
    for step in range(11):
        state.advance(schedule, step)
        shares.append(round(state.mix(schedule, step), 9))
    assert shares == [1, 1, 0.6, 0.2, 0, 0, 0.6, 0.2, 0, 0, 0]
    assert schedule.last_transition() == 8


def test_a_schedule_past_the_end_is_refused():
    MoqBits(8, 4, 10).check(81)
    with pytest.raises(ValueError, match=r"until step 80 .* training has 80 steps"):
        MoqBits(8, 4, 10).check(80)
    with pytest.raises(ValueError, match="until step 10,000"):
        MoqBits(8, 4, 10).check(81, factor=5)


def test_constant_bits_need_no_steps():
    MoqBits(4, 4, 1).check(1)
    assert transitions(MoqBits(4, 4, 1), 1, 50) == []


def test_a_state_travels_as_a_tensor():
    state = BitsState(7, 1 << 40, 12)
    assert BitsState.of(state.tensor()) == state
    assert state.tensor().dtype == torch.int64


def test_sensitivity_stretches_periods():
    assert [period_factor(x) for x in (0.01, 0.25, 0.5, 0.75, 0.999, 1.0)] == [1, 2, 3, 4, 4, 5]
    assert period_factor(0.0) == 5
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            period_factor(wrong)


@pytest.mark.parametrize(
    "wrong",
    [(4, 8, 1), (17, 8, 1), (8, 0, 1), (8, 4, 0), (8, 4, 1, -1), (8, 4, 1, 0, 1.5)],
    ids=["upwards", "17-bits", "0-bits", "no-period", "negative-offset", "share-above-1"],
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        MoqBits(*wrong)


def test_values_of_the_plain_schedules():
    assert Constant(3.0).at(10**9) == 3.0
    line = Linear(1.0, 3.0, 2, 6)
    assert [line.at(step) for step in (0, 2, 4, 6, 100)] == [1, 1, 2, 3, 3]
    assert Linear(1.0, 3.0, 0, 0).at(0) == 3.0
    assert [Geometric(8.0, 2.0, 3).at(step) for step in (0, 2, 3, 9)] == [1, 4, 8, 8]
    with pytest.raises(ValueError, match="first <= last"):
        Linear(0, 1, 5, 4)
