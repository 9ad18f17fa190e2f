"""Embedding tables of which each rank holds only some: the module that takes emb_l's place.

Small tables lie in ``kept``, the same on all ranks; this rank's pieces of the large ones lie in
``owned``. Rows are quantized where they lie and pooled there. What crosses between ranks is the
matter of whoever sets ``remote``.

Symbols as in dqrm.models.embedding: B samples, T tables, D embedding_dim.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dqrm.models.embedding import ROWS_AT_ONCE, EmbeddingBagCollection, Table
from dqrm.models.placement import Piece, Placement


class Remote(Protocol):
    """Looks up what lies on several ranks."""

    def lookup(self, indices: Tensor, offsets: Tensor | None, out: Tensor) -> None:
        """Write the pooled vectors of a batch; arguments as of ShardedEmbeddingBags.lookup."""


@dataclass(frozen=True)
class HeldRows:
    """Rows of one table that are here."""

    collection: EmbeddingBagCollection
    table: int
    first_row: int
    """The first of them, in the table."""
    number: int
    """Of the collection's tables, which these rows are."""
    here: slice
    """Rows of the collection."""
    whole: slice
    """Rows of a collection of all tables."""


class ShardedEmbeddingBags(nn.Module):
    """One rank's part of a collection of tables.

    A freshly made one holds the values that the same seed gives a collection in one process.

    Args:
        tables: all tables, in the order of the batch.
        embedding_dim: D.
        placement: of these tables.
        rank: of this process.
        pooling: as in EmbeddingBagCollection.
        options: of the collections, but ``pooling``.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        embedding_dim: int,
        *,
        placement: Placement,
        rank: int,
        pooling: Literal["sum", "mean"] = "sum",
        **options: Any,
    ) -> None:
        super().__init__()
        self.tables = tuple(tables)
        self.embedding_dim = embedding_dim
        self.placement = placement
        self.rank = rank
        self.pooling: Literal["sum", "mean"] = pooling
        self._options = options
        self.pieces = placement.of_rank(rank)
        """This rank's, in the order of its rows."""
        self.remote: Remote | None = None
        """Does the look-ups; to be set before the first."""
        of_pieces = [
            Table(tables[p.table].name, p.num_rows, tables[p.table].bits) for p in self.pieces
        ]
        # Whoever looked up divides: an owner may see a part of a bag only.
        self.owned = EmbeddingBagCollection(
            of_pieces, embedding_dim, pooling="sum", draw=False, **options
        )
        self.kept: EmbeddingBagCollection | None = None
        if placement.replicated:
            tables_here = [tables[t] for t in placement.replicated]
            self.kept = EmbeddingBagCollection(
                tables_here, embedding_dim, pooling=pooling, draw=False, **options
            )
        self._draw()

    @property
    def num_rows(self) -> int:
        """Rows of all tables on all ranks."""
        return sum(table.num_rows for table in self.tables)

    def held(self) -> list[HeldRows]:
        """Return what is here of each table."""
        first_of_table = list(accumulate((table.num_rows for table in self.tables), initial=0))
        whole = [
            Piece(table, 0, self.tables[table].num_rows, self.rank)
            for table in self.placement.replicated
        ]
        found = []
        for collection, pieces in ((self.kept, whole), (self.owned, self.pieces)):
            start = 0
            for number, piece in enumerate(pieces):
                assert collection is not None
                first = first_of_table[piece.table] + piece.first_row
                here = slice(start, start + piece.num_rows)
                found.append(
                    HeldRows(
                        collection,
                        piece.table,
                        piece.first_row,
                        number,
                        here,
                        slice(first, first + piece.num_rows),
                    )
                )
                start = here.stop
        return found

    def _draw(self) -> None:
        """Draw as EmbeddingBagCollection.reset_parameters does and keep what is this rank's."""
        held, drawn = self.held(), 0
        for table in self.tables:
            bound = table.num_rows**-0.5
            for begin in range(0, table.num_rows, ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, table.num_rows - begin)
                values = torch.empty(count, self.embedding_dim).uniform_(-bound, bound)
                for part in held:
                    low = max(part.whole.start, drawn)
                    high = min(part.whole.stop, drawn + count)
                    if low < high:
                        rows = torch.arange(low, high) - part.whole.start + part.here.start
                        part.collection.kernel.write_rows(rows, values[low - drawn : high - drawn])
                drawn += count
        self.refresh_scales()

    def zero_first_rows(self, tables: Sequence[int]) -> None:
        """Make row 0 of some tables zero, where it lies here."""
        for part in self.held():
            if part.table in tables and part.first_row == 0:
                rows = torch.tensor([part.here.start])
                part.collection.kernel.write_rows(rows, torch.zeros(1, self.embedding_dim))
        self.refresh_scales()

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what is this rank's from the state of an EmbeddingBagCollection of all tables.

        Raises:
            ValueError: names, shapes or types do not agree.
        """
        names = set(self.owned.state_dict())
        if names != set(tensors):
            raise ValueError(
                f"the state has {', '.join(sorted(tensors))}; the tables {', '.join(sorted(names))}"
            )
        rows, own = tensors["weight"], self.owned.weight
        if rows.dtype != own.dtype or rows.shape != (self.num_rows, *own.shape[1:]):
            raise ValueError(
                f"the state has rows of {rows.dtype} {list(rows.shape)}; the tables of {own.dtype} "
                f"{[self.num_rows, *own.shape[1:]]}"
            )
        for part in self.held():
            part.collection.weight.detach()[part.here].copy_(tensors["weight"][part.whole])
            part.collection.table_scale[part.number] = tensors["table_scale"][part.table]
        for collection in self.collections():
            for name in names - {"weight", "table_scale"}:
                collection.state_dict()[name].copy_(tensors[name])
        self.restore_scales()

    def one_by_one(self, tensors: Mapping[str, Tensor]) -> Iterator[EmbeddingBagCollection]:
        """Yield each table as a collection of its own, in memory one after the other.

        Args:
            tensors: as for :meth:`load_whole`.
        """
        start = 0
        for number, table in enumerate(self.tables):
            alone = EmbeddingBagCollection(
                [table], self.embedding_dim, pooling=self.pooling, draw=False, **self._options
            )
            rows = {"weight": tensors["weight"][start : start + table.num_rows]}
            scale = {"table_scale": tensors["table_scale"][number : number + 1]}
            alone.load_state_dict({**tensors, **rows, **scale})
            alone.restore_scales()
            yield alone
            start += table.num_rows

    def collections(self) -> list[EmbeddingBagCollection]:
        """Return ``kept``, where there is one, and ``owned``."""
        return [self.owned] if self.kept is None else [self.kept, self.owned]

    def refresh_scales(self) -> None:
        """As of EmbeddingBagCollection; a table in pieces gets its scale at the next lookup."""
        for collection in self.collections():
            collection.refresh_scales()

    def restore_scales(self) -> None:
        """As of EmbeddingBagCollection."""
        for collection in self.collections():
            collection.restore_scales()

    def split_scales(self) -> Tensor:
        """Return this rank's scale of each table in several pieces, float32 [S]; 0 for none."""
        scales = torch.zeros(len(self.placement.split))
        for at, piece in enumerate(self.pieces):
            if piece.table in self.placement.split:
                scales[self.placement.split.index(piece.table)] = self.owned.table_scale[at]
        return scales

    def set_split_scales(self, scales: Tensor) -> None:
        """Make pieces use the scales of their whole tables: the largest of any rank.

        An exact scale is that of the piece again after the next update.

        Args:
            scales: float32 [S], as from :meth:`split_scales`.
        """
        for at, piece in enumerate(self.pieces):
            if piece.table in self.placement.split:
                self.owned.table_scale[at] = scales[self.placement.split.index(piece.table)]

    def lookup(self, indices: Tensor, offsets: Tensor | None, out: Tensor) -> None:
        """Write the pooled vectors of a batch to ``out``, float32 [B, T, D]; a collective call.

        Args:
            indices: int32 or int64 [N], table-major ids local to their table.
            offsets: int64 [T * B + 1], or None for one id a bag.
            out: samples may be any distance apart.
        """
        assert self.remote is not None
        self.remote.lookup(indices, offsets, out)

    def forward(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return the pooled vectors of a batch; see :meth:`lookup`."""
        bags = indices.numel() if offsets is None else offsets.numel() - 1
        out = torch.empty(bags // len(self.tables), len(self.tables), self.embedding_dim)
        self.lookup(indices, offsets, out)
        return out
