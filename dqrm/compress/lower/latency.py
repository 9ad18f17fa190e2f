"""Times of models that take turns, so that what else the machine does meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

_FEWEST_ROUNDS = 5


def median_seconds(
    contestants: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, float]:
    """Return the median time of a call of each of them.

    Args:
        contestants: by name; each is called once before anything is measured.
        seconds: to spend, about; at least five rounds are made.
    """
    for call in contestants.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < _FEWEST_ROUNDS or time.perf_counter() < deadline:
        for name, call in contestants.items():
            began = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - began)
        rounds += 1
    return {name: statistics.median(times) for name, times in spent.items()}
