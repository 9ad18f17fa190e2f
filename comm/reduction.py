"""How values are reduced: what a transport cannot do is said in terms of what it can."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed import ReduceOp


class Op(StrEnum):
    """What transports may be asked to reduce by."""

    SUM = "sum"
    PRODUCT = "product"
    MIN = "min"
    MAX = "max"
    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"


BITWISE: Final = (Op.BAND, Op.BOR, Op.BXOR)

_OF_BOOLS: Final = {
    Op.SUM: Op.MAX,
    Op.MAX: Op.MAX,
    Op.BOR: Op.MAX,
    Op.PRODUCT: Op.MIN,
    Op.MIN: Op.MIN,
    Op.BAND: Op.MIN,
    Op.BXOR: Op.BXOR,
}
_LOCAL: Final[dict[Op, Callable[[Tensor], Tensor]]] = {
    Op.SUM: lambda rows: rows.sum(0),
    Op.PRODUCT: lambda rows: rows.prod(0),
    Op.MIN: lambda rows: rows.amin(0),
    Op.MAX: lambda rows: rows.amax(0),
    Op.BAND: lambda rows: reduce(torch.bitwise_and, rows.unbind()),
    Op.BOR: lambda rows: reduce(torch.bitwise_or, rows.unbind()),
    Op.BXOR: lambda rows: reduce(torch.bitwise_xor, rows.unbind()),
}


@dataclass(frozen=True)
class Reduction:
    """A reduction over ``size`` ranks, in terms that transports know."""

    op: Op
    averaged: bool
    size: int

    def finish(self, values: Tensor) -> None:
        """What remains to be done to the reduced values, in place."""
        if self.averaged:
            if values.is_floating_point():
                values.div_(self.size)
            else:
                values.div_(self.size, rounding_mode="trunc")


def op_name(options: Any) -> str:
    """The operation in torch's options, or in an operation of torch, as in "sum" or "avg"."""
    if options is None:
        return "sum"
    op = getattr(options, "reduceOp", options)
    kind: Any = getattr(op, "op", op)
    return str(kind.name).lower()


def reduction_of(name: str, dtype: torch.dtype, size: int) -> Reduction:
    """Translate torch's operation ``name`` for values of ``dtype``.

    Raises ValueError for what has no meaning there.
    """
    if name == "premul_sum":
        raise ValueError("ReduceOp.PREMUL_SUM is known to NCCL only: multiply before the sum")
    op = Op.SUM if name == "avg" else Op(name)
    if dtype == torch.bool:
        if name == "avg":
            raise ValueError("the average of bool has no meaning")
        return Reduction(_OF_BOOLS[op], False, size)
    if op in BITWISE and (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"{name} of {dtype} has no meaning")
    return Reduction(op, name == "avg", size)


def torch_op(op: Op) -> ReduceOp:
    """Return the operation as torch's own groups take it."""
    kind: Any = getattr(ReduceOp, op.name)
    made: ReduceOp = ReduceOp(kind)
    return made


def values_of(tensor: Tensor) -> Tensor:
    """Contiguous values [n] to be reduced, which share memory with ``tensor`` if they can."""
    if tensor.is_complex():
        raise ValueError("complex values have no reduction of their own: torch.view_as_real")
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8) if tensor.dtype == torch.bool else flat


def reduce_rows(rows: Tensor, op: Op) -> Tensor:
    """Reduce [size, n] to [n] here: for dtypes that no transport reduces."""
    wide = rows.to(torch.float32 if rows.is_floating_point() else torch.int64)
    return _LOCAL[op](wide).to(rows.dtype)
