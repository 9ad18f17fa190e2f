"""``stage: prune``: heads and neurons taken out of a fine-tuned transformer, without training.

Its output holds ``model/``, smaller matrices in Hugging Face's format with the widths of every
layer in its configuration, and ``pruning.json``: what stays, and the loss of held-out rows after
each step. A killed stage begins anew; it takes minutes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from dqrm.pipelines.references import origin_folder, skeleton_of
from dqrm.pipelines.stage import MODEL_FOLDER, Problem, Stage, StageContext
from dqrm.pipelines.stages.calibrated import CalibratedStage
from dqrm.settings import Settings

if TYPE_CHECKING:
    from dqrm.pipelines.text.tables import Examples


class PruneBudget(Settings):
    """What the pruned encoder may cost."""

    macs: float = Field(gt=0.0, le=1.0)
    """Share of the encoder's multiply-accumulates that stays, for sentences as long as those of the
    training rows."""


class PruneStage(CalibratedStage):
    """Take heads and neurons out of a fine-tuned transformer (arXiv 2204.09656)."""

    stage: Literal["prune"] = "prune"
    """Take heads and neurons out of a fine-tuned transformer, without training it again."""

    budget: PruneBudget

    round_to: PositiveInt = 16
    """Neurons stay in multiples of it: widths that matrix units multiply fast."""

    tune: bool = True
    """Fit what stays to the whole model, layer by layer, where that lowers the loss of rows it was
    not fitted on."""

    damping: NonNegativeFloat = 0.1
    """Of the fit, as a share of the mean diagonal of its normal equations; it pulls towards no
    change."""

    held_out: PositiveInt = 512
    """Further training rows, which decide what is kept of the fit."""

    @model_validator(mode="after")
    def _damps_a_fit(self) -> Self:
        if self.differs("damping") and not self.tune:
            raise ValueError("damping has no effect with tune=false; leave it out")
        return self

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """What a stage with calibration finds, too few rows, and a model it cannot cut."""
        from dqrm.compress.lower.shapes import layer_units

        found = super().problems(earlier)
        if found:
            return found
        try:
            self._draw(self.data.read()[0])
        except ValueError as error:
            found.append(Problem("held_out", str(error)))
        try:
            model = skeleton_of(self.model, earlier)
            if model is not None:
                layer_units(model)
        except ValueError as error:
            kinds = "BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA"
            found.append(Problem("model", f"{error}; those that can be pruned are {kinds}"))
        return found

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """Rows, and the multiply-accumulates that the budget pays for."""
        from dqrm.pipelines.text.batches import EncodedText
        from dqrm.pipelines.text.classifier import load_tokenizer
        from dqrm.pipelines.text.unit_masks import UnitCosts

        rows = super().plan(earlier)
        model, origin = skeleton_of(self.model, earlier), origin_folder(self.model, earlier)
        if model is None or origin is None:
            return rows
        looked_at, _ = self._draw(self.data.read()[0])
        text = EncodedText(load_tokenizer(origin), looked_at, self.max_length)
        total = UnitCosts.of(model, text.lengths).total(model)
        kept = f"at most {self.budget.macs * total:,.0f} of {total:,.0f} a sentence"
        return [*rows, ("encoder MACs", kept)]

    def run(self, context: StageContext) -> dict[str, float]:
        """Prune, measure, write the model."""
        from dataclasses import asdict

        from dqrm.data.files import write_json
        from dqrm.pipelines.text.classifier import save_classifier
        from dqrm.pipelines.text.pruning import PruneRecipe, prune_units

        loaded = self.load(context)
        looked_at, held_out = self._draw(loaded.train)
        pruned = prune_units(
            loaded.model,
            loaded.encode(looked_at),
            loaded.encode(held_out),
            PruneRecipe(
                macs=self.budget.macs,
                round_to=self.round_to,
                tune=self.tune,
                damping=self.damping,
                batch_size=self.batch_size,
                seed=self.seed,
            ),
            context.scratch,
            lambda: self.check(context),
            context.progress,
        )
        save_classifier(loaded.model, loaded.tokenizer, context.output / MODEL_FOLDER)
        write_json(context.output / "pruning.json", asdict(pruned))
        context.tracker.log_artifact(context.output / "pruning.json")
        return loaded.quality(loaded.model, 2 * self.batch_size) | {
            "prune/macs_kept": pruned.macs_kept,
            "prune/heads": float(sum(pruned.heads)),
            "prune/neurons": float(sum(pruned.neurons)),
            **{f"prune/loss_{name}": value for name, value in pruned.held_out_loss.items()},
        }

    def _draw(self, train: "Examples") -> tuple["Examples", "Examples"]:
        """The rows to look at, and those held out.

        Raises:
            ValueError: there are none to look at.
        """
        from dqrm.pipelines.text.calibration import draw_rows

        drawn = draw_rows(train, self.samples + self.held_out, self.seed)
        count = len(drawn) - self.held_out
        if count <= 0:
            raise ValueError(
                f"held_out={self.held_out}: there are {len(drawn)} training rows, and some have to "
                "be left to look at"
            )
        return drawn.take(range(count)), drawn.take(range(count, len(drawn)))
