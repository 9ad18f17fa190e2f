"""A worker that trains as the published code does: bags are pooled first and quantized second.

    python -m dqrm.study.pooled_first CONFIG.yaml

The configuration has ``quant.bits=32``: rows stay FP32, and the sum of a bag is rounded to the grid
of INT4 rows, in which it saturates (the code of arXiv 2410.20046). The scale of a table is
refreshed every 200 training steps, as published for Criteo Kaggle.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqrm.compress import grids
from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.models import dlrm
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.runtime import prepare_threads
from dqrm.training.run import train

BITS = 4
PERIOD = 200


class PooledFirst(EmbeddingBagCollection):
    """Rounds what bags pooled, not what was looked up."""

    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Look up, pool, quantize; the gradient passes through."""
        pooled: Tensor = super().forward(indices, offsets, weights)
        return pooled + (self._rounded(pooled.detach()) - pooled.detach())

    def lookup(
        self, indices: Tensor, offsets: Tensor | None, out: Tensor, weights: Tensor | None = None
    ) -> None:
        """The same into ``out``, without autograd."""
        super().lookup(indices, offsets, out, weights)
        out.copy_(self._rounded(out))

    def count_forward(self) -> None:
        """Count a training forward; refresh the scales where that is due."""
        if not self.training:
            return
        if int(self.forwards) % PERIOD == 0:
            bounds = [torch.aminmax(rows) for rows in self.table_rows()]
            max_abs = torch.stack([torch.maximum(-low, high) for low, high in bounds])
            self.table_scale.copy_(grids.scale_of(max_abs, grids.largest_code(BITS)))
        self.forwards += 1

    def _rounded(self, pooled: Tensor) -> Tensor:
        """Put vectors, float32 [B, T, D], on the grids of their tables."""
        scale = self.table_scale[None, :, None]
        return grids.quantize(pooled, scale, grids.largest_code(BITS)) * scale


def main(arguments: list[str]) -> None:
    """Train by the configuration that is named."""
    chosen = load(RunConfig, Path(arguments[0]), [])
    prepare_threads(chosen.train.threads)
    models: Any = dlrm
    models.EmbeddingBagCollection = PooledFirst
    train(chosen, resume="auto")


if __name__ == "__main__":
    main(sys.argv[1:])
