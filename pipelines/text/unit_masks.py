"""Masks over the heads and neurons of a transformer, and what its units cost.

transformers 5 takes no ``head_mask``. The masks multiply what the output matrices of attention and
feed-forward take, by forward pre-hooks, so that a value of 0 does what removing the unit does.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dqrm.compress.lower.shapes import keep_units, layer_units, linear_of
from dqrm.compress.signals.units import Kept


@dataclass(frozen=True)
class UnitCosts:
    """Multiply-accumulates of one unit, mean over sentences without padding."""

    head: float
    neuron: float

    @classmethod
    def of(cls, model: Any, lengths: Sequence[int]) -> "UnitCosts":
        """The costs for sentences of these lengths, in tokens.

        A head of width h projects to query, key and value and back (4 s d h MACs for s tokens and
        hidden width d) and makes and applies its weights (2 s**2 h); a neuron has a row of one
        matrix and a column of another (2 s d).
        """
        config = model.config
        hidden = config.hidden_size
        width = hidden // config.num_attention_heads
        mean = sum(lengths) / len(lengths)
        square = sum(length * length for length in lengths) / len(lengths)
        return cls(4 * mean * hidden * width + 2 * square * width, 2 * mean * hidden)

    def total(self, model: Any) -> float:
        """MACs of all units a model has: those of its encoder."""
        layers = layer_units(model)
        return sum(self.head * u.num_heads + self.neuron * u.num_neurons for u in layers)


class UnitMasks:
    """One value for every head and neuron of ``model``, 1 to begin with."""

    def __init__(self, model: Any) -> None:
        self.layers = layer_units(model)
        self.heads = [torch.ones(units.num_heads) for units in self.layers]
        """float32 [heads] of each layer."""
        self.neurons = [torch.ones(units.num_neurons) for units in self.layers]
        """float32 [neurons] of each layer."""

    def variables(self) -> dict[str, Tensor]:
        """The masks by name, as leaves that require gradients."""
        found = {}
        for kind, masks in (("heads", self.heads), ("neurons", self.neurons)):
            for index, mask in enumerate(masks):
                found[f"{kind}.{index}"] = mask.requires_grad_()
        return found

    def keep(self, kept: Kept) -> None:
        """Make the masks 1 for these units and 0 for others."""
        self.heads = [mask.float() for mask in kept.heads]
        self.neurons = [mask.float() for mask in kept.neurons]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Multiply by the masks, as they are at each call."""
        handles = []
        for index, units in enumerate(self.layers):
            handles += [
                linear_of(units.attention_output).register_forward_pre_hook(
                    lambda _, inputs, index=index: self._heads_times(index, inputs)
                ),
                linear_of(units.output).register_forward_pre_hook(
                    lambda _, inputs, index=index: (inputs[0] * self.neurons[index],)
                ),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def cut(self) -> None:
        """Remove the units whose mask is 0 and put the values of the others into the matrices."""
        for units, heads, neurons in zip(self.layers, self.heads, self.neurons, strict=True):
            linear_of(units.attention_output).weight.mul_(heads.repeat_interleave(units.head_size))
            linear_of(units.output).weight.mul_(neurons)
            keep_units(units, heads != 0, neurons != 0)

    def _heads_times(self, index: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        values = self.heads[index].repeat_interleave(self.layers[index].head_size)
        return (inputs[0] * values,)
