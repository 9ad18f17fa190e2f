"""Deduplication of rows: the oracle's bits at every level and for any number of threads."""

import pytest
import torch

from dqrm.kernels.merge_rows import merge_rows, merge_rows_reference


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    # Magnitudes far apart, so that sums in another order have other bits.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 10.0 ** torch.randint(
        -6, 6, shape, generator=generator
    )


def rows_below(bound: int, count: int) -> torch.Tensor:
    return torch.randint(0, bound, (count,), generator=torch.Generator().manual_seed(count))


def summed_one_by_one(rows: torch.Tensor, values: torch.Tensor) -> dict[int, torch.Tensor]:
    sums: dict[int, torch.Tensor] = {}
    for row, value in zip(rows.tolist(), values, strict=True):
        sums[row] = sums.get(row, torch.zeros(values.shape[1])) + value
    return sums


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


CASES = {
    "no-rows": torch.zeros(0, dtype=torch.int64),
    "one-row": torch.tensor([5]),
    "row-zero-only": torch.zeros(9, dtype=torch.int64),
    "all-equal": torch.full((3000,), 77),
    "all-distinct": torch.arange(3000).flip(0),
    "few-distinct": rows_below(7, 2000),
    "many-distinct": rows_below(10**6, 5000),
    "beyond-2-to-31": rows_below(2**40, 3000) // 100 * 100,
    "table-after-table": torch.cat([rows_below(3, 500), 3 + rows_below(2**33, 500)]).sort()[0],
}


@pytest.mark.parametrize("dim", [1, 4, 7, 16, 33, 100])
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_sums_have_the_bits_of_adding_one_by_one(each_level, rows, dim):
    values = random(len(rows), dim)
    expected = merge_rows_reference(rows, values)
    for level in each_level():
        got = merge_rows(rows, values)
        assert torch.equal(got.rows, expected.rows), level
        assert torch.equal(bits(got.values), bits(expected.values)), level


def test_the_oracle_adds_in_the_order_of_occurrence(each_level):
    rows, values = rows_below(5, 200), random(200, 3)
    sums = summed_one_by_one(rows, values)
    for _ in each_level():
        for merged in (merge_rows_reference(rows, values), merge_rows(rows, values)):
            assert merged.rows.tolist() == sorted(sums)
            assert torch.equal(merged.values, torch.stack([sums[row] for row in sorted(sums)]))


def test_results_do_not_depend_on_the_threads(each_level):
    rows = torch.cat([rows_below(50_000, 70_000), torch.full((30_000,), 123), rows_below(9, 5000)])
    values = random(len(rows), 5)
    expected = merge_rows_reference(rows, values)
    before = torch.get_num_threads()
    try:
        for level in each_level():
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                got = merge_rows(rows, values)
                assert torch.equal(got.rows, expected.rows), level
                assert torch.equal(bits(got.values), bits(expected.values)), level
    finally:
        torch.set_num_threads(before)


def test_special_values_stay_in_their_row(each_level):
    rows = torch.tensor([3, 1, 3, 2, 2, 0, 0])
    values = torch.tensor([torch.nan, 1.0, 1.0, torch.inf, -torch.inf, 1e-45, 1e-45]).unsqueeze(1)
    for _ in each_level():
        merged = merge_rows(rows, values)
        assert merged.rows.tolist() == [0, 1, 2, 3]
        assert merged.values[0, 0] == 2 * values[5, 0]
        assert merged.values[1, 0] == 1.0
        assert merged.values[2:].isnan().all()


def test_results_go_where_the_caller_wants_them_and_nowhere_else(each_level):
    rows, values = rows_below(20, 50), random(51, 6)[1:]
    expected = merge_rows_reference(rows, values)
    for _ in each_level():
        out_rows = torch.full((60,), -7)
        out_values = torch.full((60, 6), 7.0)
        got = merge_rows(rows, values, out_rows=out_rows, out_values=out_values)
        assert got.rows.data_ptr() == out_rows.data_ptr()
        assert got.values.data_ptr() == out_values.data_ptr()
        count = len(expected.rows)
        assert torch.equal(out_rows[:count], expected.rows)
        assert torch.equal(out_values[:count], expected.values)
        assert (out_rows[count:] == -7).all()
        assert (out_values[count:] == 7.0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": torch.tensor([4, -3, 1])}, "rows: -3 "),
        (
            {"rows": torch.tensor([1, 2, 3], dtype=torch.int32)},
            r"rows: must be int64 \[N\], is int",
        ),
        ({"values": torch.zeros(2, 4)}, r"values: must be float32 \[3, D\], is float32 \[2, 4\]"),
        ({"values": torch.zeros(3, 4).double()}, r"values: must be float32 .* is float64"),
        (
            {"out_rows": torch.zeros(2, dtype=torch.int64)},
            "out_rows: must be int64 with room for 3",
        ),
        ({"out_values": torch.zeros(9, 5)}, r"out_values: .* room for \[3, 4\]"),
        ({"out_values": torch.zeros(4, 9).T}, r"out_values: must be contiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused_and_nothing_is_written(each_level, arguments, message):
    for _ in each_level():
        given = {
            "rows": torch.tensor([4, 3, 1]),
            "values": torch.ones(3, 4),
            "out_rows": torch.zeros(3, dtype=torch.int64),
            "out_values": torch.zeros(3, 4),
        } | arguments
        with pytest.raises(ValueError, match=message):
            merge_rows(**given)
        assert not given["out_rows"].any()
        assert not given["out_values"].any()


def test_rows_that_no_sorting_key_can_hold_are_refused(each_level):
    rows = torch.tensor([2**62, 1, 2, 3, 4])
    for _ in each_level():
        with pytest.raises(ValueError, match="5 rows below 2\\^63 do not fit a 64-bit sorting key"):
            merge_rows(rows, torch.zeros(5, 2))
