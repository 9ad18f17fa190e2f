"""The encoder layers of a transformer, and a model with some of them taken out."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from dqrm.compress.distill.maps import check_map


def encoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of a model's layers. Raises ValueError as :func:`encoder_path`."""
    layers = model.get_submodule(encoder_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def encoder_path(model: Any) -> str:
    """Return the name of the list of a model's layers, the one as long as its configuration says.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    count = model.config.num_hidden_layers
    found = [
        str(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        which = f"several lists ({', '.join(found)})" if found else "no list"
        raise ValueError(f"{type(model).__name__}: {which} of {count} layers, so none to take out")
    return found[0]


def keep_layers(model: Any, keep: Sequence[int]) -> None:
    """Take all layers but ``keep`` (from 0, rising) out of ``model``; all else stays.

    Raises:
        ValueError: the model has no such layers.
    """
    count = model.config.num_hidden_layers
    check_map(keep, len(keep), count)
    layers = encoder_layers(model)
    kept = nn.ModuleList(layers[position] for position in keep)
    model.set_submodule(encoder_path(model), kept)
    model.config.num_hidden_layers = len(kept)
    for position, layer in enumerate(kept):
        for module in layer.modules():
            # Where a layer finds its keys and values in a decoder's cache.
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]
