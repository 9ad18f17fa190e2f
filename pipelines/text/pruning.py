"""Heads and neurons taken out of a fine-tuned transformer, without training it again.

After arXiv 2204.09656: Fisher information of masks, search under a budget, rearrangement within
layers, tuning of what stays, and then real surgery.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dqrm.compress.lower.shapes import layer_units
from dqrm.compress.recon.capture import LayerStream
from dqrm.compress.signals.gradients import batch_gradients
from dqrm.compress.signals.units import Kept, rearrange, search_units
from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.calibration import forwards, valid_tokens
from dqrm.pipelines.text.classifier import predict_text
from dqrm.pipelines.text.labelled import LabelledText
from dqrm.pipelines.text.mask_tuning import Tuned, tune_masks
from dqrm.pipelines.text.objective import TaskLoss
from dqrm.pipelines.text.quality import measure_text
from dqrm.pipelines.text.unit_masks import UnitCosts, UnitMasks

_STREAM_BYTES = 1 << 28
"""Hidden states kept in memory, of each of two models, while masks are tuned."""


@dataclass(frozen=True)
class PruneRecipe:
    """How to prune."""

    macs: float
    """Share of the encoder's multiply-accumulates to keep."""
    round_to: int
    """Neurons are kept in multiples of it."""
    tune: bool
    """Fit the masks of what stays."""
    damping: float
    """Of that fit."""
    batch_size: int
    """Rows of a gradient."""
    seed: int
    """Of the batches."""


@dataclass(frozen=True)
class Pruned:
    """What pruning came to."""

    macs_kept: float
    """Share of the encoder's multiply-accumulates."""
    heads: list[int]
    """That stay, by layer."""
    neurons: list[int]
    """That stay, by layer."""
    tuned: list[str]
    """Blocks whose tuned masks lowered the held-out loss."""
    held_out_loss: dict[str, float]
    """Of the whole model, and after search, rearrangement and tuning."""


def prune_units(
    model: Any,
    rows: LabelledText,
    held_out: LabelledText,
    recipe: PruneRecipe,
    folder: Path,
    check: Callable[[], None],
    progress: Callable[[str, int, int, str], None],
) -> Pruned:
    """Take units out of ``model``, in place.

    Args:
        model: a classifier or regressor of transformers.
        rows: what gradients are taken and masks fitted on.
        held_out: other rows, which decide whether fitted masks are kept.
        recipe: how.
        folder: for what does not fit in memory.
        check: called between batches; may raise.
        progress: takes a phase, the units done, all of them, and their name.

    Raises:
        ValueError: the model is not built as BERT is, or the budget pays for no unit.
    """
    model.eval().requires_grad_(False)
    classes = None if model.config.problem_type == "regression" else model.config.num_labels

    def loss() -> float:
        check()
        logits = predict_text(model, held_out.text, 2 * recipe.batch_size)
        return measure_text(logits, held_out.labels, classes)["loss"]

    # Made before there are hooks, which would be copied with the model.
    whole = copy.deepcopy(model) if recipe.tune else None
    masks = UnitMasks(model)
    losses = {"whole": loss()}
    heads, neurons = _gradients(model, masks, rows, recipe, check, progress)
    costs = UnitCosts.of(model, rows.text.lengths)
    total = costs.total(model)
    kept = search_units(
        [_fisher(gradients) for gradients in heads],
        [_fisher(gradients) for gradients in neurons],
        costs.head,
        costs.neuron,
        recipe.macs * total,
        recipe.round_to,
    )
    tuned: list[str] = []
    with masks.attached():
        masks.keep(kept)
        losses["searched"] = loss()
        kept = Kept(_rearranged(kept.heads, heads), _rearranged(kept.neurons, neurons))
        masks.keep(kept)
        losses["rearranged"] = loss()
        if whole is not None:
            result = _tune((model, whole), masks, rows.text, recipe, folder, loss, check, progress)
            tuned, losses["tuned"] = result.accepted, result.loss
    masks.cut()
    model.requires_grad_(True)
    return Pruned(
        macs_kept=costs.total(model) / total,
        heads=[int(mask.sum()) for mask in kept.heads],
        neurons=[int(mask.sum()) for mask in kept.neurons],
        tuned=tuned,
        held_out_loss=losses,
    )


def _gradients(
    model: Any,
    masks: UnitMasks,
    rows: LabelledText,
    recipe: PruneRecipe,
    check: Callable[[], None],
    progress: Callable[[str, int, int, str], None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the masks by layer: of heads and of neurons, float32 [batches, units]."""
    task = TaskLoss(regression=model.config.problem_type == "regression", bf16=False)
    batches = rows.text.shuffled(recipe.batch_size, recipe.seed, 0)

    def losses() -> Iterator[Tensor]:
        for done, batch in enumerate(batches):
            check()
            progress("gradients", done, len(batches), "batches")
            yield task(model, rows.text.batch(batch), rows.labels[batch])

    with masks.attached():
        found = list(batch_gradients(masks.variables(), losses()).values())
    return found[: len(masks.layers)], found[len(masks.layers) :]


def _fisher(gradients: Tensor) -> Tensor:
    return gradients.double().square().sum(0)


def _rearranged(kept: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    return [rearrange(mask, values) for mask, values in zip(kept, gradients, strict=True)]


def _tune(
    models: tuple[Any, Any],
    masks: UnitMasks,
    text: EncodedText,
    recipe: PruneRecipe,
    folder: Path,
    loss: Callable[[], float],
    check: Callable[[], None],
    progress: Callable[[str, int, int, str], None],
) -> Tuned:
    """Fit the masks of the first model so that its layers sum up to those of the second."""
    batches = list(text.in_order_of_length(2 * recipe.batch_size))
    teacher = layer_units(models[1])
    student_stream, teacher_stream = (
        LayerStream(
            [units.layer for units in layers],
            forwards(model, text, batches),
            folder / name,
            _STREAM_BYTES,
            check,
        )
        for model, layers, name in (
            (models[0], masks.layers, "pruned"),
            (models[1], teacher, "whole"),
        )
    )
    measured = -1

    def held_out_loss() -> float:
        nonlocal measured
        measured += 1
        progress("tuning", measured, 2 * len(teacher), "blocks")
        return loss()

    return tune_masks(
        masks,
        teacher,
        (student_stream, teacher_stream),
        valid_tokens(text, batches),
        held_out_loss,
        recipe.damping,
    )
