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

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dqrm.compress.transforms.config import TransformConfig
from dqrm.pipelines.digests import folder_digest
from dqrm.pipelines.references import (
    model_folder,
    named_stage,
    outside_model,
    skeleton_of,
    stages_named,
)
from dqrm.pipelines.stage import Problem, Stage, StageContext
from dqrm.pipelines.stages.allocation import read_allocation
from dqrm.pipelines.stages.prune import PruneStage
from dqrm.pipelines.stages.text_model import model_problems
from dqrm.pipelines.stages.text_training import TextTrainingStage
from dqrm.settings import Settings

if TYPE_CHECKING:
    from dqrm.pipelines.text.finetune import Recipe, Training
    from dqrm.pipelines.text.tables import Labels


_WITHOUT_ATTENTION = "attentions are compared head by head: set distill.attention to 0"


class Distill(Settings):
    """A teacher to learn from, all of it in one stage (arXiv 2206.01859)."""

    teacher: str
    """A fine-tuned model of the same task and tokens: stage:NAME, package:NAME or a folder."""

    logits: NonNegativeFloat = 1.0
    """Weight of the cross-entropy against the teacher's probabilities."""

    hidden: NonNegativeFloat = 1.0
    """Weight of the squared differences of hidden states, summed over layers."""

    attention: NonNegativeFloat = 1.0
    """Weight of the squared differences of attention probabilities, summed over layers. Above 0 it
    costs time, as fused attention does not tell them, and both models have the same heads."""

    labels: NonNegativeFloat = 0.0
    """Weight of the loss of the labels themselves."""

    temperature: PositiveFloat = 1.0
    """Both sides' logits are divided by it."""

    average: Literal["batch", "elements"] = "batch"
    """Of the logits' loss: over rows, or over rows and classes as XTC's scripts do (half as much of
    two classes)."""

    map: Literal["auto", "uniform"] | tuple[NonNegativeInt, ...] = "auto"
    """Teacher layer of each layer, from 0. auto: the one it was kept from, else uniform: evenly
    spread, the last on the last."""

    @model_validator(mode="after")
    def _compares_logits(self) -> Self:
        for field in ("temperature", "average"):
            if field in self.model_fields_set and not self.logits:
                raise ValueError(f"{field} has no effect with logits=0; leave it out")
        return self

    @property
    def layerwise(self) -> bool:
        """Whether anything but logits is compared."""
        return self.hidden > 0 or self.attention > 0


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
            found += model_problems("distill.teacher", self.teacher)
        if self.distill is not None and self.distill.attention:
            pruned = [_pruned_by(name, earlier) for name in (self.model, self.distill.teacher)]
            if pruned[0] != pruned[1]:
                text = f"stage {pruned[0] or pruned[1]} may take heads out of one of the two models"
                found.append(Problem("distill.attention", f"{text}; {_WITHOUT_ATTENTION}"))
        model = None if found else skeleton_of(self.model, earlier)
        if model is None:
            return found
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
                reason = _heads_differ(model, teacher, layers) if self.distill.attention else None
                if reason is not None:
                    found.append(Problem("distill.attention", reason))
            try:
                check_length(teacher, self.max_length)
            except ValueError as error:
                found.append(Problem("distill.teacher", str(error)))
        try:
            train, _, _ = self.data.read()
        except (OSError, ValueError) as error:
            return [*found, Problem("data", str(error))]
        try:
            self._attach(model, len(train))
        except ValueError as error:
            found.append(Problem("transforms", str(error)))
        return found

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
            if distill.attention:
                reason = _heads_differ(model, teacher, layers)
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


def _pruned_by(reference: str, earlier: Mapping[str, Stage]) -> str | None:
    """The stage that a model has the widths of its layers from; None: from outside the pipeline."""
    key = named_stage(reference)
    for name in reversed(list(earlier)):
        if name != key:
            continue
        if isinstance(earlier[name], PruneStage):
            return name
        key = named_stage(getattr(earlier[name], "model", ""))
    return None


def _heads_differ(model: Any, teacher: Any, layers: tuple[int, ...]) -> str | None:
    """Why attentions cannot be held against each other, if they cannot.

    Args:
        model: of transformers, with or without values.
        teacher: likewise.
        layers: teacher layer of each layer of the model.
    """
    ours, theirs = _heads(model), _heads(teacher)
    for whose, heads in (("the model", ours), ("the teacher", theirs)):
        # Such a layer has no place among those that tell their attention: others would take it.
        if 0 in heads:
            return f"layer {heads.index(0)} of {whose} has no heads; {_WITHOUT_ATTENTION}"
    for layer, (count, its) in enumerate(zip(ours, layers, strict=True)):
        if count != theirs[its]:
            return (
                f"layer {layer} has {count} heads, and layer {its} of the teacher has "
                f"{theirs[its]}; {_WITHOUT_ATTENTION}"
            )
    return None


def _heads(model: Any) -> list[int]:
    """Heads of each layer."""
    from dqrm.compress.lower.shapes import layer_units

    try:
        return [units.num_heads for units in layer_units(model)]
    except ValueError:
        # Built otherwise, so nothing can have cut it. Some models have no attention at all.
        return [getattr(model.config, "num_attention_heads", 0)] * model.config.num_hidden_layers
