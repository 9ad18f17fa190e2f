"""A transformer with some of its layers taken out."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dqrm.compress.distill.maps import check_map
from dqrm.compress.lower.shapes import encoder_layers as encoder_layers
from dqrm.compress.lower.shapes import encoder_path as encoder_path

_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
"""Settings of configurations that have an entry for each layer."""


def keep_layers(model: Any, keep: Sequence[int]) -> None:
    """Take all layers but ``keep`` (from 0, rising) out of ``model``; all else stays.

    Raises:
        ValueError: the model has no such layers, or would be read back from the disk as another
            one; it is as it was.
    """
    check_map(keep, len(keep), model.config.num_hidden_layers)
    path = encoder_path(model)
    kept = nn.ModuleList(encoder_layers(model)[position] for position in keep)
    config = copy.deepcopy(model.config)
    _keep_in_config(config, keep)
    with torch.device("meta"):
        built = type(model)(config).get_submodule(path)
    for position, (number, layer) in enumerate(zip(keep, kept, strict=True)):
        lost = layer.state_dict().keys() - built[position].state_dict().keys()
        if lost:
            raise ValueError(
                f"{type(model).__name__}: layer {number} would be layer {position}, which has no "
                f"{', '.join(sorted(lost))}; keep layer {position} in its place"
            )
    model.set_submodule(path, kept)
    # The one that the model's modules share.
    _keep_in_config(model.config, keep)
    for position, layer in enumerate(kept):
        for module in layer.modules():
            # Where a layer finds its keys and values in a decoder's cache.
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]


def _keep_in_config(config: Any, keep: Sequence[int]) -> None:
    by_layer = {name: getattr(config, name, None) for name in _BY_LAYER}
    try:
        config.num_hidden_layers = len(keep)
    except NotImplementedError as error:
        raise ValueError(f"{type(config).__name__}: {error}") from error
    for name, values in by_layer.items():
        if values is not None:
            setattr(config, name, [values[position] for position in keep])
