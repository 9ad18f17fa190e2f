"""What embedding rows are kept in while they are trained: FP32, BF16, or integer codes.

Symbols: R rows of all tables, U distinct rows of a batch, D embedding_dim.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from dqrm.kernels import huge_pages
from dqrm.kernels.code_layout import packed_dtype
from dqrm.kernels.rounding import random_bits_reference, round_to_bfloat16_reference, step_key
from dqrm.kernels.row_codes import (
    STEP_BYTES,
    read_rows_reference,
    read_steps_reference,
    row_bytes,
    write_rows_reference,
)

StorageKind = Literal["fp32", "bf16", "int8", "int4"]


class RowStorage(ABC):
    """Rows that are read and written as float32 values, whatever they are kept in.

    Args:
        tensor: what is kept, one line a row.
        dim: D.
    """

    kind: StorageKind
    """Its name in the configuration."""

    state_dtype: torch.dtype = torch.float32
    """What the optimizer keeps its state of the rows in."""

    on_grid: bool = False
    """Whether values are codes times a step already."""

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self.tensor = tensor
        self.dim = dim

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """Return the values of some rows (int64 [U]), float32 [U, D]."""

    @abstractmethod
    def write(self, rows: Tensor, values: Tensor) -> None:
        """Make some rows (int64 [U], distinct) hold ``values`` (float32 [U, D])."""

    def begin_step(self) -> None:  # noqa: B027
        """Begin an optimizer step: what it writes is rounded with random bits of its own."""

    def read_state(self, state: Tensor, rows: Tensor) -> Tensor:
        """Return the optimizer's state of some rows as float32."""
        return state[rows]

    def write_state(self, state: Tensor, rows: Tensor, values: Tensor, first: int) -> None:
        """Write the optimizer's state of some rows.

        Args:
            state: of ``state_dtype``, [R] or [R, D].
            rows: int64 [U], distinct.
            values: float32 [U] or [U, D].
            first: number of the first element among all that are rounded with a row.
        """
        state[rows] = values


class FloatRows(RowStorage):
    """Rows in float32."""

    kind = "fp32"

    def read(self, rows: Tensor) -> Tensor:
        """Return the values of some rows."""
        return self.tensor.index_select(0, rows)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Make some rows hold ``values``."""
        self.tensor[rows] = values


class RoundedRows(RowStorage):
    """Rows that are rounded stochastically when they are written.

    Args:
        tensor: what is kept, one line a row.
        dim: D.
        clock: int64 [2], the seed of the rounding and the number of the optimizer step;
            part of a checkpoint.
    """

    state_dtype = torch.bfloat16

    def __init__(self, tensor: Tensor, dim: int, clock: Tensor) -> None:
        super().__init__(tensor, dim)
        self.clock = clock

    def begin_step(self) -> None:
        """Begin an optimizer step."""
        self.clock[1] += 1

    def random(self, rows: Tensor, first: int, count: int) -> Tensor:
        """Return the random bits of this step for ``count`` elements of some rows."""
        seed, step = self.clock.tolist()
        return random_bits_reference(step_key(seed, step), rows, first, count)

    def read_state(self, state: Tensor, rows: Tensor) -> Tensor:
        """Return the optimizer's state of some rows as float32."""
        return state[rows].float()

    def write_state(self, state: Tensor, rows: Tensor, values: Tensor, first: int) -> None:
        """Write the optimizer's state of some rows, rounded to bfloat16."""
        random = self.random(rows, first, values[0].numel() if rows.numel() else 0)
        state[rows] = round_to_bfloat16_reference(values, random.view(values.shape))


class BFloatRows(RoundedRows):
    """Rows in bfloat16."""

    kind = "bf16"

    def read(self, rows: Tensor) -> Tensor:
        """Return the values of some rows."""
        return self.tensor.index_select(0, rows).float()

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Make some rows hold ``values``, rounded to bfloat16."""
        self.tensor[rows] = round_to_bfloat16_reference(values, self.random(rows, 0, self.dim))


class CodeRows(RoundedRows):
    """Rows as integer codes with a step each, without a copy in full precision.

    Args:
        tensor: uint8 [R, row_bytes] (see dqrm.kernels.row_codes).
        dim: D.
        clock: as in RoundedRows.
        kind: "int8" or "int4".
    """

    on_grid = True

    def __init__(
        self, tensor: Tensor, dim: int, clock: Tensor, kind: Literal["int8", "int4"]
    ) -> None:
        super().__init__(tensor, dim, clock)
        self.kind = kind
        self.bits = code_bits(kind)

    def read(self, rows: Tensor) -> Tensor:
        """Return the values of some rows."""
        return read_rows_reference(self.tensor.index_select(0, rows), self.bits, self.dim)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Make some rows hold ``values``, rounded to multiples of their steps."""
        steps = read_steps_reference(self.tensor.index_select(0, rows))
        random = self.random(rows, 0, self.dim)
        self.tensor[rows] = write_rows_reference(values, steps, random, self.bits)

    def packed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the packed codes and the steps (float32 [U]) of some rows."""
        encoded = self.tensor.index_select(0, rows)
        codes = encoded[:, STEP_BYTES:].contiguous().view(packed_dtype(self.bits))
        return codes, read_steps_reference(encoded)


def code_bits(kind: Literal["int8", "int4"]) -> int:
    """Return the bits of a code."""
    return 8 if kind == "int8" else 4


def stored_row_bytes(kind: StorageKind, dim: int) -> int:
    """Return the bytes of one row of ``dim`` elements."""
    if kind == "int8" or kind == "int4":
        return row_bytes(dim, code_bits(kind))
    return dim * (4 if kind == "fp32" else 2)


def make_storage(kind: StorageKind, num_rows: int, dim: int) -> RowStorage:
    """Return storage for ``num_rows`` rows; its seed is that of torch's generator."""
    if kind == "fp32":
        # Written before anyone reads: reading untouched memory maps the shared page of zeros, and
        # older Linux then writes to small pages.
        return FloatRows(huge_pages.zeros(num_rows, dim), dim)
    clock = torch.tensor([torch.initial_seed() & (2**63 - 1), 0])
    if kind == "bf16":
        return BFloatRows(huge_pages.zeros(num_rows, dim, dtype=torch.bfloat16), dim, clock)
    rows = huge_pages.zeros(num_rows, stored_row_bytes(kind, dim), dtype=torch.uint8)
    return CodeRows(rows, dim, clock, kind)
