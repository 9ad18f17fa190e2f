"""Transforms as a pipeline's file says them.

transforms:
  - kind: quant
    match: ".*encoder.*dense"
    weight: {bits: 4, group: 64}
    act: {bits: 8}
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from dqrm.settings import Settings

if TYPE_CHECKING:
    from dqrm.compress.grids.granularity import Granularity
    from dqrm.compress.schedules import MoqBits
    from dqrm.compress.transforms.base import Transform

Patterns = str | Annotated[tuple[str, ...], Field(min_length=1)]


class WeightGrid(Settings):
    """Grid of weights and which of them share a scale."""

    bits: int = Field(default=8, ge=1, le=16)
    """Of a weight. 1 and 2 are binary and ternary (arXiv 2206.01859) unless grid says otherwise."""

    grid: Literal["symmetric", "asymmetric", "ternary", "binary"] | None = None
    """None takes binary for 1 bit, ternary for 2, symmetric for more. asymmetric: from the smallest
    to the largest weight, with zero among the values (DeepSpeed's quantization_type)."""

    per: Literal["row", "tensor"] = "row"
    """One scale an output channel, or one a weight. Of an embedding, rows never share scales."""

    group: PositiveInt | None = None
    """Inputs that share a scale, within a row: group_size of GPTQ and torchao."""

    groups: PositiveInt | None = None
    """Groups of rows of a weight that share a scale: quantize_groups of DeepSpeed."""

    range: Literal["restricted", "full"] = "restricted"
    """Scale of a symmetric grid: max|w| / (2^(b-1) - 1), or max|w| / 2^(b-1) as DeepSpeed has it,
    where the largest positive weight of a group loses a step; of an asymmetric one likewise."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Where gradients are taken, of a symmetric or asymmetric grid; what is evaluated and kept is
    rounded to nearest."""

    @model_validator(mode="after")
    def _fits(self) -> "WeightGrid":
        if self.group is not None and self.groups is not None:
            raise ValueError("group cuts a row and groups a matrix; set one of them")
        for field in ("group", "groups"):
            if self.differs("per") and getattr(self, field) is not None:
                raise ValueError(f"per has no effect with {field}; leave it out")
        if {"ternary": 2, "binary": 1}.get(self.grid or "", self.bits) != self.bits:
            raise ValueError(f"a {self.grid} grid cannot have {self.bits} bits")
        if self.grid in ("symmetric", "asymmetric") and self.bits == 1:
            raise ValueError(f"a {self.grid} grid has 2 bits or more")
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

    grid: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric",
        # A stage that was complete before there was this setting stays so.
        exclude_if=lambda grid: grid == "symmetric",
    )
    """asymmetric: from the smallest to the largest value of a token, with zero among the values; a
    gain for inputs of one sign. Such layers run in FP32."""


class BitSchedule(Settings):
    """Bits that go down to the weight's while training: MoQ of DeepSpeed.

    They change in the steps period, 2 period, 4 period, ... after offset; the last change must lie
    within the training.
    """

    start: int = Field(ge=1, le=16)
    """Bits at first."""

    period: PositiveInt
    """Steps until bits first go down."""

    offset: NonNegativeInt = 0
    """Steps at the beginning in which weights are not quantized."""

    mix_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """After each change the weight is part FP32, less by this share every step; 0: not at all.
    DeepSpeed's quantize_change_ratio."""

    sensitivity: Literal["eigenvalue"] | None = None
    """eigenvalue makes the periods of a block up to 5 times as long, by the largest curvature of
    the loss along its weights."""

    mixed_end: bool = False
    """Whether sensitive blocks may end with more bits than the target."""

    @model_validator(mode="after")
    def _mixes_by_sensitivity(self) -> "BitSchedule":
        if self.mixed_end and self.sensitivity is None:
            raise ValueError("mixed_end is for blocks of different sensitivity; set sensitivity")
        return self


