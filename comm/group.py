"""A process group for torch.distributed over any transport.

torch asks for the same thing in many forms: lists, single tensors, coalesced, old names and new
ones. Each form is brought down to the few operations of `dqrm.comm.transport`, so that all
transports take the same dtypes and shapes, and every failure says which ranks are missing.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dqrm.comm.agreement import Call
from dqrm.comm.buffers import bytes_of, listed, require, room_for, split_values, unpacking
from dqrm.comm.group_base import Finish, Started, described
from dqrm.comm.group_reductions import ReducingGroup
from dqrm.comm.work import WatchedWork


class WatchedGroup(ReducingGroup):
    """A group that reduces and copies; see `GroupBase` for its arguments."""

    def broadcast(self, tensors: Any, opts: Any) -> WatchedWork:
        """Copy a tensor from one rank to all."""
        [tensor] = listed(tensors)
        root = opts.rootRank
        number = self._enter(
            lambda: self._alike("broadcast", [tensor], f"from {root}"), "broadcast", [tensor]
        )
        started = Started()
        whole = tensor.contiguous()
        started.pendings.append(self._transport.broadcast(bytes_of(whole), root))
        if whole is not tensor:
            started.finish.append(lambda: tensor.copy_(whole))
        return self._work("broadcast", number, started, [tensor], opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> WatchedWork:
        """Gather one tensor of every rank, in a list. Sizes may differ."""
        tensors = outputs[0] if isinstance(outputs[0], (list, tuple)) else list(outputs)
        return self._gather_lists([list(tensors)], listed(inputs), opts)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> WatchedWork:
        """Gather several tensors of every rank, into lists ``outputs[rank][i]``."""
        columns = [[row[i] for row in outputs] for i in range(len(inputs))]
        return self._gather_lists(columns, inputs, opts)

    def _gather_lists(
        self, columns: list[list[Tensor]], inputs: list[Tensor], opts: Any
    ) -> WatchedWork:
        flat = [tensor for column in columns for tensor in column]
        detail = f"{len(inputs)} tensors" if len(inputs) > 1 else ""
        number = self._enter(
            lambda: Call(
                described("all_gather", inputs[0], detail),
                [sum(tensor.numel() for tensor in inputs)] * self._count,
                [sum(c[rank].numel() for c in columns) for rank in range(self._count)],
            ),
            "all_gather",
            [*flat, *inputs],
        )
        started = Started()
        for column, source in zip(columns, inputs, strict=True):
            own = column[self._own].numel()
            sizes = f"input has {source.numel()} values, output {self._own} {own}"
            require("all_gather", own == source.numel(), sizes)
            packed, splits = room_for(column)
            started.pendings.append(self._transport.all_gather(packed, bytes_of(source), splits))
            started.finish.append(unpacking(packed, splits, column))
        return self._work("all_gather", number, started, flat, opts)

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> WatchedWork:
        """Gather a tensor of every rank into one. All have the same size."""
        return self.all_gather_single_coalesced([output], [source], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> WatchedWork:
        """`all_gather_single` of several tensors."""
        number = self._enter(
            lambda: self._alike("all_gather", inputs, ""), "all_gather", [*outputs, *inputs]
        )
        started = Started()
        for output, source in zip(outputs, inputs, strict=True):
            fits = output.numel() == self._count * source.numel()
            sizes = f"input has {source.numel()} values, output {output.numel()}"
            require("all_gather", fits, sizes)
            whole = output.contiguous()
            data = bytes_of(source)
            splits = [data.numel()] * self._count
            started.pendings.append(self._transport.all_gather(bytes_of(whole), data, splits))
            if whole is not output:
                started.finish.append(partial(output.copy_, whole))
        return self._work("all_gather", number, started, outputs, opts)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> WatchedWork:
        """Gather one tensor of every rank at one rank, in a list. Sizes may differ."""
        [source] = listed(inputs)
        root = opts.rootRank
        targets = list(outputs[0]) if self._own == root else []
        sends = self._at(root, source.numel())
        receives = [t.numel() for t in targets] if targets else [0] * self._count
        return self._exchange(
            "gather", f"to {root}", [source] if source.numel() else [], sends, targets, receives,
            opts, source,
        )  # fmt: skip

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> WatchedWork:
        """Give each rank one of a list of tensors that one rank has. Sizes may differ."""
        [target] = listed(outputs)
        root = opts.rootRank
        sources = list(inputs[0]) if self._own == root else []
        sends = [s.numel() for s in sources] if sources else [0] * self._count
        receives = self._at(root, target.numel())
        return self._exchange(
            "scatter", f"from {root}", sources, sends, [target], receives, opts, target
        )

    def alltoall(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> WatchedWork:
        """Send the i-th of a list of tensors to rank i. Sizes may differ."""
        sends, receives = [t.numel() for t in inputs], [t.numel() for t in outputs]
        return self._exchange("all_to_all", "", inputs, sends, outputs, receives, opts, inputs[0])

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: Sequence[int],
        source_splits: Sequence[int],
        opts: Any = None,
    ) -> WatchedWork:
        """Send parts of a tensor's first dimension to each rank; no splits means equal parts."""
        sends = split_values(source, source_splits, self._count, "input")
        receives = split_values(output, output_splits, self._count, "output")
        whole = output.contiguous()
        finish = [] if whole is output else [lambda: output.copy_(whole)]
        return self._exchange_packed(
            "all_to_all", "", bytes_of(source), sends, bytes_of(whole), receives, finish, [output],
            opts, source,
        )  # fmt: skip

    alltoall_base = all_to_all_single

    def _exchange(
        self,
        name: str,
        detail: str,
        sources: Sequence[Tensor],
        sends: list[int],
        targets: Sequence[Tensor],
        receives: list[int],
        opts: Any,
        like: Tensor,
    ) -> WatchedWork:
        """An all-to-all of lists, which are packed: oneCCL takes no scattered buffers there."""
        source = (
            torch.cat([bytes_of(tensor) for tensor in sources]) if sources else bytes_of(like[:0])
        )
        packed = torch.empty(sum(receives) * like.itemsize, dtype=torch.uint8)
        splits = [tensor.numel() * tensor.itemsize for tensor in targets]
        finish = [unpacking(packed, splits, targets)]
        return self._exchange_packed(
            name, detail, source, sends, packed, receives, finish, list(targets), opts, like
        )

    def _exchange_packed(
        self,
        name: str,
        detail: str,
        source: Tensor,
        sends: list[int],
        packed: Tensor,
        receives: list[int],
        finish: Sequence[Finish],
        results: list[Tensor],
        opts: Any,
        like: Tensor,
    ) -> WatchedWork:
        number = self._enter(
            lambda: Call(described(name, like, detail), sends, receives), name, [like, *results]
        )
        size = like.itemsize
        started = Started()
        started.pendings.append(
            self._transport.all_to_all(
                packed, [n * size for n in receives], source, [n * size for n in sends]
            )
        )
        started.finish += finish
        return self._work(name, number, started, results, opts)

    def _at(self, root: int, count: int) -> list[int]:
        return [count if rank == root else 0 for rank in range(self._count)]
