"""Gloo, which comes with torch, as a transport."""

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import ProcessGroupGloo, Store, Work
from torch.futures import Future

from dqrm.comm.reduction import BITWISE, Op, torch_op

_DTYPES: Final = (
    torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


class _GlooPending:
    """An operation of Gloo.

    Args:
        work: of Gloo.
        then: run once, after the operation and before its end is told.
        ended: called once, when the operation is known to have ended.
    """

    def __init__(
        self, work: Work, then: Callable[[], object] | None, ended: Callable[[], None]
    ) -> None:
        self._work = work
        self._then = then
        self._ended: Callable[[], None] | None = ended
        self._lock = threading.Lock()
        self._told = False
        self._error: RuntimeError | None = None

    def wait(self, seconds: float | None) -> bool:
        if self._error is not None:
            self._tell_end()
            raise self._error
        if not self._told:
            try:
                self._work.wait(timedelta(seconds=seconds or 0))
            except RuntimeError:
                if seconds is not None and not self._work.is_completed():
                    return False
                self._tell_end()
                raise
        self._finish()
        return True

    def attend(self) -> None:
        """Gloo has threads of its own."""

    def done(self) -> bool:
        return self._told or self._work.is_completed()

    def on_end(self, callback: Callable[[], None]) -> None:
        def told(future: "Future[Any]") -> None:
            # The future ends before the work does, which must not be waited for here.
            try:
                future.value()
            except RuntimeError as error:
                self._error = error
            self._told = True
            callback()

        self._work.get_future().add_done_callback(told)

    def _finish(self) -> None:
        with self._lock:
            then, self._then = self._then, None
            if then is not None:
                then()
        self._tell_end()

    def _tell_end(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, None
        if ended is not None:
            ended()


class GlooTransport:
    """The operations of `dqrm.comm.transport`, by a Gloo group of its own.

    Args:
        store: where the ranks of the group find each other.
        rank: in the group.
        size: of the group.
        timeout: seconds after which an operation fails.
    """

    name = "watched_gloo"

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self._rank = rank
        self._size = size
        # The type stubs know nothing of its operations.
        self._group: Any = ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
        self._under_way = 0
        self._lock = threading.Lock()

    def reduces(self, tensor: Tensor, op: Op) -> bool:
        """See `Transport.reduces`."""
        return tensor.dtype in _DTYPES and not (op in BITWISE and tensor.is_floating_point())

    def all_reduce(self, tensor: Tensor, op: Op) -> _GlooPending:
        """See `Transport.all_reduce`."""
        options = distributed.AllreduceOptions()
        options.reduceOp = torch_op(op)
        return self._begun(self._group.allreduce([tensor], options))

    def reduce(self, tensor: Tensor, op: Op, root: int) -> _GlooPending:
        """See `Transport.reduce`."""
        options = distributed.ReduceOptions()
        options.reduceOp = torch_op(op)
        options.rootRank = root
        return self._begun(self._group.reduce([tensor], options))

    def reduce_scatter(self, output: Tensor, source: Tensor, op: Op) -> _GlooPending:
        """See `Transport.reduce_scatter`."""
        # Gloo's own would need equal parts as well, and gains nothing on the way.
        whole = source.clone()
        part = whole.view(self._size, -1)[self._rank]
        options = distributed.AllreduceOptions()
        options.reduceOp = torch_op(op)
        work = self._group.allreduce([whole], options)
        return self._begun(work, lambda: output.copy_(part))

    def broadcast(self, data: Tensor, root: int) -> _GlooPending:
        """See `Transport.broadcast`."""
        options = distributed.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        return self._begun(self._group.broadcast([data], options))

    def all_gather(self, output: Tensor, source: Tensor, splits: Sequence[int]) -> _GlooPending:
        """See `Transport.all_gather`."""
        widest = max(splits)
        if min(splits) == widest:
            return self._begun(self._group._allgather_base(output, source))
        # Gloo gathers equal parts only: send every part as wide as the widest.
        padded = torch.empty(widest, dtype=torch.uint8)
        padded[: source.numel()] = source
        gathered = torch.empty(widest * self._size, dtype=torch.uint8)

        def unpad() -> None:
            parts = gathered.view(self._size, widest)
            torch.cat([part[:width] for part, width in zip(parts, splits, strict=True)], out=output)

        return self._begun(self._group._allgather_base(gathered, padded), unpad)

    def all_to_all(
        self,
        output: Tensor,
        output_splits: Sequence[int],
        source: Tensor,
        source_splits: Sequence[int],
    ) -> _GlooPending:
        """See `Transport.all_to_all`."""
        splits = list(output_splits), list(source_splits)
        return self._begun(self._group.alltoall_base(output, source, *splits))

    def send(self, data: Tensor, peer: int, tag: int) -> _GlooPending:
        """See `Transport.send`."""
        return self._begun(self._group.send([data], peer, tag))

    def receive(self, data: Tensor, peer: int, tag: int) -> _GlooPending:
        """See `Transport.receive`."""
        return self._begun(self._group.recv([data], peer, tag))

    def abort(self, reason: str) -> None:
        """Gloo cannot be told; its operations fail by themselves, at the latest in time."""

    def close(self) -> None:
        """Close the connections and end Gloo's threads, unless an operation may never end.

        A thread of Gloo that still wants the interpreter, to call back or to drop a tensor, aborts
        the process if the interpreter is gone by then.
        """
        with self._lock:
            idle = self._under_way == 0
        if idle:
            self._group = None

    def _begun(self, work: Work, then: Callable[[], object] | None = None) -> _GlooPending:
        with self._lock:
            self._under_way += 1
        return _GlooPending(work, then, self._one_ended)

    def _one_ended(self) -> None:
        with self._lock:
            self._under_way -= 1
