"""Optimizers of embedding rows: only the rows a batch touched are read and written.

Each takes a RowGradient, duplicates already summed, and keeps its state in tensors that index
like the collection's rows: float32, or bfloat16 where the rows are kept in less than FP32.
Symbols as in dqrm.models.embedding.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dqrm.models.embedding import EmbeddingBagCollection, RowGradient
from dqrm.training.config import OptimConfig


class RowOptimizer(ABC):
    """Applies summed row gradients to a collection.

    Args:
        collection: whose rows to train.
        config: eps, betas and embedding_weight_decay are read.
    """

    def __init__(self, collection: EmbeddingBagCollection, config: OptimConfig) -> None:
        self.collection = collection
        self.config = config

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the state by name; writing into these tensors restores it."""

    @abstractmethod
    def _update(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Return the step of each row at rate 1, float32 [U, D], and advance the state."""

    @torch.no_grad()
    def step(self, gradient: RowGradient, lr: float) -> None:
        """Update the rows of ``gradient`` at rate ``lr`` and keep the scales exact."""
        storage = self.collection.storage
        storage.begin_step()
        before = storage.read(gradient.rows)
        values = before - lr * self._update(gradient.rows, gradient.values)
        if self.config.embedding_weight_decay:
            values -= lr * self.config.embedding_weight_decay * before
        storage.write(gradient.rows, values)
        self.collection.rows_changed(gradient.rows)


class RowSGD(RowOptimizer):
    """Plain stochastic gradient descent; no state."""

    def state(self) -> dict[str, Tensor]:
        """Return no tensors."""
        return {}

    def _update(self, rows: Tensor, gradient: Tensor) -> Tensor:
        return gradient


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad: one accumulator a row, the running sum of the row's mean squares.

    As in facebookresearch/dlrm and FBGEMM; 4 bytes a row where Adagrad keeps 4 D.
    """

    def __init__(self, collection: EmbeddingBagCollection, config: OptimConfig) -> None:
        super().__init__(collection, config)
        self._sum = torch.zeros(collection.num_rows, dtype=collection.storage.state_dtype)

    def state(self) -> dict[str, Tensor]:
        """Return ``sum``, [R]."""
        return {"sum": self._sum}

    def _update(self, rows: Tensor, gradient: Tensor) -> Tensor:
        storage = self.collection.storage
        total = storage.read_state(self._sum, rows) + gradient.square().mean(dim=1)
        storage.write_state(self._sum, rows, total, first=storage.dim)
        return gradient / (total.sqrt() + self.config.eps).unsqueeze(1)


class RowAdam(RowOptimizer):
    """Adam on touched rows (arXiv 1412.6980, algorithm 1), moments of other rows left alone.

    Bias is corrected with the global step, as torch.optim.SparseAdam does.
    """

    def __init__(self, collection: EmbeddingBagCollection, config: OptimConfig) -> None:
        super().__init__(collection, config)
        shape = collection.num_rows, collection.embedding_dim
        self._first = torch.zeros(shape, dtype=collection.storage.state_dtype)
        self._second = torch.zeros(shape, dtype=collection.storage.state_dtype)
        self._steps = torch.zeros((), dtype=torch.int64)

    def state(self) -> dict[str, Tensor]:
        """Return ``first`` and ``second`` ([R, D]) and ``steps`` (int64 scalar)."""
        return {"first": self._first, "second": self._second, "steps": self._steps}

    def _update(self, rows: Tensor, gradient: Tensor) -> Tensor:
        beta1, beta2 = self.config.betas
        self._steps += 1
        steps = int(self._steps)
        storage, dim = self.collection.storage, self.collection.embedding_dim
        first = torch.lerp(gradient, storage.read_state(self._first, rows), beta1)
        second = torch.lerp(gradient.square(), storage.read_state(self._second, rows), beta2)
        storage.write_state(self._first, rows, first, first=dim)
        storage.write_state(self._second, rows, second, first=2 * dim)
        corrected = (second / (1 - beta2**steps)).sqrt_().add_(self.config.eps)
        return first / (1 - beta1**steps) / corrected


ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    "adam": RowAdam,
}
