"""One training step: a batch in, its loss out, the model updated.

Symbols: B samples, T tables, F = T + 1 vectors a sample, D embedding_dim, K mixed features.
"""

import math
from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn import functional

from dqrm.compress.linear import QuantLinear
from dqrm.data.batch import Batch
from dqrm.kernels.interaction import interaction_backward, interaction_forward
from dqrm.kernels.loss import bce_with_logits
from dqrm.kernels.mlp import DenseStack, LayerSpec, StackPrecision
from dqrm.kernels.rounding import step_key
from dqrm.models.dlrm import DLRM
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.models.interaction import ConcatInteraction, DotInteraction
from dqrm.models.sharded import ShardedEmbeddingBags
from dqrm.training.errors import TrainingError
from dqrm.training.optimizer import Optimizer

_FUSED = "linear layers, ReLU, dropout and the dot interaction or concatenation"


class TrainStep(Protocol):
    """Updates a model on one batch."""

    def __call__(self, batch: Batch, step: int) -> float:
        """Return the mean loss of ``batch`` before the update; ``step`` (0-based) sets the rate.

        Raises:
            TrainingError: the loss is not finite; nothing was updated.
        """


def make_step(
    model: DLRM,
    optimizer: Optimizer,
    precision: StackPrecision = "fp32",
    seed: int = 0,
    *,
    optimize: Literal["default", "ipex"] = "default",
) -> TrainStep:
    """Return the fastest step that can train ``model``.

    Args:
        model: in training mode.
        optimizer: of that model.
        precision: of the products in the MLPs.
        seed: of dropout and of the stochastic rounding of "int8".
        optimize: as ``train.optimize``.

    Raises:
        TypeError: "int8" of a model that cannot be fused.
    """
    if optimize == "ipex":
        from dqrm.training.ipex import IpexStep

        return IpexStep(model, optimizer, bf16=precision == "bf16")
    stacks = [linear_stack(mlp) for mlp in (model.bot_l, model.top_l)]
    if None not in stacks and isinstance(model.interaction, DotInteraction | ConcatInteraction):
        return FusedStep(model, optimizer, precision, seed)
    if precision == "int8":
        raise TypeError(f"int8 is for {_FUSED}")
    return AutogradStep(model, optimizer, bf16=precision == "bf16")


class AutogradStep:
    """The step as torch sees it: any module of the model may be replaced."""

    def __init__(self, model: DLRM, optimizer: Optimizer, *, bf16: bool = False) -> None:
        self.model = model
        self.optimizer = optimizer
        self.bf16 = bf16

    def __call__(self, batch: Batch, step: int) -> float:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.model(batch.dense, batch.indices, batch.offsets)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), batch.label)
        value = check_loss(loss.item(), step)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(step)
        return value


class FusedPasses:
    """Forward and backward as a dozen native calls, without autograd and without allocating.

        batch.dense ---- bottom ---> vectors[:, 0]  \\
        batch.indices -- emb_l ----> vectors[:, 1:] -+- interaction -> mixed -- top -> logit

    and back the same way; vectors are concatenated as they lie.

    Args:
        model: in training mode.
        precision: of the products in the MLPs.
        seed: of dropout and of the stochastic rounding of "int8", whose random bits are those of
            the seed and the step alone: a resumed run goes on with the same ones.
    """

    def __init__(self, model: DLRM, precision: StackPrecision = "fp32", seed: int = 0) -> None:
        bottom, top = linear_stack(model.bot_l), linear_stack(model.top_l)
        self.interaction = model.interaction
        if (
            bottom is None
            or top is None
            or not isinstance(self.interaction, DotInteraction | ConcatInteraction)
        ):
            raise TypeError(f"only {_FUSED} can be fused")
        if not isinstance(model.emb_l, EmbeddingBagCollection | ShardedEmbeddingBags):
            raise TypeError("a packed model cannot be trained; load a checkpoint instead")
        self.bags = model.emb_l
        self.bottom = DenseStack(bottom, precision)
        self.top = DenseStack(top, precision)
        # Seeds of their own: the embedding rows' rounding has the keys of the seed itself.
        self._seeds = step_key(seed, 1), step_key(seed, 2)
        for stack in (self.bottom, self.top):
            for layer, gradients in zip(stack.layers, stack.gradients, strict=True):
                layer.weight.grad, layer.bias.grad = gradients
        self._activations = _Activations(self, 0)

    def _forward(self, batch: Batch, step: int, *, rows: float | None = None) -> float:
        """Return the loss and keep its gradient by the logits.

        Args:
            batch: any number of samples.
            step: 0-based.
            rows: what the mean loss is over; the batch when not given.
        """
        if self._activations.size != batch.label.numel():
            self._activations = _Activations(self, batch.label.numel())
        on = self._activations
        bottom_key, top_key = self._keys(step)
        first_row = batch.first_row
        self.bottom.forward(batch.dense, out=on.vectors[:, 0], key=bottom_key, first_row=first_row)
        self.bags.lookup(batch.indices, batch.offsets, on.vectors[:, 1:])
        if isinstance(self.interaction, DotInteraction):
            interaction_forward(on.vectors, on.mixed, self.interaction.itself)
        self.top.forward(on.mixed, out=on.logits, key=top_key, first_row=first_row)
        return bce_with_logits(on.logits, batch.label, on.grad_logits, rows=rows)

    def _backward_top(self, step: int) -> None:
        on = self._activations
        self.top.backward(on.grad_logits, out=on.grad_mixed, key=self._keys(step)[1])

    def _backward_interaction(self) -> None:
        on = self._activations
        if isinstance(self.interaction, DotInteraction):
            interaction_backward(
                on.vectors, on.grad_mixed, on.grad_vectors, self.interaction.itself
            )

    def _backward_bottom(self, step: int) -> None:
        grad = self._activations.grad_vectors[:, 0]
        self.bottom.backward(grad, need_grad_input=False, key=self._keys(step)[0])

    def _keys(self, step: int) -> tuple[int, int]:
        """Keys of the random bits of both MLPs."""
        return step_key(self._seeds[0], step), step_key(self._seeds[1], step)


