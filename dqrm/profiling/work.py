"""What an operator, a layer or a model does in one forward: the unit in which the others count."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch


@dataclass
class Work:
    """Multiplications, other arithmetic, and bytes to and from memory."""

    macs: int = 0
    """Products of matrices; each is two FLOPs."""
    elementwise: int = 0
    """FLOPs of all else."""
    moved_bytes: int = 0
    """What operators read and write if nothing stays in caches between them."""
    overhead_calls: int = 0
    """Calls of modules and of torch's operators, views among them."""
    flops_by_type: dict[str, int] = field(default_factory=dict)
    """Of both kinds, by the type of the values: float32, bfloat16, int8."""

    @property
    def flops(self) -> int:
        """Two a MAC, and all else."""
        return 2 * self.macs + self.elementwise

    def add(self, other: "Work") -> None:
        """Add what another does."""
        self.macs += other.macs
        self.elementwise += other.elementwise
        self.moved_bytes += other.moved_bytes
        self.overhead_calls += other.overhead_calls
        for name, flops in other.flops_by_type.items():
            self.flops_by_type[name] = self.flops_by_type.get(name, 0) + flops


def total(works: Iterable[Work]) -> Work:
    """The sum."""
    result = Work()
    for work in works:
        result.add(work)
    return result


def type_name(dtype: torch.dtype) -> str:
    """``float32``; codes without a sign are int8 as well."""
    return str(dtype).removeprefix("torch.").replace("uint8", "int8")
