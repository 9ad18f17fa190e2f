"""The namespace ``torch.ops.dqrm``, through which autograd and torch.compile see the kernels.

Kernels register with ``LIBRARY.define`` and ``LIBRARY.impl``, which cost a few microseconds a
call; ``torch.library.custom_op`` costs ten times that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

LIBRARY = Library("dqrm", "DEF")  # type: ignore[no-untyped-call]


def define_operator(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator of the CPU.

    Args:
        schema: name, arguments and result, as in ``"scaled(Tensor x, float factor) -> Tensor"``.
        function: what it does.
        fake: the same for tensors without values: results of the right shape and dtype.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dqrm::{name}", fake, lib=LIBRARY)
