"""Exchange in two levels: in full precision inside a node, compressed between nodes.

Inside a node memory is fast and a codec only costs time; between nodes the network is the limit.
The gradients of a node's ranks are summed at its leader, leaders exchange as flat worlds do, and
tell their nodes the result. Between nodes 2 (M - 1) / M P bytes travel per node, not per rank.

Symbols: W ranks on M nodes. With L ranks on a node, its sum counts M / W, so that the mean over
nodes is the mean over ranks, also where nodes differ in size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from dqrm.comm.dense import DenseReducer
from dqrm.comm.layout import Layout
from dqrm.comm.meter import Meter
from dqrm.comm.row_codec import Rows
from dqrm.comm.rows import RowReducer
from dqrm.comm.wire import RefusedError, Rounds, Wire
from dqrm.kernels.tables import RowGradient


@dataclass(frozen=True)
class Nodes:
    """The groups of one rank. Nothing else may use them meanwhile."""

    node: ProcessGroup
    """The ranks of its node; the first one leads."""
    leaders: ProcessGroup | None
    """The leaders of all nodes; None on other ranks."""
    count: int
    """Nodes."""
    ranks: int
    """Ranks of all nodes."""


def make_nodes(ranks_per_node: int) -> Nodes:
    """Make the groups of nodes of so many neighbouring ranks; the last may have fewer.

    A collective call: every rank of the default group makes it.
    """
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node={ranks_per_node}: must be at least 1")
    world, rank = distributed.get_world_size(), distributed.get_rank()
    firsts = list(range(0, world, ranks_per_node))
    leaders = _group(firsts)
    own = None
    for first in firsts:
        ranks = list(range(first, min(first + ranks_per_node, world)))
        group = _group(ranks)
        if rank in ranks:
            own = group
    assert own is not None
    return Nodes(own, leaders, len(firsts), world)


def _group(ranks: list[int]) -> ProcessGroup | None:
    """Make a group; None on ranks that are not in it."""
    group = distributed.new_group(ranks)
    return group if isinstance(group, ProcessGroup) and distributed.get_rank() in ranks else None


class _Node:
    """What both kinds of gradients do inside a node."""

    def __init__(self, nodes: Nodes, meter: Meter, name: str) -> None:
        self.nodes, self.meter, self.name = nodes, meter, name
        self.size = distributed.get_world_size(nodes.node)
        self.leads = distributed.get_rank(nodes.node) == 0
        self.weight = nodes.count / nodes.ranks

    def tell(self, reason: str | None, count: int = 0) -> int:
        """Tell the node how many rows there are, or why there is nothing; return how many.

        Raises:
            RefusedError: on all its ranks, with the reason.
        """
        text = torch.frombuffer(
            bytearray((reason or "").encode()) or bytearray(1), dtype=torch.uint8
        )
        told = torch.tensor([len((reason or "").encode()), count])
        self.spread(told)
        size, count = told.tolist()
        if size:
            text = text if self.leads else torch.empty(size, dtype=torch.uint8)
            self.spread(text)
            raise RefusedError(text.numpy().tobytes().decode(errors="replace"))
        return int(count)

    def spread(self, tensor: Tensor) -> None:
        """Give the leader's tensor to the node."""
        if self.size == 1:
            return
        with self.meter.timed(self.name, "node", "wire"):
            distributed.broadcast(tensor, group=self.nodes.node, group_src=0)
        self._count(tensor, self.leads)

    def sum(self, values: Tensor) -> None:
        """Sum the node's tensors at its leader."""
        if self.size == 1:
            return
        with self.meter.timed(self.name, "node", "wire"):
            distributed.reduce(values, group=self.nodes.node, group_dst=0)
        self._count(values, not self.leads)

    def _count(self, tensor: Tensor, sends: bool) -> None:
        record = self.meter.record(self.name, "node")
        size = tensor.numel() * tensor.element_size()
        record.messages += 1
        record.raw_bytes += size if sends else 0
        record.payload_bytes += size if sends else 0
        record.sent_bytes += size if sends else 0
        record.received_bytes += 0 if sends else size


class NodeDenseReducer:
    """A DenseReducer among leaders; see :class:`dqrm.comm.dense.DenseReducer`.

    Args:
        nodes: the groups.
        between: of the leaders; None on other ranks.
        meter: what counts.
    """

    def __init__(self, nodes: Nodes, between: DenseReducer | None, meter: Meter) -> None:
        self.nodes, self.between, self.meter = nodes, between, meter

    def rounds(self, name: str, layout: Layout, values: Tensor, step: int) -> Rounds[None]:
        """Take the mean over all ranks, in place; in collectives of its own."""
        yield from ()
        node = _Node(self.nodes, self.meter, name)
        node.sum(values)
        reason = None
        if self.between is not None:
            values.mul_(node.weight)
            try:
                self.between.reduce(name, layout, values, step)
            except RefusedError as error:
                reason = f"of the leaders of nodes, {error}"
        node.tell(reason)
        node.spread(values)


class NodeRowReducer:
    """A RowReducer among leaders; see :class:`dqrm.comm.rows.RowReducer`.

    Args:
        nodes: the groups.
        between: of the leaders; None on other ranks.
        inside: of the node, to exchange messages on.
        name: of the collection of tables.
        rows: of it.
        dim: D.
    """

    def __init__(
        self, nodes: Nodes, between: RowReducer | None, inside: Wire, name: str, rows: int, dim: int
    ) -> None:
        self.nodes, self.between = nodes, between
        self.inside = RowReducer(inside, name, rows, dim, Rows(32), "gather")
        self.node = _Node(nodes, inside.meter, name)

    def rounds(self, gradient: RowGradient, step: int) -> Rounds[RowGradient]:
        """Return the mean over all ranks, valid until the next call; in collectives of its own."""
        yield from ()
        reason = None
        try:
            gradient = self.inside.reduce(gradient, step)
        except RefusedError as error:
            reason = f"of its node, {error}"
        merged = gradient
        if self.between is not None:
            # The node's mean becomes its part of the mean over nodes.
            weight = self.node.size * self.node.weight
            given = RowGradient(gradient.rows, gradient.values * weight)
            try:
                merged = self.between.reduce(given, step, reason)
                reason = None
            except RefusedError as error:
                reason = f"of the leaders of nodes, {error}"
        count = self.node.tell(reason, len(merged.rows))
        if self.between is None:
            dim = gradient.values.shape[1]
            merged = RowGradient(torch.empty(count, dtype=torch.int64), torch.empty(count, dim))
        self.node.spread(merged.rows)
        self.node.spread(merged.values)
        return merged
