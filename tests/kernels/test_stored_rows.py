"""Rows in bfloat16 and in codes: every level stores the bits of the plain twin."""

import pytest
import torch

from dqrm.kernels.embedding import TableBatch
from dqrm.kernels.embedding_reference import TableBatchReference
from dqrm.kernels.row_storage import make_storage
from dqrm.kernels.rules import RowRule
from dqrm.kernels.tables import TableLayout

KINDS = ["bf16", "int8", "int4"]
DIMS = [1, 4, 5, 15, 16, 17, 32, 33, 64, 100, 128, 256]
ROWS = (1, 7, 500)


def twins(kind, dim, rows=ROWS, *, exact=True, clip=False, pooling="sum"):
    """The same empty tables twice, plain and native at the level in force."""
    on_grid = kind in ("int8", "int4")
    layout = TableLayout(
        names=tuple(f"t{number}" for number in range(len(rows))),
        rows=rows,
        largest=tuple(0 if on_grid else (7, 127, 7)[n % 3] for n in range(len(rows))),
        granularity="row" if on_grid else "table",
        exact=exact and not on_grid,
        clip=clip,
        pooling=pooling,
    )
    made = []
    for batch in (TableBatchReference, TableBatch):
        torch.manual_seed(5)
        storage = make_storage(kind, sum(rows), dim)
        scales = torch.ones(len(rows))
        made.append((batch(layout, storage, scales), storage, scales))
    return made


def assert_equal_bits(left, right, message):
    if left.dtype == torch.bfloat16:
        left, right = left.view(torch.int16), right.view(torch.int16)
    assert torch.equal(left, right), message


def write_both(made, rows, values):
    for batch, _, _ in made:
        batch.write_rows(rows, values)
        batch.rebuild()


def hostile_values(rows, dim):
    """Values of all magnitudes: denormal, huge, zero, not finite."""
    values = torch.randn(rows, dim) * torch.logspace(-46, 38, rows)[:, None]
    values[1] = 0.0
    values[2, -1] = float("nan")
    values[3, 0] = float("inf")
    values[4, 0] = -float("inf")
    values[5] = torch.finfo(torch.float32).max
    values[6] = -1e-45
    values[7] = 0.25
    return values


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_writing_and_reading(each_level, kind, dim):
    for level in each_level():
        made = twins(kind, dim, exact=False)
        torch.manual_seed(0)
        rows = torch.randperm(sum(ROWS))
        for scale in (1.0, 1.0 + 2**-9, 0.6, 0.4, 3.0):
            write_both(made, rows, scale * hostile_values(len(rows), dim))
            assert_equal_bits(made[0][1].tensor, made[1][1].tensor, (level, scale))
        # Codes are multiplied by their step; bfloat16 rows would be put on a grid.
        indices = torch.cat([torch.arange(n) for n in (1, 7, 500)])
        offsets = torch.tensor([0, 1, 8, 508])
        outs = [torch.empty(1, 3, dim) for _ in made]
        for (batch, _, _), out in zip(made, outs, strict=True):
            batch.lookup(indices, offsets, out)
        assert_equal_bits(outs[0].nan_to_num(), outs[1].nan_to_num(), level)


def random_batch(rows, samples, generator):
    lengths = torch.randint(0, 4, (len(rows) * samples,), generator=generator)
    counts = lengths.view(len(rows), samples).sum(dim=1).tolist()
    ids = [
        torch.randint(0, r, (n,), generator=generator) for r, n in zip(rows, counts, strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.cat(ids), offsets


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("dim", [4, 5, 16, 32, 37, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_training(each_level, kind, dim, name):
    for level in each_level():
        made = twins(kind, dim, clip=kind == "bf16", pooling="mean")
        generator = torch.Generator().manual_seed(1)
        write_both(made, torch.arange(sum(ROWS)), torch.randn(sum(ROWS), dim, generator=generator))
        rules = [RowRule(name, storage, weight_decay=0.01) for _, storage, _ in made]
        for step in range(4):
            indices, offsets = random_batch(ROWS, 60, generator)
            grad = torch.randn(60, len(ROWS), dim, generator=generator)
            outs = [torch.empty(60, len(ROWS), dim) for _ in made]
            for (batch, _, _), rule, out in zip(made, rules, outs, strict=True):
                batch.lookup(indices, offsets, out)
                batch.update(indices, offsets, grad, rule, 0.05)
            assert_equal_bits(outs[0], outs[1], (level, step, "lookup"))
            (_, plain, plain_scales), (_, native, native_scales) = made
            assert_equal_bits(plain.tensor, native.tensor, (level, step, "rows"))
            assert_equal_bits(plain_scales, native_scales, (level, step, "scales"))
            assert torch.equal(plain.clock, native.clock)
            for key, state in rules[0].state().items():
                assert_equal_bits(state, rules[1].state()[key], (level, step, key))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_batch_and_a_batch_of_indices_take_the_same_step(each_level, kind):
    for level in each_level():
        made = twins(kind, 16)
        write_both(made, torch.arange(sum(ROWS)), torch.ones(sum(ROWS), 16))
        (plain, _, _), (native, _, _) = made
        generator = torch.Generator().manual_seed(2)
        indices, offsets = random_batch(ROWS, 50, generator)
        grad = torch.randn(50, len(ROWS), 16, generator=generator)
        rows, values = native.row_gradient(indices, offsets, grad)
        plain.apply(rows, values, RowRule("adagrad", made[0][1]), 0.1)
        native.update(indices, offsets, grad, RowRule("adagrad", made[1][1]), 0.1)
        assert_equal_bits(made[0][1].tensor, made[1][1].tensor, level)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_does_not_matter(each_level, kind):
    stored = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in each_level():
                batch, storage, _ = twins(kind, 16, rows=(40, 30_000))[1]
                generator = torch.Generator().manual_seed(3)
                values = torch.randn(30_040, 16, generator=generator)
                batch.write_rows(torch.arange(30_040), values)
                batch.rebuild()
                indices, offsets = random_batch((40, 30_000), 10_000, generator)
                grad = torch.randn(10_000, 2, 16, generator=generator)
                batch.update(indices, offsets, grad, RowRule("adagrad", storage), 0.1)
                stored.append(storage.tensor)
    finally:
        torch.set_num_threads(before)
    for other in stored[1:]:
        assert_equal_bits(stored[0], other, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_leaves_rows_and_clock_alone(each_level, kind):
    for _ in each_level():
        batch, storage, _ = twins(kind, 16)[1]
        rule = RowRule("sgd", storage)
        before, clock = storage.tensor.clone(), storage.clock.clone()
        with pytest.raises(IndexError, match=r"id 7 is outside table 't1' of 7 rows"):
            batch.update(torch.tensor([0, 7, 3]), None, torch.ones(1, 3, 16), rule, 1.0)
        with pytest.raises(ValueError, match=r"row 508 is outside the 508 rows"):
            batch.write_rows(torch.tensor([0, 508]), torch.ones(2, 16))
        with pytest.raises(ValueError, match=r"row 3 follows row 3"):
            batch.apply(torch.tensor([3, 3]), torch.ones(2, 16), rule, 1.0)
        full = RowRule("adagrad", make_storage("fp32", sum(ROWS), 16))
        with pytest.raises(ValueError, match=r"state must be \[R, 1\] or \[R, D\], of the type"):
            batch.apply(torch.tensor([3]), torch.ones(1, 16), full, 1.0)
        assert torch.equal(storage.tensor, before)
        assert torch.equal(storage.clock, clock)
