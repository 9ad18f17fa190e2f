"""All embedding tables of a model as one collection, trained on low-bit grids.

Symbols: B rows in the batch, T tables, N looked-up ids, D embedding_dim, R rows of all tables,
U distinct rows among the looked-up ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dqrm.compress import grids
from dqrm.kernels.embedding import EmbeddingTables, TableBatch
from dqrm.kernels.embedding_ops import embedding_lookup
from dqrm.kernels.embedding_reference import TableBatchReference
from dqrm.kernels.row_storage import CodeRows, RoundedRows, StorageKind, make_storage
from dqrm.kernels.tables import RowGradient, TableLayout, merge_rows

ROWS_AT_ONCE = 1 << 16
"""Rows drawn or packed at a time, a few megabytes in float32."""


@dataclass(frozen=True)
class Table:
    """One embedding table: its column's name, its rows and the bits it is trained at."""

    name: str
    num_rows: int
    bits: int


class EmbeddingBagCollection(nn.Module):
    """Embedding bags of all tables over one contiguous storage.

    Rows are quantized first and pooled second, so that a bag of several ids sees exactly the
    values a packed table holds (quantizing the pooled sum would clamp it into the range of a
    single row). Only looked-up rows are quantized; no copy of a table is ever made.

    ``indices`` are table-major with ids local to their table, as in TorchRec's
    KeyedJaggedTensor. For two tables and a batch of two:

        table             0              1
        sample         0     1       0       1
        indices     [ 4  7 | 2 ]  [ 0 ] [ 3  3  5 ]
        offsets     [ 0, 2,  3,     4,    7 ]

    Rows are read and written through ``storage``, as float32 whatever they are kept in; ``weight``
    is the tensor it keeps. A gradient reaches ``leaf`` as a sparse tensor of the looked-up rows;
    :meth:`row_gradient` hands it out with duplicates summed. A training loop that needs no
    autograd calls :meth:`lookup` and the row optimizer's ``update``, one native call each.

    Args:
        tables: the tables in the order of the batch.
        embedding_dim: D.
        pooling: how a bag's rows become one vector.
        granularity: one scale per table, or per row (then always exact).
        scale_period: 0 keeps the tables' scales exact at every step; T > 0 refreshes them by a
            scan every T training forwards (arXiv 2410.20046, section 3.2).
        ste: "pass" hands the gradient of a value to its weight; "clip" zeroes it where the
            weight was clamped into the grid.
        storage: what the rows are kept in. Rows kept as codes are values of their own grid, with
            one step a row, and are not fake-quantized.
        draw: give the rows their first values; otherwise they are to be written, and the scales
            refreshed, before they are used.
    """

    weight: Tensor
    table_start: Tensor
    largest: Tensor
    table_scale: Tensor
    forwards: Tensor

    def __init__(
        self,
        tables: Sequence[Table],
        embedding_dim: int,
        *,
        pooling: Literal["sum", "mean"] = "sum",
        granularity: Literal["table", "row"] = "table",
        scale_period: int = 0,
        ste: Literal["pass", "clip"] = "pass",
        storage: StorageKind = "fp32",
        draw: bool = True,
    ) -> None:
        super().__init__()
        self.tables = tuple(tables)
        self.embedding_dim = embedding_dim
        self.pooling = pooling
        self.granularity = granularity
        self.scale_period = scale_period
        counts = torch.tensor([table.num_rows for table in tables], dtype=torch.int64)
        bits = [table.bits for table in tables]
        self.num_rows = int(counts.sum())
        self.storage = make_storage(storage, self.num_rows, embedding_dim)
        if isinstance(self.storage, RoundedRows):
            self.register_buffer("weight", self.storage.tensor)
            self.register_buffer("clock", self.storage.clock)
        else:
            self.weight = nn.Parameter(self.storage.tensor)
        # A tensor of the rows' shape without memory, for rows that cannot require grad themselves.
        self._stand_in = torch.zeros(()).expand(self.num_rows, embedding_dim).requires_grad_()
        self.register_buffer("table_start", torch.cumsum(counts, 0) - counts, persistent=False)
        self.register_buffer("largest", grids.largest_codes(bits), persistent=False)
        self.register_buffer("table_scale", torch.ones(len(bits)))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        on_grid = self.storage.on_grid
        self._any_quantized = any(b != 32 for b in bits) and not on_grid
        self._exact = granularity == "table" and scale_period == 0 and self._any_quantized
        self._kernel = EmbeddingTables(
            TableLayout(
                names=tuple(table.name for table in tables),
                rows=tuple(table.num_rows for table in tables),
                largest=tuple(0 if on_grid or b == 32 else grids.largest_code(b) for b in bits),
                pooling=pooling,
                granularity=granularity,
                exact=self._exact,
                clip=ste == "clip",
            ),
            self.storage,
        )
        if draw:
            self.reset_parameters()

    @property
    def leaf(self) -> Tensor:
        """The tensor of shape [R, D] whose ``grad`` a backward fills; its values mean nothing."""
        return self.weight if self.weight.requires_grad else self._stand_in

    def reset_parameters(self) -> None:
        """Draw every table from U(-sqrt(1/rows), sqrt(1/rows)), as the reference DLRM does."""
        for table, start in zip(self.tables, self.table_start.tolist(), strict=True):
            bound = table.num_rows**-0.5
            # By blocks: a table that is kept in few bits never exists in FP32.
            for rows in row_blocks(start, table.num_rows):
                values = torch.empty(rows.numel(), self.embedding_dim).uniform_(-bound, bound)
                self.kernel.write_rows(rows, values)
        self.refresh_scales()

    def table_rows(self) -> list[Tensor]:
        """Return what is kept of each table, views of ``weight``."""
        return list(torch.split(self.weight.detach(), [table.num_rows for table in self.tables]))

    @property
    def kernel(self) -> TableBatch | TableBatchReference:
        """The loops over this collection's tensors."""
        return self._kernel.on(self.weight, self.table_scale)

    def refresh_scales(self) -> None:
        """Recompute maxima and scales from the weights; call after writing weights wholesale."""
        if self._exact:
            self.kernel.rebuild()
        elif self._any_quantized and self.granularity == "table":
            # aminmax makes no temporary of the table's size, abs().amax() would.
            bounds = [torch.aminmax(rows) for rows in self.table_rows()]
            max_abs = torch.stack([torch.maximum(-low, high) for low, high in bounds]).float()
            self.table_scale.copy_(grids.scale_of(max_abs, self.largest))

    def restore_scales(self) -> None:
        """Make the scales fit weights that were loaded together with ``table_scale``.

        Maintained maxima are a function of the weights and are rebuilt; a periodic scale is
        part of what was loaded and stays.
        """
        if self._exact:
            self.refresh_scales()

    def rows_changed(self, rows: Tensor) -> None:
        """Keep the exact scales exact after ``rows`` (int64 [U]) were written from outside."""
        if self._exact:
            self.kernel.rows_changed(rows)

    def row_scale(self, values: Tensor, table: Tensor) -> Tensor:
        """Return the scale of each looked-up row, float32 [N, 1].

        Args:
            values: float32 [N, D], the rows.
            table: int64 [N], the table of each row.
        """
        if self.granularity == "table":
            return self.table_scale[table].unsqueeze(1)
        return grids.scale_of(values.abs().amax(dim=1, keepdim=True), self.largest[table, None])

    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Look up, quantize and pool.

        Args:
            indices: int32 or int64 [N], table-major ids local to their table.
            offsets: int64 [T * B + 1] into indices; None when every bag holds exactly one id,
                then N = T * B.
            weights: float32 [N], factor of each id; receives no gradient.

        Returns:
            float32 [B, T, D]; empty bags are zero.

        Raises:
            IndexError: an id is outside its table; the message names table and id.
            ValueError: indices and offsets do not describe whole bags of every table.
        """
        self.count_forward()
        return embedding_lookup(
            self.leaf,
            self.weight,
            self.table_scale,
            indices,
            offsets,
            weights,
            self._kernel.handle,
        )

    def lookup(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        out: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        """As :meth:`forward` into ``out``, without autograd.

        Args:
            indices: as in forward, contiguous.
            offsets: as in forward.
            out: float32 [B, T, D]; samples may be any distance apart, as in ``buffer[:, 1:]``.
            weights: as in forward.
        """
        self.count_forward()
        self.kernel.lookup(indices, offsets, out, weights)

    def count_forward(self) -> None:
        """Count a training forward, and refresh periodic scales where that is due."""
        if self.training and self.scale_period:
            if int(self.forwards) % self.scale_period == 0:
                self.refresh_scales()
            self.forwards += 1

    def row_gradient(self) -> RowGradient | None:
        """Return the gradient of the last backward with duplicate rows summed, or None."""
        gradient = self.leaf.grad
        if gradient is None:
            return None
        rows, values = gradient._indices()[0], gradient._values()
        # Gradients of two backwards lie one after the other.
        return RowGradient(rows, values) if gradient.is_coalesced() else merge_rows(rows, values)

    def packed(self, table: int) -> tuple[Tensor, Tensor]:
        """Return one quantized table as it is exported.

        Codes are packed by blocks of rows: no copy of the table in float32 is made.

        Returns:
            Packed codes (see ``grids.pack``) and scales (float32 [1] or [rows]).
        """
        start, bits = int(self.table_start[table]), self.tables[table].bits
        blocks, scales = [], []
        for rows in row_blocks(start, self.tables[table].num_rows):
            if isinstance(self.storage, CodeRows):
                codes, scale = self.storage.packed(rows)
            else:
                values = self.storage.read(rows)
                by_row = self.row_scale(values, torch.full((len(values),), table))
                codes = grids.pack(grids.quantize(values, by_row, self.largest[table]), bits)
                scale = by_row[:, 0]
            blocks.append(codes)
            scales.append(scale)
        of_table = self.table_scale[table : table + 1].clone()
        return torch.cat(blocks), of_table if self.granularity == "table" else torch.cat(scales)

    def codes(self, table: int) -> tuple[Tensor, Tensor]:
        """Return one table's codes (float32 [rows, D]) and scales (float32 [1] or [rows])."""
        packed, scale = self.packed(table)
        return grids.unpack(packed, self.tables[table].bits, self.embedding_dim), scale

    def extra_repr(self) -> str:
        """Return what repr() adds to the class name."""
        bits = sorted({table.bits for table in self.tables})
        return (
            f"{len(self.tables)} tables, {self.num_rows} rows in {self.weight.dtype}, "
            f"embedding_dim={self.embedding_dim}, bits={bits}, granularity={self.granularity}"
        )


def row_blocks(start: int, count: int) -> Iterator[Tensor]:
    """Yield the numbers of ``count`` rows from ``start`` on, int64, some at a time."""
    for begin in range(start, start + count, ROWS_AT_ONCE):
        yield torch.arange(begin, min(begin + ROWS_AT_ONCE, start + count))
