"""Ways to exchange the gradient of touched rows and apply it, all from the same pooled gradients.

Symbols: W ranks, B samples a rank, T tables, D columns, N = B T looked-up ids, n distinct rows.
"""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from dqrm.bench.speed.embedding import LEARNING_RATE
from dqrm.bench.speed.traffic import Traffic
from dqrm.comm.exchange import Exchange, TableRows
from dqrm.comm.message import HEADER_BYTES
from dqrm.comm.policy import Policy, RowRecipe
from dqrm.comm.row_codec import Rows
from dqrm.kernels.row_codecs_reference import code_bytes
from dqrm.kernels.tables import RowGradient, merge_rows
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.training.config import OptimConfig
from dqrm.training.exchanged_step import TABLES
from dqrm.training.row_optimizers import RowOptimizer

# Its name changed with torch.
_all_gather: Callable[..., object] = getattr(
    distributed, "all_gather_single", distributed.all_gather_into_tensor
)
_RAW_KEY_BYTES = 8
_PHASE_CALLS = 30


class RowWork:
    """A rank's batches and the tables that everybody updates by SGD.

    Args:
        collection: not quantized, so that all do the same to it.
        traffic: of this rank.
    """

    def __init__(self, collection: EmbeddingBagCollection, traffic: Traffic) -> None:
        self.collection, self.traffic = collection, traffic
        self.weight = collection.weight.detach()
        starts = collection.table_start[: len(traffic.shape.rows), None]
        self.ids = [ids.flatten().to(torch.int32) for ids in traffic.batches]
        """int32 [N], local to their tables, as data loading hands them out."""
        self.numbers = [(ids + starts).flatten() for ids in traffic.batches]
        """int64 [N], through all tables."""
        size = len(traffic.shape.rows), traffic.batch, collection.embedding_dim
        generator = torch.Generator().manual_seed(1)
        by_table = torch.randn(size, generator=generator) * 1e-3
        self.by_id = by_table.view(-1, size[2])
        """float32 [N, D]: the gradient as torch's embeddings return it."""
        self.pooled = by_table.transpose(0, 1).contiguous()
        """float32 [B, T, D]: the same, as our interaction returns it."""

    def touched(self, number: int) -> Tensor:
        """Return the distinct rows of a batch, int64 [n]."""
        rows: Tensor = torch.unique(self.numbers[self.traffic.pick(number)])
        return rows


class RowContestant(ABC):
    """One way to do it."""

    def __init__(self, work: RowWork, group: ProcessGroup) -> None:
        self.work, self.group = work, group
        self.world_size = distributed.get_world_size(group)
        self._seconds: dict[str, list[float]] | None = None

    @abstractmethod
    def call(self, number: int) -> None:
        """Exchange the gradient of one batch and apply the mean."""

    @abstractmethod
    def formula_bytes(self, number: int) -> float:
        """Return the bytes this rank sends for one batch, by calculation."""

    def counted_bytes(self) -> float | None:
        """Return all bytes this rank sent so far, by the meter; None without one."""
        return None

    def phases(self) -> dict[str, float]:
        """Return the median seconds of each part of a call; a collective call."""
        self._seconds = {}
        for number in range(_PHASE_CALLS):
            self.call(number)
        seconds, self._seconds = self._seconds, None
        return {name: statistics.median(values) for name, values in seconds.items() if values}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self._seconds is None:
            yield
            return
        begin = time.perf_counter()
        yield
        self._seconds.setdefault(name, []).append(time.perf_counter() - begin)


class OurRows(RowContestant):
    """Ours: sum repeated rows, encode, send, merge, apply.

    Args:
        work: of this rank.
        group: to exchange over; nobody else's.
        codec: how rows are sent.
        residual_rows: as in RowRecipe.
    """

    def __init__(
        self, work: RowWork, group: ProcessGroup, codec: Rows, residual_rows: int | None
    ) -> None:
        super().__init__(work, group)
        self.codec = codec
        collection = work.collection
        self.exchange = Exchange(
            Policy([(TABLES, RowRecipe(codec, residual_rows=residual_rows))]),
            {},
            {TABLES: TableRows(collection.num_rows, collection.embedding_dim)},
            group=group,
            # As the training step of a rank with one core.
            overlap=False,
        )
        self.optimizer = RowOptimizer(collection, OptimConfig(name="sgd", lr=LEARNING_RATE))
        self._steps = 0

    def call(self, number: int) -> None:
        """Exchange and apply, as the training step does without anything to overlap with."""
        work = self.work
        self.exchange.start_step(self._steps)
        self._steps += 1
        before = self.exchange.meter.total() if self._seconds is not None else None
        with self._phase("sum repeated rows"):
            gradient = work.collection.kernel.row_gradient(
                work.ids[work.traffic.pick(number)], None, work.pooled
            )
        with self._phase("exchange"):
            merged = self.exchange.reduce_rows(TABLES, gradient).wait()
        with self._phase("apply"):
            self.optimizer.step(merged, LEARNING_RATE)
        if self._seconds is not None and before is not None:
            after = self.exchange.meter.total()
            stages = {
                "encode": after.encode_seconds - before.encode_seconds,
                "wire": after.wire_seconds - before.wire_seconds,
                "decode": after.decode_seconds - before.decode_seconds,
            }
            whole = self._seconds["exchange"]
            stages["hand over"] = whole.pop() - sum(stages.values())
            for name, seconds in stages.items():
                self._seconds.setdefault(name, []).append(seconds)

    def phases(self) -> dict[str, float]:
        """Return where the time goes, in the order in which it passes."""
        found = super().phases()
        order = ("sum repeated rows", "hand over", "encode", "wire", "decode", "apply")
        return {name: found[name] for name in order}

    def formula_bytes(self, number: int) -> float:
        """A message to each other rank; its size follows from the rows alone."""
        rows, bits = self.work.touched(number), self.codec.bits
        return (self.world_size - 1) * row_message_bytes(rows, self.work.traffic.shape.dim, bits)

    def counted_bytes(self) -> float:
        """Return what the meter says."""
        return self.exchange.meter.total().sent_bytes

    def close(self) -> None:
        """End the communication thread."""
        self.exchange.close()


def row_message_bytes(rows: Tensor, dim: int, bits: int) -> int:
    """Return the bytes of a message of all rows (int64 [n], ascending), its header included.

    The format is defined in dqrm.kernels.row_messages_reference.
    """
    count = len(rows)
    gaps = torch.diff(rows, prepend=torch.tensor([-1])) - 1
    sizes = 1 + (gaps > 0xFF).long() + (gaps > 0xFFFF).long() + 5 * (gaps > 0xFFFFFF).long()
    values = code_bytes(dim, bits) + (2 if bits <= 8 else 0)
    return HEADER_BYTES - (-count // 4) + int(sizes.sum()) + count * values


class SparseAllReduce(RowContestant):
    """torch's own: one sparse COO tensor over all tables, coalesced, summed by Gloo."""

    def call(self, number: int) -> None:
        """Coalesce, sum over ranks, apply as torch.optim.SGD does."""
        work = self.work
        with self._phase("coalesce"):
            numbers = work.numbers[work.traffic.pick(number)]
            sparse = torch.sparse_coo_tensor(
                numbers[None], work.by_id, work.weight.shape, check_invariants=False
            ).coalesce()
        with self._phase("all-reduce"):
            distributed.all_reduce(sparse, group=self.group)
        with self._phase("apply"):
            work.weight.add_(sparse, alpha=-LEARNING_RATE / self.world_size)

    def formula_bytes(self, number: int) -> float:
        """Gloo gathers every rank's row numbers, int64, and values."""
        count = len(self.work.touched(number))
        return (self.world_size - 1) * count * (_RAW_KEY_BYTES + 4 * self.work.traffic.shape.dim)


class RawGather(RowContestant):
    """Every rank gathers all looked-up rows as they are and adds them to its table."""

    def __init__(self, work: RowWork, group: ProcessGroup) -> None:
        super().__init__(work, group)
        count, dim = work.by_id.shape
        self._numbers = torch.empty(self.world_size * count, dtype=torch.int64)
        self._values = torch.empty(self.world_size * count, dim)

    def call(self, number: int) -> None:
        """Gather row numbers, gather values, add."""
        work = self.work
        with self._phase("gather"):
            numbers = work.numbers[work.traffic.pick(number)]
            _all_gather(self._numbers, numbers, group=self.group)
            _all_gather(self._values, work.by_id, group=self.group)
        with self._phase("apply"):
            factor = -LEARNING_RATE / self.world_size
            work.weight.index_add_(0, self._numbers, self._values, alpha=factor)

    def formula_bytes(self, number: int) -> float:
        """Repeated rows travel as often as they occur."""
        count, dim = self.work.by_id.shape
        return (self.world_size - 1) * count * (_RAW_KEY_BYTES + 4 * dim)


class DistinctGather(RowContestant):
    """Every rank sums its repeated rows by torch, pads and gathers, and merges by torch."""

    def call(self, number: int) -> None:
        """Sum, agree on a length, gather twice, merge, apply."""
        work, world = self.work, self.world_size
        with self._phase("sum repeated rows"):
            own = merge_rows(work.numbers[work.traffic.pick(number)], work.by_id)
        with self._phase("gather"):
            counts = torch.empty(world, dtype=torch.int64)
            _all_gather(counts, torch.tensor([len(own.rows)]), group=self.group)
            longest = int(counts.max())
            rows = torch.empty(world, longest, dtype=torch.int64)
            values = torch.empty(world, longest, own.values.shape[1])
            padded = RowGradient(
                torch.zeros(longest, dtype=torch.int64), torch.zeros_like(values[0])
            )
            padded.rows[: len(own.rows)] = own.rows
            padded.values[: len(own.rows)] = own.values
            _all_gather(rows.view(-1), padded.rows, group=self.group)
            _all_gather(values.view(-1, values.shape[2]), padded.values, group=self.group)
        with self._phase("merge"):
            merged = merge_rows(rows.view(-1), values.view(-1, values.shape[2]))
        with self._phase("apply"):
            factor = -LEARNING_RATE / world
            work.weight.index_add_(0, merged.rows, merged.values, alpha=factor)

    def formula_bytes(self, number: int) -> float:
        """Up to padding."""
        count = len(self.work.touched(number))
        return (self.world_size - 1) * count * (_RAW_KEY_BYTES + 4 * self.work.traffic.shape.dim)
