"""Quantizes a model layer by layer against the model as it was."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from dqrm.compress.recon.capture import LayerStream, called_linears, input_gram
from dqrm.compress.recon.gptq import gptq
from dqrm.compress.recon.lkd import LayerLoss, LkdRecipe, distil_layer, relative_loss
from dqrm.compress.recon.targets import (
    Target,
    begin,
    finish,
    hold_patterns,
    kept_weights,
    put,
    quantize_without_data,
    record_activations,
)
from dqrm.compress.transforms.latent import settle
from dqrm.compress.transforms.weights import grid_of

Forwards = Callable[[nn.Module], Iterable[Callable[[], object]]]


@dataclass(frozen=True)
class GptqRecipe:
    """How GPTQ rounds."""

    damping: float
    act_order: bool


def check_gptq_targets(targets: Mapping[str, Target]) -> None:
    """Refuse grids that GPTQ does not round to.

    Raises:
        ValueError: the message names the module.
    """
    for name, target in targets.items():
        grid = grid_of(target.bits, target.grid)
        if not target.keeps_weight and grid != "symmetric":
            raise ValueError(
                f"{name}: GPTQ rounds to symmetric grids, not to {grid} ones; set 3 bits or more, "
                "or grid: symmetric"
            )


@dataclass(frozen=True)
class Calibration:
    """What layers are run on."""

    forwards: Forwards
    """For a model: calls of it, one a batch."""
    valid: Sequence[Tensor]
    """bool [rows, tokens] of each batch."""
    folder: Path
    """For hidden states that do not fit in memory."""
    memory_bytes: int
    """Of hidden states, kept in memory; of each of the two models where both are run."""
    check: Callable[[], None] = lambda: None
    """Called before each batch runs through a layer; may raise."""


class LayerwiseQuantizer:
    """Takes the layers of ``student`` to their grids, one after another.

    Modules outside the layers are rounded at once. A resumed run begins with the layer behind the
    last one that was finished.

    Args:
        student: computes in evaluation mode; changed in place.
        teacher: the same model as it was.
        layers: names of the layers, in the order they run in.
        targets: by module name.
        recipe: how.
        inputs: whose hidden states a layer is fitted on. ``teacher``: those of the original model,
            as in ZeroQuant; ``student``: those that the layers quantized so far make, so that a
            layer can make up for their errors.
        calibration: what to run on.
        first: the layer to begin with.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Sequence[str],
        targets: Mapping[str, Target],
        recipe: LkdRecipe | GptqRecipe,
        inputs: Literal["teacher", "student"],
        calibration: Calibration,
        first: int = 0,
    ) -> None:
        self._student = student
        self._layers = layers
        self._targets = targets
        self._recipe = recipe
        self._calibration = calibration
        self._student_layers = [student.get_submodule(name) for name in layers]
        self._teacher_layers = [teacher.get_submodule(name) for name in layers]
        if isinstance(recipe, GptqRecipe):
            check_gptq_targets(targets)
        if first == 0:
            for name, target in targets.items():
                if not any(name.startswith(f"{layer}.") for layer in layers):
                    quantize_without_data(student, name, target)
        self._teacher_stream = self._stream(teacher, self._teacher_layers, "teacher", first)
        self._student_stream = self._teacher_stream
        if inputs == "student":
            self._student_stream = self._stream(student, self._student_layers, "student", first)
        self.position = first
        """Of the layer that is next."""

    def step(self) -> LayerLoss:
        """Take the next layer to its grids; return the error of its outputs."""
        prefix = f"{self._layers[self.position]}."
        names = {
            name.removeprefix(prefix): target
            for name, target in self._targets.items()
            if name.startswith(prefix)
        }
        layer = self._student_layers[self.position]
        if isinstance(self._recipe, LkdRecipe):
            loss = self._distil(layer, names, self._recipe)
        else:
            loss = self._round(layer, names, self._recipe)
        self._teacher_stream.advance()
        if self._student_stream is not self._teacher_stream:
            self._student_stream.advance()
        self.position += 1
        return loss

    def _distil(
        self, layer: nn.Module, targets: Mapping[str, Target], recipe: LkdRecipe
    ) -> LayerLoss:
        for name, target in targets.items():
            begin(layer, name, target)
        # All of the layer learns, so what keeps its values must keep its pattern, too.
        held = hold_patterns(layer)
        loss = distil_layer(
            layer,
            self._teacher_layers[self.position],
            self._student_stream,
            self._teacher_stream,
            self._calibration.valid,
            recipe,
        )
        for module in held:
            settle(module)
        for name, target in targets.items():
            finish(layer, name, target)
        return loss

    def _round(
        self, layer: nn.Module, targets: Mapping[str, Target], recipe: GptqRecipe
    ) -> LayerLoss:
        plain = copy.deepcopy(layer)
        for name, target in targets.items():
            quantize_without_data(plain, name, target)
            begin(layer, name, replace(target, bits=32))
        stream, valid = self._student_stream, self._calibration.valid
        # Inputs of a matrix are those that the matrices rounded before it make.
        rounded = {name for name, target in targets.items() if not target.keeps_weight}
        for name in called_linears(layer, stream):
            if name not in rounded:
                continue
            target = targets[name]
            module = layer.get_submodule(name)
            assert isinstance(module, nn.Linear)
            gram = input_gram(layer, module, stream, valid)
            weight, scale = gptq(
                module.weight.detach(),
                gram,
                target.bits,
                target.granularity,
                kept_weights(module),
                full_range=target.full_range,
                damping=recipe.damping,
                act_order=recipe.act_order,
            )
            put(module, weight, scale, target)
        for name, target in targets.items():
            record_activations(layer.get_submodule(name), target)
        teacher = self._teacher_layers[self.position]
        start, end = (
            relative_loss(tried, teacher, stream, self._teacher_stream, valid)
            for tried in (plain, layer)
        )
        return LayerLoss(start, end)

    def _stream(
        self, model: nn.Module, layers: Sequence[nn.Module], name: str, first: int
    ) -> LayerStream:
        calibration = self._calibration
        stream = LayerStream(
            layers,
            calibration.forwards(model),
            calibration.folder / name,
            calibration.memory_bytes,
            calibration.check,
        )
        for _ in range(first):
            stream.advance()
        return stream
