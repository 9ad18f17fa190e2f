"""Embedding tables in one storage: look up, update, keep the scales exact; a call a direction.

Symbols and the layout of a batch as in dqrm.kernels.tables. What the loops compute is written
down, in plain torch, in dqrm.kernels.embedding_reference and dqrm.kernels.rules; they give the
same bits at every instruction set and for every number of threads.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.embedding_reference import TableBatchReference
from dqrm.kernels.row_storage import RoundedRows, RowStorage
from dqrm.kernels.rules import RowRule
from dqrm.kernels.tables import RowGradient, TableLayout


class TableBatch:
    """The tables of one storage, bound to the compiled loops.

    Every call takes ``indices`` (int32 or int64 [N], contiguous), ``offsets`` (int64 [T * B + 1],
    or None for one id a bag) and, for weighted sums, ``weights`` (float32 [N]).

    Raises, before anything is written:
        IndexError: an id is outside its table; the message names table and id.
        ValueError: indices and offsets do not describe whole bags of every table, the shape of
            another tensor does not fit them, or means are to be weighted.

    NaN weights come out as NaN and are left out of ranges, so that they spoil no other row; an
    infinite weight makes its table's scale infinite and so all of its values NaN.

    Args:
        layout: the tables.
        storage: of the rows, contiguous, D <= 1024; written in place by updates.
        scales: float32 [T]; written in place where ``layout.exact``.
    """

    def __init__(self, layout: TableLayout, storage: RowStorage, scales: Tensor) -> None:
        module = native()
        assert module is not None
        self._native: Any = module.EmbeddingTables(
            storage.kind,
            capsule(storage.tensor),
            storage.dim,
            capsule(storage.clock) if isinstance(storage, RoundedRows) else None,
            capsule(scales),
            list(layout.names),
            list(layout.rows),
            list(layout.largest),
            by_row=layout.granularity == "row",
            mean=layout.pooling == "mean",
            clip=layout.clip,
            exact=layout.exact,
            level=isa_level(),
        )

    def lookup(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        out: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        """Write the pooled rows of every bag to ``out``.

        ``out`` is float32 [B, T, D]; samples may be any distance apart, a sample's vectors are
        contiguous. Empty bags are zero.
        """
        self._native.look_up(
            capsule(indices),
            None if offsets is None else capsule(offsets),
            None if weights is None else capsule(weights),
            capsule(out),
            torch.get_num_threads(),
        )

    def row_gradient(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        grad: Tensor,
        weights: Tensor | None = None,
    ) -> RowGradient:
        """Return the summed gradients of the distinct rows a batch looked up.

        ``grad`` is laid out as ``out`` of :meth:`lookup`. Gradients of one row are summed in the
        order of its ids.
        """
        rows, values = self._native.row_gradient(
            capsule(indices),
            None if offsets is None else capsule(offsets),
            None if weights is None else capsule(weights),
            capsule(grad),
            torch.get_num_threads(),
        )
        return RowGradient(rows, values)

    def update(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        grad: Tensor,
        rule: RowRule,
        lr: float,
        weights: Tensor | None = None,
    ) -> None:
        """Sum the gradients of the rows a batch looked up and take the rule's step.

        Equals :meth:`row_gradient` followed by :meth:`apply`.
        """
        self._native.update(
            capsule(indices),
            None if offsets is None else capsule(offsets),
            None if weights is None else capsule(weights),
            capsule(grad),
            rule.native,
            lr,
            *rule.corrections(),
            torch.get_num_threads(),
        )
        rule.count_step()

    def apply(self, rows: Tensor, values: Tensor, rule: RowRule, lr: float) -> None:
        """Take the rule's step with gradients that were summed already.

        Args:
            rows: int64 [U], ascending and distinct row numbers in the storage.
            values: float32 [U, D].
            rule: the optimizer.
            lr: learning rate.
        """
        self._native.apply(
            capsule(rows.contiguous()),
            capsule(values.contiguous()),
            rule.native,
            lr,
            *rule.corrections(),
            torch.get_num_threads(),
        )
        rule.count_step()

    def write_rows(self, rows: Tensor, values: Tensor) -> None:
        """Make ``rows`` (int64 [U], distinct) hold ``values`` (float32 [U, D]).

        Scales are left as they are.
        """
        self._native.write_rows(
            capsule(rows.contiguous()), capsule(values.contiguous()), torch.get_num_threads()
        )

    def rows_changed(self, rows: Tensor) -> None:
        """Take in that ``rows`` (int64 [U], numbers in the storage) were written from outside."""
        self._native.rows_changed(capsule(rows.contiguous()))

    @property
    def maxima_bytes(self) -> int:
        """Bytes that keeping the scales exact takes."""
        return int(self._native.maxima_bytes())

    def rebuild(self) -> None:
        """Recompute from all weights what is kept about them; after writing weights wholesale."""
        self._native.rebuild(torch.get_num_threads())


_HANDLES = itertools.count()
_TABLES: WeakValueDictionary[int, "EmbeddingTables"] = WeakValueDictionary()


class EmbeddingTables:
    """A layout over a storage, and the kernel bound to the memory it was last used with.

    Copies and pickles without the kernel: a copied module binds to its own memory.
    """

    def __init__(self, layout: TableLayout, storage: RowStorage) -> None:
        self.layout = layout
        self.storage = storage
        self.handle = next(_HANDLES)
        """Stands for this object in the arguments of torch operators."""
        _TABLES[self.handle] = self
        self._kernel: TableBatch | TableBatchReference | None = None
        self._bound: tuple[int, int] | None = None

    def on(self, weight: Tensor, scales: Tensor) -> TableBatch | TableBatchReference:
        """Return the kernel: compiled, or plain where nothing is built or rows are too wide.

        Binding to memory not seen before reads all weights once where scales are kept exact.

        Args:
            weight: what the storage keeps; a module may have moved it.
            scales: float32 [T].
        """
        bound = weight.data_ptr(), scales.data_ptr()
        if self._kernel is None or bound != self._bound:
            self.storage.tensor = weight.detach()
            self._kernel = _kernel(self.layout, self.storage, scales)
            self._bound = bound
            self._kernel.rebuild()
        return self._kernel

    def __reduce__(self) -> tuple[type["EmbeddingTables"], tuple[TableLayout, RowStorage]]:
        return EmbeddingTables, (self.layout, self.storage)


def tables_of(handle: int) -> EmbeddingTables:
    """Return the object a handle stands for."""
    return _TABLES[handle]


def _kernel(
    layout: TableLayout, storage: RowStorage, scales: Tensor
) -> TableBatch | TableBatchReference:
    module = native()
    if module is None:
        announce_fallback()
    elif storage.dim <= module.max_embedding_dim:
        return TableBatch(layout, storage, scales)
    return TableBatchReference(layout, storage, scales)
