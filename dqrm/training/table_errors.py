"""What rounding to the grid changes in each embedding table."""

from collections.abc import Iterable, Iterator

import torch

from dqrm.compress import grids
from dqrm.kernels.row_storage import CodeRows
from dqrm.models.embedding import ROWS_AT_ONCE, EmbeddingBagCollection
from dqrm.models.sizes import packed_table_bytes
from dqrm.tracking.measurements import TableMeasurement

_BLOCKS = 4
"""Blocks of ROWS_AT_ONCE rows looked at in a table, spread evenly: a second or two at most."""


def measured_tables(
    collections: Iterable[EmbeddingBagCollection], into: list[TableMeasurement]
) -> Iterator[EmbeddingBagCollection]:
    """Yield the collections, each after its tables have been measured ``into`` the list."""
    for collection in collections:
        into += [_measure(collection, number) for number in range(len(collection.tables))]
        yield collection


def _measure(collection: EmbeddingBagCollection, number: int) -> TableMeasurement:
    table, dim = collection.tables[number], collection.embedding_dim
    rounded = table.bits != 32 and not isinstance(collection.storage, CodeRows)
    return TableMeasurement(
        name=table.name,
        rows=table.num_rows,
        bits=table.bits,
        fp32_bytes=4 * table.num_rows * dim,
        packed_bytes=packed_table_bytes(table.num_rows, dim, table.bits, collection.granularity),
        relative_error=_relative_error(collection, number) if rounded else 0.0,
    )


def _relative_error(collection: EmbeddingBagCollection, number: int) -> float:
    """Return |W - Q(W)| / |W| over the blocks of one table; 0 for a table of zeros."""
    start, count = int(collection.table_start[number]), collection.tables[number].num_rows
    lost = total = 0.0
    for block in _spread(count):
        values = collection.storage.read(start + block)
        scale = collection.row_scale(values, torch.full((len(values),), number))
        codes = grids.quantize(values, scale, collection.largest[number])
        lost += float((values - grids.dequantize(codes, scale)).double().square().sum())
        total += float(values.double().square().sum())
    return (lost / total) ** 0.5 if total else 0.0


def _spread(count: int) -> Iterator[torch.Tensor]:
    """Yield int64 row numbers below ``count``: all of a small table, blocks of a large one."""
    if count <= _BLOCKS * ROWS_AT_ONCE:
        yield torch.arange(count)
        return
    for begin in torch.linspace(0, count - ROWS_AT_ONCE, _BLOCKS).long().tolist():
        yield torch.arange(begin, begin + ROWS_AT_ONCE)
