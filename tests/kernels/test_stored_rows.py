"""Rows in bfloat16 and in codes: every level stores the bits of the plain twin."""

import pytest
import torch

from dqrm.kernels.embedding import TableBatch
from dqrm.kernels.embedding_reference import TableBatchReference
from dqrm.kernels.row_storage import make_storage
from dqrm.kernels.rules import RowRule
from dqrm.kernels.tables import TableLayout

KINDS = ["bf16", "int8", "int4"]
ROWS = (1, 7, 100)
NUM_ROWS = sum(ROWS)


def tables_of(kind, dim, batch, rows=ROWS, *, exact=True, clip=False, pooling="sum"):
    """Empty tables of a kind: plain, or native at the level in force."""
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
    torch.manual_seed(5)
    storage = make_storage(kind, sum(rows), dim)
    scales = torch.ones(len(rows))
    return batch(layout, storage, scales), storage, scales


def assert_same_everywhere(each_level, steps):
    """Run ``steps(batch_class)``, a generator of tensors, plainly and at every level."""
    expected = [(name, tensor.clone()) for name, tensor in steps(TableBatchReference)]
    for level in each_level():
        for (name, right), (_, left) in zip(expected, steps(TableBatch), strict=True):
            if left.dtype == torch.bfloat16:
                left, right = left.view(torch.int16), right.view(torch.int16)
            assert torch.equal(left, right), f"{name} at level {level}"


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


@pytest.mark.parametrize("dim", [1, 4, 5, 15, 16, 17, 32, 33, 64, 100, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_writing_and_reading(each_level, kind, dim):
    torch.manual_seed(0)
    rows, values = torch.randperm(NUM_ROWS), hostile_values(NUM_ROWS, dim)
    everything = torch.cat([torch.arange(n) for n in ROWS])
    offsets = torch.tensor([0, 1, 8, NUM_ROWS])

    def steps(batch_class):
        batch, storage, _ = tables_of(kind, dim, batch_class, exact=False)
        out = torch.empty(1, 3, dim)
        for factor in (1.0, 1.0 + 2**-9, 0.6, 0.4, 3.0):
            batch.write_rows(rows, factor * values)
            yield f"rows times {factor}", storage.tensor
            batch.lookup(everything, offsets, out)
            yield "their sum", out.nan_to_num()

    assert_same_everywhere(each_level, steps)


def random_batch(rows, samples, generator):
    lengths = torch.randint(0, 4, (len(rows) * samples,), generator=generator)
    counts = lengths.view(len(rows), samples).sum(dim=1).tolist()
    ids = [
        torch.randint(0, r, (n,), generator=generator) for r, n in zip(rows, counts, strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.cat(ids), offsets


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("dim", [5, 16, 32, 37, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_training(each_level, kind, dim, name):
    def steps(batch_class):
        clip = kind == "bf16"
        batch, storage, scales = tables_of(kind, dim, batch_class, clip=clip, pooling="mean")
        generator = torch.Generator().manual_seed(1)
        batch.write_rows(torch.arange(NUM_ROWS), torch.randn(NUM_ROWS, dim, generator=generator))
        batch.rebuild()
        rule = RowRule(name, storage, weight_decay=0.01)
        for step in range(4):
            indices, offsets = random_batch(ROWS, 30, generator)
            out = torch.empty(30, len(ROWS), dim)
            batch.lookup(indices, offsets, out)
            yield f"lookup {step}", out
            grad = torch.randn(30, len(ROWS), dim, generator=generator)
            batch.update(indices, offsets, grad, rule, 0.05)
            yield f"rows {step}", storage.tensor
            yield f"scales {step}", scales
            yield f"clock {step}", storage.clock
            for key, state in rule.state().items():
                yield f"{key} {step}", state

    assert_same_everywhere(each_level, steps)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_batch_takes_the_same_step_as_its_indices(each_level, kind):
    generator = torch.Generator().manual_seed(2)
    indices, offsets = random_batch(ROWS, 50, generator)
    grad = torch.randn(50, len(ROWS), 16, generator=generator)
    for level in each_level():
        stored = []
        for merged in (False, True):
            batch, storage, _ = tables_of(kind, 16, TableBatch)
            batch.write_rows(torch.arange(NUM_ROWS), torch.ones(NUM_ROWS, 16))
            batch.rebuild()
            rule = RowRule("adagrad", storage)
            if merged:
                batch.apply(*batch.row_gradient(indices, offsets, grad), rule, 0.1)
            else:
                batch.update(indices, offsets, grad, rule, 0.1)
            stored.append(storage.tensor)
        assert torch.equal(*stored), level


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_does_not_matter(each_level, kind):
    stored = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in each_level():
                batch, storage, _ = tables_of(kind, 16, TableBatch, (40, 30_000))
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
        assert torch.equal(stored[0], other)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_leaves_rows_and_clock_alone(each_level, kind):
    for _ in each_level():
        batch, storage, _ = tables_of(kind, 16, TableBatch)
        rule = RowRule("sgd", storage)
        before, clock = storage.tensor.clone(), storage.clock.clone()
        with pytest.raises(IndexError, match=r"id 7 is outside table 't1' of 7 rows"):
            batch.update(torch.tensor([0, 7, 3]), None, torch.ones(1, 3, 16), rule, 1.0)
        with pytest.raises(ValueError, match=r"row 108 is outside the 108 rows"):
            batch.write_rows(torch.tensor([0, 108]), torch.ones(2, 16))
        with pytest.raises(ValueError, match=r"row 3 follows row 3"):
            batch.apply(torch.tensor([3, 3]), torch.ones(2, 16), rule, 1.0)
        full = RowRule("adagrad", make_storage("fp32", sum(ROWS), 16))
        with pytest.raises(ValueError, match=r"state must be \[R, 1\] or \[R, D\], of the type"):
            batch.apply(torch.tensor([3]), torch.ones(1, 16), full, 1.0)
        assert torch.equal(storage.tensor, before)
        assert torch.equal(storage.clock, clock)
