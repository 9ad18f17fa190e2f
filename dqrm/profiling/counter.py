"""One forward with every operator counted, by the modules that are running."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqrm.profiling.elementwise import elementwise_flops
from dqrm.profiling.layers import formula_works, has_formula
from dqrm.profiling.macs import operator_macs
from dqrm.profiling.traffic import operator_bytes
from dqrm.profiling.work import Work, type_name


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the work of every operator to the modules that are running.

    Attributes:
        works: by the modules that were running, the outermost first.
        calls: of each module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._running: list[nn.Module] = []
        self.works: dict[tuple[nn.Module, ...], Work] = {}
        self.calls: dict[nn.Module, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if self._running and has_formula(self._running[-1]):
            work = Work()
        else:
            work = _work(func, args, options, result)
        work.overhead_calls = 1
        self._add(self._running, work)
        return result

    def _add(self, running: list[nn.Module], work: Work) -> None:
        self.works.setdefault(tuple(running), Work()).add(work)

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
        self._add(self._running, Work(overhead_calls=1))
        if has_formula(module):
            for layer, work in formula_works(module, inputs):
                inner = [] if layer is module else [layer]
                self._add([*self._running, *inner], work)

    def _end(self, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        self._running.pop()


def _work(function: Any, arguments: tuple[Any, ...], options: Any, result: Any) -> Work:
    macs = operator_macs(function, arguments, result)
    elementwise = elementwise_flops(function, arguments, result)
    work = Work(macs, elementwise, operator_bytes(function, arguments, options, result))
    if work.flops:
        work.flops_by_type[_type(function, arguments)] = work.flops
    return work


def _type(function: Any, arguments: tuple[Any, ...]) -> str:
    """Type of the values that are computed with."""
    if str(function.overloadpacket) == "quantized.linear_dynamic":
        # Its input is quantized inside.
        return "int8"
    first = next(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return type_name(first.dtype)
