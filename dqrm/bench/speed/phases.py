"""Where the time of our step goes, phase by phase."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dqrm.training import step as step_module
from dqrm.training.step import FusedStep

_ROUNDS = 40


def phase_seconds(step: FusedStep, call: Callable[[int], object]) -> dict[str, float]:
    """Return the median CPU seconds of each phase of one step, in the order they first run.

    Args:
        step: whose calls are timed.
        call: takes one step on the batch of a number.
    """
    taken: dict[str, list[float]] = {}
    points: list[tuple[Any, str, str]] = [
        (step.bottom, "forward", "bottom MLP forward"),
        (step.collection, "lookup", "embedding forward"),
        (step_module, "interaction_forward", "interaction forward"),
        (step.top, "forward", "top MLP forward"),
        (step.top, "backward", "top MLP backward"),
        (step_module, "interaction_backward", "interaction backward"),
        (step.bottom, "backward", "bottom MLP backward"),
        (step.optimizer.dense, "step", "MLP optimizer"),
        (step.optimizer.rows, "update", "embedding backward and update"),
    ]
    with _timed(points, taken):
        for number in range(_ROUNDS):
            start = time.process_time()
            call(number)
            taken.setdefault("whole step", []).append(time.process_time() - start)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    whole = medians.pop("whole step")
    return {**medians, "everything else": max(0.0, whole - sum(medians.values()))}


@contextmanager
def _timed(points: list[tuple[Any, str, str]], taken: dict[str, list[float]]) -> Iterator[None]:
    """Put a clock around attributes of objects and modules for a while."""

    def around(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.process_time() - start)

        return call

    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in points]
    for owner, name, label in points:
        setattr(owner, name, around(getattr(owner, name), taken.setdefault(label, [])))
    try:
        yield
    finally:
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
