"""``stage: reconstruct``: a fine-tuned transformer put on low-bit grids in minutes (ZeroQuant).

Its output holds ``model/``: weights in FP32 whose values are on their grids, the tokenizer, and
``compression.safetensors``, which says on which (``dqrm.compress.grids.records_file``). Weights
that an N:M pattern left at zero stay there. A killed stage goes on behind the last layer it
finished and comes to the same weights.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from dqrm.compress.transforms.config import QuantTransform, TransformConfig
from dqrm.pipelines.references import compression_of, named_stage, skeleton_of, stages_named
from dqrm.pipelines.stage import MODEL_FOLDER, Problem, Stage, StageContext
from dqrm.pipelines.stages.allocation import read_allocation
from dqrm.pipelines.stages.calibrated import CalibratedStage
from dqrm.pipelines.stages.text_model import name_problems

if TYPE_CHECKING:
    from dqrm.compress.recon.layerwise import GptqRecipe
    from dqrm.compress.recon.lkd import LkdRecipe

_SOLVERS_OF = {
    "inputs_of": ("lkd", "gptq"),
    "steps": ("lkd",),
    "lr": ("lkd",),
    "damping": ("gptq",),
    "act_order": ("gptq",),
}
"""Settings by the solvers that they are of."""


class ReconstructStage(CalibratedStage):
    """Put a fine-tuned transformer on low-bit grids without training it (arXiv 2206.01861)."""

    takes_patterns: ClassVar[bool] = True

    stage: Literal["reconstruct"] = "reconstruct"
    """Put a fine-tuned transformer on low-bit grids: by rounding, layer-wise distillation, GPTQ."""

    transforms: tuple[QuantTransform, ...] = ()
    """Grids of weights and activations, by the names of modules; those of no pattern stay."""

    allocation: str | None = None
    """stage:NAME of an allocate stage, whose grids are taken besides."""

    solver: Literal["none", "lkd", "gptq"] = "none"
    """none: weights are rounded, without data. lkd: every layer learns to answer as the original
    one. gptq: what a column loses by rounding is made up for by those behind it."""

    inputs_of: Literal["teacher", "student"] = "teacher"
    """Whose hidden states a layer is fitted on: the original model's, or those that the layers put
    on grids before it make."""

    steps: PositiveInt = 100
    """lkd: steps a layer."""

    lr: PositiveFloat = 1e-4
    """lkd: learning rate of AdamW; falls to 0 along a cosine."""

    damping: PositiveFloat = 0.01
    """gptq: added to the diagonal of the Hessian, as a share of its mean."""

    act_order: bool = False
    """gptq: round the columns with the largest inputs first."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.transforms and self.allocation is None:
            raise ValueError("set transforms or allocation: nothing is put on grids")
        if self.allocation is not None and named_stage(self.allocation) is None:
            raise ValueError(f"allocation={self.allocation}: must be stage:NAME")
        for field, solvers in _SOLVERS_OF.items():
            if self.differs(field) and self.solver not in solvers:
                raise ValueError(
                    f"{field} is for solver={' or '.join(solvers)} and has no effect with "
                    f"{self.solver}; leave it out"
                )
        return self

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stages of the model and of the allocation."""
        return stages_named(earlier, model=self.model, allocation=self.allocation)

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """What a stage with calibration finds, and patterns that name no module."""
        from dqrm.compress.lower.shapes import encoder_path
        from dqrm.compress.recon.layerwise import check_gptq_targets
        from dqrm.pipelines.text.reconstruction import resolve_targets

        found = super().problems(earlier)
        if found:
            return found
        model = skeleton_of(self.model, earlier)
        if model is None:
            return name_problems(self.model, earlier, self.transforms)
        try:
            targets = resolve_targets(model, self.transforms)
            if self.solver == "gptq":
                check_gptq_targets(targets)
        except ValueError as error:
            found.append(Problem("transforms", str(error)))
        try:
            if self.solver != "none":
                encoder_path(model)
        except ValueError as error:
            found.append(Problem("solver", f"{error}; solver=none needs none"))
        return found

    def skeleton(self, earlier: Mapping[str, Stage]) -> Any:
        """That of the model it takes."""
        return skeleton_of(self.model, earlier)

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """Rows, and bytes when packed."""
        from dqrm.pipelines.text.account import planned_account

        rows = super().plan(earlier)
        if self.allocation is not None:
            return [*rows, ("packed", f"as {self.allocation} comes to")]
        skeleton, done = self.skeleton(earlier), self.compression(earlier)
        if skeleton is not None and done is not None:
            rows.append(("packed", str(planned_account(skeleton, done))))
        return rows

    def compression(self, earlier: Mapping[str, Stage]) -> tuple[TransformConfig, ...] | None:
        """What the model has been through, and its own."""
        before = compression_of(self.model, earlier)
        return None if before is None or self.allocation is not None else before + self.transforms

    def run(self, context: StageContext) -> dict[str, float]:
        """Reconstruct, measure, write the model."""
        from dqrm.compress.grids.records_file import save_records
        from dqrm.pipelines.text.calibration import draw_rows
        from dqrm.pipelines.text.classifier import save_classifier
        from dqrm.pipelines.text.reconstruction import (
            reconstruct_layers,
            resolve_targets,
            round_weights,
        )

        loaded = self.load(context)
        model = loaded.model
        targets = resolve_targets(model, self._transforms(context))
        metrics: dict[str, float] = {}
        recipe = self._recipe()
        if recipe is None:
            round_weights(model, targets)
        else:
            text = loaded.encode(draw_rows(loaded.train, self.samples, self.seed)).text
            losses = reconstruct_layers(
                model,
                targets,
                recipe,
                self.inputs_of,
                text,
                text.shuffled(self.batch_size, self.seed, 0),
                context.scratch,
                lambda: self.check(context),
                lambda done, layers: context.progress("layers", done, layers, "layers"),
            )
            for number, loss in enumerate(losses):
                metrics[f"reconstruct/layer_{number}_error_rounded"] = loss.start
                metrics[f"reconstruct/layer_{number}_error"] = loss.end
        weights = sum(model.get_submodule(name).weight.numel() for name in targets)
        bits = sum(
            target.bits * model.get_submodule(name).weight.numel()
            for name, target in targets.items()
        )
        metrics["bits/mean"] = bits / weights
        folder = context.output / MODEL_FOLDER
        save_classifier(model, loaded.tokenizer, folder)
        save_records(folder, model)
        return loaded.quality(model, 2 * self.batch_size) | metrics

    def _transforms(self, context: StageContext) -> tuple[QuantTransform, ...]:
        """Those of the settings and of the allocation."""
        key = None if self.allocation is None else named_stage(self.allocation)
        if key is None:
            return self.transforms
        allocated = read_allocation(context.inputs[key])
        grids = tuple(t for t in allocated if isinstance(t, QuantTransform))
        if len(grids) < len(allocated):
            raise ValueError(f"{self.allocation}: has patterns, which take training: use compress")
        return self.transforms + grids

    def _recipe(self) -> "LkdRecipe | GptqRecipe | None":
        from dqrm.compress.recon.layerwise import GptqRecipe
        from dqrm.compress.recon.lkd import LkdRecipe

        if self.solver == "lkd":
            return LkdRecipe(self.steps, self.lr, self.seed)
        if self.solver == "gptq":
            return GptqRecipe(self.damping, self.act_order)
        return None
