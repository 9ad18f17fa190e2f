"""``stage: compress``: a sequence classifier trained to be smaller.

Its output holds ``model/``: weights in FP32 whose values are on their grids, the tokenizer, and
``compression.safetensors``, which says on which (``dqrm.compress.grids.records_file``). What is
selected on the dev rows is the best of the models that were measured as they are shipped: with all
bits taken off and all patterns decided. A killed stage goes on and comes to the same weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from dqrm.compress.transforms.config import TransformConfig
from dqrm.pipelines.digests import folder_digest
from dqrm.pipelines.references import (
    model_folder,
    named_stage,
    names_of,
    outside_model,
    skeleton_of,
    stages_named,
)
from dqrm.pipelines.stage import Problem, Stage, StageContext
from dqrm.pipelines.stages.allocation import read_allocation
from dqrm.pipelines.stages.distill import (
    Distill,
    heads_differ,
    widths_differ,
)
from dqrm.pipelines.stages.text_checks import look_at_rows, weight_problems
from dqrm.pipelines.stages.text_model import model_problems, name_problems
from dqrm.pipelines.stages.text_training import TextTrainingStage, head_of

if TYPE_CHECKING:
    from dqrm.pipelines.text.finetune import Recipe, Training
    from dqrm.pipelines.text.tables import Labels


class CompressStage(TextTrainingStage):
    """Train a sequence classifier or regressor to be smaller."""

    stage: Literal["compress"] = "compress"
    """Train a classifier on low-bit or sparse weights, with fewer layers, or from a teacher."""

    transforms: tuple[TransformConfig, ...] = ()
    """What is done to weights and activations."""

    allocation: str | None = None
    """stage:NAME of an allocate stage, whose choice of transforms goes before those given here."""

    layers: PositiveInt | tuple[NonNegativeInt, ...] | None = None
    """Encoder layers to keep, from 0; or how many, evenly spread, the last one among them."""

    distill: Distill | None = None
    """Learn from a teacher; None learns from the labels."""

    dropout: bool | None = None
    """Drop activations in training; None does unless layers are held against a teacher's, which
    drops none."""

    @field_validator("layers")
    @classmethod
    def _keeps_a_layer(cls, layers: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        if layers == ():
            raise ValueError("at least one layer has to stay")
        return layers

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        given = (self.allocation, self.layers, self.distill)
        if not self.transforms and all(setting is None for setting in given):
            raise ValueError("set transforms, allocation, layers or distill: nothing is compressed")
        return self

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stages of the model and of the teacher."""
        if self.allocation is not None and named_stage(self.allocation) is None:
            raise ValueError(f"allocation={self.allocation}: must be stage:NAME")
        named = {"model": self.model, "distill.teacher": self.teacher}
        return stages_named(earlier, **named, allocation=self.allocation)

    def sources(self) -> dict[str, str]:
        """Digests of the tables, and of models from outside."""
        folder = None if self.teacher is None else outside_model(self.teacher)
        teacher = {} if folder is None else {"teacher": folder_digest(folder)}
        return super().sources() | teacher

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """What fine-tuning finds, and settings that do not fit the model."""
        from dqrm.pipelines.text.positions import check_length

        found = super().problems(earlier)
        if self.teacher is not None:
            found += model_problems(
                "distill.teacher", self.teacher, packed=True
            ) or weight_problems("distill.teacher", self.teacher, new_head=False)
        if not found:
            found += self._head_problems(earlier)
        if found:
            return found
        model = skeleton_of(self.model, earlier)
        if model is None:
            return name_problems(self.model, earlier, self.transforms)
        teacher = None if self.teacher is None else skeleton_of(self.teacher, earlier)
        try:
            kept, depth = self._cut(model)
        except ValueError as error:
            return [Problem("layers", str(error))]
        if self.distill is not None and teacher is not None:
            if self.distill.layerwise and model.config.is_encoder_decoder:
                text = "has layers of an encoder and a decoder; set distill.hidden and attention 0"
                return [Problem("distill", f"{self.model} {text}")]
            try:
                layers = self._map(self.distill, kept, depth, teacher.config.num_hidden_layers)
            except ValueError as error:
                found.append(Problem("distill.map", str(error)))
            else:
                reason = heads_differ(model, teacher, layers) if self.distill.attention else None
                if reason is not None:
                    found.append(Problem("distill.attention", reason))
            try:
                check_length(teacher, self.max_length)
            except ValueError as error:
                found.append(Problem("distill.teacher", str(error)))
        try:
            self._attach(model, look_at_rows(self.data, self.task).count)
        except ValueError as error:
            found.append(Problem("transforms", str(error)))
        return found

    def _head_problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """Outputs that are not those of the data, and hidden states that are not as wide."""
        from dqrm.pipelines.text.classifier import require_head, require_same_labels

        labels, config = self.labels(earlier), head_of(self.model, earlier)
        found = []
        try:
            if labels is not None and config is not None:
                self._require_same_head(config, labels)
        except ValueError as error:
            found.append(Problem("model", str(error)))
        if self.distill is None:
            return found
        its_config = head_of(self.distill.teacher, earlier)
        try:
            if its_config is not None:
                require_head(its_config, self.distill.teacher)
            # A fault of the model alone would be told of its teacher once more.
            if its_config is not None and labels is not None and not found:
                require_same_labels(its_config, labels, self.distill.teacher)
        except ValueError as error:
            return [*found, Problem("distill.teacher", str(error))]
        model, teacher = (names_of(name, earlier) for name in (self.model, self.distill.teacher))
        if self.distill.hidden and model is not None and teacher is not None:
            reason = widths_differ(model, teacher)
            if reason is not None:
                found.append(Problem("distill.hidden", reason))
        return found

    def check_head(self, config: Any, labels: "Labels") -> None:
        """Refuse a trained head of other outputs; a model without one gets its first."""
        self._require_same_head(config, labels)
        super().check_head(config, labels)

    def _require_same_head(self, config: Any, labels: "Labels") -> None:
        from dqrm.pipelines.text.classifier import has_head, require_same_labels

        if has_head(config):
            require_same_labels(config, labels, f"model={self.model}")

    def skeleton(self, earlier: Mapping[str, Stage]) -> Any:
        """That of the model it takes, with the layers it keeps."""
        model = super().skeleton(earlier)
        if model is not None:
            self._cut(model)
        return model

    def compression(self, earlier: Mapping[str, Stage]) -> tuple[TransformConfig, ...] | None:
        """Its own: training takes weights off the grids they came with."""
        return self.transforms if self.allocation is None else None

    def recipe(self, select_by: str) -> "Recipe":
        """As of fine-tuning; dropout goes by the objective."""
        layerwise = self.distill is not None and self.distill.layerwise
        dropout = not layerwise if self.dropout is None else self.dropout
        return replace(super().recipe(select_by), dropout=dropout)

    def prepare(
        self,
        model: Any,
        teacher: Any,
        labels: "Labels",
        recipe: "Recipe",
        inputs: Mapping[str, Path],
    ) -> "Training":
        """Take layers out, hold the others against the teacher's, make the transforms."""
        from dqrm.compress.distill.losses import DistillWeights
        from dqrm.compress.transforms.build import build_compression
        from dqrm.pipelines.text.attention import use_plain_attention
        from dqrm.pipelines.text.finetune import Training
        from dqrm.pipelines.text.objective import Distillation, Objective, TaskLoss

        kept, depth = self._cut(model)
        regression = labels.classes is None
        distill = self.distill
        objective: Objective
        if distill is None:
            objective = TaskLoss(regression=regression, bf16=recipe.bf16)
        else:
            layers = self._map(distill, kept, depth, teacher.config.num_hidden_layers)
            reason = widths_differ(model, teacher) if distill.hidden else None
            if reason is not None:
                raise ValueError(reason)
            if distill.attention:
                reason = heads_differ(model, teacher, layers)
                if reason is not None:
                    raise ValueError(reason)
                use_plain_attention(model)
                use_plain_attention(teacher)
            objective = Distillation(
                teacher,
                DistillWeights(
                    logits=distill.logits,
                    hidden=distill.hidden,
                    attention=distill.attention,
                    temperature=distill.temperature,
                    average=distill.average,
                ),
                layers,
                label_weight=distill.labels,
                regression=regression,
                bf16=recipe.bf16,
            )
        return Training(objective, build_compression(self._allocated(inputs) + self.transforms))

    def _allocated(self, inputs: Mapping[str, Path]) -> tuple[TransformConfig, ...]:
        """What the allocation came to; nothing while it has not run."""
        key = None if self.allocation is None else named_stage(self.allocation)
        return () if key is None or key not in inputs else read_allocation(inputs[key])

    def load_teacher(self, labels: "Labels", context: StageContext) -> Any:
        """The teacher, as it computes."""
        from dqrm.pipelines.text.classifier import load_teacher, require_same_tokens

        if self.teacher is None:
            return None
        folder = model_folder(self.model, context.inputs)
        its_folder = model_folder(self.teacher, context.inputs)
        require_same_tokens(folder, its_folder)
        return load_teacher(its_folder, labels)

    @property
    def teacher(self) -> str | None:
        """The teacher that distill names."""
        return None if self.distill is None else self.distill.teacher

    def complete(self, model: Any, folder: Path) -> dict[str, float]:
        """Write the records of the grids, and account for bytes and multiplications."""
        from dqrm.compress.grids.records_file import save_records
        from dqrm.compress.report import account

        save_records(folder, model)
        encoder = account(model, layers_only=True)
        return {
            **account(model).metrics(),
            "size/encoder_fp32_bytes": float(encoder.fp32_bytes),
            "size/encoder_packed_bytes": float(encoder.stored_bytes),
        }

    def sizes(self, skeleton: Any) -> list[tuple[str, str]]:
        """Bytes when packed, of the whole and of the encoder layers."""
        if self.allocation is not None:
            return [("packed", f"as {self.allocation} comes to")]
        from dqrm.pipelines.text.account import planned_account

        rows = []
        for what, layers_only in (("packed", False), ("encoder", True)):
            planned = planned_account(skeleton, self.transforms, layers_only=layers_only)
            rows.append((what, str(planned)))
        return rows

    def _attach(self, model: Any, rows: int) -> None:
        """Attach the transforms to the skeleton of the model, cut already, to train on ``rows``."""
        from dqrm.compress.lower.shapes import encoder_path
        from dqrm.compress.transforms.build import build_compression
        from dqrm.pipelines.text.finetune import count_steps
        from dqrm.pipelines.text.sensitivity import schedules_that_ask

        steps = count_steps(rows, self.recipe(self.select_by))
        compression = build_compression(self.transforms)
        compression.attach(model, steps)
        if schedules_that_ask(compression):
            # Measured layer by layer, before the first step.
            encoder_path(model)

    def _cut(self, model: Any) -> tuple[tuple[int, ...], int]:
        """Take layers out of ``model``; return those that stay, and how many there were."""
        from dqrm.compress.distill.maps import uniform_map
        from dqrm.pipelines.text.layers import keep_layers

        count = model.config.num_hidden_layers
        if self.layers is None:
            return tuple(range(count)), count
        kept = uniform_map(self.layers, count) if isinstance(self.layers, int) else self.layers
        keep_layers(model, kept)
        return kept, count

    @staticmethod
    def _map(
        distill: Distill, kept: tuple[int, ...], depth: int, teacher_depth: int
    ) -> tuple[int, ...]:
        """Teacher layer of each of the layers ``kept`` of ``depth``."""
        from dqrm.compress.distill.maps import check_map, uniform_map

        if isinstance(distill.map, tuple):
            return check_map(distill.map, len(kept), teacher_depth)
        if distill.map == "auto" and depth == teacher_depth:
            return kept
        return uniform_map(len(kept), teacher_depth)
