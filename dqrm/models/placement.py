"""Where each embedding table lies: on every rank, on one, or its rows shared out among several.

A pure function of the tables and the number of ranks, so that all ranks come to the same result
without a word.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Piece:
    """Rows of one table that lie on one rank."""

    table: int
    first_row: int
    num_rows: int
    rank: int


@dataclass(frozen=True)
class Placement:
    """Pieces of the tables that are not on every rank.

    A rank's rows are numbered through its pieces, in their order.
    """

    num_tables: int
    world_size: int
    pieces: tuple[Piece, ...]
    """By rank, then by table and first row."""

    @cached_property
    def sharded(self) -> tuple[int, ...]:
        """Tables that are in pieces, ascending."""
        return tuple(sorted({piece.table for piece in self.pieces}))

    @cached_property
    def replicated(self) -> tuple[int, ...]:
        """Tables that every rank has, ascending."""
        return tuple(sorted(set(range(self.num_tables)) - set(self.sharded)))

    @cached_property
    def split(self) -> tuple[int, ...]:
        """Tables in more than one piece, ascending."""
        tables = [piece.table for piece in self.pieces]
        return tuple(table for table in self.sharded if tables.count(table) > 1)

    def of_rank(self, rank: int) -> tuple[Piece, ...]:
        """Return the pieces of a rank, in the order in which its rows are numbered."""
        return tuple(piece for piece in self.pieces if piece.rank == rank)

    def of_table(self, table: int) -> tuple[Piece, ...]:
        """Return the pieces of a table, in the order of its rows."""
        return tuple(
            sorted(
                (piece for piece in self.pieces if piece.table == table),
                key=lambda piece: piece.first_row,
            )
        )

    def describe(self, names: Sequence[str], rank: int) -> str:
        """Return what lies on a rank alone, as a person reads it."""
        texts = []
        for piece in self.of_rank(rank):
            name = names[piece.table]
            if piece.table in self.split:
                name += f"[{piece.first_row:,}:{piece.first_row + piece.num_rows:,}]"
            texts.append(name)
        return ", ".join(texts) or "nothing"


def place_tables(
    rows: Sequence[int], lookups: Sequence[int], world_size: int, shard_over_rows: int
) -> Placement:
    """Share out the large tables among ranks.

    A table with more rows than a rank's fair share is cut into as few pieces of equal size as do
    not exceed it. Then the largest piece goes to the rank with the least load, and so on: the
    longest-processing-time rule, at most 4/3 of the best possible load. Load is the share of the
    sharded rows plus the share of the ids looked up in them. Pieces of one table go to different
    ranks.

    Args:
        rows: of each table.
        lookups: ids looked up in each table in one pass over the data; only their ratios count.
        world_size: number of ranks.
        shard_over_rows: tables with more rows than this are sharded.

    Returns:
        Either no pieces at all, or at least one for every rank.

    Raises:
        ValueError: the sharded tables have too few rows to give every rank some.
    """
    sharded = [t for t, count in enumerate(rows) if count > shard_over_rows]
    all_rows = sum(rows[t] for t in sharded)
    all_lookups = max(1, sum(lookups[t] for t in sharded))
    fair = max(1, -(-all_rows // world_size))
    parts: list[tuple[float, int, int, int]] = []
    for t in sharded:
        count = -(-rows[t] // fair)
        bounds = [rows[t] * n // count for n in range(count + 1)]
        for first, end in itertools.pairwise(bounds):
            share = (end - first) / all_rows
            load = share + lookups[t] / all_lookups * (end - first) / rows[t]
            parts.append((load, t, first, end - first))
    if sharded and len(parts) < world_size:
        raise ValueError(
            f"{all_rows} rows of sharded tables are too few for {world_size} processes; raise "
            "exchange.shard_over_rows, or set exchange.placement=replicate"
        )
    loads = [0.0] * world_size
    holders: dict[int, set[int]] = {}
    pieces = []
    for load, table, first, count in sorted(parts, key=lambda part: (-part[0], *part[1:])):
        taken = holders.setdefault(table, set())
        rank = min((r for r in range(world_size) if r not in taken), key=lambda r: (loads[r], r))
        loads[rank] += load
        taken.add(rank)
        pieces.append(Piece(table, first, count, rank))
    pieces.sort(key=lambda piece: (piece.rank, piece.table, piece.first_row))
    return Placement(len(rows), world_size, tuple(pieces))
