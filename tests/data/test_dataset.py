"""Batches: the right rows, in the right layout, restartable at any place."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dqrm.data import dataset as dataset_module
from dqrm.data.batch import Batch, make_batch
from dqrm.data.dataset import PreparedDataset, Split
from dqrm.data.manifest import DenseInfo, Manifest, SplitInfo, TableInfo
from dqrm.data.order import RowOrder
from dqrm.data.rows import Lists, Rows
from dqrm.data.schema import CategoricalColumn, Schema
from dqrm.data.shards import ShardWriter, shard_file

ONE_HOT = Schema(label="y", dense=("a", "b"), categorical=("u", "v", "w"))
MIXED = Schema(
    label="y",
    dense=("a",),
    categorical=("u", CategoricalColumn(name="tags", multi_hot=True), "v"),
)
SHARD_ROWS = ((40, 7), (100,), (1, 52))
"""Rows of each write, by shard."""


def write_dataset(folder: Path, schema: Schema) -> Rows:
    """A data set whose row i has label i % 2, dense and ids that depend on i."""
    shards, parts = [], []
    start = 0
    for number, sizes in enumerate(SHARD_ROWS):
        with ShardWriter(folder, shard_file("train", number), schema) as writer:
            for size in sizes:
                row = np.arange(start, start + size)
                dense = np.stack([row * (d + 1.0) for d in range(len(schema.dense))])
                ids = np.stack([row + 1000 * s for s in range(len(schema.one_hot))])
                offsets = np.concatenate([[0], np.cumsum(row % 3)])
                bags = Lists(offsets, np.repeat(row, row % 3).astype(np.int32))
                parts.append(
                    Rows(
                        (row % 2).astype(np.float32),
                        dense.astype(np.float32),
                        ids.astype(np.int32),
                        (bags,) * len(schema.multi_hot),
                    )
                )
                writer.write(parts[-1])
                start += size
            shards.append(writer.close())
    rows = Rows.concat(parts)
    Manifest(
        schema=schema,
        dense=tuple(DenseInfo(name=column.name) for column in schema.dense),
        tables=tuple(
            TableInfo(name=column.name, num_rows=3000, multi_hot=column.multi_hot)
            for column in schema.categorical
        ),
        splits={
            "train": SplitInfo(
                num_rows=len(rows), positives=int(rows.label.sum()), shards=tuple(shards)
            )
        },
    ).write(folder)
    return rows


@pytest.fixture(params=[ONE_HOT, MIXED], ids=["one-hot", "mixed"])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Split, Rows, Schema]:
    rows = write_dataset(tmp_path, request.param)
    return PreparedDataset.open(tmp_path).split("train"), rows, request.param


def assert_same(got: Batch, wanted: Batch) -> None:
    for name in ("dense", "indices", "offsets", "label"):
        a, b = getattr(got, name), getattr(wanted, name)
        if a is None or b is None:
            assert a is b, name
        else:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


def order_of(order: RowOrder) -> np.ndarray:
    parts = []
    for window in range(order.num_windows):
        read = np.concatenate([np.arange(*run) for run in order.runs(window)])
        parts.append(read[order.shuffle(window)])
    return np.concatenate(parts)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200, 1000])
@pytest.mark.parametrize("window_rows", [None, 3, 32, 100, 1 << 20])
def test_batches_hold_the_rows_of_the_order(
    prepared: tuple[Split, Rows, Schema], batch_size: int, window_rows: int | None
) -> None:
    split, rows, schema = prepared
    if window_rows is None:
        order, sequence = None, np.arange(200)
    else:
        order = RowOrder(200, 3, 1, window_rows)
        sequence = order_of(order)
    batches = list(split.batches(batch_size, order=order))
    assert len(batches) == split.num_batches(batch_size)
    for number, batch in enumerate(batches):
        chosen = sequence[number * batch_size : (number + 1) * batch_size]
        assert_same(batch, make_batch(rows.take(chosen), schema))


@pytest.mark.parametrize("batch_size", [1, 3, 64, 200, 1000])
@pytest.mark.parametrize("window_rows", [None, 3, 32, 100, 1 << 20])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_every_batch(
    prepared: tuple[Split, Rows, Schema], batch_size: int, window_rows: int | None, world_size: int
) -> None:
    split, rows, schema = prepared
    order = None if window_rows is None else RowOrder(200, 3, 1, window_rows)
    sequence = np.arange(200) if order is None else order_of(order)
    ranks = [
        split.batches(batch_size, order=order, start_batch=2, rank=rank, world_size=world_size)
        if split.num_batches(batch_size) >= 2
        else iter(())
        for rank in range(world_size)
    ]
    for number, shares in enumerate(zip(*ranks, strict=True), start=2):
        chosen = sequence[number * batch_size : (number + 1) * batch_size]
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        cuts = np.cumsum([0, *sizes])
        assert cuts[-1] == len(chosen)
        for share, start, stop in zip(shares, cuts, cuts[1:], strict=False):
            assert_same(share, make_batch(rows.take(chosen[start:stop]), schema))
            assert (share.whole_rows, share.first_row) == (len(chosen), start)


@pytest.mark.parametrize("window_rows", [32, 70, 1 << 20])
def test_restart_yields_the_same_batches(
    prepared: tuple[Split, Rows, Schema], window_rows: int
) -> None:
    split, _, _ = prepared
    order = RowOrder(200, 3, 1, window_rows)
    for chosen in (order, None):
        whole = list(split.batches(9, order=chosen))
        for start in range(len(whole) + 1):
            rest = list(split.batches(9, order=chosen, start_batch=start))
            assert len(rest) == len(whole) - start
            for got, wanted in zip(rest, whole[start:], strict=True):
                assert_same(got, wanted)


def test_restart_reads_no_window_before_the_place(
    prepared: tuple[Split, Rows, Schema], monkeypatch: pytest.MonkeyPatch
) -> None:
    split, _, _ = prepared
    read: list[int] = []
    original = Split._read

    def spy(self: Split, runs: list[tuple[int, int]], target: Rows) -> Rows:
        read.append(len(target))
        return original(self, runs, target)

    monkeypatch.setattr(Split, "_read", spy)
    order = RowOrder(200, 0, 0, 32)
    next(split.batches(10, order=order, start_batch=18))
    assert sum(read) <= 2 * 32


def test_layout_of_a_mixed_batch() -> None:
    rows = Rows(
        np.array([1, 0], np.float32),
        np.array([[0.5, 1.5]], np.float32),
        np.array([[10, 11], [20, 21]], np.int32),
        (Lists(np.array([0, 2, 2]), np.array([4, 1], np.int32)),),
    )
    batch = make_batch(rows, MIXED)
    assert batch.dense.tolist() == [[0.5], [1.5]]
    assert batch.label.tolist() == [1.0, 0.0]
    # Tables in the order of the schema: u, tags, v.
    assert batch.indices.tolist() == [10, 11, 4, 1, 20, 21]
    assert batch.offsets is not None
    assert batch.offsets.tolist() == [0, 1, 2, 4, 4, 5, 6]
    assert batch.indices.dtype == torch.int32
    assert batch.offsets.dtype == torch.int64


def test_layout_of_a_one_hot_batch() -> None:
    rows = Rows(
        np.zeros(2, np.float32),
        np.array([[1, 2], [3, 4]], np.float32),
        np.array([[10, 11], [20, 21], [30, 31]], np.int32),
    )
    batch = make_batch(rows, ONE_HOT)
    assert batch.offsets is None
    assert batch.indices.tolist() == [10, 11, 20, 21, 30, 31]
    assert batch.dense.tolist() == [[1, 3], [2, 4]]
    assert batch.dense.is_contiguous()


def test_batches_own_their_memory(prepared: tuple[Split, Rows, Schema]) -> None:
    split, _, _ = prepared
    for order in (None, RowOrder(200, 0, 0)):
        first, second = list(split.batches(150, order=order))
        kept = second.indices.clone()
        for tensor in (first.dense, first.indices, first.label):
            tensor.zero_()
        assert torch.equal(second.indices, kept)
        again = next(iter(split.batches(150, order=order)))
        assert again.indices.abs().sum() > 0


def test_few_shards_stay_open(
    prepared: tuple[Split, Rows, Schema], monkeypatch: pytest.MonkeyPatch
) -> None:
    split, rows, schema = prepared
    monkeypatch.setattr(dataset_module, "OPEN_SHARDS", 1)
    order = RowOrder(200, 0, 0, 64)
    batches = list(split.batches(200, order=order))
    assert_same(batches[0], make_batch(rows.take(order_of(order)), schema))
    assert len(split._open) == 1


def test_rows_of_a_range(prepared: tuple[Split, Rows, Schema]) -> None:
    split, rows, _ = prepared
    np.testing.assert_array_equal(split.rows(30, 60).one_hot, rows.one_hot[:, 30:60])
    assert len(split.rows()) == 200
    assert len(split.rows(190, 500)) == 10
    assert len(split.rows(5, 5)) == 0


def test_impossible_requests_are_refused(prepared: tuple[Split, Rows, Schema]) -> None:
    split, _, _ = prepared
    with pytest.raises(ValueError, match="batch_size=0"):
        split.batches(0)
    with pytest.raises(ValueError, match="start_batch=5: the split has 200 rows"):
        split.batches(50, start_batch=5)
    with pytest.raises(ValueError, match="the order is for 100 rows, not 200"):
        split.batches(50, order=RowOrder(100, 0, 0))
    with pytest.raises(ValueError, match="rank=2: must be from 0 to 1"):
        split.batches(50, rank=2, world_size=2)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, ONE_HOT)
    data = PreparedDataset.open(tmp_path)
    with pytest.raises(ValueError, match="no test split; it has train"):
        data.split("test")
    (tmp_path / "train/00001.arrow").unlink()
    with pytest.raises(ValueError, match=r"00001\.arrow: missing"):
        data.split("train")
