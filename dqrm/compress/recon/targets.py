"""What a module is to become, and the way there that needs no data.

A weight that has an N:M pattern already keeps it, and so does an input that has a grid, unless the
target has another.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import (
    ActivationGrid,
    Grid,
    WeightRecord,
    set_weight_record,
    weight_record,
)
from dqrm.compress.transforms.activations import attach_activation_quantizer
from dqrm.compress.transforms.latent import add_step, settle, weight_steps
from dqrm.compress.transforms.patterns import NMStep
from dqrm.compress.transforms.weights import FakeQuantizeWeight, grid_of


@dataclass(frozen=True)
class Target:
    """Grids of one linear layer."""

    bits: int
    """Of a weight; 32 leaves it."""
    granularity: Granularity = Granularity("row")  # noqa: RUF009
    grid: Grid | None = None
    """None: binary of 1 bit, ternary of 2, else symmetric."""
    full_range: bool = False
    """Of a symmetric or asymmetric grid (see :func:`dqrm.compress.grids.record.fit`)."""
    activation_bits: Literal[8, 32] = 32
    activation_grid: ActivationGrid = "symmetric"

    @property
    def keeps_weight(self) -> bool:
        """Whether the weight stays as it is."""
        return self.bits == 32


def begin(model: nn.Module, name: str, target: Target) -> None:
    """Have a module compute on its grids; its weight is a latent one until :func:`finish`.

    Raises:
        ValueError: the weight is on a grid already, or is another module's, too.
    """
    module = model.get_submodule(name)
    if not target.keeps_weight:
        step = FakeQuantizeWeight(
            target.granularity, target.bits, target.grid, full_range=target.full_range
        )
        step.follow(_hold(model, name))
        add_step(model, name, step)
    if target.activation_bits == 8:
        attach_activation_quantizer(module, 8, target.activation_grid)


def hold_patterns(model: nn.Module) -> list[nn.Module]:
    """Have weights with an N:M pattern and no grid keep it while they are trained.

    Returns:
        Their modules, for :func:`dqrm.compress.transforms.latent.settle` in the end.
    """
    return [
        module
        for name, module in list(model.named_modules())
        if not weight_steps(module) and _hold(model, name) is not None
    ]


def finish(model: nn.Module, name: str, target: Target) -> None:
    """Put the weight on its grid for good and record it: the values that it computed with."""
    module = model.get_submodule(name)
    settle(module)
    record_activations(module, target)


def put(module: nn.Module, weight: Tensor, scale: Tensor, target: Target) -> None:
    """Replace a weight by one that is on its grid already, and record it.

    Args:
        module: its input is quantized already, where the target says so.
        weight: float32 [out, in], on the grid of ``scale``, which has no zeros, and of the
            pattern that the module has.
        scale: as ``target.granularity`` shapes it.
        target: of the module.
    """
    with torch.no_grad():
        module.weight.copy_(weight)  # type: ignore[operator]
    grid = grid_of(target.bits, target.grid)
    record = replace(
        _record_of(module),
        grid=grid,
        bits=target.bits,
        granularity=target.granularity,
        scale=scale,
    )
    set_weight_record(module, record)
    record_activations(module, target)


def record_activations(module: nn.Module, target: Target) -> None:
    """Record the bits of a module's input."""
    if target.activation_bits == 32:
        return
    record = replace(
        _record_of(module),
        activation_bits=target.activation_bits,
        activation_grid=target.activation_grid,
    )
    set_weight_record(module, record)


def kept_weights(module: nn.Module) -> Tensor | None:
    """Return which weights the pattern of a module keeps (bool, as they); None: it has none."""
    pattern = _record_of(module).mask
    weight = module.weight
    assert isinstance(weight, Tensor)
    return None if pattern is None else pattern.mask(weight)


def quantize_without_data(model: nn.Module, name: str, target: Target) -> None:
    """Round a weight to its grid; biases, norms and all else stay."""
    begin(model, name, target)
    finish(model, name, target)


def _hold(model: nn.Module, name: str) -> NMStep | None:
    """Put the pattern that a weight has behind it as a step; None: it has none."""
    module = model.get_submodule(name)
    pattern = _record_of(module).mask
    if pattern is None:
        return None
    step = NMStep(pattern)
    step.mask = kept_weights(module)
    add_step(model, name, step)
    return step


def _record_of(module: nn.Module) -> WeightRecord:
    plain = WeightRecord("fp32", 32, Granularity("tensor"), torch.empty(0))
    return weight_record(module) or plain
