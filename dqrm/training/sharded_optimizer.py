"""The optimizer of a model whose large tables are shared out among ranks."""

from collections.abc import Mapping

from torch import Tensor

from dqrm.kernels.tables import RowGradient
from dqrm.models.dlrm import DLRM
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.models.sharded import ShardedEmbeddingBags
from dqrm.training.bag_requests import OwnGradient
from dqrm.training.config import OptimConfig
from dqrm.training.optimizer import DenseOptimizer
from dqrm.training.row_optimizers import RowOptimizer


class ShardedOptimizer(DenseOptimizer):
    """Steps the dense parameters, the replicated rows and this rank's own rows.

    The state of a row lies where the row does.

    Args:
        model: whose ``emb_l`` is a ShardedEmbeddingBags.
        config: optimizer, rates and schedule; no ``clip_norm``.
    """

    def __init__(self, model: DLRM, config: OptimConfig) -> None:
        super().__init__(model, config)
        assert isinstance(model.emb_l, ShardedEmbeddingBags)
        if config.clip_norm is not None:
            raise ValueError(
                "optim.clip_norm needs the norm of all gradients, which no rank has of sharded "
                "tables: leave it out, or set exchange.placement=replicate"
            )
        self.bags = model.emb_l
        self._owned = RowOptimizer(self.bags.owned, config)
        kept = self.bags.kept
        self._kept = None if kept is None else RowOptimizer(kept, config)

    def apply(self, kept: RowGradient | None, own: OwnGradient, step: int) -> None:
        """Apply the gradients of rows, and the dense parameters' in their ``grad``.

        Args:
            kept: of the replicated rows; None where there are no such tables.
            own: of this rank's rows.
            step: sets the rate; 0-based.
        """
        rate = self.step_dense(step)
        if self._kept is not None and kept is not None:
            self._kept.step(kept, rate)
        self._owned.update(own.indices, own.offsets, own.grad, rate)

    def row_states(self) -> dict[EmbeddingBagCollection, dict[str, Tensor]]:
        """Return the state of the rows of each collection; see RowOptimizer.state."""
        rows = [self._owned] if self._kept is None else [self._kept, self._owned]
        return {part.collection: part.state() for part in rows}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that Optimizer.state returns for a model in one process.

        Raises:
            ValueError: the tensors belong to another optimizer or model.
        """
        states = self.row_states()
        for state in states.values():
            for name, tensor in state.items():
                whole = tensors.get(f"rows.{name}")
                if whole is None:
                    raise ValueError(
                        f"the checkpoint holds no state 'rows.{name}' of optim.name="
                        f"{self.config.name}; it was written with another optimizer"
                    )
                if not tensor.dim():
                    tensor.copy_(whole)
        for part in self.bags.held():
            for name, tensor in states[part.collection].items():
                if tensor.dim():
                    whole = tensors[f"rows.{name}"]
                    tensor[part.here].copy_(whole[part.whole])
        self.load_dense_state(tensors)
