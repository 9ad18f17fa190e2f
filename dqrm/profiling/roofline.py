"""What the machine can do, measured, and which of it a module is close to.

A module cannot be faster than its FLOPs at the peak rate of their types, than its bytes at the
bandwidth of memory (roofline, Williams et al. 2009, doi 10.1145/1498765.1498785), or than the
calls of modules and operators in it. The largest of these times names what holds it, if it is a
good part of the time it takes; otherwise nothing measured here does.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from dqrm.compress.lower.engines import OnednnLinear
from dqrm.kernels.int8 import CodeLayer, CodeStack
from dqrm.profiling.work import Work

_SIDE = 384
"""Of the matrices that one thread multiplies: enough for the peak (256 to 768 are within 10 % of
each other in fp32, bf16 and int8, Zen 4), and 1 ms, so that on a core that others use as well some
products are not interrupted."""

_STREAM_BYTES = 256 << 20
"""Several times the last level of caches; read in pieces, for the same reason."""

_PIECE_BYTES = 16 << 20

_EXPLAINS = 0.25
"""Part of the time that a limit has to account for before it is named."""


@dataclass(frozen=True)
class Machine:
    """Rates that this process reached, with the threads it has."""

    threads: int
    peak_flops: dict[str, float]
    """FLOPs a second of products of matrices, by type."""
    bandwidth: float
    """Bytes of memory a second that are read, or read and written."""
    call_seconds: float
    """Time of a call that has nothing to do."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a module needs at least."""

    compute: float
    memory: float
    overhead: float

    @property
    def roof(self) -> float:
        """Seconds at the roofline: of arithmetic and memory the slower one."""
        return max(self.compute, self.memory)

    def verdict(self, seconds: float) -> str:
        """What holds a module that takes so long.

        Returns:
            ``compute``, ``memory`` or ``overhead`` (calls); ``caches`` where it is
            faster than memory, so its data are not there; ``unclear`` where none of them accounts
            for a quarter of the time.
        """
        if self.memory > max(seconds, self.compute, self.overhead):
            return "caches"
        name, least = max(vars(self).items(), key=lambda pair: pair[1])
        return name if least >= _EXPLAINS * seconds else "unclear"


def limits(work: Work, machine: Machine) -> Limits:
    """Return what a module needs at least on a machine."""
    return Limits(
        compute=sum(n / machine.peak_flops[name] for name, n in work.flops_by_type.items()),
        memory=work.moved_bytes / machine.bandwidth,
        overhead=work.overhead_calls * machine.call_seconds,
    )


def measure(types: Iterable[str]) -> Machine:
    """Measure the machine; takes about a second.

    Args:
        types: whose peaks are wanted, such as float32, bfloat16 and int8.
    """
    return Machine(
        threads=torch.get_num_threads(),
        peak_flops={name: _peak(name) for name in sorted(types)},
        bandwidth=_bandwidth(),
        call_seconds=_call_seconds(),
    )


def _peak(name: str) -> float:
    # As much for each thread, however many they are.
    side = 64 * round(_SIDE / 64 * math.cbrt(torch.get_num_threads()))
    flops = 2 * side**3
    if name == "int8":
        codes = torch.randint(-127, 128, (side, side), dtype=torch.int8)
        layer = CodeLayer(codes, torch.ones(side), torch.zeros(side))
        x = torch.randn(side, side)
        own, onednn = CodeStack([layer]), OnednnLinear(layer)
        return flops / min(_fastest(lambda: own.forward(x)), _fastest(lambda: onednn.forward(x)))
    matrix = torch.randn(side, side).to(getattr(torch, name))
    return flops / _fastest(lambda: matrix @ matrix)


def _bandwidth() -> float:
    values = torch.ones(_STREAM_BYTES // _PIECE_BYTES, _PIECE_BYTES // 4)
    pieces = itertools.cycle(range(len(values)))
    reading = _PIECE_BYTES / _fastest(lambda: values[next(pieces)].sum())
    copying = 2 * _PIECE_BYTES / _fastest(lambda: values[next(pieces)].copy_(values[next(pieces)]))
    return max(reading, copying)


def _call_seconds() -> float:
    value = torch.ones(1, 1)

    def calls() -> None:
        for _ in range(_CALLS):
            functional.linear(value, value)

    with torch.no_grad():
        return _fastest(calls) / _CALLS / _OPERATORS_OF_LINEAR


_CALLS = 200
_OPERATORS_OF_LINEAR = 2
"""The transpose of the weight and the product: 0.8 us each, Zen 4. A view takes as long; modules
and most operators take two to three times that, so that what follows is a least time."""


def _fastest(run: Callable[[], object], seconds: float = 0.15) -> float:
    """The shortest of the times that fit into ``seconds``, at least three."""
    run()
    spent: list[float] = []
    while len(spent) < 3 or sum(spent) < seconds:
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return min(spent)