class FusedStep(FusedPasses):
    """The same step in one process; rows are updated where their gradients are summed.

    Args:
        model: in training mode.
        optimizer: of that model.
        precision: as in FusedPasses.
        seed: as in FusedPasses.
    """

    def __init__(
        self,
        model: DLRM,
        optimizer: Optimizer,
        precision: StackPrecision = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__(model, precision, seed)
        self.optimizer = optimizer
        self.collection = optimizer.collection

    def __call__(self, batch: Batch, step: int) -> float:
        """Forward, backward, update."""
        loss = check_loss(self._forward(batch, step), step)
        self._backward_top(step)
        self._backward_interaction()
        self._backward_bottom(step)
        self.optimizer.update(batch, self._activations.grad_vectors[:, 1:], step)
        return loss


class _Activations:
    """What a step computes on a batch, each with its gradient."""

    def __init__(self, step: FusedPasses, size: int) -> None:
        self.size = size
        shape = size, len(step.bags.tables) + 1, step.bags.embedding_dim
        self.vectors, self.grad_vectors = torch.empty(shape), torch.empty(shape)
        """[B, F, D]: the bottom MLP's output and the pooled embeddings."""
        if isinstance(step.interaction, DotInteraction):
            self.mixed, self.grad_mixed = torch.empty(2, size, step.top.in_features)
        else:
            self.mixed, self.grad_mixed = self.vectors.flatten(1), self.grad_vectors.flatten(1)
        """[B, K]: the top MLP's input."""
        self.logits, self.grad_logits = torch.empty(size, 1), torch.empty(size, 1)
        """[B, 1]."""


def check_loss(value: float, step: int) -> float:
    """Return ``value``.

    Raises:
        TrainingError: it is not finite.
    """
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss became {value} at step {step + 1}; lower optim.lr, set optim.clip_norm, or "
            "look for extreme values in the dense columns"
        )
    return value


def linear_stack(mlp: nn.Sequential) -> list[LayerSpec] | None:
    """Return the layers of ``mlp``; None if it holds more than linear layers, ReLU and dropout."""
    layers: list[LayerSpec] = []
    for module in mlp:
        relu, *rest = module if isinstance(module, nn.Sequential) else (module,)
        if isinstance(module, nn.Linear):
            layer = LayerSpec(module.weight, module.bias)
            if isinstance(module, QuantLinear):
                layer = layer._replace(bits=module.bits, activation_bits=module.activation_bits)
            layers.append(layer)
        elif isinstance(relu, nn.ReLU) and layers and not layers[-1].relu and len(rest) <= 1:
            dropout = rest[0] if rest else nn.Dropout(0.0)
            if not isinstance(dropout, nn.Dropout):
                return None
            layers[-1] = layers[-1]._replace(relu=True, dropout=dropout.p)
        else:
            return None
    return layers
