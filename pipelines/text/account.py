"""Bytes of a model that is not trained yet, from its shapes and the grids it will have."""

from collections.abc import Sequence

from torch import nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.report import Account, WeightCost, weight_cost
from dqrm.compress.transforms.base import matching_modules
from dqrm.compress.transforms.config import NMTransform, TransformConfig, WeightGrid
from dqrm.compress.transforms.weights import grid_of


def planned_account(
    skeleton: nn.Module, transforms: Sequence[TransformConfig], prefix: str = ""
) -> Account:
    """Return what a model will take when its transforms have come to their end.

    Args:
        skeleton: the model, with or without values; nothing is attached to it.
        transforms: settings of what will be done to it.
        prefix: counts only what has a name that begins so.

    Raises:
        ValueError: a pattern of theirs matches nothing.
    """
    grids: dict[str, WeightGrid] = {}
    masks: dict[str, NM] = {}
    modules = {
        name: module
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name.startswith(prefix)
    }
    for config in transforms:
        match = (config.match,) if isinstance(config.match, str) else config.match
        matched = matching_modules(skeleton, match, (nn.Linear, nn.Embedding)).keys()
        names = matched & modules.keys()
        if isinstance(config, NMTransform):
            masks |= dict.fromkeys(names, NM(config.keep, config.group))
        elif config.weight is not None:
            grids |= dict.fromkeys(names, config.weight)
    weights = {
        name: _cost(modules[name], grids.get(name), masks.get(name))
        for name in sorted(grids.keys() | masks.keys())
    }
    rest_bytes = sum(
        tensor.nbytes
        for name, tensor in skeleton.state_dict().items()
        if name.startswith(prefix) and name.removesuffix(".weight") not in weights
    )
    rest_macs = sum(
        module.weight.numel()
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name not in weights
    )
    return Account(weights, rest_bytes, rest_macs)


def _cost(module: nn.Linear | nn.Embedding, grid: WeightGrid | None, mask: NM | None) -> WeightCost:
    multiplies = isinstance(module, nn.Linear)
    if grid is None:
        none = Granularity("tensor")
        return weight_cost(module.weight.shape, "fp32", 32, none, mask, multiplies=multiplies)
    return weight_cost(
        module.weight.shape,
        grid_of(grid.bits, grid.grid),
        grid.bits,
        grid.granularity(),
        mask,
        multiplies=multiplies,
    )
