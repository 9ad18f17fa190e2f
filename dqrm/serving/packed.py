"""Embedding tables held as packed codes, with the arithmetic of the training forward."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dqrm.compress import grids
from dqrm.models.embedding import Table, bag_layout, check_ids, pool


class PackedEmbeddingBags(nn.Module):
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
        pooling: str,
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
        _, table_of_index = bag_layout(indices, offsets, len(self.tables))
        check_ids(indices, table_of_index, self.tables)
        counts = torch.bincount(table_of_index, minlength=len(self.tables)).tolist()
        rows = [
            self._rows(number, ids)
            for number, ids in enumerate(torch.split(indices.to(torch.int64), counts))
        ]
        values = torch.cat(rows)
        pooled = values if offsets is None else pool(values, offsets, self.pooling)
        batch = pooled.shape[0] // len(self.tables)
        return pooled.view(len(self.tables), batch, self.embedding_dim).transpose(0, 1)

    def _rows(self, number: int, ids: Tensor) -> Tensor:
        packed = self.get_buffer(f"codes{number}")[ids]
        bits = self.tables[number].bits
        if bits == 32:
            return packed
        scale = self.get_buffer(f"scale{number}")
        codes = grids.unpack(packed, bits, self.embedding_dim)
        return grids.dequantize(codes, scale if scale.numel() == 1 else scale[ids, None])
