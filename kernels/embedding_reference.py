"""The embedding kernels in plain torch: their definition, their test, and their stand-in.

Symbols and the layout of a batch as in dqrm.kernels.tables.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dqrm.kernels.maxima import MaxTree
from dqrm.kernels.row_storage import RowStorage
from dqrm.kernels.rules import RowRule
from dqrm.kernels.tables import RowGradient, TableLayout, bag_layout, check_ids, merge_rows

SMALLEST_MAX_ABS = 1e-8
"""Stands in for the range of all-zero weights, as in dqrm.compress.grids."""


class TableBatchReference:
    """Same as TableBatch.

    Args:
        layout: the tables.
        storage: of the rows, written in place by updates.
        scales: float32 [T], written in place where ``layout.exact``.
    """

    def __init__(self, layout: TableLayout, storage: RowStorage, scales: Tensor) -> None:
        self._layout = layout
        self._storage = storage
        self._scales = scales
        rows = torch.tensor(layout.rows, dtype=torch.int64)
        self._start = torch.cumsum(rows, 0) - rows
        self._largest = torch.tensor(layout.largest, dtype=torch.float32)
        keeps = layout.exact and layout.granularity == "table" and any(layout.largest)
        self._maxima = MaxTree(layout.rows) if keeps else None

    def lookup(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        out: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        """Write the pooled rows of every bag.

        The order of operations, which packed tables follow as well: a sum starts at +0.0; for
        every id of the bag, in order, the row is divided by its scale, clamped, rounded,
        multiplied by its scale, multiplied by the id's weight if there are weights, and added;
        a mean then divides by the number of ids. Empty bags are zero.
        """
        _, table, rows = self._rows(indices, offsets, weights)
        values = self._storage.read(rows)
        quantized = self._largest[table, None] > 0
        scale, largest = self._scale(values, table), self._largest[table, None]
        # Adding zero turns -0.0 into 0.0, as rounding by a large number does.
        codes = torch.clamp((values / scale).round_(), -largest - 1, largest).add_(0.0)
        values = torch.where(quantized, scale * codes, values)
        if weights is not None:
            values = weights.unsqueeze(1) * values
        num_tables = len(self._layout.names)
        if offsets is None:
            pooled = values + 0.0
        else:
            pooled = pool_reference(values, offsets, self._layout.pooling)
        out.copy_(pooled.view(num_tables, -1, values.shape[1]).transpose(0, 1))

    def row_gradient(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        grad: Tensor,
        weights: Tensor | None = None,
    ) -> RowGradient:
        """Return the summed gradients of the distinct rows a batch looked up."""
        bag, table, rows = self._rows(indices, offsets, weights)
        values = grad.transpose(0, 1).reshape(-1, grad.shape[2])
        if offsets is not None and self._layout.pooling == "mean":
            values = values / offsets.diff().clamp_min(1).unsqueeze(1)
        if bag is not None:
            values = values[bag]
        if weights is not None:
            values = weights.unsqueeze(1) * values
        merged = merge_rows(rows, values)
        if self._layout.clip:
            own = self._storage.read(merged.rows)
            table = torch.bucketize(merged.rows, self._start, right=True) - 1
            largest = self._largest[table, None]
            ratio = own / self._scale(own, table)
            inside = (ratio >= -largest - 1.5) & (ratio <= largest + 0.5)
            kept = inside | (largest == 0)
            merged = RowGradient(merged.rows, torch.where(kept, merged.values, 0.0))
        return merged

    def update(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        grad: Tensor,
        rule: RowRule,
        lr: float,
        weights: Tensor | None = None,
    ) -> None:
        """Sum the gradients of the rows a batch looked up and take the rule's step."""
        rows, values = self.row_gradient(indices, offsets, grad, weights)
        self.apply(rows, values, rule, lr)

    def apply(self, rows: Tensor, values: Tensor, rule: RowRule, lr: float) -> None:
        """Take the rule's step with gradients that were summed already."""
        check_rows(rows, len(self._storage.tensor))
        rule.step_reference(self._storage, rows, values, lr)
        self.rows_changed(rows)

    def write_rows(self, rows: Tensor, values: Tensor) -> None:
        """Make ``rows`` hold ``values``."""
        self._storage.write(rows, values)

    def rows_changed(self, rows: Tensor) -> None:
        """Take in that rows were written from outside."""
        if self._maxima is not None:
            rows = torch.unique(rows)
            self._maxima.update(rows, self._storage.read(rows), self._start)
            self._write_scales(self._maxima.table_max)

    @property
    def maxima_bytes(self) -> int:
        """Bytes that keeping the scales exact takes."""
        return 0 if self._maxima is None else self._maxima.nbytes

    def rebuild(self) -> None:
        """Recompute from all weights what is kept about them."""
        if self._maxima is not None:
            self._maxima.rebuild(self._storage.tensor)
            self._write_scales(self._maxima.table_max)

    def _write_scales(self, max_abs: Tensor) -> None:
        scales = max_abs.clamp_min(SMALLEST_MAX_ABS) / self._largest
        self._scales.copy_(torch.where(self._largest > 0, scales, self._scales))

    def _rows(
        self, indices: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        layout = self._layout
        bag, table = bag_layout(indices, offsets, len(layout.names))
        check_ids(indices, table, layout.names, layout.rows)
        if weights is not None and layout.pooling == "mean":
            raise ValueError("weights: only with pooling='sum', a weighted mean is undefined")
        if weights is not None and weights.shape != indices.shape:
            raise ValueError("one weight for each index")
        return bag, table, indices.to(torch.int64) + self._start[table]

    def _scale(self, values: Tensor, table: Tensor) -> Tensor:
        """Return the scale of each row, float32 [N, 1]; anything for full-precision tables."""
        if self._layout.granularity == "table":
            return self._scales[table].unsqueeze(1)
        largest = torch.where(self._largest > 0, self._largest, 1.0)[table, None]
        # NaN is left out of a row's range, as it is of a table's.
        max_abs = values.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1, keepdim=True)
        return max_abs.clamp_min(SMALLEST_MAX_ABS) / largest


def pool_reference(values: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    """Pool rows [N, D] into bags [len(offsets) - 1, D], in the order of the ids; empty is zero."""
    order = torch.arange(values.shape[0])
    pooled = functional.embedding_bag(order, values, offsets, mode="sum", include_last_offset=True)
    if pooling == "mean":
        # torch's own mean multiplies by the rounded reciprocal of the length.
        pooled /= offsets.diff().clamp_min(1).unsqueeze(1)
    return pooled


def check_rows(rows: Tensor, count: int) -> None:
    """Raise ValueError unless rows (int64 [U]) ascend without repeats within [0, count)."""
    if rows.numel() == 0:
        return
    if int(rows.min()) < 0 or int(rows.max()) >= count:
        bad = rows[(rows < 0) | (rows >= count)][0]
        raise ValueError(f"row {int(bad)} is outside the {count} rows of all tables")
    descents = (rows.diff() <= 0).nonzero()
    if len(descents):
        at = int(descents[0])
        raise ValueError(
            f"rows must ascend without repeats; row {int(rows[at + 1])} follows row {int(rows[at])}"
        )
