"""Rows as codes with a step: what is kept, when the step changes, and what must not change."""

import pytest
import torch

from dqrm.kernels.rounding import random_bits_reference, step_key
from dqrm.kernels.row_codes import (
    HEADROOM,
    SHRINK,
    read_codes_reference,
    read_rows_reference,
    read_steps_reference,
    row_bytes,
    write_rows_reference,
)

BITS = [8, 4]
DIMS = [1, 4, 5, 16, 33, 256]


def random_for(values, step=1):
    return random_bits_reference(step_key(0, step), torch.arange(len(values)), 0, values.shape[1])


def write(values, bits, steps=None, step=1):
    steps = torch.zeros(len(values)) if steps is None else steps
    return write_rows_reference(values, steps, random_for(values, step), bits)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_written_values_come_back_within_a_step(bits, dim):
    torch.manual_seed(0)
    values = torch.randn(200, dim) * torch.logspace(-9, 9, 200)[:, None]
    rows = write(values, bits)
    assert rows.shape == (200, row_bytes(dim, bits))
    steps = read_steps_reference(rows)
    error = (read_rows_reference(rows, bits, dim) - values).abs()
    assert (error <= steps[:, None]).all()
    # The step is that of the largest magnitude with headroom, rounded up to eight bits.
    exact = values.abs().amax(dim=1).clamp_min(1e-8) * HEADROOM / (2 ** (bits - 1) - 1)
    assert (steps >= exact * (1 - 2**-22)).all()
    assert (steps <= exact * (1 + 2**-7)).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_is_read_can_be_written_forever(bits):
    torch.manual_seed(0)
    rows = write(torch.randn(500, 16), bits)
    for step in range(20):
        values = read_rows_reference(rows, bits, 16)
        again = write(values, bits, read_steps_reference(rows), step)
        fits = values.abs().amax(dim=1) >= SHRINK * (2 ** (bits - 1) - 1) * read_steps_reference(
            rows
        )
        assert fits.any()
        assert torch.equal(again[fits], rows[fits])


@pytest.mark.parametrize("bits", BITS)
def test_elements_that_do_not_change_keep_their_codes(bits):
    torch.manual_seed(0)
    rows = write(torch.randn(500, 16), bits)
    values = read_rows_reference(rows, bits, 16)
    values[:, 3] += 0.01
    after = write(values, bits, read_steps_reference(rows), step=2)
    kept = read_steps_reference(after) == read_steps_reference(rows)
    before, now = (read_codes_reference(r, bits, 16)[kept] for r in (rows, after))
    others = [n for n in range(16) if n != 3]
    assert kept.sum() > 300
    assert torch.equal(now[:, others], before[:, others])
    assert (now[:, 3] != before[:, 3]).any()


@pytest.mark.parametrize("bits", BITS)
def test_small_updates_add_up(bits):
    largest = 2 ** (bits - 1) - 1
    rows = write(torch.tensor([[1.0, 0.0]]).repeat(4000, 1), bits)
    step = float(read_steps_reference(rows)[0])
    drift = step / 50
    for number in range(100):
        values = read_rows_reference(rows, bits, 2)
        values[:, 1] += drift
        rows = write(values, bits, read_steps_reference(rows), step=number + 2)
    values = read_rows_reference(rows, bits, 2)
    # 100 roundings of variance (1/50)(49/50) steps each: five deviations of the mean of 4,000.
    assert abs(values[:, 1].mean() - 100 * drift) < 5 * step * (100 / 50 / 4000) ** 0.5
    assert read_codes_reference(rows, bits, 2).abs().max() <= largest


@pytest.mark.parametrize("bits", BITS)
def test_the_step_grows_on_overflow_and_shrinks_when_half_is_unused(bits):
    largest = 2 ** (bits - 1) - 1
    step = torch.tensor([2.0**-4])
    for factor, keeps in [(1.0, True), (1.001, False), (SHRINK, True), (SHRINK * 0.99, False)]:
        rows = write(torch.full((1, 4), largest * 2.0**-4 * factor), bits, step)
        assert (read_steps_reference(rows) == step).item() == keeps, factor


@pytest.mark.parametrize("bits", BITS)
def test_extreme_rows(bits):
    values = torch.tensor([[0.0, -0.0, 0.0], [1e-45, 0.0, 0.0], [2.0e38, -2.0e38, 1.0]])
    rows = write(values, bits)
    back = read_rows_reference(rows, bits, 3)
    assert torch.equal(back[0], torch.zeros(3))
    assert back[1].abs().max() < 1e-8
    assert torch.allclose(back[2, :2], values[2, :2], rtol=1 / 3)
    assert read_steps_reference(rows).min() > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_becomes_nan(bits, bad):
    values = torch.ones(3, 5)
    values[1, 2] = bad
    back = read_rows_reference(write(values, bits, torch.full((3,), 0.25)), bits, 5)
    assert back[1].isnan().all()
    assert back[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_no_rows(bits):
    rows = write(torch.empty(0, 6), bits)
    assert rows.shape == (0, row_bytes(6, bits))
    assert read_rows_reference(rows, bits, 6).shape == (0, 6)
