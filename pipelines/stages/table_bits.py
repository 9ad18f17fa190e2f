"""``stage: table_bits``: how many bits each table of a recommender gets, under a budget of bytes.

Its output holds ``table_bits.json``, which ``train`` takes by ``table_bits: stage:NAME``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from dqrm.compress.config import Bits, TableGranularity
from dqrm.pipelines.references import named_stage, stages_named
from dqrm.pipelines.stage import Interrupted, Product, Stage, StageContext

_FILE = "table_bits.json"


class TableBitsStage(Stage):
    """Choose the bits of each embedding table, as ``dqrm bits`` does."""

    makes: ClassVar[Product] = "bits of tables"

    stage: Literal["table_bits"] = "table_bits"
    """Choose the bits of each embedding table, at the least expected loss within a budget."""

    recommender: str
    """stage:NAME of the stage that trained the model which says what bits cost; best in FP32."""

    options: tuple[Bits, ...] = Field(default=(8, 4, 2), min_length=2)
    """Bits that a table may get."""

    ratio: float | None = Field(default=None, gt=1.0)
    """Times that the tables together shall be smaller than in FP32, at least."""

    like: Bits | None = None
    """In place of a ratio: one of the options; the tables together shall take no more bytes than
    if all had these bits."""

    granularity: TableGranularity = Field(
        default="table",
        # Stages that were complete before there was a choice stay it.
        exclude_if=lambda granularity: granularity == "table",
    )
    """Of the scales of the tables to come: settings.quant.granularity of the stage that trains
    with these bits."""

    batches: PositiveInt = 1000
    """Batches of training rows that gradients are taken of."""

    @field_validator("options")
    @classmethod
    def _differ(cls, options: tuple[Bits, ...]) -> tuple[Bits, ...]:
        if len(set(options)) < len(options):
            raise ValueError("name each once")
        return options

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if named_stage(self.recommender) is None:
            raise ValueError(f"recommender={self.recommender}: name a stage, stage:NAME")
        if (self.ratio is None) == (self.like is None):
            raise ValueError("set ratio or like, one of them: there is no budget without")
        if self.like is not None and self.like not in self.options:
            told = ", ".join(map(str, self.options))
            raise ValueError(f"like={self.like}: name one of the options, {told}")
        return self

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stage that trained the model."""
        return stages_named(earlier, recommender=self.recommender)

    def run(self, context: StageContext) -> dict[str, float]:
        """Choose, and write the choice."""
        from dqrm.compress.signals.budget import Budget
        from dqrm.data.files import write_json
        from dqrm.training.table_bits import table_bits_of

        def progress(done: int, batches: int) -> None:
            number = context.stop()
            if number is not None:
                raise Interrupted(number)
            context.progress("gradients", done, batches, "batches")

        found = table_bits_of(
            context.inputs[str(named_stage(self.recommender))],
            Budget(self.ratio, None if self.like is None else self.options.index(self.like)),
            self.options,
            self.granularity,
            batches=self.batches,
            progress=progress,
        )
        write_json(context.output / _FILE, found.as_tree())
        context.tracker.log_artifact(context.output / _FILE)
        spent = found.allocated
        total = spent.total(spent.chosen)
        return {
            "table_bits/bytes": float(total.cost),
            "table_bits/times_smaller": spent.fp32_bytes / total.cost,
            "table_bits/expected_loss": total.loss,
        }


def read_table_bits(folder: Path) -> dict[str, Bits]:
    """Return what was chosen; ``folder`` is the stage's output."""
    bits: dict[str, Bits] = json.loads((folder / _FILE).read_text("utf-8"))["table_bits"]
    return bits
