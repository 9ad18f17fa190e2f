"""The collectives that reduce."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dqrm.comm.agreement import Call
from dqrm.comm.buffers import bytes_of, listed, put_back, require, shares_memory
from dqrm.comm.group_base import GroupBase, Started, described
from dqrm.comm.reduction import Op, Reduction, op_name, reduce_rows, reduction_of, values_of
from dqrm.comm.work import WatchedWork


class ReducingGroup(GroupBase):
    """A group that reduces."""

    def allreduce(self, tensors: Any, opts: Any = None, *_: Any) -> WatchedWork:
        """Reduce a tensor over all ranks, in place."""
        return self._all_reduce(listed(tensors), opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> WatchedWork:
        """Reduce several tensors over all ranks, in place."""
        return self._all_reduce(tensors, opts)

    def _all_reduce(self, tensors: list[Tensor], opts: Any) -> WatchedWork:
        op = op_name(opts)
        number = self._enter(lambda: self._alike("all_reduce", tensors, op), "all_reduce", tensors)
        started = Started()
        for tensor in tensors:
            reduction = reduction_of(op, tensor.dtype, self._count)
            values = values_of(tensor)

            finish = partial(_finish, reduction, values, tensor)
            if self._transport.reduces(values, reduction.op):
                started.pendings.append(self._transport.all_reduce(values, reduction.op))
                if reduction.averaged or not shares_memory(values, tensor):
                    started.finish.append(finish)
            else:
                self._gather_rows(started, values, reduction.op, values)
                started.finish.append(finish)
        return self._work("all_reduce", number, started, tensors, opts)

    def reduce(self, tensors: Any, opts: Any) -> WatchedWork:
        """Reduce a tensor over all ranks to one rank, in place."""
        [tensor] = listed(tensors)
        root = opts.rootRank
        op = op_name(opts)
        number = self._enter(
            lambda: self._alike("reduce", [tensor], f"{op} to {root}"), "reduce", [tensor]
        )
        reduction = reduction_of(op, tensor.dtype, self._count)
        started = Started()
        # Reduced in a copy: elsewhere than at the root the tensor stays as it was.
        values = values_of(tensor.clone())
        if self._transport.reduces(values, reduction.op):
            started.pendings.append(self._transport.reduce(values, reduction.op, root))
        else:
            self._gather_rows(started, values, reduction.op, values)
        if self._own == root:

            def finish() -> None:
                reduction.finish(values)
                put_back(values, tensor)

            started.finish.append(finish)
        return self._work("reduce", number, started, [tensor], opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> WatchedWork:
        """Reduce the i-th of a list of tensors over all ranks, to rank i. Sizes may differ."""
        [output] = listed(outputs)
        parts = inputs[0] if isinstance(inputs[0], (list, tuple)) else list(inputs)
        started = Started()
        op = op_name(opts)
        number = self._enter(
            lambda: Call(
                described("reduce_scatter", output, op),
                [part.numel() for part in parts],
                [output.numel()] * self._count,
            ),
            "reduce_scatter",
            [output, *parts],
        )
        own = parts[self._own].numel()
        sizes = f"output has {output.numel()} values, input {self._own} {own}"
        require("reduce_scatter", own == output.numel(), sizes)
        if len({part.numel() for part in parts}) == 1:
            self._scatter_reduced(started, output, torch.cat([p.reshape(-1) for p in parts]), op)
        else:
            self._scatter_uneven(started, output, parts, op)
        return self._work("reduce_scatter", number, started, [output], opts)

    def reduce_scatter_single(
        self, output: Tensor, source: Tensor, opts: Any = None
    ) -> WatchedWork:
        """Reduce a tensor over all ranks; rank i keeps the i-th of its equal parts."""
        return self.reduce_scatter_single_coalesced([output], [source], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> WatchedWork:
        """`reduce_scatter_single` of several tensors."""
        op = op_name(opts)
        number = self._enter(
            lambda: self._alike("reduce_scatter", outputs, op),
            "reduce_scatter",
            [*outputs, *inputs],
        )
        started = Started()
        for output, source in zip(outputs, inputs, strict=True):
            fits = source.numel() == self._count * output.numel()
            sizes = f"input has {source.numel()} values, output {output.numel()}"
            require("reduce_scatter", fits, sizes)
            self._scatter_reduced(started, output, source, op)
        return self._work("reduce_scatter", number, started, outputs, opts)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _scatter_reduced(self, started: Started, output: Tensor, source: Tensor, op: str) -> None:
        reduction = reduction_of(op, output.dtype, self._count)
        values, target = values_of(source), values_of(output)
        if self._transport.reduces(values, reduction.op):
            started.pendings.append(self._transport.reduce_scatter(target, values, reduction.op))
        else:
            width = target.numel()
            self._gather_rows(
                started, values, reduction.op, target, self._own * width, (self._own + 1) * width
            )

        def finish() -> None:
            reduction.finish(target)
            put_back(target, output)

        started.finish.append(finish)

    def _scatter_uneven(
        self, started: Started, output: Tensor, parts: Sequence[Tensor], op: str
    ) -> None:
        reduction = reduction_of(op, output.dtype, self._count)
        copies = [values_of(part.clone()) for part in parts]
        own = copies[self._own]
        for root, copy in enumerate(copies):
            if self._transport.reduces(copy, reduction.op):
                started.pendings.append(self._transport.reduce(copy, reduction.op, root))
            else:
                self._gather_rows(started, copy, reduction.op, copy)

        def finish() -> None:
            reduction.finish(own)
            put_back(own, output)

        started.finish.append(finish)

    def _gather_rows(
        self,
        started: Started,
        values: Tensor,
        op: Op,
        target: Tensor,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        """Reduce by gathering everything everywhere, for what the transport cannot reduce."""
        rows = torch.empty(self._count, values.numel(), dtype=values.dtype)
        source = bytes_of(values)
        splits = [source.numel()] * self._count
        started.pendings.append(self._transport.all_gather(bytes_of(rows), source, splits))
        started.finish.append(lambda: target.copy_(reduce_rows(rows[:, first:last], op)))


def _finish(reduction: Reduction, values: Tensor, tensor: Tensor) -> None:
    reduction.finish(values)
    put_back(values, tensor)
