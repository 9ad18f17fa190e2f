"""What ranks ask of each other for a batch, as lists of integers, and what an owner makes of them.

A bag, here, is what one sample looks up in one piece of a table. Where each of them is a single
id, equal ones are asked for once: a click log's popular ids then travel once a batch.

A list, int32: the number of bags n, 1 where lengths follow, the bits of the asker's float32 scale
of each table in several pieces, the n lengths, and the rows as their owner numbers them.

Symbols: B samples of a rank, S sharded tables, P pieces of a rank, n bags.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqrm.kernels.tables import bag_layout, check_ids
from dqrm.models.placement import Placement

_HEAD = 2


@dataclass(frozen=True)
class TablePart:
    """The ids of a batch in some of its tables, laid out as a batch of these alone."""

    indices: Tensor
    offsets: Tensor | None


def take_tables(
    indices: Tensor, offsets: Tensor | None, tables: Sequence[int], num_tables: int
) -> TablePart:
    """Return the ids of some tables of a batch."""
    if len(tables) == num_tables:
        return TablePart(indices, offsets)
    if offsets is None:
        return TablePart(indices.view(num_tables, -1)[list(tables)].reshape(-1), None)
    size = (offsets.numel() - 1) // num_tables
    lengths = offsets.diff().view(num_tables, size)[list(tables)].reshape(-1)
    parts = [indices[int(offsets[t * size]) : int(offsets[(t + 1) * size])] for t in tables]
    return TablePart(torch.cat([indices[:0], *parts]), _offsets_of(lengths))


@dataclass(frozen=True)
class Asked:
    """The bags that a rank asks of others."""

    slot: Tensor
    """int64 [n]: which of the vectors asked for is the bag's."""
    bag: Tensor
    """int64 [n]: table * B + sample, to which the vector belongs."""
    counts: list[int]
    """Vectors asked of each rank."""
    lists: list[Tensor]
    """For each rank."""
    whole: bool
    """Whether there is one bag for every sample and table, in their order."""


@dataclass(frozen=True)
class Served:
    """The bags that all ranks ask of one, as a batch of its collection.

    A collection has as many bags in every table; where fewer are asked for, empty ones follow.
    """

    counts: list[int]
    """Vectors for each rank."""
    indices: Tensor
    offsets: Tensor
    place: Tensor
    """int64: where in [bags, P] each vector lies, in the order of the ranks."""
    bags: int
    scales: Tensor
    """float32: the largest scale of any rank of each table in several pieces."""


@dataclass(frozen=True)
class OwnGradient:
    """The gradient of a batch, as an update of this rank's own rows takes it."""

    indices: Tensor
    offsets: Tensor
    grad: Tensor
    """float32 [bags, P, D]."""


