"""oneCCL as a transport. Importing this loads no library; making a `CclTransport` does.

oneCCL moves data only while it is called. Whoever waits for an operation calls it; else the
compiled module's progress thread does. A second thread, in Python, is started with the first
future: it tells futures of the end of their operations.
"""

import atexit
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from dqrm.comm import oneccl
from dqrm.comm.reduction import Op

if TYPE_CHECKING:
    from dqrm.comm import _ccl

# Waiting in slices lets Python act on signals, such as Ctrl-C, in between.
_SLICE_SECONDS: Final = 0.2
# Operations nobody waited for are looked through once there are so many.
_SWEEP: Final = 64


class _CclPending:
    """An operation of oneCCL, and the tensors it reads and writes."""

    def __init__(self, transport: "CclTransport", operation: "_ccl.Operation",
                 tensors: tuple[Tensor, ...]) -> None:  # fmt: skip
        self._transport = transport
        self._operation = operation
        self.tensors = tensors
        transport.keep(operation.number, self)

    def wait(self, seconds: float | None) -> bool:
        operation = self._operation
        left = seconds
        while not operation.wait(_SLICE_SECONDS if left is None else min(left, _SLICE_SECONDS)):
            if left is not None:
                left -= _SLICE_SECONDS
                if left <= 0:
                    return False
        if not operation.succeeded:
            raise RuntimeError(operation.error)
        self._transport.forget(operation.number)
        return True

    def attend(self) -> None:
        self._transport.module.attend()

    def done(self) -> bool:
        return self._operation.finished

    @property
    def succeeded(self) -> bool:
        """Whether it has ended well."""
        return self._operation.succeeded

    def on_end(self, callback: Callable[[], None]) -> None:
        ENDS.watch(self._transport.module, self._operation, callback)


class _Ends:
    """Calls back when operations end, from a thread of its own."""

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def watch(
        self, module: ModuleType, operation: "_ccl.Operation", callback: Callable[[], None]
    ) -> None:
        """Call back once, at once if the operation has ended already."""
        with self._lock:
            if self._thread is None:
                # A daemon, as the interpreter waits for other threads before it runs `_leave`.
                self._thread = threading.Thread(
                    target=self._run, args=(module,), name="dqrm-ccl-futures", daemon=True
                )
                self._thread.start()
                atexit.register(self._leave, module, self._thread)
        self._callbacks[operation.number] = callback
        if not module.watch(operation):
            self._call(operation.number)

    @staticmethod
    def _leave(module: ModuleType, thread: threading.Thread) -> None:
        # A thread inside a future's callback that comes back to an interpreter which is gone is
        # unwound through C++, which aborts the process.
        module.stop()
        thread.join()

    def _run(self, module: ModuleType) -> None:
        while numbers := module.next_finished():
            for number in numbers:
                self._call(number)

    def _call(self, number: int) -> None:
        # Taken out by whoever comes first.
        callback = self._callbacks.pop(number, None)
        if callback is not None:
            callback()


ENDS: Final = _Ends()


