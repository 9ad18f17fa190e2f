"""Embedding tables held as packed codes, with the arithmetic of the training forward."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dqrm.kernels.packed import PackedTables
from dqrm.models.embedding import Table
from dqrm.serving.prepared import PreparedModule


class PackedEmbeddingBags(PreparedModule[PackedTables]):
    """Embedding bags whose rows are unpacked when they are looked up.

    A row is ``scale * code`` exactly as in EmbeddingBagCollection and rows are pooled in the
    same order, so the output equals the training forward's bit for bit.

    Args:
        tables: the tables in the order of the batch.
        codes: packed codes of each table (see ``grids.pack``); FP32 rows at 32 bits.
        scales: float32 [1] or [rows] of each table; None at 32 bits.
        embedding_dim: D.
        pooling: "sum" or "mean".
    """

    def __init__(
        self,
        tables: Sequence[Table],
        codes: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        embedding_dim: int,
        pooling: Literal["sum", "mean"],
    ) -> None:
        super().__init__()
        self.tables = tuple(tables)
        self.embedding_dim = embedding_dim
        self.pooling = pooling
        for number, (packed, scale) in enumerate(zip(codes, scales, strict=True)):
            self.register_buffer(f"codes{number}", packed)
            self.register_buffer(f"scale{number}", scale)

    def forward(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return [B, T, D]; arguments and errors as in EmbeddingBagCollection."""
        if torch.compiler.is_compiling():
            codes, scales, bits, names = self._arrays()
            pooled: Tensor = torch.ops.dqrm.packed_embedding_bag(
                codes, scales, bits, names, self.embedding_dim, self.pooling, indices, offsets
            )
            return pooled
        return self.prepared().look_up(indices, offsets)

    def forward_reference(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return what forward does, by torch operators."""
        return self.prepared().look_up_reference(indices, offsets)

    def _prepare(self) -> PackedTables:
        codes, scales, bits, names = self._arrays()
        return PackedTables(codes, scales, bits, names, self.embedding_dim, self.pooling)

    def _arrays(self) -> tuple[list[Tensor], list[Tensor | None], list[int], list[str]]:
        numbers = range(len(self.tables))
        return (
            [self.get_buffer(f"codes{number}") for number in numbers],
            [getattr(self, f"scale{number}") for number in numbers],
            [table.bits for table in self.tables],
            [table.name for table in self.tables],
        )
