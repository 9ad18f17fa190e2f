"""The cache of residuals: the plain twin's choices, and nothing is lost."""

import random

import pytest
import torch

from dqrm.kernels.hot_rows import place_rows, place_rows_reference, slots_for
from dqrm.kernels.large_values import select_large, select_large_reference
from dqrm.kernels.tables import RowGradient

DIM = 3


def cache(slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.full((slots,), -1),
        torch.zeros(slots, dtype=torch.int16),
        torch.zeros(slots, DIM),
    )


def test_the_native_cache_makes_the_plain_twins_choices(fuzz):
    def case(rng: random.Random) -> None:
        slots = rng.choice([4, 8, 64])
        native, plain = cache(slots), cache(slots)
        for _ in range(6):
            rows = torch.tensor(sorted(rng.sample(range(200), rng.randint(0, 60))))
            rows = rows.to(torch.int64)
            room = rng.randint(0, 9)
            results = []
            for (hot, uses, values), place in ((native, place_rows), (plain, place_rows_reference)):
                places = torch.empty_like(rows)
                out = RowGradient(torch.empty(room, dtype=torch.int64), torch.empty(room, DIM))
                gone = place(hot, uses, values, rows, places, out)
                # What an encoder would leave there; zero for some, which need not be sent.
                values[places[places >= 0]] += (rows[places >= 0] % 3).unsqueeze(1).float()
                results.append((places, out.rows[:gone], out.values[:gone], hot, uses, values))
            for mine, twin in zip(*results, strict=True):
                assert torch.equal(mine, twin)

    fuzz(case)


def test_residuals_are_kept_or_handed_out(each_level):
    generator = torch.Generator().manual_seed(1)
    for _ in each_level():
        hot, uses, values = cache(slots_for(100))
        put, sent = torch.zeros(3000, DIM), torch.zeros(3000, DIM)
        for _ in range(40):
            rows = torch.randint(0, 3000, (200,), generator=generator).unique()
            slots = torch.empty_like(rows)
            out = RowGradient(torch.empty(50, dtype=torch.int64), torch.empty(50, DIM))
            gone = place_rows(hot, uses, values, rows, slots, out)
            assert (out.rows[:gone].diff() > 0).all()
            assert not torch.isin(out.rows[:gone], rows).any()
            sent.index_add_(0, out.rows[:gone], out.values[:gone])
            kept = slots >= 0
            assert torch.equal(hot[slots[kept]], rows[kept])
            values[slots[kept]] += 1.0
            put[rows[kept]] += 1.0
        left = torch.zeros(3000, DIM)
        left[hot[hot >= 0]] = values[hot >= 0]
        assert sent.any()
        assert torch.equal(put, sent + left)


def test_rows_that_come_often_outlive_a_stream_of_others(each_level):
    often = torch.arange(0, 40)
    for _ in each_level():
        hot, uses, values = cache(slots_for(160))
        for step in range(60):
            others = torch.arange(1000 + 100 * step, 1100 + 100 * step)
            rows = torch.cat([often, others])
            slots = torch.empty_like(rows)
            out = RowGradient(torch.empty(200, dtype=torch.int64), torch.empty(200, DIM))
            place_rows(hot, uses, values, rows, slots, out)
            values[slots[slots >= 0]] += 1.0
        assert torch.isin(often, hot).float().mean() > 0.9


@pytest.mark.parametrize("rows", [[2, 2], [3, 1], [-4, 1]])
def test_rows_that_do_not_ascend_are_refused_by_the_cache(each_level, rows):
    for _ in each_level():
        with pytest.raises(ValueError, match="must ascend"):
            place_rows(
                *cache(8),
                torch.tensor(rows),
                torch.empty(2, dtype=torch.int64),
                RowGradient(torch.empty(0, dtype=torch.int64), torch.empty(0, DIM)),
            )


def test_slots_are_four_times_a_power_of_two():
    assert [slots_for(rows) for rows in (0, 1, 4, 5, 8, 9, 1000)] == [4, 4, 4, 8, 8, 16, 1024]


@pytest.mark.parametrize("count", [0, 1, 7, 16, 65, 5000])
def test_large_values_are_the_plain_twins(each_level, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    values[count // 2 :: 7] = 0.0
    for bad in (None, count // 3):
        if bad is not None and count:
            values[bad] = torch.inf
        for threshold in (0.0, 1.5, 9.0):
            for room in (3, count):
                expected = torch.full((room,), -1)
                wanted = select_large_reference(values, threshold, expected)
                for level in each_level():
                    indices = torch.full((room,), -1)
                    assert select_large(values, threshold, indices) == wanted, level
                    assert torch.equal(indices, expected), level