class CclTransport:
    """The operations of `dqrm.comm.transport`, by oneCCL.

    Args:
        store: where the ranks of the group find each other.
        rank: in the group.
        size: of the group.
        timeout: seconds after which an operation fails, and the group with it.

    Raises ImportError where oneCCL cannot be loaded.
    """

    name = "ccl"

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.module = oneccl.load()
        self._timeout = timeout
        self._alive: dict[int, _CclPending] = {}
        self._sweep_at = _SWEEP
        self._dtypes = {getattr(torch, name): code for name, code in self.module.DTYPES.items()}
        if rank == 0:
            store.set("address", self.module.open_address())
        else:
            store.wait(["address"], timedelta(seconds=timeout))
        address = store.get("address")
        self._group: _ccl.Group = self.module.join(address, size, rank, timeout)
        # Of messages between two ranks the others know nothing, so their order among collectives
        # may differ from rank to rank, which oneCCL would not survive in one group.
        self._pairs = self._group
        if size > 1:
            self._pairs = self.module.join(address, size, rank, timeout)

    def reduces(self, tensor: Tensor, op: Op) -> bool:
        """See `Transport.reduces`."""
        return op in self.module.REDUCTIONS and tensor.dtype in self._dtypes

    def all_reduce(self, tensor: Tensor, op: Op) -> _CclPending:
        """See `Transport.all_reduce`."""
        address = tensor.data_ptr()
        kind = self._kind(tensor, op)
        module = self.module
        return self._pending(
            module.allreduce(self._group, address, address, tensor.numel(), *kind, self._timeout),
            tensor,
        )

    def reduce(self, tensor: Tensor, op: Op, root: int) -> _CclPending:
        """See `Transport.reduce`."""
        address = tensor.data_ptr()
        kind = self._kind(tensor, op)
        operation = self.module.reduce(
            self._group, address, address, tensor.numel(), *kind, root, self._timeout
        )
        return self._pending(operation, tensor)

    def reduce_scatter(self, output: Tensor, source: Tensor, op: Op) -> _CclPending:
        """See `Transport.reduce_scatter`."""
        kind = self._kind(source, op)
        pointers = source.data_ptr(), output.data_ptr()
        operation = self.module.reduce_scatter(
            self._group, *pointers, output.numel(), *kind, self._timeout
        )
        return self._pending(operation, output, source)

    def broadcast(self, data: Tensor, root: int) -> _CclPending:
        """See `Transport.broadcast`."""
        operation = self.module.broadcast(
            self._group, data.data_ptr(), data.numel(), root, self._timeout
        )
        return self._pending(operation, data)

    def all_gather(self, output: Tensor, source: Tensor, splits: Sequence[int]) -> _CclPending:
        """See `Transport.all_gather`."""
        operation = self.module.allgatherv(
            self._group, source.data_ptr(), output.data_ptr(), splits, self._timeout
        )
        return self._pending(operation, output, source)

    def all_to_all(
        self,
        output: Tensor,
        output_splits: Sequence[int],
        source: Tensor,
        source_splits: Sequence[int],
    ) -> _CclPending:
        """See `Transport.all_to_all`."""
        operation = self.module.alltoallv(
            self._group, source.data_ptr(), source_splits, output.data_ptr(), output_splits,
            self._timeout,
        )  # fmt: skip
        return self._pending(operation, output, source)

    def send(self, data: Tensor, peer: int, tag: int) -> _CclPending:
        """See `Transport.send`."""
        _refuse_tag(tag)
        operation = self.module.send(
            self._pairs, data.data_ptr(), data.numel(), peer, self._timeout
        )
        return self._pending(operation, data)

    def receive(self, data: Tensor, peer: int, tag: int) -> _CclPending:
        """See `Transport.receive`."""
        _refuse_tag(tag)
        operation = self.module.receive(
            self._pairs, data.data_ptr(), data.numel(), peer, self._timeout
        )
        return self._pending(operation, data)

    def abort(self, reason: str) -> None:
        """See `Transport.abort`."""
        for group in {self._group, self._pairs}:
            self.module.fail(group, reason)
        oneccl.remove_shared_memory()

    def close(self) -> None:
        """Let go of buffers. Connections last as long as the process, see native/engine.h."""
        self._sweep()

    def keep(self, number: int, pending: _CclPending) -> None:
        """Hold an operation and its tensors until it has ended well; for good if it never does."""
        self._alive[number] = pending
        if len(self._alive) >= self._sweep_at:
            self._sweep()

    def forget(self, number: int) -> None:
        """Let go of an operation that has ended well."""
        self._alive.pop(number, None)

    def _sweep(self) -> None:
        for number, pending in list(self._alive.items()):
            if pending.succeeded:
                self._alive.pop(number, None)
        self._sweep_at = max(_SWEEP, 2 * len(self._alive))

    def _kind(self, tensor: Tensor, op: Op) -> tuple[int, int]:
        return self._dtypes[tensor.dtype], self.module.REDUCTIONS[op]

    def _pending(self, operation: "_ccl.Operation", *tensors: Tensor) -> _CclPending:
        return _CclPending(self, operation, tensors)


def _refuse_tag(tag: int) -> None:
    if tag != 0:
        raise ValueError(
            f"tag={tag}: oneCCL has no tags; messages between two ranks arrive in the order sent. "
            "Use tag 0, or the backend gloo"
        )
