"""Masks of the units that stay, tuned layer by layer so that each layer's sum is the dense one's.

Least squares (arXiv 2204.09656, section 4.3), on what goes into each block's norm: the teacher's
sum of residual and block output against that of the pruned model on its own, already deviating,
inputs. A layer's solution counts only if the loss of rows it was not fitted on falls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dqrm.compress.lower.shapes import LayerUnits, linear_of
from dqrm.compress.recon.capture import LayerStream
from dqrm.compress.recon.least_squares import UnitLeastSquares
from dqrm.pipelines.text.unit_masks import UnitMasks


@dataclass
class Tuned:
    """What tuning came to."""

    loss: float
    """Of the held-out rows."""
    accepted: list[str] = field(default_factory=list)
    """Blocks whose masks were tuned: ``0.heads``, ``0.neurons`` and so on."""


@dataclass
class _Block:
    """A mixing matrix and its units."""

    output: nn.Module
    unit_size: int
    masks: list[Tensor]
    index: int


def tune_masks(
    masks: UnitMasks,
    teacher: Sequence[LayerUnits],
    streams: tuple[LayerStream, LayerStream],
    valid: Sequence[Tensor],
    held_out_loss: Callable[[], float],
    damping: float,
) -> Tuned:
    """Tune the masks that are not 0, and the biases behind them, in place.

    Args:
        masks: attached to the model that is pruned.
        teacher: layers of the model to be like.
        streams: inputs of the layers of the pruned model and of the teacher.
        valid: bool [rows, tokens] of each batch: what to fit in all layers but the last, of which
            only the first token is used.
        held_out_loss: of the pruned model as it is at that time.
        damping: of the least squares.
    """
    tuned = Tuned(held_out_loss())
    student_stream, teacher_stream = streams
    for index, (units, wanted) in enumerate(zip(masks.layers, teacher, strict=True)):
        last = index == len(masks.layers) - 1
        for kind, block, target in (
            (
                "heads",
                _Block(units.attention_output, units.head_size, masks.heads, index),
                wanted.attention_output,
            ),
            ("neurons", _Block(units.output, 1, masks.neurons, index), wanted.output),
        ):
            before = block.masks[index], linear_of(block.output).bias.detach().clone()
            _fit(block, target, units.layer, wanted.layer, streams, valid, damping, last=last)
            loss = held_out_loss()
            if loss < tuned.loss:
                tuned.loss = loss
                tuned.accepted.append(f"{index}.{kind}")
            else:
                block.masks[index] = before[0]
                with torch.no_grad():
                    linear_of(block.output).bias.copy_(before[1])
        student_stream.advance()
        teacher_stream.advance()
    return tuned


def _fit(
    block: _Block,
    target: nn.Module,
    student_layer: nn.Module,
    teacher_layer: nn.Module,
    streams: tuple[LayerStream, LayerStream],
    valid: Sequence[Tensor],
    damping: float,
    *,
    last: bool,
) -> None:
    linear = linear_of(block.output)
    kept = block.masks[block.index] != 0
    if not kept.any():
        return
    solver = UnitLeastSquares(linear.weight, block.unit_size)
    student, teacher = _Sums(block.output), _Sums(target)
    try:
        with torch.no_grad():
            for batch, tokens in enumerate(valid):
                streams[0].call(student_layer, batch)
                streams[1].call(teacher_layer, batch)
                if last:
                    tokens = torch.zeros_like(tokens)
                    tokens[:, 0] = True
                solver.add(student.inputs[tokens], (teacher.sum - student.sum)[tokens])
    finally:
        student.remove()
        teacher.remove()
    scales, shift = solver.solve(kept, damping, shift=True)
    block.masks[block.index] = block.masks[block.index] * scales
    with torch.no_grad():
        linear.bias.add_(shift)


class _Sums:
    """What an output module last took, masked, and what it last gave its norm."""

    def __init__(self, output: nn.Module) -> None:
        self.inputs = self.sum = torch.empty(0)
        self._residual = torch.empty(0)
        linear = linear_of(output)
        self._handles = [
            output.register_forward_pre_hook(self._take_residual),
            linear.register_forward_hook(self._take),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _take_residual(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._residual = inputs[1]

    def _take(self, module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        self.inputs, self.sum = inputs[0], result + self._residual
