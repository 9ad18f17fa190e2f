"""Optimizers of embedding rows: only the rows a batch touched are read and written.

The formulas are in dqrm.kernels.rules; symbols as in dqrm.models.embedding.
"""

import torch
from torch import Tensor

from dqrm.kernels.rules import RowRule
from dqrm.kernels.tables import RowGradient
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.training.config import OptimConfig


class RowOptimizer:
    """Trains the rows of a collection and keeps its scales exact.

    Args:
        collection: whose rows to train.
        config: name, eps, betas and embedding_weight_decay are read.
    """

    def __init__(self, collection: EmbeddingBagCollection, config: OptimConfig) -> None:
        self.collection = collection
        self.rule = RowRule(
            config.name,
            collection.storage,
            eps=config.eps,
            betas=config.betas,
            weight_decay=config.embedding_weight_decay,
        )

    def state(self) -> dict[str, Tensor]:
        """Return the state by name; writing into these tensors restores it.

        ``sum`` [R] for adagrad; ``first`` and ``second`` [R, D] and ``steps`` (int64 scalar) for
        adam.
        """
        return self.rule.state()

    def update(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        grad: Tensor,
        lr: float,
        weights: Tensor | None = None,
    ) -> None:
        """Take a step with the gradient of what ``collection.lookup`` returned, in one call.

        Args:
            indices: of the lookup.
            offsets: of the lookup.
            grad: float32 [B, T, D]; samples may be any distance apart.
            lr: learning rate.
            weights: of the lookup.
        """
        self.collection.kernel.update(indices, offsets, grad, self.rule, lr, weights)

    @torch.no_grad()
    def step(self, gradient: RowGradient, lr: float) -> None:
        """Take a step with gradients that were summed already, rows ascending."""
        self.collection.kernel.apply(gradient.rows, gradient.values, self.rule, lr)
