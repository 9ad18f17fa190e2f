"""A transformer with some of its layers taken out."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from dqrm.compress.distill.maps import check_map
from dqrm.compress.lower.shapes import encoder_layers as encoder_layers
from dqrm.compress.lower.shapes import encoder_path as encoder_path


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
