"""One optimizer for a whole DLRM: dense parameters by torch.optim, embedding rows by our own."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dqrm.data.batch import Batch
from dqrm.kernels.tables import RowGradient
from dqrm.models.dlrm import DLRM
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.training.config import OptimConfig
from dqrm.training.row_optimizers import RowOptimizer


def rate_factor(step: int, config: OptimConfig) -> float:
    """Return the share of the learning rate used at ``step`` (0-based).

    Linear warm-up, then constant, then decay with power 2 down to zero, as in
    facebookresearch/dlrm.
    """
    factor = 1.0
    if step < config.warmup_steps:
        factor = (step + 1) / config.warmup_steps
    if config.decay_steps and step >= config.decay_start_step:
        left = 1.0 - min(1.0, (step - config.decay_start_step) / config.decay_steps)
        factor *= left * left
    return factor


class DenseOptimizer:
    """Steps the dense parameters of a model at the scheduled rate.

    Args:
        model: all but its ``emb_l``.
        config: optimizer, rates and schedule.
    """

    def __init__(self, model: DLRM, config: OptimConfig) -> None:
        self.config = config
        self.dense_parameters = {
            n: p for n, p in model.named_parameters() if not n.startswith("emb_l.")
        }
        """All parameters but the embedding rows, by name."""
        self._parameters = list(self.dense_parameters.values())
        self.dense = dense_optimizer(self._parameters, config)

    def step_dense(self, step: int) -> float:
        """Apply the gradients in the dense parameters' ``grad``.

        Args:
            step: sets the rate; 0-based.

        Returns:
            The learning rate of the embedding rows.
        """
        factor = rate_factor(step, self.config)
        for group in self.dense.param_groups:
            group["lr"] = self.config.lr * factor
        if self.config.weight_decay:
            self._decay(self.config.lr * factor * self.config.weight_decay)
        self.dense.step()
        return (self.config.embedding_lr or self.config.lr) * factor

    def dense_state(self) -> dict[str, Tensor]:
        """Return every state tensor of the dense parameters: ``dense.<parameter>.<name>``."""
        return {
            f"dense.{name}.{key}": value
            for name, parameter in self.dense_parameters.items()
            for key, value in self.dense.state.get(parameter, {}).items()
        }

    def load_dense_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`dense_state` returned; other tensors may be among it."""
        for name, parameter in self.dense_parameters.items():
            prefix = f"dense.{name}."
            state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                self.dense.state[parameter] = state

    @torch.no_grad()
    def _decay(self, amount: float) -> None:
        for parameter in self._parameters:
            if parameter.dim() > 1:
                parameter.mul_(1.0 - amount)


class Optimizer(DenseOptimizer):
    """Steps every parameter of a model at the scheduled rate.

    Args:
        model: whose ``emb_l`` is an EmbeddingBagCollection.
        config: optimizer, rates and schedule.
    """

    def __init__(self, model: DLRM, config: OptimConfig) -> None:
        super().__init__(model, config)
        if not isinstance(model.emb_l, EmbeddingBagCollection):
            raise TypeError("a packed model cannot be trained; load a checkpoint instead")
        self.collection = model.emb_l
        self.rows = RowOptimizer(self.collection, config)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.dense.zero_grad(set_to_none=True)
        self.collection.leaf.grad = None

    def step(self, step: int) -> None:
        """Apply the gradients of the last backward at the rate of ``step`` (0-based)."""
        self.apply(self.collection.row_gradient(), step)

    def apply(self, gradient: RowGradient | None, step: int) -> None:
        """Apply summed gradients of rows, and the dense parameters' in their ``grad``.

        Args:
            gradient: of the looked-up rows; None if there were none.
            step: sets the rate; 0-based.
        """
        if self.config.clip_norm is not None:
            self._clip(gradient, self.config.clip_norm)
        row_rate = self.step_dense(step)
        if gradient is not None:
            self.rows.step(gradient, row_rate)

    def update(self, batch: Batch, grad_pooled: Tensor, step: int) -> None:
        """Apply gradients that no autograd made, at the rate of ``step`` (0-based).

        Args:
            batch: whose rows are updated; the dense parameters' gradients are in their ``grad``.
            grad_pooled: float32 [B, T, D], the gradient of what the collection looked up; samples
                may be any distance apart.
            step: 0-based.
        """
        if self.config.clip_norm is None:
            self.rows.update(batch.indices, batch.offsets, grad_pooled, self.step_dense(step))
            return
        # The norm of the whole gradient must be known before any of it is applied.
        kernel = self.collection.kernel
        self.apply(kernel.row_gradient(batch.indices, batch.offsets, grad_pooled), step)

    def state(self) -> dict[str, Tensor]:
        """Return every state tensor: ``rows.<name>`` and ``dense.<parameter>.<name>``."""
        rows = {f"rows.{name}": tensor for name, tensor in self.rows.state().items()}
        return rows | self.dense_state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: the tensors belong to another optimizer or model.
        """
        for name, tensor in self.rows.state().items():
            if f"rows.{name}" not in tensors:
                raise ValueError(
                    f"the checkpoint holds no state 'rows.{name}' of optim.name="
                    f"{self.config.name}; it was written with another optimizer"
                )
            tensor.copy_(tensors[f"rows.{name}"])
        self.load_dense_state(tensors)

    def _clip(self, gradient: RowGradient | None, clip_norm: float) -> None:
        dense = [p.grad for p in self._parameters if p.grad is not None]
        rows = [] if gradient is None else [gradient.values]
        norms = torch.stack([g.norm() for g in dense + rows])
        factor = (clip_norm / (norms.norm() + 1e-6)).clamp_max(1.0)
        for tensor in dense + rows:
            tensor.mul_(factor)


def dense_optimizer(
    parameters: list[torch.nn.Parameter], config: OptimConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Return torch's optimizer of MLP parameters."""
    # Fused: a pass over memory a tensor, up to four times faster than torch's default on a CPU.
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, fused=fused)
    if config.name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=config.lr, eps=config.eps, fused=fused)
    return torch.optim.Adam(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )
