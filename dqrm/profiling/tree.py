"""A model's tree of modules with parameters, bytes, MACs and time.

MACs are counted in one pass and times taken in others, as counting slows every operator down.
The values of a module include those of the modules in it. A module that is called several times
has the sum; a tensor that several modules share counts once in each of them and once above.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dqrm.profiling.macs import module_macs, operator_macs, own_bytes, own_parameters


@dataclass
class Node:
    """One module and what is in it."""

    name: str
    """Of the module within its parent; empty for the model."""
    kind: str
    parameters: int
    bytes: int
    """Of parameters and buffers, as they are kept."""
    macs: int
    """Of one forward."""
    seconds: float | None
    """Median of a forward; None for a module that its parent runs without calling it."""
    gflops: float | None
    """Two billion MACs a second are four: what was reached in that time. None without a time."""
    calls: int
    """In one forward."""
    children: list["Node"] = field(default_factory=list)


def profile(model: nn.Module, forward: Callable[[], object], repeats: int = 5) -> Node:
    """Return the tree of ``model`` for one forward, without gradients, in evaluation mode.

    Args:
        model: put into evaluation mode for the time, and back afterwards.
        forward: calls the model.
        repeats: forwards that are timed, after one that is not.
    """
    training = model.training
    model.eval()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # One operator for a whole encoder layer would hide what is in it.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Not inference_mode: operators made of others are then not taken apart.
        with torch.no_grad():
            counter = _Counter(model)
            with counter.attached(), counter:
                forward()
            times = _times(model, forward, repeats)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        model.train(training)
    return _node("", model, counter, times)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the MACs of every operator to the modules that are running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._running: list[nn.Module] = []
        self._by_formula = 0
        self.macs: dict[nn.Module, int] = {}
        self.calls: dict[nn.Module, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._by_formula:
            self._add(operator_macs(func, args, result), self._running)
        return result

    def _add(self, count: int, modules: list[nn.Module]) -> None:
        # A module that calls itself is there twice.
        for module in set(modules):
            self.macs[module] = self.macs.get(module, 0) + count

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the model's modules."""
        handles = []
        for module in self._model.modules():
            handles.append(module.register_forward_pre_hook(self._begin))
            handles.append(module.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._running.append(module)
        self.calls[module] = self.calls.get(module, 0) + 1
        layers = module_macs(module, inputs)
        if layers is not None:
            for layer, count in layers.items():
                self._add(count, [*self._running, layer])
            self._by_formula += 1

    def _end(self, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        self._running.pop()
        if module_macs(module, ()) is not None:
            self._by_formula -= 1


def _times(model: nn.Module, forward: Callable[[], object], repeats: int) -> dict[nn.Module, float]:
    """Median seconds a forward of every module that is called."""
    spent: dict[nn.Module, float] = {}
    begun: list[float] = []

    def begin(module: nn.Module, inputs: object) -> None:
        begun.append(time.perf_counter())

    def end(module: nn.Module, inputs: object, output: object) -> None:
        spent[module] = spent.get(module, 0.0) + time.perf_counter() - begun.pop()

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end))
    rounds = []
    try:
        for _ in range(1 + repeats):
            spent.clear()
            forward()
            rounds.append(dict(spent))
    finally:
        for handle in handles:
            handle.remove()
    # The first one makes what later ones reuse.
    return {
        module: statistics.median(one[module] for one in rounds[1:] if module in one)
        for module in rounds[-1]
    }


def _node(name: str, module: nn.Module, counter: _Counter, times: dict[nn.Module, float]) -> Node:
    inside = list(module.modules())
    children = [_node(n, m, counter, times) for n, m in module.named_children()]
    macs, seconds = counter.macs.get(module, 0), times.get(module)
    if children and module not in counter.calls:
        # A list of modules is never called itself.
        macs = sum(child.macs for child in children)
        timed = [child.seconds for child in children if child.seconds is not None]
        seconds = sum(timed) if timed else None
    return Node(
        name=name,
        kind=type(module).__name__,
        parameters=sum(dict(pair for m in inside for pair in own_parameters(m)).values()),
        bytes=sum(dict(pair for m in inside for pair in own_bytes(m)).values()),
        macs=macs,
        seconds=seconds,
        gflops=2e-9 * macs / seconds if seconds else None,
        calls=counter.calls.get(module, 0),
        children=children,
    )
