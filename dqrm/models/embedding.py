"""All embedding tables of a model as one collection, trained on low-bit grids.

Symbols: B rows in the batch, T tables, N looked-up ids, D embedding_dim, R rows of all tables,
U distinct rows among the looked-up ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqrm.compress import grids
from dqrm.compress.maxima import MaxTree
from dqrm.models.row_storage import CodeRows, RoundedRows, StorageKind, make_storage


@dataclass(frozen=True)
class Table:
    """One embedding table: its column's name, its rows and the bits it is trained at."""

    name: str
    num_rows: int
    bits: int


class RowGradient(NamedTuple):
    """Summed gradients of the distinct rows a batch looked up."""

    rows: Tensor
    """int64 [U], ascending global row numbers."""
    values: Tensor
    """float32 [U, D]."""


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
    :meth:`row_gradient` hands it out with duplicates summed, and whoever writes rows reports them
    to :meth:`rows_changed`.

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
    """

    weight: Tensor
    table_start: Tensor
    largest: Tensor
    quantized: Tensor
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
    ) -> None:
        super().__init__()
        self.tables = tuple(tables)
        self.embedding_dim = embedding_dim
        self.pooling = pooling
        self.granularity = granularity
        self.scale_period = scale_period
        self.ste = ste
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
        self.register_buffer(
            "quantized", torch.tensor([b != 32 for b in bits], dtype=torch.bool), persistent=False
        )
        self.register_buffer("table_scale", torch.ones(len(bits)))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self._any_quantized = any(b != 32 for b in bits) and not self.storage.on_grid
        self._all_quantized = all(b != 32 for b in bits)
        self.maxima = (
            MaxTree([table.num_rows for table in tables])
            if self._any_quantized and granularity == "table" and scale_period == 0
            else None
        )
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
            end = start + table.num_rows
            for begin in range(start, end, 1 << 16):
                rows = torch.arange(begin, min(begin + (1 << 16), end))
                values = torch.empty(rows.numel(), self.embedding_dim).uniform_(-bound, bound)
                self.storage.write(rows, values)
        self.refresh_scales()

    def table_rows(self) -> list[Tensor]:
        """Return what is kept of each table, views of ``weight``."""
        return list(torch.split(self.weight.detach(), [table.num_rows for table in self.tables]))

    def refresh_scales(self) -> None:
        """Recompute maxima and scales from the weights; call after writing weights wholesale."""
        if self.maxima is not None:
            self.maxima.rebuild(self.weight.detach())
            max_abs = self.maxima.table_max
        elif self._any_quantized and self.granularity == "table":
            # aminmax makes no temporary of the table's size, abs().amax() would.
            bounds = [torch.aminmax(rows) for rows in self.table_rows()]
            max_abs = torch.stack([torch.maximum(-low, high) for low, high in bounds]).float()
        else:
            return
        self.table_scale.copy_(grids.scale_of(max_abs, self.largest))

    def restore_scales(self) -> None:
        """Make the scales fit weights that were loaded together with ``table_scale``.

        Maintained maxima are a function of the weights and are rebuilt; a periodic scale is
        part of what was loaded and stays.
        """
        if self.maxima is not None:
            self.refresh_scales()

    def rows_changed(self, rows: Tensor) -> None:
        """Keep the exact scales exact after ``rows`` (int64 [U], distinct) were written."""
        if self.maxima is not None:
            self.maxima.update(rows, self.storage.read(rows), self.table_start)
            self.table_scale.copy_(grids.scale_of(self.maxima.table_max, self.largest))

    def row_scale(self, values: Tensor, table: Tensor) -> Tensor:
        """Return the scale of each looked-up row, float32 [N, 1].

        Args:
            values: float32 [N, D], the rows.
            table: int64 [N], the table of each row.
        """
        if self.granularity == "table":
            return self.table_scale[table].unsqueeze(1)
        return grids.scale_of(values.abs().amax(dim=1, keepdim=True), self.largest[table, None])

    def forward(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Look up, quantize and pool.

        Args:
            indices: int32 or int64 [N], table-major ids local to their table.
            offsets: int64 [T * B + 1] into indices; None when every bag holds exactly one id,
                then N = T * B.

        Returns:
            float32 [B, T, D]; empty bags are zero.

        Raises:
            IndexError: an id is outside its table; the message names table and id.
        """
        if self.training and self.scale_period:
            if int(self.forwards) % self.scale_period == 0:
                self.refresh_scales()
            self.forwards += 1
        bag_of_index, table_of_index = bag_layout(indices, offsets, len(self.tables))
        check_ids(indices, table_of_index, self.tables)
        rows = indices.to(torch.int64) + self.table_start[table_of_index]
        pooled: Tensor = _Lookup.apply(self.leaf, self, rows, table_of_index, offsets, bag_of_index)  # type: ignore[no-untyped-call]
        batch = pooled.shape[0] // len(self.tables)
        return pooled.view(len(self.tables), batch, self.embedding_dim).transpose(0, 1)

    def row_gradient(self) -> RowGradient | None:
        """Return the gradient of the last backward with duplicate rows summed, or None."""
        gradient = self.leaf.grad
        if gradient is None:
            return None
        return merge_rows(gradient._indices()[0], gradient._values())

    def codes(self, table: int) -> tuple[Tensor, Tensor]:
        """Return one table's codes (float32 [rows, D]) and scales (float32 [1] or [rows])."""
        start = int(self.table_start[table])
        rows = torch.arange(start, start + self.tables[table].num_rows)
        if isinstance(self.storage, CodeRows):
            return self.storage.codes(rows)
        values = self.storage.read(rows)
        scale = self.row_scale(values, torch.full((len(values),), table))
        codes = grids.quantize(values, scale, self.largest[table])
        return codes, self.table_scale[table : table + 1] if self.granularity == "table" else scale[
            :, 0
        ]

    def extra_repr(self) -> str:
        """Return what repr() adds to the class name."""
        bits = sorted({table.bits for table in self.tables})
        return (
            f"{len(self.tables)} tables, {self.num_rows} rows in {self.weight.dtype}, "
            f"embedding_dim={self.embedding_dim}, bits={bits}, granularity={self.granularity}"
        )


