"""One training step: a batch in, its loss out, the model updated.

Symbols: B samples, T tables, F = T + 1 vectors a sample, D embedding_dim, K mixed features.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqrm.compress.linear import QuantLinear
from dqrm.data.batch import Batch
from dqrm.kernels.interaction import interaction_backward, interaction_forward
from dqrm.kernels.mlp import DenseStack, LayerSpec, StackPrecision
from dqrm.kernels.rounding import step_key
from dqrm.models.dlrm import DLRM
from dqrm.models.interaction import DotInteraction
from dqrm.training.optimizer import Optimizer


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


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
        seed: of the stochastic rounding of "int8".
        optimize: as ``train.optimize``.

    Raises:
        TypeError: "int8" of a model that cannot be fused.
    """
    if optimize == "ipex":
        from dqrm.training.ipex import IpexStep

        return IpexStep(model, optimizer, bf16=precision == "bf16")
    stacks = [linear_stack(mlp) for mlp in (model.bot_l, model.top_l)]
    if None not in stacks and isinstance(model.interaction, DotInteraction):
        return FusedStep(model, optimizer, precision, seed)
    if precision == "int8":
        raise TypeError(
            "int8 computes only linear layers, ReLU and the dot interaction, without dropout"
        )
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


class FusedStep:
    """The same step as a dozen native calls, without autograd and without allocating.

        batch.dense ---- bottom ---> vectors[:, 0]  \\
        batch.indices -- emb_l ----> vectors[:, 1:] -+- interaction -> mixed -- top -> logit

    and back the same way. The looked-up rows are updated where their gradients are summed.

    Args:
        model: in training mode.
        optimizer: of that model.
        precision: of the products in the MLPs.
        seed: of the stochastic rounding of "int8", whose random bits are those of the seed and the
            step alone: a resumed run goes on with the same ones.
    """

    def __init__(
        self,
        model: DLRM,
        optimizer: Optimizer,
        precision: StackPrecision = "fp32",
        seed: int = 0,
    ) -> None:
        bottom, top = linear_stack(model.bot_l), linear_stack(model.top_l)
        if bottom is None or top is None or not isinstance(model.interaction, DotInteraction):
            raise TypeError("only linear layers, ReLU and the dot interaction can be fused")
        self.optimizer = optimizer
        self.collection = optimizer.collection
        self.itself = model.interaction.itself
        self.bottom = DenseStack(bottom, precision)
        self.top = DenseStack(top, precision)
        # Seeds of their own: the embedding rows' rounding has the keys of the seed itself.
        self._seeds = step_key(seed, 1), step_key(seed, 2)
        for stack in (self.bottom, self.top):
            for layer, gradients in zip(stack.layers, stack.gradients, strict=True):
                layer.weight.grad, layer.bias.grad = gradients
        self._buffers: tuple[Tensor, ...] = ()

    def __call__(self, batch: Batch, step: int) -> float:
        """Forward, backward, update."""
        size = batch.label.numel()
        vectors, grad_vectors, mixed, grad_mixed, logits, grad_logits = self._workspace(size)
        self.bottom.forward(batch.dense, out=vectors[:, 0])
        self.collection.lookup(batch.indices, batch.offsets, vectors[:, 1:])
        interaction_forward(vectors, mixed, self.itself)
        self.top.forward(mixed, out=logits)
        loss = functional.binary_cross_entropy_with_logits(logits[:, 0], batch.label).item()
        check_loss(loss, step)
        torch.sub(logits.sigmoid_()[:, 0], batch.label, out=grad_logits[:, 0]).div_(size)
        bottom_key, top_key = (step_key(seed, step) for seed in self._seeds)
        self.top.backward(grad_logits, out=grad_mixed, key=top_key)
        interaction_backward(vectors, grad_mixed, grad_vectors, self.itself)
        self.bottom.backward(grad_vectors[:, 0], need_grad_input=False, key=bottom_key)
        self.optimizer.update(batch, grad_vectors[:, 1:], step)
        return loss

    def _workspace(self, size: int) -> tuple[Tensor, ...]:
        """Vectors [B, F, D], mixed features [B, K] and logits [B, 1], each with its gradient."""
        if not self._buffers or self._buffers[0].shape[0] != size:
            vectors = size, len(self.collection.tables) + 1, self.collection.embedding_dim
            shapes = (vectors, (size, self.top.in_features), (size, 1))
            self._buffers = tuple(torch.empty(shape) for shape in shapes for _ in range(2))
        return self._buffers


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
    """Return the layers of ``mlp``; None if it holds more than linear layers and ReLU."""
    modules = list(mlp)
    layers: list[LayerSpec] = []
    for position, module in enumerate(modules):
        if (
            isinstance(module, nn.ReLU)
            and position
            and isinstance(modules[position - 1], nn.Linear)
        ):
            layers[-1] = layers[-1]._replace(relu=True)
        elif isinstance(module, nn.Linear):
            layer = LayerSpec(module.weight, module.bias)
            if isinstance(module, QuantLinear):
                layer = layer._replace(bits=module.bits, activation_bits=module.activation_bits)
            layers.append(layer)
        else:
            return None
    return layers
