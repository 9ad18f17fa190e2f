"""How sensitive the layers of a text model are, for schedules that ask: curvature of the loss."""

import json
import logging
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.compress.signals.curvature import block_eigenvalue, relative_curvature
from dqrm.compress.transforms.base import Compression
from dqrm.compress.transforms.weights import QuantizeWeights
from dqrm.pipelines.text.attention import use_plain_attention
from dqrm.pipelines.text.layers import encoder_layers, encoder_path
from dqrm.pipelines.text.objective import TaskLoss
from dqrm.training.world import World

log = logging.getLogger(__name__)

ROWS = 32
"""Sentences the curvature is taken on: each product with the Hessian costs a double backward."""

_ITERATIONS = 30
_TOLERANCE = 1e-2


def schedules_that_ask(compression: Compression) -> list[QuantizeWeights]:
    """Return the transforms whose periods depend on sensitivity."""
    transforms = [t for t in compression.transforms if isinstance(t, QuantizeWeights)]
    return [transform for transform in transforms if transform.sensitivity]


def tell_sensitivity(
    model: Any,
    compression: Compression,
    inputs: dict[str, Tensor],
    labels: Tensor,
    world: World | None = None,
) -> None:
    """Measure each layer, and tell the schedules that ask; nothing where none does.

    A layer's sensitivity is the largest eigenvalue of its block of the Hessian as a share of the
    largest of all. What is in no layer has none: its bits go down as if none had been asked for.

    Args:
        model: of transformers, the compression attached. Measured in evaluation mode and FP32.
        compression: attached to it.
        inputs: of a batch.
        labels: of its rows; float32 of a regression.
        world: of processes that have the same model; rank 0 measures for all.

    Raises:
        ValueError: bits would not reach their target in time.
    """
    asking = schedules_that_ask(compression)
    if not asking:
        return
    world = world or World()
    measured = None
    if world.is_main:
        shares = relative_curvature(_layer_eigenvalues(model, inputs, labels))
        log.info("sensitivity of layers: %s", ", ".join(f"{share:.2f}" for share in shares))
        measured = json.dumps(shares)
    shares = json.loads(world.from_main(measured))
    path = encoder_path(model)
    values = {
        name: _share_of(name, path, shares)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    for transform in asking:
        transform.set_sensitivity(values)


def _layer_eigenvalues(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> list[float]:
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    use_plain_attention(model)  # A fused one cannot be differentiated twice.
    task = TaskLoss(regression=labels.is_floating_point(), bf16=False)
    generator = torch.Generator().manual_seed(0)
    try:
        return [
            block_eigenvalue(
                lambda: task(model, inputs, labels),
                [p for p in layer.parameters() if p.requires_grad and p.ndim > 1],
                generator,
                max_iterations=_ITERATIONS,
                tolerance=_TOLERANCE,
            )
            for layer in encoder_layers(model)
        ]
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


def _share_of(name: str, path: str, shares: list[float]) -> float | None:
    head, _, rest = name.partition(f"{path}.")
    return shares[int(rest.split(".")[0])] if rest and not head else None
