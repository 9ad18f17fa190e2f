"""Bytes of a model that is not trained yet, from its shapes and the grids it will have."""

from collections.abc import Sequence

from torch import Tensor, nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.report import Account, WeightCost, account_of, weight_cost
from dqrm.compress.transforms.base import matching_modules
from dqrm.compress.transforms.config import NMTransform, TransformConfig, WeightGrid
from dqrm.compress.transforms.weights import grid_of


def planned_account(
    skeleton: nn.Module, transforms: Sequence[TransformConfig], *, layers_only: bool = False
) -> Account:
    """Return what a model will take when its transforms have come to their end.

    Codes of two symmetric bits are counted as the range says; those of GPTQ may take all of them.

    Args:
        skeleton: the model, with or without values; nothing is attached to it.
        transforms: settings of what will be done to it.
        layers_only: counts only what is of a layer (:func:`dqrm.compress.lower.tensors.in_layers`).

    Raises:
        ValueError: a pattern of theirs matches nothing.
    """
    modules: dict[str, nn.Module] = {}
    grids: dict[str, WeightGrid] = {}
    masks: dict[str, NM] = {}
    for config in transforms:
        match = (config.match,) if isinstance(config.match, str) else config.match
        matched = matching_modules(skeleton, match, (nn.Linear, nn.Embedding))
        modules |= matched
        if isinstance(config, NMTransform):
            masks |= dict.fromkeys(matched, NM(config.keep, config.group))
        elif config.weight is not None:
            grids |= dict.fromkeys(matched, config.weight)
    weights = {
        name: _cost(modules[name], grids.get(name), masks.get(name))
        for name in sorted(grids.keys() | masks.keys())
    }
    return account_of(skeleton, weights, layers_only=layers_only)


def _cost(module: nn.Module, grid: WeightGrid | None, mask: NM | None) -> WeightCost:
    weight = module.weight
    assert isinstance(weight, Tensor)
    multiplies = isinstance(module, nn.Linear)
    if grid is None:
        none = Granularity("tensor")
        return weight_cost(weight.shape, "fp32", 32, none, mask, multiplies=multiplies)
    return weight_cost(
        weight.shape,
        grid_of(grid.bits, grid.grid),
        grid.bits,
        grid.granularity(),
        mask,
        multiplies=multiplies,
        full_range=grid.range == "full",
    )