class QuantTransform(Settings):
    """Quantization-aware training of layers and embeddings."""

    kind: Literal["quant"]

    match: Patterns
    """Names of the modules, as regular expressions of whole names."""

    weight: WeightGrid | None = None
    """None leaves weights as they are."""

    act: ActivationGrid | None = None
    """None leaves inputs as they are."""

    schedule: BitSchedule | None = None
    """None has the weight's bits from the first step on."""

    @model_validator(mode="after")
    def _does_something(self) -> "QuantTransform":
        if self.weight is None and self.act is None:
            raise ValueError("set weight, act or both: neither is quantized")
        return self

    @model_validator(mode="after")
    def _bits_go_down(self) -> "QuantTransform":
        if self.schedule is None:
            return self
        if self.weight is None:
            raise ValueError("schedule is for the bits of weights; set weight")
        if self.schedule.start < self.weight.bits:
            raise ValueError(
                f"schedule.start={self.schedule.start}: must be weight.bits={self.weight.bits} "
                "or more"
            )
        if self.weight.grid in ("ternary", "binary"):
            raise ValueError(f"a {self.weight.grid} grid has no bits to lower; leave grid out")
        return self

    @model_validator(mode="after")
    def _grids_have_steps(self) -> "QuantTransform":
        weight, schedule = self.weight, self.schedule
        if weight is None or weight.grid in ("symmetric", "asymmetric"):
            return self
        # Bits that go down are on a symmetric grid as long as there are more than two.
        most = weight.bits if schedule is None else schedule.start
        if most > 2:
            return self
        grid = weight.grid or ("ternary" if weight.bits == 2 else "binary")
        for field in ("range", "rounding"):
            if weight.differs(field):
                raise ValueError(f"{field} has no effect on a {grid} grid; leave it out")
        return self

    def bits(self) -> "MoqBits | None":
        """Return how the weight's bits go down, if they do."""
        from dqrm.compress.schedules import MoqBits

        weight, schedule = self.weight, self.schedule
        if weight is None or schedule is None:
            return None
        periods = schedule.period, schedule.offset, schedule.mix_ratio
        return MoqBits(schedule.start, weight.bits, *periods)

    def transforms(self) -> "list[Transform]":
        """Return what it stands for."""
        from dqrm.compress.transforms.activations import QuantizeActivations
        from dqrm.compress.transforms.weights import QuantizeWeights

        made: list[Transform] = []
        weight, schedule = self.weight, self.schedule
        if weight is not None:
            made.append(
                QuantizeWeights(
                    patterns(self.match),
                    weight.bits,
                    weight.granularity(),
                    weight.grid,
                    rounding=weight.rounding,
                    full_range=weight.range == "full",
                    schedule=self.bits(),
                    sensitivity=schedule is not None and schedule.sensitivity is not None,
                    mixed_end=schedule is not None and schedule.mixed_end,
                )
            )
        if self.act is not None:
            made.append(QuantizeActivations(patterns(self.match), self.act.bits, self.act.grid))
        return made


class NMTransform(Settings):
    """N:M sparsity of linear layers: of every group of inputs, some keep their weight."""

    kind: Literal["nm"]

    match: Patterns
    """Names of the modules, as regular expressions of whole names."""

    keep: PositiveInt = 2
    """Weights of a group that stay."""

    group: PositiveInt = 4
    """Weights of a group."""

    via: Literal["one_shot", "sr_ste", "admm"] = "admm"
    """one_shot: the largest magnitudes before training, as NVIDIA's ASP. sr_ste: masks taken anew
    at every step (arXiv 2102.04010). admm: weights pulled to the pattern (arXiv 2110.15766)."""

    polish: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of the steps, at the end, with the masks fixed. one_shot fixes them from the start."""

    rho: NonNegativeFloat = 1000.0
    """admm: strength of the pull at the end of the search. Decoupled it is in units of 1 / lr; with
    coupling=grad, some 1e-3."""

    coupling: Literal["decoupled", "grad"] = "decoupled"
    """admm: pull after the optimizer's step, or as a part of the gradient."""

    ramp: Literal["constant", "linear", "geometric"] = "linear"
    """admm: how rho grows, from dual update to dual update."""

    updates: PositiveInt = 12
    """admm: dual updates of the whole search."""

    joint: bool = False
    """admm: project to the pattern and the weight grid of the same modules at once."""

    decay: NonNegativeFloat = 2e-4
    """sr_ste: pull of weights outside the mask to zero."""

    @model_validator(mode="after")
    def _keeps_some(self) -> "NMTransform":
        if self.keep >= self.group:
            raise ValueError(f"keep={self.keep}: must be below group={self.group}")
        return self

    @model_validator(mode="after")
    def _fits_the_way(self) -> "NMTransform":
        of = {
            "one_shot": (),
            "sr_ste": ("polish", "decay"),
            "admm": ("polish", "rho", "coupling", "ramp", "updates", "joint"),
        }
        all_ways = {field for fields in of.values() for field in fields}
        for field in sorted(all_ways - set(of[self.via])):
            if self.differs(field):
                raise ValueError(f"{field} has no effect with via={self.via}; leave it out")
        return self

    def transforms(self) -> "list[Transform]":
        """Return what it stands for."""
        from dqrm.compress.grids.nm import NM
        from dqrm.compress.transforms.admm import Admm
        from dqrm.compress.transforms.sparsify import OneShot, SrSte

        match, pattern = patterns(self.match), NM(self.keep, self.group)
        if self.via == "one_shot":
            return [OneShot(match, pattern)]
        if self.via == "sr_ste":
            return [SrSte(match, pattern, self.decay, self.polish)]
        return [
            Admm(
                match,
                pattern,
                self.rho,
                coupling=self.coupling,
                ramp=self.ramp,
                updates=self.updates,
                polish=self.polish,
                joint=self.joint,
            )
        ]


TransformConfig = Annotated[QuantTransform | NMTransform, Field(discriminator="kind")]


def patterns(match: Patterns) -> tuple[str, ...]:
    """Return the regular expressions of a ``match``."""
    return (match,) if isinstance(match, str) else match
