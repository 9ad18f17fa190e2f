"""A fine-tuned transformer put on low-bit grids, layer by layer, without training it as a whole."""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.records_file import load_records, save_records
from dqrm.compress.lower.shapes import encoder_layers, encoder_path
from dqrm.compress.recon.layerwise import Calibration, GptqRecipe, LayerwiseQuantizer
from dqrm.compress.recon.lkd import LayerLoss, LkdRecipe
from dqrm.compress.recon.targets import Target, quantize_without_data
from dqrm.compress.transforms.base import matching_modules
from dqrm.compress.transforms.config import QuantTransform, patterns
from dqrm.compress.transforms.weights import grid_of
from dqrm.data.files import new_folder, write_json
from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.calibration import forwards, valid_tokens

log = logging.getLogger(__name__)

_STREAM_BYTES = 1 << 28
"""Hidden states kept in memory, of each of the two models."""
_WEIGHTS = "model.safetensors"
_LOSSES = "losses.json"


def resolve_targets(model: nn.Module, transforms: Sequence[QuantTransform]) -> dict[str, Target]:
    """Return the grids of each module that a pattern names.

    Raises:
        ValueError: a pattern names none, two name one module, or the grids cannot be reached
            without training.
    """
    targets: dict[str, Target] = {}
    for transform in transforms:
        if transform.schedule is not None:
            raise ValueError(f"match={transform.match}: a schedule is for training; leave it out")
        weight = transform.weight
        if weight is not None and weight.rounding != "nearest":
            raise ValueError(f"match={transform.match}: rounding is to nearest without training")
        full_range = weight is not None and weight.range == "full"
        if weight is not None and full_range:
            grid = grid_of(weight.bits, weight.grid)
            if grid in ("ternary", "binary"):
                raise ValueError(
                    f"match={transform.match}: range has no effect on a {grid} grid; leave it out"
                )
        target = Target(
            bits=32 if weight is None else weight.bits,
            granularity=Granularity("row") if weight is None else weight.granularity(),
            grid=None if weight is None else weight.grid,
            full_range=full_range,
            activation_bits=32 if transform.act is None else transform.act.bits,
            activation_grid="symmetric" if transform.act is None else transform.act.grid,
        )
        kinds = (nn.Linear,) if transform.act is not None else (nn.Linear, nn.Embedding)
        for name, module in matching_modules(model, patterns(transform.match), kinds).items():
            if name in targets:
                raise ValueError(f"match={transform.match}: {name} has grids already")
            weights = module.weight
            assert isinstance(weights, Tensor)
            try:
                target.granularity.scale_shape(weights.shape)
            except ValueError as error:
                raise ValueError(f"match={transform.match}: {name}: {error}") from error
            # Where all units of a layer were pruned there is nothing left to round.
            if weights.numel():
                targets[name] = target
    return targets


def round_weights(model: Any, targets: Mapping[str, Target]) -> None:
    """Put the modules on their grids, each by itself and without data."""
    for name, target in targets.items():
        quantize_without_data(model, name, target)


def reconstruct_layers(
    model: Any,
    targets: Mapping[str, Target],
    recipe: LkdRecipe | GptqRecipe,
    inputs: Literal["teacher", "student"],
    text: EncodedText,
    batches: Sequence[Sequence[int]],
    folder: Path,
    check: Callable[[], None],
    progress: Callable[[int, int], None],
) -> list[LayerLoss]:
    """Put the modules on their grids, layer by layer, each layer held against the original one.

    Args:
        model: in evaluation mode; changed in place.
        targets: by module name.
        recipe: how.
        inputs: whose hidden states layers are fitted on.
        text: calibration sentences.
        batches: rows of each batch.
        folder: keeps every finished layer; what is there already is gone on from.
        check: called between batches; may raise.
        progress: takes the layers done, and all of them.

    Returns:
        The error of each layer's outputs.
    """
    whole = copy.deepcopy(model).requires_grad_(False)
    path = encoder_path(model)
    names = [f"{path}.{place}" for place in range(len(encoder_layers(model)))]
    done = _resume(folder, model)
    if done:
        log.info("going on at layer %d of %d", len(done) + 1, len(names))
    calibration = Calibration(
        forwards=lambda either: forwards(either, text, batches),
        valid=valid_tokens(text, batches),
        folder=folder / "hidden",
        memory_bytes=_STREAM_BYTES,
        check=check,
    )
    quantizer = LayerwiseQuantizer(
        model, whole, names, targets, recipe, inputs, calibration, first=len(done)
    )
    while quantizer.position < len(names):
        progress(quantizer.position, len(names))
        done.append(quantizer.step())
        _save(folder, model, done)
    return done


def _save(folder: Path, model: Any, losses: Sequence[LayerLoss]) -> None:
    with new_folder(folder / "layers") as temporary:
        save_model(model, str(temporary / _WEIGHTS))
        save_records(temporary, model)
        write_json(temporary / _LOSSES, [asdict(loss) for loss in losses])


def _resume(folder: Path, model: Any) -> list[LayerLoss]:
    saved = folder / "layers"
    if not saved.is_dir():
        return []
    load_model(model, saved / _WEIGHTS)
    load_records(saved, model)
    losses = json.loads((saved / _LOSSES).read_text(encoding="utf-8"))
    return [LayerLoss(**loss) for loss in losses]
