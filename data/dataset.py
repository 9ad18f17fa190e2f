"""A prepared data set: splits, and batches cut from memory-mapped shards."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dqrm.data.batch import Batch, make_batch
from dqrm.data.manifest import Manifest, SplitInfo, TableInfo, read_manifest
from dqrm.data.order import FileOrder, RowOrder
from dqrm.data.rows import Lists, Rows
from dqrm.data.schema import Schema
from dqrm.data.shards import Shard, check_size, empty_packed_rows, empty_rows, with_lists

OPEN_SHARDS = 128
"""Mapped shards kept open per split; each holds a file descriptor, of which 1,024 are usual."""


class Split:
    """Rows of one split, in file order unless an order is given."""

    def __init__(self, folder: Path, schema: Schema, info: SplitInfo) -> None:
        for shard in info.shards:
            check_size(folder, shard)
        self._folder = folder
        self._schema = schema
        self.info = info
        self._starts = np.cumsum([0, *(shard.num_rows for shard in info.shards)])
        self._open: OrderedDict[int, Shard] = OrderedDict()

    @property
    def num_rows(self) -> int:
        """Rows in the split."""
        return self.info.num_rows

    def num_batches(self, batch_size: int) -> int:
        """Batches of a pass; the last one may be short."""
        return -(-self.num_rows // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        order: RowOrder | None = None,
        start_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """Yield the batches of one pass from number `start_batch` on.

        Of a batch of n rows, `rank` gets those from n * rank // world_size on, up to where the
        next rank's begin; together the ranks get every row once, and a rank none where n is small.

        Rows come in file order, or in `order`. A pass started at batch k yields exactly the
        batches that a whole pass yields from its k-th on, and reads at most one window for rows
        it does not yield. Memory: one window of rows (`order.window_rows`, 2^18 in file order).

        Raises:
            ValueError: `batch_size` < 1, `start_batch` or `rank` out of range, or an order of
                another number of rows.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be from 0 to {world_size - 1}")
        if batch_size < 1 or not 0 <= start_batch <= self.num_batches(batch_size):
            raise ValueError(
                f"batch_size={batch_size}, start_batch={start_batch}: the split has "
                f"{self.num_rows} rows"
            )
        if order is not None and order.num_rows != self.num_rows:
            raise ValueError(f"the order is for {order.num_rows} rows, not {self.num_rows}")
        chosen = order or FileOrder(self.num_rows)
        return self._batches(batch_size, chosen, start_batch, rank, world_size)

    def _batches(
        self,
        batch_size: int,
        order: RowOrder | FileOrder,
        start_batch: int,
        rank: int,
        world_size: int,
    ) -> Iterator[Batch]:
        def share(count: int) -> tuple[int, int]:
            return count * rank // world_size, count * (rank + 1) // world_size

        place = start_batch * batch_size
        first = int(np.searchsorted(order.window_starts, place, side="right")) - 1
        rest: Rows | None = None  # rows of a batch that began in the window before
        for window in range(first, order.num_windows):
            size = int(order.window_starts[window + 1] - order.window_starts[window])
            shuffle = order.shuffle(window)
            make = empty_rows if shuffle is None else empty_packed_rows
            rows = self._read(order.runs(window), make(size, self._schema))
            at = max(0, place - int(order.window_starts[window]))
            last = window == order.num_windows - 1
            while at < size:
                before = 0 if rest is None else len(rest)
                count = min(batch_size - before, size - at)
                ends = before + count == batch_size or last
                # Batches that lie in one window, nearly all, are cut before they are copied.
                begin, end = share(count) if ends and rest is None else (0, count)
                if shuffle is None:
                    part = rows.slice(at + begin, at + end)
                else:
                    part = rows.take(shuffle[at + begin : at + end])
                at += count
                if rest is not None:
                    part, rest = Rows.concat([rest, part]), None
                    count = len(part)
                    if ends:
                        begin, end = share(count)
                        part = part.slice(begin, end)
                if ends:
                    yield make_batch(part, self._schema, count, begin)
                else:
                    rest = part

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """Rows start to stop as stored, copied into memory; all of them by default."""
        start, stop, _ = slice(start, stop).indices(self.num_rows)
        return self._read([(start, stop)], empty_rows(max(0, stop - start), self._schema))

    def _read(self, runs: list[tuple[int, int]], target: Rows) -> Rows:
        """Fill `target` with runs of consecutive rows, one after the other; adds the lists."""
        lists: list[list[Lists]] = []
        at = 0
        for start, stop in runs:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            while start < stop:
                begin, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
                shard = self._shard(number)
                lists += shard.copy_rows(start - begin, end - begin, target, at)
                at, start, number = at + end - start, end, number + 1
        return with_lists(target, lists, len(self._schema.multi_hot))

    def _shard(self, number: int) -> Shard:
        shard = self._open.pop(number, None)
        if shard is None:
            shard = Shard(self._folder, self.info.shards[number], self._schema)
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open[number] = shard
        return shard


class PreparedDataset:
    """What `dqrm data prepare` wrote, ready to be read."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> "PreparedDataset":
        """Open a folder, or the built-in example by its name, ``census``.

        The example is prepared on first use into a cache folder (see `dqrm.data.census`).

        Raises:
            ValueError: no complete prepared data set there; the message says what to do.
        """
        if str(path) == "census" and not Path(path).is_dir():
            from dqrm.data.census import cached_census

            path = cached_census()
        path = Path(path)
        return cls(path, read_manifest(path))

    @property
    def schema(self) -> Schema:
        """The columns and their roles."""
        return self.manifest.schema_

    @property
    def tables(self) -> tuple[TableInfo, ...]:
        """The embedding tables, in the order of a batch's indices."""
        return self.manifest.tables

    @property
    def num_dense(self) -> int:
        """Dense columns."""
        return len(self.schema.dense)

    @property
    def digest(self) -> str:
        """Content id."""
        return self.manifest.digest

    def split(self, name: str) -> Split:
        """Open a split: train, validation or test.

        Raises:
            ValueError: the data set has no such split, or a shard is missing or cut short.
        """
        if name not in self.manifest.splits:
            raise ValueError(
                f"{self.path}: no {name} split; it has {', '.join(self.manifest.splits)}"
            )
        return Split(self.path, self.schema, self.manifest.splits[name])
