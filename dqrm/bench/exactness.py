"""Whether packed tables give the very bits of the training forward.

Random weights are looked up by the training forward, which quantizes rows on the way, and in
packed tables made of their codes, as an artifact holds them: each at every instruction set this
processor has. All outputs are held against the training forward of the first level, without
vectors, and differing bits are counted.
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dqrm.kernels.cpu import ISA_VARIABLE, available_levels, isa_level
from dqrm.models.embedding import EmbeddingBagCollection, Table
from dqrm.serving.packed import PackedEmbeddingBags

Granularity = Literal["table", "row"]
Bags = Literal["one id", "many ids"]

BITS: Sequence[Literal[2, 4, 8, 16]] = (2, 4, 8, 16)
ROWS = (100_000, 3_000, 40, 1)
"""Rows of the tables compared."""
DIMS = (16, 37, 64)
"""Widths compared, one after the other: one vector, one that fills no vector, several."""
LONGEST_BAG = 8
SAMPLES = 4096
"""Samples looked up at a time."""


@dataclass
class Comparison:
    """What one kind of table and batch gave at one instruction set."""

    level: str
    bits: int
    granularity: Granularity
    bags: Bags
    look_ups: int = 0
    packed_different_bits: int = 0
    training_different_bits: int = 0


def compare_exactness(
    look_ups: int, seed: int = 0, progress: Callable[[str], None] = lambda line: None
) -> list[Comparison]:
    """Compare at least ``look_ups`` random look-ups at every instruction set.

    They are divided evenly over bits, granularities, batches of one and of many ids a bag, and
    widths.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = list(itertools.product(BITS, get_args(Granularity), get_args(Bags)))
    share = -(-look_ups // (len(kinds) * len(DIMS)))
    results = []
    for bits, granularity, bags in kinds:
        levels = [Comparison(level, bits, granularity, bags) for level in _levels()]
        for dim in DIMS:
            _compare(levels, dim, share, generator)
        progress(f"{bits} bits, a scale a {granularity}, {bags} a bag")
        results += levels
    return results


def packed_twin(collection: EmbeddingBagCollection) -> PackedEmbeddingBags:
    """Return the packed tables of a collection, as its artifact would hold them."""
    codes: list[Tensor] = []
    scales: list[Tensor | None] = []
    for number, (table, rows) in enumerate(
        zip(collection.tables, collection.table_rows(), strict=True)
    ):
        if table.bits == 32:
            codes.append(rows.to(torch.float32, copy=True))
            scales.append(None)
            continue
        its_codes, scale = collection.packed(number)
        codes.append(its_codes)
        scales.append(scale)
    return PackedEmbeddingBags(
        collection.tables, codes, scales, collection.embedding_dim, collection.pooling
    )


def random_batch(
    rows: Sequence[int], samples: int, longest_bag: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Return indices and offsets of uniform ids in bags of 0 to ``longest_bag``; None: one each."""
    bags = len(rows) * samples
    if longest_bag is None:
        lengths = torch.ones(bags, dtype=torch.int64)
    else:
        lengths = torch.randint(0, longest_bag + 1, (bags,), generator=generator)
    counts = lengths.view(len(rows), samples).sum(dim=1).tolist()
    indices = torch.cat(
        [
            torch.randint(0, table_rows, (count,), generator=generator)
            for table_rows, count in zip(rows, counts, strict=True)
        ]
    )
    if longest_bag is None:
        return indices, None
    return indices, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def different_bits(left: Tensor, right: Tensor) -> int:
    """Return how many bits of two float32 tensors of one shape differ."""
    difference = left.contiguous().view(torch.uint8) ^ right.contiguous().view(torch.uint8)
    return int(_BITS_SET[difference.to(torch.int64)].sum())


_BITS_SET = torch.tensor([number.bit_count() for number in range(256)])


def _compare(
    levels: Sequence[Comparison], dim: int, look_ups: int, generator: torch.Generator
) -> None:
    """Add ``look_ups`` look-ups, and up to a batch more, in one collection to each level."""
    kind = levels[0]
    many = kind.bags == "many ids"
    tables = [Table(f"t{number}", rows, kind.bits) for number, rows in enumerate(ROWS)]
    collection = EmbeddingBagCollection(
        tables, dim, granularity=kind.granularity, pooling="mean" if many and dim % 2 else "sum"
    )
    with torch.no_grad():
        collection.leaf.normal_(generator=generator)
    collection.refresh_scales()
    contestants = [_contestants(collection, comparison.level) for comparison in levels]
    done = 0
    while done < look_ups:
        batch = random_batch(ROWS, SAMPLES, LONGEST_BAG if many else None, generator)
        done += batch[0].numel()
        with torch.no_grad():
            outputs = [(trained(*batch), packed(*batch)) for trained, packed in contestants]
        for comparison, (trained_output, packed_output) in zip(levels, outputs, strict=True):
            comparison.training_different_bits += different_bits(trained_output, outputs[0][0])
            comparison.packed_different_bits += different_bits(packed_output, outputs[0][0])
            comparison.look_ups += batch[0].numel()


def _levels() -> tuple[str, ...]:
    return available_levels() or (isa_level(),)


def _contestants(
    collection: EmbeddingBagCollection, level: str
) -> tuple[EmbeddingBagCollection, PackedEmbeddingBags]:
    """A copy of the collection and its packed twin, both bound to a level."""
    with _forced(level):
        trained, packed = copy.deepcopy(collection).eval(), packed_twin(collection)
        assert trained.kernel is not None
        assert packed.prepared() is not None
    return trained, packed


@contextmanager
def _forced(level: str) -> Iterator[None]:
    before = os.environ.get(ISA_VARIABLE)
    if level in available_levels():
        os.environ[ISA_VARIABLE] = level
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ISA_VARIABLE, None)
        else:
            os.environ[ISA_VARIABLE] = before
