"""The encoder layers of a transformer, and a model with some of them taken out."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def encoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of a model's layers, the one as long as its configuration says.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    count = model.config.num_hidden_layers
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if len(found) != 1:
        which = f"several lists ({', '.join(found)})" if found else "no list"
        raise ValueError(f"{type(model).__name__}: {which} of {count} layers, so none to take out")
    return next(iter(found.values()))


def keep_layers(model: Any, keep: Sequence[int]) -> None:
    """Take all layers but ``keep`` (from 0, rising) out of ``model``; all else stays.

    Raises:
        ValueError: the model has no such layers.
    """
    layers = encoder_layers(model)
    if not keep or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < len(layers):
        raise ValueError(
            f"layers {', '.join(map(str, keep))}: must rise within 0 to {len(layers) - 1}"
        )
    kept = [layers[position] for position in keep]
    del layers[len(kept) :]
    for position, layer in enumerate(kept):
        layers[position] = layer
        for module in layer.modules():
            # Where a layer finds its keys and values in a decoder's cache.
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]
    model.config.num_hidden_layers = len(kept)
