"""One batch as tensors: the only form of data the model knows."""

from dataclasses import dataclass

import numpy as np
import torch

from dqrm.data.rows import Rows
from dqrm.data.schema import Schema


@dataclass(frozen=True)
class Batch:
    """B rows, T tables, N ids.

    Table-major, local ids per table. Two rows, tables a (multi-hot) and b (one-hot), where row 0
    holds a = [4, 1], b = 7 and row 1 holds a = [], b = 2::

                 a: row 0   a: row 1   b: row 0   b: row 1
        indices  4  1                  7          2
        offsets  0          2          2          3          4
    """

    dense: torch.Tensor
    """float32 [B, num_dense]"""

    indices: torch.Tensor
    """int32 [N]: all bags of table 0, then of table 1, and so on."""

    offsets: torch.Tensor | None
    """int64 [T * B + 1] into indices; None when every bag holds exactly one id (N = T * B)."""

    label: torch.Tensor
    """float32 [B]"""

    whole_rows: int = -1
    """Rows of the whole batch where these are one rank's share of it; B when not given."""

    first_row: int = 0
    """Number of the first of these rows in the whole batch."""

    def __post_init__(self) -> None:
        if self.whole_rows < 0:
            object.__setattr__(self, "whole_rows", len(self.label))

    def __len__(self) -> int:
        return len(self.label)


def make_batch(rows: Rows, schema: Schema, whole_rows: int = -1, first_row: int = 0) -> Batch:
    """Lay rows out for the model; tensors own their memory."""
    share = whole_rows, first_row
    # Of no rows, numpy's own copy would have strides that kernels refuse.
    dense = torch.empty(rows.dense.T.shape)
    dense.numpy()[:] = rows.dense.T
    label = torch.from_numpy(np.array(rows.label))
    if not rows.lists:
        indices = torch.from_numpy(np.array(rows.one_hot, order="C").reshape(-1))
        return Batch(dense, indices, None, label, *share)
    num_rows, num_tables = len(rows), len(schema.categorical)
    lengths = np.ones((num_tables, num_rows), np.int64)
    parts = []
    one_hot, lists = iter(rows.one_hot), iter(rows.lists)
    for t, column in enumerate(schema.categorical):
        if column.multi_hot:
            bags = next(lists)
            lengths[t] = np.diff(bags.offsets)
            parts.append(bags.ids)
        else:
            parts.append(next(one_hot))
    offsets = np.zeros(num_tables * num_rows + 1, np.int64)
    np.cumsum(lengths.reshape(-1), out=offsets[1:])
    indices = torch.from_numpy(np.concatenate(parts))
    return Batch(dense, indices, torch.from_numpy(offsets), label, *share)
