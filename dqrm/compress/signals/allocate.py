"""One candidate for each item under a budget, at the least expected loss.

The multiple-choice knapsack. A sweep over Lagrange multipliers gives a solution and, for every
multiplier, a bound on what any solution can reach. Dynamic programming over the items then keeps
the combinations that no other beats in both cost and loss and that the bound does not rule out:
the result is the best one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SWEEPS = 100
"""Halvings of the multiplier's interval; it is then as narrow as float64 can say."""

_MOST_STATES = 1_000_000
"""Combinations kept at once. MiniLM's 36 matrices with 9 candidates each keep under 10,000."""


@dataclass(frozen=True)
class Candidate:
    """One way to treat an item."""

    cost: int
    """Of the budget: bytes, for example; 0 or more."""
    loss: float
    """Expected; losses of items add up."""


def allocate(items: Sequence[Sequence[Candidate]], budget: int) -> list[int]:
    """Return the position of the chosen candidate of each item.

    Args:
        items: candidates of each item.
        budget: the costs of the chosen ones sum to no more.

    Raises:
        ValueError: even the cheapest ones cost more, an item has no candidate, or a loss is not
            finite.
    """
    costs = [np.array([c.cost for c in item], dtype=np.int64) for item in items]
    losses = [np.array([c.loss for c in item], dtype=np.float64) for item in items]
    if not all(len(item) for item in items):
        raise ValueError("an item has no candidate")
    if not all(np.isfinite(loss).all() for loss in losses):
        raise ValueError("a candidate's loss is not finite")
    cheapest = sum(int(cost.min()) for cost in costs)
    if cheapest > budget:
        raise ValueError(f"the cheapest candidates cost {cheapest:,}, the budget is {budget:,}")
    multiplier, chosen = _sweep(costs, losses, budget)
    return _refine(costs, losses, budget, multiplier, chosen)


def _sweep(
    costs: list[np.ndarray], losses: list[np.ndarray], budget: int
) -> tuple[float, list[int]]:
    """The least multiplier whose cheapest combination fits, and that combination."""

    def best(multiplier: float) -> list[int]:
        # Of equal ones the cheapest, so that a large multiplier always fits.
        return [
            int(np.lexsort((cost, loss + multiplier * cost))[0])
            for cost, loss in zip(costs, losses, strict=True)
        ]

    def fits(chosen: list[int]) -> bool:
        return sum(int(cost[n]) for cost, n in zip(costs, chosen, strict=True)) <= budget

    free = best(0.0)
    if fits(free):
        return 0.0, free
    low, high = 0.0, 1.0 + 2 * sum(float(np.ptp(loss)) for loss in losses)
    chosen = best(high)
    for _ in range(_SWEEPS):
        middle = (low + high) / 2
        tried = best(middle)
        if fits(tried):
            high, chosen = middle, tried
        else:
            low = middle
    return high, chosen


def _refine(
    costs: list[np.ndarray],
    losses: list[np.ndarray],
    budget: int,
    multiplier: float,
    chosen: list[int],
) -> list[int]:
    """The best combination, found among those that the bound leaves."""
    # What the items from one on take at least: cost alone, and loss plus the multiplier's price.
    least_cost = _tails([int(cost.min()) for cost in costs])
    least_price = _tails(
        [float((loss + multiplier * cost).min()) for cost, loss in zip(costs, losses, strict=True)]
    )
    best_loss = sum(float(loss[n]) for loss, n in zip(losses, chosen, strict=True))
    slack = 1e-9 * max(1.0, abs(best_loss))
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for index, (item_costs, item_losses) in enumerate(zip(costs, losses, strict=True)):
        all_costs = (cost[:, None] + item_costs).ravel()
        all_losses = (loss[:, None] + item_losses).ravel()
        bound = all_losses + multiplier * (all_costs - budget) + least_price[index + 1]
        possible = (all_costs + least_cost[index + 1] <= budget) & (bound <= best_loss + slack)
        kept = np.flatnonzero(possible)
        kept = kept[np.lexsort((all_losses[kept], all_costs[kept]))]
        # Of those sorted by cost, the ones that lose less than every cheaper one.
        below = np.minimum.accumulate(all_losses[kept])
        better = np.ones(len(kept), dtype=bool)
        better[1:] = below[1:] < below[:-1]
        kept = kept[better]
        if not 0 < len(kept) <= _MOST_STATES:
            # Rounding ruled everything out, or the losses tell too little apart.
            return chosen
        steps.append((kept // len(item_costs), kept % len(item_costs)))
        cost, loss = all_costs[kept], all_losses[kept]
    state = int(np.argmin(loss))
    if loss[state] >= best_loss:
        return chosen
    refined = []
    for parents, picks in reversed(steps):
        refined.append(int(picks[state]))
        state = int(parents[state])
    return refined[::-1]


def _tails(values: Sequence[float]) -> list[float]:
    """Sums from each position on, and 0 behind the last."""
    sums = [0.0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]
