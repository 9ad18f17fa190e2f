"""The tables that contestants look ids up in, and the ids."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dqrm.data.synth import CRITEO_KAGGLE_CARDINALITIES

IndexKind = Literal["uniform", "zipf"]

ZIPF_EXPONENT = 1.1
RING_LOOKUPS = 4_000_000
"""Ids in all batches together: 250 MB of rows at d=16, so that a batch that comes again finds
none of its rows of large tables in a cache."""
_SPREADING_PRIME = 2_654_435_761
"""Above every table's rows, hence coprime to each: multiplying by it permutes the ids."""


@dataclass(frozen=True)
class Shape:
    """Embedding tables of one width."""

    rows: tuple[int, ...]
    dim: int

    @property
    def total_rows(self) -> int:
        """Rows of all tables."""
        return sum(self.rows)

    @property
    def fp32_bytes(self) -> int:
        """Bytes of all tables in FP32."""
        return 4 * self.dim * self.total_rows


def default_max_rows(dim: int) -> int | None:
    """Return the cap on tables: none at 16 columns (2.2 GB in FP32), a million rows above."""
    return None if dim <= 16 else 1_000_000


def kaggle_shape(dim: int, scale: float, max_rows: int | None) -> Shape:
    """Return the 26 tables of the Criteo Kaggle set, shrunk by ``scale`` and capped."""
    scaled = [max(1, round(rows * scale)) for rows in CRITEO_KAGGLE_CARDINALITIES]
    return Shape(tuple(min(rows, max_rows or rows) for rows in scaled), dim)


def largest_table_shape(dim: int, scale: float, max_rows: int | None) -> Shape:
    """Return the largest of those tables alone, 10.1 million rows; it fits no cache."""
    return Shape((max(kaggle_shape(dim, scale, max_rows).rows),), dim)


@dataclass(frozen=True)
class Traffic:
    """Batches of ids, one a bag, that all contestants are given."""

    shape: Shape
    batch: int
    """B: bags a table."""
    kind: IndexKind
    batches: tuple[Tensor, ...]
    """int64 [T, B] each; ids local to their table."""

    @property
    def lookups(self) -> int:
        """Ids of one batch."""
        return self.batch * len(self.shape.rows)

    def pick(self, number: int) -> int:
        """Return the place of a batch in ``batches``; they come again and again."""
        return number % len(self.batches)


def make_traffic(
    shape: Shape, batch: int, kind: IndexKind, seed: int, ring_lookups: int = RING_LOOKUPS
) -> Traffic:
    """Draw batches that hold ``ring_lookups`` ids together, at least four.

    "zipf": the k-th most frequent of a table's ids is drawn in proportion to k^-1.1, and
    frequent ids lie anywhere in the table.
    """
    rng = np.random.default_rng(seed)
    count = max(4, ring_lookups // (batch * len(shape.rows)))
    columns = [
        _zipf(rows, count * batch, rng)
        if kind == "zipf"
        else rng.integers(0, rows, count * batch, dtype=np.int64)
        for rows in shape.rows
    ]
    ids = np.stack(columns).reshape(len(shape.rows), count, batch).transpose(1, 0, 2)
    batches = torch.from_numpy(np.ascontiguousarray(ids)).unbind(0)
    return Traffic(shape, batch, kind, batches)


def _zipf(rows: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw by inverting the distribution function of the continuous law on [1, rows + 1)."""
    power = 1.0 - ZIPF_EXPONENT
    top = (rows + 1.0) ** power
    rank = np.floor((1.0 + rng.random(count) * (top - 1.0)) ** (1.0 / power)).astype(np.int64) - 1
    spread: np.ndarray = np.clip(rank, 0, rows - 1) * _SPREADING_PRIME % rows
    return spread