class _Lookup(torch.autograd.Function):
    """Gather, fake-quantize, pool; the backward hands the rows' gradients out sparse."""

    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,
        collection: EmbeddingBagCollection,
        rows: Tensor,
        table: Tensor,
        offsets: Tensor | None,
        bag: Tensor | None,
    ) -> Tensor:
        values = collection.storage.read(rows)
        ctx.shape, ctx.rows, ctx.bag, ctx.lengths, ctx.mask = leaf.shape, rows, bag, None, None
        if collection._any_quantized:
            scale = collection.row_scale(values, table)
            largest = collection.largest[table, None]
            hat = grids.dequantize(grids.quantize(values, scale, largest), scale)
            exempt = None if collection._all_quantized else ~collection.quantized[table, None]
            if collection.ste == "clip":
                ctx.mask = grids.inside_grid(values, scale, largest)
                if exempt is not None:
                    ctx.mask |= exempt
            values = hat if exempt is None else torch.where(exempt, values, hat)
        if offsets is None:
            return values
        if collection.pooling == "mean":
            ctx.lengths = (offsets[1:] - offsets[:-1]).clamp_min(1).unsqueeze(1)
        return pool(values, offsets, collection.pooling)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gradient = grad_outputs[0]
        if ctx.lengths is not None:
            gradient = gradient / ctx.lengths
        if ctx.bag is not None:
            gradient = gradient.index_select(0, ctx.bag)
        if ctx.mask is not None:
            gradient = gradient * ctx.mask
        sparse = torch.sparse_coo_tensor(
            ctx.rows.unsqueeze(0), gradient, ctx.shape, check_invariants=False
        )
        return sparse, None, None, None, None, None


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


def check_ids(indices: Tensor, table_of_index: Tensor, tables: Sequence[Table]) -> None:
    """Raise IndexError naming table and id when an id lies outside its table."""
    counts = torch.tensor([table.num_rows for table in tables], dtype=torch.int64)
    bad = (indices < 0) | (indices >= counts[table_of_index])
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        table = tables[int(table_of_index[at])]
        raise IndexError(
            f"id {int(indices[at])} is outside table {table.name!r} of {table.num_rows} rows"
        )


def pool(values: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    """Pool rows [N, D] into bags [len(offsets) - 1, D], in the order of the ids; empty is zero."""
    order = torch.arange(values.shape[0])
    return functional.embedding_bag(order, values, offsets, mode=pooling, include_last_offset=True)


def merge_rows(rows: Tensor, values: Tensor) -> RowGradient:
    """Sum the values of equal rows.

    Args:
        rows: int64 [N], with repeats.
        values: float32 [N, D].
    """
    distinct, inverse = torch.unique(rows, return_inverse=True)
    summed = torch.zeros(distinct.numel(), values.shape[1], dtype=values.dtype)
    return RowGradient(distinct, summed.index_add_(0, inverse, values))
