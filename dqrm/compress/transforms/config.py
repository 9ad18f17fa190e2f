"""Transforms as a pipeline's file says them.

transforms:
  - kind: quant
    match: ".*encoder.*dense"
    weight: {bits: 4, group: 64}
    act: {bits: 8}
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from dqrm.settings import Settings

if TYPE_CHECKING:
    from dqrm.compress.grids.granularity import Granularity
    from dqrm.compress.transforms.base import Transform

Patterns = str | tuple[str, ...]


class WeightGrid(Settings):
    """Grid of weights and which of them share a scale."""

    bits: int = Field(default=8, ge=1, le=16)
    """Of a weight. 1 and 2 are binary and ternary (arXiv 2206.01859) unless grid says otherwise."""

    grid: Literal["symmetric", "ternary", "binary"] | None = None
    """None takes binary for 1 bit, ternary for 2, symmetric for more."""

    per: Literal["row", "tensor"] = "row"
    """One scale an output channel (or row of an embedding), or one a weight."""

    group: PositiveInt | None = None
    """Inputs that share a scale, within a row: group_size of GPTQ and torchao."""

    groups: PositiveInt | None = None
    """Groups of rows of a weight that share a scale: quantize_groups of DeepSpeed."""

    @model_validator(mode="after")
    def _fits(self) -> "WeightGrid":
        if self.group is not None and self.groups is not None:
            raise ValueError("group cuts a row and groups a matrix; set one of them")
        if {"ternary": 2, "binary": 1}.get(self.grid or "", self.bits) != self.bits:
            raise ValueError(f"a {self.grid} grid cannot have {self.bits} bits")
        if self.grid == "symmetric" and self.bits == 1:
            raise ValueError("a symmetric grid has 2 bits or more")
        return self

    def granularity(self) -> "Granularity":
        """Return the weights that share a scale."""
        from dqrm.compress.grids.granularity import Granularity

        if self.group is not None:
            return Granularity("k_groups", self.group)
        if self.groups is not None:
            return Granularity("row_groups", self.groups)
        return Granularity(self.per)


class ActivationGrid(Settings):
    """Grid of a layer's input."""

    bits: Literal[8] = 8
    """Of an element."""

    per: Literal["token"] = "token"
    """One scale a token, taken from it: dynamic quantization."""


class QuantTransform(Settings):
    """Quantization-aware training of layers and embeddings."""

    kind: Literal["quant"]

    match: Patterns
    """Names of the modules, as regular expressions of whole names."""

    weight: WeightGrid | None = None
    """None leaves weights as they are."""

    act: ActivationGrid | None = None
    """None leaves inputs as they are."""

    @model_validator(mode="after")
    def _does_something(self) -> "QuantTransform":
        if self.weight is None and self.act is None:
            raise ValueError("set weight, act or both: neither is quantized")
        return self

    def transforms(self) -> "list[Transform]":
        """Return what it stands for."""
        from dqrm.compress.transforms.activations import QuantizeActivations
        from dqrm.compress.transforms.weights import QuantizeWeights

        match = (self.match,) if isinstance(self.match, str) else self.match
        made: list[Transform] = []
        if self.weight is not None:
            weight = self.weight
            made.append(QuantizeWeights(match, weight.bits, weight.granularity(), weight.grid))
        if self.act is not None:
            made.append(QuantizeActivations(match, self.act.bits))
        return made


TransformConfig = Annotated[QuantTransform, Field()]