class Asker:
    """Sorts ids by the owners of their rows.

    Args:
        placement: of the tables.
        names: of all tables.
        rows: of all tables.
    """

    def __init__(self, placement: Placement, names: Sequence[str], rows: Sequence[int]) -> None:
        self._names = tuple(names[t] for t in placement.sharded)
        self._rows = tuple(rows[t] for t in placement.sharded)
        self._table_start = torch.tensor([0, *self._rows]).cumsum(0)[:-1]
        # Rows are numbered through by table; keys by rank, and within a rank as it numbers them.
        sizes = torch.tensor([piece.num_rows for piece in placement.pieces])
        self._key_of_piece = sizes.cumsum(0) - sizes
        by_rank = [
            sum(piece.num_rows for piece in placement.of_rank(rank))
            for rank in range(placement.world_size)
        ]
        if max(by_rank) >= 2**31:
            raise ValueError(
                f"{max(by_rank):,} rows of sharded tables on one rank are too many; start more"
            )
        self._key_of_rank = torch.tensor([0, *by_rank]).cumsum(0)
        starts, shifts = [], []
        for table, start in zip(placement.sharded, self._table_start.tolist(), strict=True):
            for piece in placement.of_table(table):
                starts.append(start + piece.first_row)
                shifts.append(int(self._key_of_piece[placement.pieces.index(piece)]) - starts[-1])
        self._piece_start, self._shift = torch.tensor(starts), torch.tensor(shifts)

    def ask(self, part: TablePart, scales: Tensor) -> Asked:
        """Return what to ask of each rank.

        Args:
            part: ids of the sharded tables.
            scales: float32, this rank's of tables in several pieces.

        Raises:
            IndexError: an id is outside its table; the message names table and id.
            ValueError: indices and offsets do not describe whole bags of every table.
        """
        indices = part.indices.long()
        bag, table = bag_layout(indices, part.offsets, len(self._rows))
        check_ids(indices, table, self._names, self._rows)
        row = indices + self._table_start[table]
        key = row + self._shift[torch.bucketize(row, self._piece_start, right=True) - 1]
        if bag is None:
            return self._ask_ids(key, torch.arange(len(key)), scales, True)
        if not bool((bag[1:] == bag[:-1]).any()):
            assert part.offsets is not None
            return self._ask_ids(key, bag, scales, len(key) == part.offsets.numel() - 1)
        return self._ask_bags(key, bag, scales)

    def _ask_ids(self, key: Tensor, bag: Tensor, scales: Tensor, whole: bool) -> Asked:
        keys, slot = torch.unique(key, return_inverse=True)
        counts = torch.searchsorted(keys, self._key_of_rank).diff().tolist()
        lists = [
            _list_of(count, scales, None, rows)
            for count, rows in zip(counts, self._rows_of(keys, counts), strict=True)
        ]
        return Asked(slot, bag, counts, lists, whole)

    def _ask_bags(self, key: Tensor, bag: Tensor, scales: Tensor) -> Asked:
        piece = torch.bucketize(key, self._key_of_piece, right=True) - 1
        order = piece.argsort(stable=True)
        key, bag, piece = key[order], bag[order], piece[order]
        new = torch.ones(len(key), dtype=torch.bool)
        new[1:] = (bag[1:] != bag[:-1]) | (piece[1:] != piece[:-1])
        first = new.nonzero().view(-1)
        lengths = torch.cat([first, torch.tensor([len(key)])]).diff()
        ranks = len(self._key_of_rank) - 1
        rank = torch.bucketize(key, self._key_of_rank, right=True) - 1
        ids = torch.bincount(rank, minlength=ranks).tolist()
        counts = torch.bincount(rank[first], minlength=ranks).tolist()
        lists = [
            _list_of(count, scales, own, rows)
            for count, own, rows in zip(
                counts, torch.split(lengths, counts), self._rows_of(key, ids), strict=True
            )
        ]
        return Asked(torch.arange(len(first)), bag[first], counts, lists, False)

    def _rows_of(self, keys: Tensor, counts: list[int]) -> list[Tensor]:
        """Return the rows of keys that are sorted by rank, as each owner numbers them."""
        starts = self._key_of_rank[:-1].tolist()
        return [part - start for part, start in zip(torch.split(keys, counts), starts, strict=True)]


def serve(lists: Sequence[Tensor], piece_rows: Sequence[int], num_scales: int) -> Served:
    """Return what all ranks ask of this one.

    Args:
        lists: int32, of every rank.
        piece_rows: rows of each piece here, P numbers.
        num_scales: tables in several pieces.
    """
    counts, all_lengths, all_rows, all_scales = [], [], [], []
    for numbers in lists:
        count, has_lengths = numbers[:_HEAD].tolist()
        scales, rest = numbers[_HEAD:].tensor_split([num_scales])
        lengths = rest[:count].long() if has_lengths else torch.ones(count, dtype=torch.int64)
        counts.append(count)
        all_scales.append(scales.view(torch.float32))
        all_lengths.append(lengths)
        all_rows.append(rest[count:] if has_lengths else rest)
    lengths, rows = torch.cat(all_lengths), torch.cat(all_rows).long()
    largest = torch.stack(all_scales).amax(0)
    sizes = torch.tensor(piece_rows, dtype=torch.int64)
    starts = sizes.cumsum(0) - sizes
    pieces = len(piece_rows)
    piece_of_id = torch.bucketize(rows, starts, right=True) - 1
    piece = piece_of_id[lengths.cumsum(0) - lengths]
    order = piece.argsort(stable=True)
    by_piece = torch.bincount(piece, minlength=pieces)
    bags = int(by_piece.max())
    position = torch.arange(len(piece)) - (by_piece.cumsum(0) - by_piece)[piece[order]]
    place = torch.empty_like(piece)
    place[order] = position * pieces + piece[order]
    padded = torch.zeros(pieces, bags, dtype=torch.int64)
    padded[piece[order], position] = lengths[order]
    local = rows - starts[piece_of_id]
    indices = local[piece_of_id.argsort(stable=True)]
    return Served(counts, indices, _offsets_of(padded.view(-1)), place, bags, largest)


def _list_of(count: int, scales: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
    head = torch.tensor([count, int(lengths is not None)], dtype=torch.int32)
    parts = [head, scales.view(torch.int32)]
    parts += [] if lengths is None else [lengths.to(torch.int32)]
    return torch.cat([*parts, rows.to(torch.int32)])


def _offsets_of(lengths: Tensor) -> Tensor:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets
