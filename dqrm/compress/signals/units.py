"""Which units of a network to keep under a budget, from the gradients of their masks.

A unit is what a mask of one value multiplies: an attention head, a neuron between two linear
layers. After arXiv 2204.09656 and its code: a global search by the diagonal Fisher information,
then a rearrangement within each layer by the block-diagonal one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """Units that stay, as bool [units] for each layer."""

    heads: list[Tensor]
    neurons: list[Tensor]


def search_units(
    head_fisher: Sequence[Tensor],
    neuron_fisher: Sequence[Tensor],
    head_cost: float,
    neuron_cost: float,
    budget: float,
    round_to: int = 1,
) -> Kept:
    """Keep the units with the most Fisher information that the budget allows.

    For every number of heads the best heads are taken, and the best neurons that the rest of the
    budget pays for; the number with the largest sum of Fisher information wins. Neurons come in
    blocks of ``round_to``, each layer's best first, so that matrices keep widths which multiply
    fast and the whole budget is spent on them. Where widths are multiples of it no other choice
    on that grid has a larger sum.

    Args:
        head_fisher: float [heads] of each layer; layers may differ in width.
        neuron_fisher: float [neurons] of each layer.
        head_cost: of one head, in the unit of the budget.
        neuron_cost: of one neuron.
        budget: for heads and neurons together.
        round_to: neurons a block; the last block of a layer may be smaller and costs what it has.

    Raises:
        ValueError: the budget pays for no unit at all.
    """
    heads = _Ranked.of([fisher.double() for fisher in head_fisher], 1)
    blocks = _Ranked.of([fisher.double() for fisher in neuron_fisher], round_to)
    head_sums, block_sums = _prefix_sums(heads.values), _prefix_sums(blocks.values)
    best: tuple[float, int, int] | None = None
    for count in range(len(heads.values) + 1):
        left = budget - count * head_cost
        if left < 0:
            break
        taken = blocks.within(left, neuron_cost)
        value = float(head_sums[count] + block_sums[taken])
        # Of equal ones the last, so that a budget for everything keeps everything.
        if best is None or value >= best[0]:
            best = (value, count, taken)
    if best is None or best[1:] == (0, 0):
        raise ValueError(
            f"a budget of {budget:g} pays for no unit: a head costs {head_cost:g}, "
            f"{round_to} neurons {round_to * neuron_cost:g}"
        )
    return Kept(heads.masks(best[1]), blocks.masks(best[2]))


def rearrange(kept: Tensor, gradients: Tensor) -> Tensor:
    """Exchange units of one layer, as many as before, so that the removed ones cancel out.

    What the loss is expected to rise by when the units P are removed is half the sum over batches
    of (sum of their gradients)**2: the block of the Fisher information, its off-diagonal included.
    Every kept unit, the least informative first, is put among the removed ones, and the one
    whose return lowers that sum most comes back.

    Args:
        kept: bool [units].
        gradients: float32 [batches, units], of the units' masks.

    Returns:
        bool [units], with as many kept; its sum is never larger than that of ``kept``.
    """
    values = gradients.double()
    squares = (values * values).sum(0)
    removed = ~kept
    total = values[:, removed].sum(1)
    candidates = [u for u in torch.argsort(squares, stable=True).tolist() if kept[u]]
    for unit in candidates:
        removed[unit] = True
        total = total + values[:, unit]
        # |total - g|**2 without what is the same for all.
        change = squares - 2 * (total @ values)
        change[~removed] = torch.inf
        back = int(change.argmin())
        # Exactly equal ones stay as they are.
        if change[back] >= change[unit]:
            back = unit
        removed[back] = False
        total = total - values[:, back]
    return ~removed


def _prefix_sums(values: Tensor) -> Tensor:
    """float64 [values + 1]; one after another, so that a zero adds nothing at all."""
    return torch.cat([values.new_zeros(1), torch.cumsum(values, 0)])


@dataclass(frozen=True)
class _Ranked:
    """Blocks of all layers, the most valuable first."""

    values: Tensor
    """float64 [blocks]: of the whole block, less what is a part of it when it is not full."""
    sizes: Tensor
    """int64 [blocks]: units in it."""
    layers: Tensor
    """int64 [blocks]."""
    members: list[Tensor]
    """Units of each block, in its layer."""
    widths: list[int]

    @classmethod
    def of(cls, fisher: Sequence[Tensor], size: int) -> "_Ranked":
        values, layers, members = [], [], []
        for layer, information in enumerate(fisher):
            order = torch.argsort(information, descending=True, stable=True)
            for part in torch.split(order, size) if len(order) else ():
                values.append(information[part].sum())
                layers.append(layer)
                members.append(part)
        stacked = torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)
        order = torch.argsort(stacked, descending=True, stable=True)
        return cls(
            values=stacked[order],
            sizes=torch.tensor([len(members[n]) for n in order.tolist()], dtype=torch.int64),
            layers=torch.tensor(layers, dtype=torch.int64)[order],
            members=[members[n] for n in order.tolist()],
            widths=[len(information) for information in fisher],
        )

    def within(self, budget: float, cost: float) -> int:
        """How many of the best blocks the budget pays for."""
        spent = torch.cumsum(self.sizes.double(), 0) * cost
        # Room for the rounding of a budget that was meant to pay for exactly so many.
        return int((spent <= budget * (1 + 1e-12)).sum())

    def masks(self, count: int) -> list[Tensor]:
        """The units of so many of the best blocks, bool [units] of each layer."""
        masks = [torch.zeros(width, dtype=torch.bool) for width in self.widths]
        for block in range(count):
            masks[int(self.layers[block])][self.members[block]] = True
        return masks
