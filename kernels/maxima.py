"""Exact per-table maxima, maintained in time proportional to the rows that changed.

The plain stand-in for the compiled kernel's tree of bounds: simpler, and a value for every row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FANOUT = 64
"""Children per node. A 10-million-row table then has four levels, and the tree above the row
maxima adds under 2 % to them."""


def level_counts(table_rows: Sequence[int]) -> list[Tensor]:
    """Return the nodes of each table (int64 [T]) on every level, rows first."""
    counts = torch.tensor(table_rows, dtype=torch.int64)
    levels = [counts]
    while int(counts.max()) > 1:
        counts = (counts + FANOUT - 1) // FANOUT
        levels.append(counts)
    return levels


def bound_nodes(table_rows: Sequence[int]) -> int:
    """Return the number of bounds, 4 bytes each, that the compiled kernel keeps of these tables.

    Unlike MaxTree it keeps none per row; see native/embedding/maxima.h.
    """
    nodes = 0
    for rows in table_rows:
        level = -(-rows // FANOUT)
        nodes += level
        while level > 1:
            level = -(-level // FANOUT)
            nodes += level
    return nodes


class MaxTree:
    """The largest magnitude of every table, exact after every update.

    Only looked-up rows change in a training step, so each level of the tree needs only the
    nodes above them to be recomputed: O(touched rows x levels x FANOUT) a step, where a scan
    reads the whole table (arXiv 2410.20046, figure 1c, gives the scan 97 % of a step).

    Level 0 holds one maximum per row and level k one per FANOUT nodes of level k - 1; tables
    never share a node and every table ends in one node at the top:

        rows of table 0 | rows of table 1     level 0   [R]
           \\ | /            \\ | / \\ | /
        node   | node node                    level 1   every table's ceil(rows / FANOUT)
        root   |   root                       top       [T]

    Args:
        table_rows: rows of each table.
    """

    def __init__(self, table_rows: Sequence[int]) -> None:
        self._counts = level_counts(table_rows)
        # starts[k][t] is where table t begins in level k.
        self._starts = [torch.cumsum(c, 0) - c for c in self._counts]
        self._levels = [torch.zeros(int(c.sum())) for c in self._counts]

    @property
    def table_max(self) -> Tensor:
        """Largest magnitude of each table, float32 [T]; valid until the next call."""
        return self._levels[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all levels."""
        return sum(level.nbytes for level in self._levels)

    @property
    def row_max(self) -> Tensor:
        """Largest magnitude of each row, float32 [R]."""
        return self._levels[0]

    def rebuild(self, weight: Tensor) -> None:
        """Set every node from a full scan of ``weight`` (floats [R, D])."""
        for begin in range(0, weight.shape[0], 1 << 20):
            block = weight[begin : begin + (1 << 20)]
            self._levels[0][begin : begin + block.shape[0]] = _row_max(block)
        for level in range(1, len(self._levels)):
            for table in range(self._counts[0].numel()):
                below, count = (
                    int(self._starts[level - 1][table]),
                    int(self._counts[level - 1][table]),
                )
                children = self._levels[level - 1][below : below + count]
                padded = torch.nn.functional.pad(children, (0, -count % FANOUT))
                start = int(self._starts[level][table])
                nodes = padded.view(-1, FANOUT).amax(dim=1)
                self._levels[level][start : start + nodes.numel()] = nodes

    def update(self, rows: Tensor, values: Tensor, table_start: Tensor) -> None:
        """Take in the new content of some rows.

        Args:
            rows: int64 [U], distinct global row numbers.
            values: float32 [U, D], their new weights.
            table_start: int64 [T], first global row of each table.
        """
        if rows.numel() == 0:
            return
        self._levels[0][rows] = _row_max(values)
        table = torch.bucketize(rows, table_start, right=True) - 1
        local = rows - table_start[table]
        children = torch.arange(FANOUT)
        for level in range(1, len(self._levels)):
            node = self._starts[level][table] + local // FANOUT
            node, first = _unique_with_first(node)
            table, local = table[first], local[first] // FANOUT
            # A ragged last node repeats its last child, which leaves the maximum as it is.
            last = (self._counts[level - 1][table] - 1).unsqueeze(1)
            child = torch.minimum(local.unsqueeze(1) * FANOUT + children, last)
            child += self._starts[level - 1][table].unsqueeze(1)
            self._levels[level][node] = self._levels[level - 1][child].amax(dim=1)


def _row_max(values: Tensor) -> Tensor:
    # NaN is left out, so that it spoils no other row of its table.
    return values.abs().float().nan_to_num_(nan=0.0, posinf=torch.inf).amax(dim=1)


def _unique_with_first(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values in order and the position of one occurrence of each."""
    ordered, position = torch.sort(values)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    keep[1:] = ordered[1:] != ordered[:-1]
    return ordered[keep], position[keep]
