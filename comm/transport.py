"""What a backend must offer: the few operations that all collectives are made of.

Tensors are contiguous, on the CPU, and stay untouched until the operation has ended. Counts and
splits are in bytes where tensors are uint8, else in values.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dqrm.comm.reduction import Op


class Pending(Protocol):
    """An operation under way."""

    def wait(self, seconds: float | None) -> bool:
        """Wait for the end, at most ``seconds``; return whether it came. Raises what failed."""
        ...

    def attend(self) -> None:
        """See to its progress from now on, as nobody waits for it yet."""
        ...

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        ...

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call back once it has ended, from any thread; at once if it has already."""
        ...


class Transport(Protocol):
    """Operations among the ranks of one group, in the same order on every rank."""

    name: str
    """Known to torch under this name. torch would look for its own Gloo behind the name gloo."""

    def reduces(self, tensor: Tensor, op: Op) -> bool:
        """Whether it can reduce values of this dtype so."""
        ...

    def all_reduce(self, tensor: Tensor, op: Op) -> Pending:
        """Reduce in place, over all ranks, to all ranks."""
        ...

    def reduce(self, tensor: Tensor, op: Op, root: int) -> Pending:
        """Reduce in place, to one rank; elsewhere the tensor's values are lost."""
        ...

    def reduce_scatter(self, output: Tensor, source: Tensor, op: Op) -> Pending:
        """Reduce ``source`` [size * n]; each rank gets its n values in ``output``."""
        ...

    def broadcast(self, data: Tensor, root: int) -> Pending:
        """Copy bytes [n] from one rank to all, in place."""
        ...

    def all_gather(self, output: Tensor, source: Tensor, splits: Sequence[int]) -> Pending:
        """Gather bytes [splits[rank]] of every rank into ``output`` [sum(splits)]."""
        ...

    def all_to_all(
        self,
        output: Tensor,
        output_splits: Sequence[int],
        source: Tensor,
        source_splits: Sequence[int],
    ) -> Pending:
        """Send bytes [source_splits[r]] to each rank r, receive [output_splits[r]] from it."""
        ...

    def send(self, data: Tensor, peer: int, tag: int) -> Pending:
        """Send bytes to one rank."""
        ...

    def receive(self, data: Tensor, peer: int, tag: int) -> Pending:
        """Receive bytes from one rank."""
        ...

    def abort(self, reason: str) -> None:
        """Fail all that is under way or comes later, without waiting for anybody."""
        ...

    def close(self) -> None:
        """Give up connections, in good order."""
        ...
