"""``stage: allocate``: which grid or pattern each matrix of a transformer gets, under a budget.

Its output holds ``transforms.json``, a list of transforms that ``compress`` and ``reconstruct``
take by ``allocation: stage:NAME`` (and that can be copied into a pipeline's file), and
``allocation.json``: bytes and expected loss of every option of every matrix.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from dqrm.compress.transforms.config import NMTransform, Patterns, QuantTransform, patterns
from dqrm.pipelines.references import names_of, skeleton_of
from dqrm.pipelines.stage import Problem, Product, Stage, StageContext
from dqrm.pipelines.stages.allocation import with_match, write_allocation
from dqrm.pipelines.stages.calibrated import CalibratedStage

if TYPE_CHECKING:
    from dqrm.compress.signals.candidates import WeightOption

Option = tuple[dict[str, Any], ...]


class AllocateStage(CalibratedStage):
    """Choose bits and patterns matrix by matrix (the search of arXiv 2206.15014, section 3)."""

    makes: ClassVar[Product] = "allocation"

    stage: Literal["allocate"] = "allocate"
    """Choose grids and patterns matrix by matrix, at the least expected loss within a budget."""

    match: Patterns
    """Names of the linear layers to choose for, as regular expressions of whole names."""

    options: tuple[Option, ...] = Field(min_length=2)
    """What a matrix may become: each a list of transforms without their match."""

    ratio: float | None = Field(default=None, gt=1.0)
    """Times that the matrices together shall be smaller than in FP32, at least. Bytes are those on
    the disk, scales and places of kept weights included."""

    like: NonNegativeInt | None = None
    """In place of a ratio: position of an option, from 0; the matrices together shall take no more
    bytes than if all had this one."""

    signal: Literal["fisher", "trace"] = Field(
        default="fisher",
        # Stages that were complete before there was a choice stay it.
        exclude_if=lambda signal: signal == "fisher",
    )
    """How the loss that an option costs is foreseen: by the Fisher information of each weight, one
    backward pass a batch, or by the trace of each matrix's Hessian (HAWQ-V2), a double one."""

    @field_validator("options")
    @classmethod
    def _are_transforms(cls, options: tuple[Option, ...]) -> tuple[Option, ...]:
        for place, option in enumerate(options):
            try:
                made = with_match(option, [".*"])
                _weight_option(made)
            except ValueError as error:
                raise ValueError(f"option {place}: {error}") from error
        return options

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if (self.ratio is None) == (self.like is None):
            raise ValueError("set ratio or like, one of them: there is no budget without")
        if self.like is not None and self.like >= len(self.options):
            raise ValueError(f"like={self.like}: options are 0 to {len(self.options) - 1}")
        return self

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """What a stage with calibration finds, and patterns that name no module."""
        found = super().problems(earlier)
        model = None if found else names_of(self.model, earlier)
        if model is not None:
            try:
                self._modules(model)
            except ValueError as error:
                found.append(Problem("match", str(error)))
        return found

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """Rows, and the budget."""
        rows = super().plan(earlier)
        model = skeleton_of(self.model, earlier)
        if model is None:
            return rows
        whole = sum(4 * module.weight.numel() for module in self._modules(model).values())
        most = f"as option {self.like}" if self.ratio is None else f"{int(whole / self.ratio):,}"
        return [*rows, ("budget", f"{most} of {whole:,} bytes")]

    def run(self, context: StageContext) -> dict[str, float]:
        """Choose, and write the choice."""
        from dqrm.compress.signals.budget import Budget
        from dqrm.data.files import write_json
        from dqrm.pipelines.text.allocation import allocate_options, weight_curvature
        from dqrm.pipelines.text.calibration import draw_rows

        loaded = self.load(context)
        rows = loaded.encode(draw_rows(loaded.train, self.samples, self.seed))
        modules = self._modules(loaded.model)
        curvature = weight_curvature(
            loaded.model,
            modules,
            self.signal,
            rows,
            self._shown(context, rows.text.shuffled(self.batch_size, self.seed, 0)),
            self.seed,
        )
        result = allocate_options(
            {name: module.weight.detach() for name, module in modules.items()},
            curvature,
            [_weight_option(with_match(option, [".*"])) for option in self.options],
            Budget(self.ratio, self.like),
            lambda: self.check(context),
        )
        transforms: list[Any] = []
        for place, option in enumerate(self.options):
            names = [name for name, chosen in result.chosen.items() if chosen == place]
            if names:
                transforms += with_match(option, [re.escape(name) for name in names])
        write_allocation(context.output, transforms)
        table = {"options": self.options, "matrices": result.as_tree()}
        write_json(context.output / "allocation.json", table)
        context.tracker.log_artifact(context.output / "allocation.json")
        total = result.total(result.chosen)
        metrics = {
            "allocate/bytes": float(total.cost),
            "allocate/times_smaller": result.fp32_bytes / total.cost,
            "allocate/expected_loss": total.loss,
        }
        uniform = result.best_uniform()
        if uniform is not None:
            metrics["allocate/uniform_option"] = float(uniform)
            metrics["allocate/uniform_expected_loss"] = result.uniform(uniform).loss
        return metrics

    def _shown(
        self, context: StageContext, batches: Sequence[Sequence[int]]
    ) -> Iterator[Sequence[int]]:
        for done, batch in enumerate(batches):
            self.check(context)
            context.progress("gradients", done, len(batches), "batches")
            yield batch

    def _modules(self, model: Any) -> dict[str, Any]:
        from torch import nn

        from dqrm.compress.transforms.base import matching_modules

        return matching_modules(model, patterns(self.match), (nn.Linear,))


def _weight_option(transforms: tuple[Any, ...]) -> "WeightOption":
    """What the transforms of an option come to for a weight.

    Raises:
        ValueError: there is a transform of another kind, or two of one kind.
    """
    from dqrm.compress.grids.granularity import Granularity
    from dqrm.compress.grids.nm import NM
    from dqrm.compress.signals.candidates import WeightOption
    from dqrm.compress.transforms.weights import grid_of

    kinds = [type(transform) for transform in transforms]
    if len(set(kinds)) < len(kinds) or not set(kinds) <= {QuantTransform, NMTransform}:
        raise ValueError("an option has at most one quant and one nm transform, and no other")
    grid = next((t.weight for t in transforms if isinstance(t, QuantTransform)), None)
    sparse = next((t for t in transforms if isinstance(t, NMTransform)), None)
    pattern = None if sparse is None else NM(sparse.keep, sparse.group)
    if grid is None:
        return WeightOption("fp32", 32, Granularity("tensor"), pattern)
    return WeightOption(
        grid_of(grid.bits, grid.grid),
        grid.bits,
        grid.granularity(),
        pattern,
        full_range=grid.range == "full",
    )
