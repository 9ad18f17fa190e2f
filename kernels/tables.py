"""What the embedding kernels are told about a collection of tables, and how a batch is checked.

Symbols: B samples in the batch, T tables, N looked-up ids, D columns, R rows of all tables,
U distinct rows among the looked-up ones.

``indices`` are table-major with ids local to their table, as in TorchRec's KeyedJaggedTensor. For
two tables and a batch of two:

    table             0              1
    sample         0     1       0       1
    indices     [ 4  7 | 2 ]  [ 0 ] [ 3  3  5 ]
    offsets     [ 0, 2,  3,     4,    7 ]
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class TableLayout:
    """The tables of one storage, float32 [R, D], and what is done with their rows.

    With n the largest code of a table and s its scale, a looked-up weight w counts as
    s * clamp(round_half_even(w / s), -n - 1, n).
    """

    names: tuple[str, ...]
    """One for each table, for messages."""
    rows: tuple[int, ...]
    """Rows of each table; they lie one after the other."""
    largest: tuple[int, ...]
    """Largest code of each table; 0 leaves its weights as they are."""
    pooling: Literal["sum", "mean"] = "sum"
    """How a bag's rows become one vector."""
    granularity: Literal["table", "row"] = "table"
    """table: the scale is the table's entry in ``scales``. row: the row's max|w| / n."""
    exact: bool = False
    """Keep the scales of quantized tables at max|w| / n through every update."""
    clip: bool = False
    """Zero the gradient of a weight that was clamped into the grid."""


class RowGradient(NamedTuple):
    """Summed gradients of the distinct rows a batch looked up."""

    rows: Tensor
    """int64 [U], ascending row numbers in the storage."""
    values: Tensor
    """float32 [U, D]."""


def bag_layout(
    indices: Tensor, offsets: Tensor | None, num_tables: int
) -> tuple[Tensor | None, Tensor]:
    """Return the bag of each id (int64 [N]; None for one id a bag) and its table (int64 [N]).

    Raises:
        ValueError: indices and offsets do not describe whole bags of every table.
    """
    if offsets is None:
        if indices.numel() % num_tables:
            raise ValueError(
                f"{indices.numel()} indices do not divide into {num_tables} tables; "
                "pass offsets for bags of other than one id"
            )
        return None, torch.arange(num_tables).repeat_interleave(indices.numel() // num_tables)
    bags = offsets.numel() - 1
    if bags < 0 or bags % num_tables or int(offsets[0]) or int(offsets[-1]) != indices.numel():
        raise ValueError(
            f"offsets must hold num_tables * batch + 1 numbers from 0 to {indices.numel()}, the "
            f"number of indices; got {offsets.numel()} numbers for {num_tables} tables"
        )
    lengths = offsets.diff()
    if bags and int(lengths.min()) < 0:
        bag = int((lengths < 0).nonzero()[0])
        raise ValueError(f"offsets decrease after bag {bag}")
    bag_of_index = torch.arange(bags).repeat_interleave(lengths)
    return bag_of_index, bag_of_index // max(1, bags // num_tables)


def check_ids(
    indices: Tensor, table_of_index: Tensor, names: tuple[str, ...], rows: tuple[int, ...]
) -> None:
    """Raise IndexError naming table and id when an id lies outside its table.

    Args:
        indices: int32 or int64 [N].
        table_of_index: int64 [N].
        names: of each table.
        rows: of each table.
    """
    counts = torch.tensor(rows, dtype=torch.int64)
    bad = (indices < 0) | (indices >= counts[table_of_index])
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        table = int(table_of_index[at])
        raise IndexError(
            f"id {int(indices[at])} is outside table {names[table]!r} of {rows[table]} rows"
        )


def merge_rows(rows: Tensor, values: Tensor) -> RowGradient:
    """Sum the values of equal rows.

    Args:
        rows: int64 [N], with repeats.
        values: float32 [N, D].
    """
    distinct, inverse = torch.unique(rows, return_inverse=True)
    summed = torch.zeros(distinct.numel(), values.shape[1], dtype=values.dtype)
    return RowGradient(distinct, summed.index_add_(0, inverse, values))
