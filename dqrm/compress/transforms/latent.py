"""The steps between a module's latent weight and the one it computes with.

Steps are parametrizations of torch (torch.nn.utils.parametrize), in the order of their transforms.
They keep no tensors among the model's: its state is the latent weight alone.
"""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import WeightRecord, set_weight_record, weight_record


class WeightStep(nn.Module):
    """One step; ``forward`` maps a weight to a weight, with the gradient it chooses."""

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight after this step, float32 as it came."""

    @abstractmethod
    def described(self, record: WeightRecord, before: Tensor) -> WeightRecord:
        """Return ``record`` with what this step does to the weight ``before`` it."""

    def keeps(self, record: WeightRecord) -> bool:
        """Return whether a compressed weight is still all that ``record`` says after this step."""
        return record.grid == "fp32" and record.mask is None


def add_step(model: nn.Module, name: str, step: WeightStep) -> None:
    """Put ``step`` behind those of the module's weight.

    Raises:
        ValueError: the weight has a step of that kind, was compressed before in a way that the
            first step does not keep, or is another module's, too.
    """
    module = model.get_submodule(name)
    if any(type(other) is type(step) for other in weight_steps(module)):
        raise ValueError(f"{name}: two transforms of one kind match it")
    if not weight_steps(module):
        record = weight_record(module)
        if record is not None and not step.keeps(record):
            raise ValueError(f"{name}: its weight was compressed before")
        for other, parameter in model.named_parameters(remove_duplicate=False):
            if parameter is module.weight and other != f"{name}.weight":
                raise ValueError(f"{name}: its weight is also {other}; a shared one would differ")
    parametrize.register_parametrization(module, "weight", step)


def weight_steps(module: nn.Module) -> list[WeightStep]:
    """Return the steps of a module's weight, in order."""
    if not parametrize.is_parametrized(module, "weight"):
        return []
    steps = module.parametrizations["weight"]  # type: ignore[index]
    return [step for step in steps if isinstance(step, WeightStep)]


def latent_weight(module: nn.Module) -> nn.Parameter:
    """Return the tensor an optimizer updates."""
    if weight_steps(module):
        # Not by way of module.weight, which would take all steps.
        parameter: object = module.parametrizations["weight"].original  # type: ignore[index, union-attr]
    else:
        parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    return parameter


@torch.no_grad()
def settle(module: nn.Module) -> None:
    """Make the weight what its steps give in evaluation, and record them."""
    steps = weight_steps(module)
    if not steps:
        return
    value = latent_weight(module)
    record = WeightRecord("fp32", 32, Granularity("tensor"), torch.empty(0))
    for step in steps:
        record = step.described(record, value)
        value = step(value)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    earlier = weight_record(module)
    if earlier is not None:
        record = replace(
            record,
            activation_bits=earlier.activation_bits,
            activation_grid=earlier.activation_grid,
        )
    set_weight_record(module, record)
