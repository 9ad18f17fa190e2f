"""A model's tree of modules with parameters, bytes, arithmetic and time.

Work is counted in one pass and times taken in others, as counting slows every operator down.
The values of a module include those of the modules in it. A module that is called several times
has the sum; a tensor that several modules share counts once in each of them and once above.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from dqrm.profiling.counter import Counter
from dqrm.profiling.layers import kept_part, own_bytes, own_parameters
from dqrm.profiling.roofline import Machine, limits, measure
from dqrm.profiling.timing import Times, time_forwards
from dqrm.profiling.work import Work, total


@dataclass
class Node:
    """One module and what is in it."""

    name: str
    """Of the module within its parent; empty for the model."""
    kind: str
    calls: int
    """In one forward."""
    parameters: int
    bytes: int
    """Of parameters and buffers, as they are kept."""
    macs: int
    """Of one forward, with zeros among the weights: the loops multiply them all the same."""
    kept_macs: int
    """Of these, with weights that are not zero, as masks and N:M patterns leave them."""
    flops: int
    """Two a MAC, and those of elementwise operators, softmax and norms."""
    flops_by_type: dict[str, int]
    """Of these, by the type of the values."""
    moved_bytes: int
    """That its operators read and write, each tensor once a call and each row of a table once."""
    intensity: float | None
    """FLOPs for each of them; None where nothing is moved."""
    overhead_calls: int
    """Calls of modules and of torch's operators, views among them."""
    seconds: float | None
    """Of a forward; None for a module that its parent runs without calling it."""
    own_seconds: float | None
    """Of these, outside of the modules in it."""
    gflops: float | None
    """Billions of FLOPs a second that were reached in that time. None without a time."""
    roofline: float | None
    """Part of the time that it would take at the roofline; above 1, its data were in caches."""
    bound: str | None
    """What holds it: see dqrm.profiling.roofline.Limits.verdict."""
    children: list["Node"] = field(default_factory=list)


@dataclass
class Profile:
    """A model's tree, and what its times are to be compared with."""

    machine: Machine
    wall_seconds: float
    """Of the forward whose times the tree has, from outside."""
    plain_seconds: float
    """Of a forward without clocks in the modules."""
    interruptions: float
    """How often a second other programs took a core from this one while times were taken."""
    tree: Node


def profile(model: nn.Module, forward: Callable[[], object], repeats: int = 5) -> Profile:
    """Return the tree of ``model`` for one forward, without gradients, in evaluation mode.

    Args:
        model: put into evaluation mode for the time, and back afterwards.
        forward: calls the model.
        repeats: forwards that are timed, as many again without clocks in the modules.
    """
    training = model.training
    model.eval()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # One operator for a whole encoder layer would hide what is in it.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Not inference_mode: operators made of others are then not taken apart.
        with torch.no_grad():
            # The first one makes what later ones reuse.
            forward()
            counter = Counter(model)
            with counter.attached(), counter:
                forward()
            began, before = time.perf_counter(), _interruptions()
            times, plain = time_forwards(model, forward, repeats)
            types = {name for work in counter.works.values() for name in work.flops_by_type}
            # Outside of autocast, which would convert what the peaks are measured with.
            with torch.autocast("cpu", enabled=False):
                machine = measure(types)
            interruptions = (_interruptions() - before) / (time.perf_counter() - began)
            tree = _Tree(counter, times, machine).node("", model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        model.train(training)
    return Profile(machine, times.wall, plain, interruptions, tree)


def _interruptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class _Tree:
    """Puts together what was counted, what was timed and what the machine can do."""

    def __init__(self, counter: Counter, times: Times, machine: Machine) -> None:
        self._times = times
        self._machine = machine
        self._calls = counter.calls
        self._works: dict[nn.Module, Work] = {}
        self._kept: dict[nn.Module, int] = {}
        parts: dict[nn.Module, float] = {}
        for running, work in counter.works.items():
            if work.macs and running and running[-1] not in parts:
                parts[running[-1]] = kept_part(running[-1])
            kept = round(work.macs * parts[running[-1]]) if work.macs and running else work.macs
            # A module that calls itself is there twice.
            for module in set(running):
                self._works.setdefault(module, Work()).add(work)
                self._kept[module] = self._kept.get(module, 0) + kept

    def node(self, name: str, module: nn.Module) -> Node:
        """The module and what is in it."""
        inside = list(module.modules())
        children = [self.node(n, m) for n, m in module.named_children()]
        work, kept = self._works.get(module, Work()), self._kept.get(module, 0)
        seconds, own = self._times.inside.get(module), self._times.own.get(module)
        if children and module not in self._calls:
            # A list of modules is never called itself.
            work = total(_work(child) for child in children)
            kept = sum(child.kept_macs for child in children)
            timed = [child.seconds for child in children if child.seconds is not None]
            seconds, own = (sum(timed), 0.0) if timed else (None, None)
        least = limits(work, self._machine)
        return Node(
            name=name,
            kind=type(module).__name__,
            calls=self._calls.get(module, 0),
            parameters=sum(dict(pair for m in inside for pair in own_parameters(m)).values()),
            bytes=sum(dict(pair for m in inside for pair in own_bytes(m)).values()),
            macs=work.macs,
            kept_macs=kept,
            flops=work.flops,
            flops_by_type=work.flops_by_type,
            moved_bytes=work.moved_bytes,
            intensity=work.flops / work.moved_bytes if work.moved_bytes else None,
            overhead_calls=work.overhead_calls,
            seconds=seconds,
            own_seconds=own,
            gflops=1e-9 * work.flops / seconds if seconds else None,
            roofline=least.roof / seconds if seconds else None,
            bound=least.verdict(seconds) if seconds else None,
            children=children,
        )


def _work(node: Node) -> Work:
    return Work(
        macs=node.macs,
        elementwise=node.flops - 2 * node.macs,
        moved_bytes=node.moved_bytes,
        overhead_calls=node.overhead_calls,
        flops_by_type=node.flops_by_type,
    )
