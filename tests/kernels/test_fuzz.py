"""Random and malformed batches into every native entry point of the embedding tables.

Each call must either be refused with an error people can act on, nothing written, or give what the
plain twin gives.
"""

import itertools
import math
import random
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from dqrm.kernels.code_layout import pack
from dqrm.kernels.embedding import TableBatch
from dqrm.kernels.embedding_reference import TableBatchReference
from dqrm.kernels.packed import PackedTables
from dqrm.kernels.row_storage import RowStorage, make_storage
from dqrm.kernels.rules import RowRule
from dqrm.kernels.tables import TableLayout

REFUSED = (ValueError, IndexError, TypeError)


def tensors_alike(left: Tensor, right: Tensor) -> bool:
    """Whether shapes, dtypes and bits are equal, with every NaN the same."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.is_floating_point():
        left, right = (torch.where(side.isnan(), math.nan, side) for side in (left, right))
    return torch.equal(*(_bytes(side) for side in (left, right)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


class Batch:
    """Indices, offsets and weights: right, or wrong in up to two places."""

    def __init__(self, rng: random.Random, rows: list[int], pooling: str) -> None:
        self.tables = len(rows)
        self.samples = rng.choice([0, 1, 2, 5, 130])
        bags = self.tables * self.samples
        one_each = rng.random() < 0.4
        longest = rng.choice([1, 3, 9])
        lengths = [1 if one_each else rng.randint(0, longest) for _ in range(bags)]
        ids = [
            rng.choice([0, rows[bag // self.samples] - 1, rng.randrange(rows[bag // self.samples])])
            for bag, length in enumerate(lengths)
            for _ in range(length)
        ]
        self.indices = torch.tensor(ids, dtype=rng.choice([torch.int32, torch.int64]))
        offsets = torch.tensor([0, *itertools.accumulate(lengths)])
        self.offsets = None if one_each and rng.random() < 0.7 else offsets
        self.weights = torch.randn(len(ids)) if pooling == "sum" and rng.random() < 0.3 else None
        self.right = rng.random() < 0.4
        if not self.right:
            for _ in range(rng.randint(1, 2)):
                rng.choice([self.spoil_indices, self.spoil_offsets, self.spoil_weights])(rng)

    def spoil_indices(self, rng: random.Random) -> None:
        ids = self.indices.clone()
        if ids.numel() and rng.random() < 0.5:
            wild = [-1, -(2**31), 2**31 - 1, 10**6]
            if ids.dtype == torch.int64:
                wild += [2**32, 2**63 - 1, -(2**63)]
            ids[rng.randrange(ids.numel())] = rng.choice(wild)
        else:
            ids = rng.choice(
                [
                    lambda: ids[: ids.numel() // 2],
                    lambda: torch.cat([ids, ids[:1]]),
                    lambda: ids.repeat_interleave(2)[::2],
                    lambda: ids.view(1, -1),
                    lambda: ids.to(rng.choice([torch.int16, torch.float32, torch.uint8])),
                    lambda: torch.tensor(3, dtype=ids.dtype),
                ]
            )()
        self.indices = ids

    def spoil_offsets(self, rng: random.Random) -> None:
        if self.offsets is None:
            self.offsets = torch.tensor([0, self.indices.numel()])
            return
        offsets = self.offsets.clone()
        if offsets.numel() and rng.random() < 0.5:
            at = rng.randrange(offsets.numel())
            offsets[at] = rng.choice([-1, 0, 7, 2**40, -(2**62), self.indices.numel() + 1])
        else:
            offsets = rng.choice(
                [
                    lambda: offsets[:-1],
                    lambda: offsets[1:],
                    lambda: offsets[:0],
                    lambda: offsets.flip(0),
                    lambda: torch.cat([offsets, offsets[-1:]]),
                    lambda: offsets.repeat_interleave(2)[::2],
                    lambda: offsets.to(rng.choice([torch.int32, torch.float64])),
                    lambda: offsets.view(-1, 1),
                ]
            )()
        self.offsets = offsets

    def spoil_weights(self, rng: random.Random) -> None:
        count = self.indices.numel()
        self.weights = rng.choice(
            [
                lambda: torch.randn(count + 1),
                lambda: torch.randn(max(0, count - 1)),
                lambda: torch.randn(2 * count)[::2],
                lambda: torch.randn(count, dtype=torch.float64),
                lambda: torch.randn(count, 1),
                lambda: torch.full((count,), rng.choice([math.nan, math.inf, -0.0, 1e-42])),
            ]
        )()


class Numbers:
    """Room for [B, T, D] floats with others around them, sometimes of a wrong kind."""

    def __init__(self, rng: random.Random, shape: tuple[int, int, int], right: bool) -> None:
        samples, tables, dim = shape
        self.room = torch.randn(samples + 2, tables + 2, dim)
        self.view = self.room[1:-1, 1:-1]
        if not right and rng.random() < 0.3:
            self.view = rng.choice(
                [
                    lambda: torch.randn(samples + 1, tables, dim),
                    lambda: torch.randn(samples, tables, dim + 1),
                    lambda: torch.randn(samples, tables * dim),
                    lambda: torch.randn(samples, tables, 2 * dim)[:, :, ::2],
                    lambda: torch.randn(samples, dim, tables).transpose(1, 2),
                    lambda: torch.randn(samples, tables, dim, dtype=torch.float64),
                    lambda: torch.randn(tables, samples, dim).transpose(0, 1),
                ]
            )()
            self.room = self.view
        self.before = self.room.clone()

    def unwritten(self) -> bool:
        return tensors_alike(self.room, self.before)

    def holds(self, expected: Tensor) -> bool:
        """Whether the numbers are these and nothing around them was written."""
        if not tensors_alike(self.view, expected):
            return False
        self.view.copy_(torch.zeros(self.view.shape))
        surroundings = self.room.clone()
        self.room.copy_(self.before)
        self.view.zero_()
        return tensors_alike(surroundings, self.room)


def outcome(call: Callable[[], object]) -> object:
    """What the call returned, or the error it was refused with."""
    try:
        return call()
    except REFUSED as error:
        return error


def fuzz_packed(rng: random.Random) -> None:
    rows = [rng.choice([1, 2, 50, 3000]) for _ in range(rng.randint(1, 4))]
    dim = rng.choice([1, 3, 4, 8, 16, 17, 32, 37, 64, 128])
    codes: list[Tensor] = []
    scales: list[Tensor | None] = []
    bits = [rng.choice([2, 4, 8, 16, 32]) for _ in rows]
    for count, width in zip(rows, bits, strict=True):
        half = 1 << (width - 1)
        if width == 32:
            codes.append(torch.randn(count, dim))
            scales.append(None)
            continue
        codes.append(pack(torch.randint(-half, half, (count, dim)), width))
        scales.append(torch.rand(rng.choice([1, count])))
    names = [f"t{table}" for table in range(len(rows))]
    pooling: Literal["sum", "mean"] = "sum" if rng.random() < 0.6 else "mean"
    tables = PackedTables(codes, scales, bits, names, dim, pooling)
    batch = Batch(rng, rows, pooling)
    out = Numbers(rng, (batch.samples, len(rows), dim), batch.right)
    arguments = batch.indices, batch.offsets
    got = outcome(lambda: tables.look_up(*arguments, weights=batch.weights, out=out.view))
    if isinstance(got, Exception):
        assert not batch.right, got
        assert out.unwritten()
        return
    assert out.holds(tables.look_up_reference(*arguments, weights=batch.weights))


class Twins:
    """The native tables and the plain ones on copies of the same rows and optimizer state."""

    def __init__(self, rng: random.Random) -> None:
        self.rows = [rng.choice([1, 2, 50, 700]) for _ in range(rng.randint(1, 4))]
        self.dim = rng.choice([1, 3, 4, 8, 16, 17, 32, 37, 64])
        kind = rng.choice(["fp32", "fp32", "bf16", "int8", "int4"])
        self.pooling: Literal["sum", "mean"] = "sum" if rng.random() < 0.6 else "mean"
        clip, exact = rng.random() < 0.3, rng.random() < 0.5
        largest = [0 if kind.startswith("int") else rng.choice([0, 1, 7, 127]) for _ in self.rows]
        layout = TableLayout(
            names=tuple(f"t{table}" for table in range(len(self.rows))),
            rows=tuple(self.rows),
            largest=tuple(largest),
            pooling=self.pooling,
            granularity="table" if exact else rng.choice(["table", "row"]),
            exact=exact,
            clip=clip,
        )
        total = sum(self.rows)
        values = torch.randn(total, self.dim) * rng.choice([1e-3, 1.0])
        name = rng.choice(["sgd", "adagrad", "adam"])
        self.storages: list[RowStorage] = []
        self.scales: list[Tensor] = []
        self.rules: list[RowRule] = []
        for _ in range(2):
            storage = make_storage(kind, total, self.dim)
            storage.write(torch.arange(total), values)
            self.storages.append(storage)
            self.scales.append(torch.full((len(self.rows),), 0.1))
            self.rules.append(RowRule(name, storage, eps=1e-3, weight_decay=0.01))
        self.native = TableBatch(layout, self.storages[0], self.scales[0])
        self.plain = TableBatchReference(layout, self.storages[1], self.scales[1])
        for tables in (self.native, self.plain):
            tables.rebuild()

    def tensors(self, side: int) -> list[Tensor]:
        storage, rule = self.storages[side], self.rules[side]
        clock = [storage.clock] if hasattr(storage, "clock") else []
        return [storage.tensor, self.scales[side], *clock, *rule.state().values()]

    def check(self, right: bool, native: Callable[[], object], plain: Callable[[], object]) -> None:
        """Both calls leave the same behind, or the native one nothing and an error."""
        before = [tensor.clone() for tensor in self.tensors(0)]
        got = outcome(native)
        if isinstance(got, Exception):
            assert not right, got
            for now, was in zip(self.tensors(0), before, strict=True):
                assert tensors_alike(now, was), f"written in spite of {got}"
            return
        expected = plain()
        if isinstance(got, tuple):
            for left, right_side in zip(got, expected, strict=True):  # type: ignore[call-overload]
                assert tensors_alike(left, right_side)
        for now, then in zip(self.tensors(0), self.tensors(1), strict=True):
            assert tensors_alike(now, then)


def fuzz_lookup(rng: random.Random) -> None:
    twins = Twins(rng)
    batch = Batch(rng, twins.rows, twins.pooling)
    shape = batch.samples, len(twins.rows), twins.dim
    out = Numbers(rng, shape, batch.right)
    expected = torch.empty(shape)
    arguments = batch.indices, batch.offsets

    def plain() -> None:
        twins.plain.lookup(*arguments, expected, batch.weights)
        assert out.holds(expected)

    twins.check(
        batch.right, lambda: twins.native.lookup(*arguments, out.view, batch.weights), plain
    )


def fuzz_row_gradient(rng: random.Random) -> None:
    twins = Twins(rng)
    batch = Batch(rng, twins.rows, twins.pooling)
    grad = Numbers(rng, (batch.samples, len(twins.rows), twins.dim), batch.right).view
    arguments = batch.indices, batch.offsets, grad, batch.weights
    twins.check(
        batch.right,
        lambda: tuple(twins.native.row_gradient(*arguments)),
        lambda: tuple(twins.plain.row_gradient(*arguments)),
    )


def fuzz_update(rng: random.Random) -> None:
    twins = Twins(rng)
    for _ in range(2):
        batch = Batch(rng, twins.rows, twins.pooling)
        grad = Numbers(rng, (batch.samples, len(twins.rows), twins.dim), batch.right).view
        first, last = (batch.indices, batch.offsets, grad), (0.1, batch.weights)
        native_rule, plain_rule = twins.rules
        twins.check(
            batch.right,
            lambda: twins.native.update(*first, native_rule, *last),  # noqa: B023
            lambda: twins.plain.update(*first, plain_rule, *last),  # noqa: B023
        )


def spoiled_rows(rng: random.Random, rows: Tensor, total: int) -> Tensor:
    rows = rows.clone()
    if rows.numel() and rng.random() < 0.5:
        rows[rng.randrange(rows.numel())] = rng.choice([-1, total, 2**40, -(2**63), 0])
        return rows
    changed: Tensor = rng.choice(
        [
            lambda: rows.flip(0),
            lambda: rows.repeat_interleave(2),
            lambda: rows.to(rng.choice([torch.int32, torch.float32])),
            lambda: rows.view(1, -1),
            lambda: rows[:-1],
        ]
    )()
    return changed


def fuzz_apply(rng: random.Random) -> None:
    twins = Twins(rng)
    total = sum(twins.rows)
    rows = torch.tensor(sorted(rng.sample(range(total), min(total, rng.choice([0, 1, 40])))))
    rows = rows.to(torch.int64)
    values = torch.randn(rows.numel(), twins.dim)
    right = rng.random() < 0.5
    if not right:
        if rng.random() < 0.7:
            rows = spoiled_rows(rng, rows, total)
        else:
            values = rng.choice([values.double(), values[:-1], values.view(-1), values[:, 1:]])
    native_rule, plain_rule = twins.rules
    twins.check(
        right,
        lambda: twins.native.apply(rows, values, native_rule, 0.1),
        lambda: twins.plain.apply(rows, values, plain_rule, 0.1),
    )


def fuzz_rows_changed(rng: random.Random) -> None:
    twins = Twins(rng)
    total = sum(twins.rows)
    rows = torch.tensor(sorted(rng.sample(range(total), min(total, 20))))
    values = torch.randn(rows.numel(), twins.dim)
    for storage in twins.storages:
        storage.write(rows, values)
    right = rng.random() < 0.5
    if not right:
        rows = spoiled_rows(rng, rows, total)
        # A row left out would leave the two with scales that are both wrong.
        rows = torch.cat([rows.flatten().to(torch.int64), torch.tensor([total])])
    twins.check(
        right, lambda: twins.native.rows_changed(rows), lambda: twins.plain.rows_changed(rows)
    )


ENTRIES = {
    "packed": fuzz_packed,
    "lookup": fuzz_lookup,
    "row_gradient": fuzz_row_gradient,
    "update": fuzz_update,
    "apply": fuzz_apply,
    "rows_changed": fuzz_rows_changed,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_batch_crashes_or_writes_what_it_should_not(fuzz, entry):
    fuzz(ENTRIES[entry])
