"""Where the time of a forward goes: every module with and without the modules in it.

Times add up: those of all modules without what is in them make that of the model.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from dqrm.compress.lower.modules import Int8Linear

Key = TypeVar("Key")


@dataclass
class Times:
    """Seconds of a forward."""

    wall: float = 0.0
    """From outside, with the clocks in the modules running."""
    inside: dict[nn.Module, float] = field(default_factory=dict)
    """Of modules that are called, with those they call."""
    own: dict[nn.Module, float] = field(default_factory=dict)
    """Without those."""


def time_forwards(
    model: nn.Module, forward: Callable[[], object], repeats: int
) -> tuple[Times, float]:
    """Return the times of modules, and of a forward without clocks in them.

    Each is the mean over the middle half of ``repeats`` forwards, by their wall time. One should
    have gone before.
    """
    plain = sorted(_seconds(forward) for _ in range(repeats))
    rounds: list[Times] = []
    for _ in range(repeats):
        times = Times()
        with _clocks(model, times):
            times.wall = _seconds(forward)
        rounds.append(times)
    rounds.sort(key=lambda times: times.wall)
    kept = middle(rounds)
    mean = Times(
        wall=sum(times.wall for times in kept) / len(kept),
        inside=_mean([times.inside for times in kept]),
        own=_mean([times.own for times in kept]),
    )
    _share_out(model, mean)
    unhooked = middle(plain)
    return mean, sum(unhooked) / len(unhooked)


def middle(ordered: list[Key]) -> list[Key]:
    """Without the first and the last quarter, rounded down."""
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut]


@contextlib.contextmanager
def _clocks(model: nn.Module, times: Times) -> Iterator[None]:
    running: list[tuple[nn.Module, float]] = []
    called: list[float] = []

    def begin(module: nn.Module, inputs: object) -> None:
        called.append(0.0)
        running.append((module, time.perf_counter()))

    def end(module: nn.Module, inputs: object, output: object) -> None:
        spent = time.perf_counter() - running.pop()[1]
        times.own[module] = times.own.get(module, 0.0) + spent - called.pop()
        if all(outer is not module for outer, _ in running):
            times.inside[module] = times.inside.get(module, 0.0) + spent
        if called:
            called[-1] += spent

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _share_out(model: nn.Module, times: Times) -> None:
    """Give each of the layers that one product computes its part, by their outputs."""
    groups: dict[int, list[Int8Linear]] = {}
    for module in model.modules():
        if isinstance(module, Int8Linear) and module.shared is not None and module in times.own:
            groups.setdefault(id(module.shared), []).append(module)
    for layers in groups.values():
        outputs = sum(layer.out_features for layer in layers)
        for kind in (times.inside, times.own):
            spent = sum(kind[layer] for layer in layers)
            for layer in layers:
                kind[layer] = spent * layer.out_features / outputs


def _seconds(forward: Callable[[], object]) -> float:
    began = time.perf_counter()
    forward()
    return time.perf_counter() - began


def _mean(rounds: list[dict[nn.Module, float]]) -> dict[nn.Module, float]:
    return {
        module: sum(one.get(module, 0.0) for one in rounds) / len(rounds) for module in rounds[-1]
    }
