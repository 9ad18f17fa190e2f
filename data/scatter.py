"""The rows of one parsed shard, scattered to the files of their splits."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from dqrm.data.local import Remap
from dqrm.data.manifest import SPLITS
from dqrm.data.rows import Lists
from dqrm.data.schema import Schema
from dqrm.data.slots import SlottedShard
from dqrm.data.splits import U8, ShardKey

_BATCH_ROWS = 2**17
"""Rows of one record batch."""

Places: TypeAlias = "slice | npt.NDArray[np.intp]"
"""Rows of a shard that make up one batch: a run of rows needs no copy."""


@dataclass(frozen=True)
class IdFigures:
    """What was written for one split; a number for each table column."""

    lookups: list[int]
    unknown: list[int]
    """Look-ups of id 0, where the column has a vocabulary."""


def split_path(folder: Path, split: str, key: ShardKey) -> Path:
    """Where the rows of a shard that belong to `split` lie until the data set is finished."""
    return folder / split / f"{key}.arrow"


class ShardSplits:
    """One file for each split that has rows of the shard.

    The two kinds of columns can be written by different processes, one after the other: making
    the object again finds the files as they were left.
    """

    def __init__(
        self, folder: Path, key: ShardKey, schema: Schema, codes: U8, lists: Sequence[Lists]
    ) -> None:
        """codes: split of every row. lists: multi-hot columns, of which the offsets are used."""
        self._num_dense = len(schema.dense)
        self._num_one_hot = len(schema.one_hot)
        self._places = {
            name: list(_batches(codes == code)) for code, name in enumerate(SPLITS) if code in codes
        }
        most = min(_BATCH_ROWS, len(codes))
        # Used again for every column: fresh memory costs more than what is done in it.
        self._chosen = np.empty(most, np.int32)
        self._ids = np.empty(most, np.int32)
        self._open = ExitStack()
        with ExitStack() as opened:
            self._files = {
                name: opened.enter_context(
                    SlottedShard(
                        split_path(folder, name, key),
                        schema,
                        [(_length(p), [_offsets(column, p) for column in lists]) for p in places],
                    )
                )
                for name, places in self._places.items()
            }
            self._open = opened.pop_all()

    def write_numbers(
        self, label: npt.NDArray[np.float32], dense: npt.NDArray[np.float32]
    ) -> dict[str, dict[str, int]]:
        """Write labels and dense columns; returns rows, positives and file size of every split."""
        figures: dict[str, dict[str, int]] = {}
        for name, batch, places in self._each():
            file = self._files[name]
            found = figures.setdefault(name, {"rows": 0, "positives": 0, "bytes": file.bytes})
            values = self._take(label, places)
            found["rows"] += len(values)
            found["positives"] += int(np.count_nonzero(values))
            file.write(batch, 0, values)
            for at, column in enumerate(dense, start=1):
                file.write(batch, at, self._take(column, places))
        return figures

    def write_ids(
        self,
        one_hot: Sequence[npt.NDArray[Any]],
        lists: Sequence[Lists],
        remaps: Sequence[Remap],
    ) -> dict[str, IdFigures]:
        """Write the ids of every table column, one-hot before multi-hot, and bring all to disk.

        one_hot: integers of any width. remaps: one for each table column.
        """
        num_tables = len(remaps)
        figures = {name: IdFigures([0] * num_tables, [0] * num_tables) for name in self._files}
        for name, batch, places in self._each():
            found = figures[name]
            for at, remap in enumerate(remaps):
                if at < self._num_one_hot:
                    ids = self._take(one_hot[at], places)
                    if remap is not None:
                        # Local ids are in range by construction; clip skips numpy's slower check.
                        ids = np.take(remap, ids, out=self._ids[: len(ids)], mode="clip")
                else:
                    ids = _rows_of(lists[at - self._num_one_hot], places).ids
                    if remap is not None:
                        ids = np.take(remap, ids, mode="clip")
                self._files[name].write(batch, 1 + self._num_dense + at, ids)
                found.lookups[at] += len(ids)
                if remap is not None:
                    found.unknown[at] += len(ids) - int(np.count_nonzero(ids))
        for file in self._files.values():
            file.sync()
        return figures

    def _each(self) -> Iterator[tuple[str, int, Places]]:
        for name, batches in self._places.items():
            for batch, places in enumerate(batches):
                yield name, batch, places

    def _take(self, column: npt.NDArray[Any], places: Places) -> npt.NDArray[Any]:
        """The chosen values, valid until the next call."""
        if isinstance(places, slice):
            return column[places]
        chosen = self._chosen.view(column.dtype)[: len(places)]
        # mode="clip" skips numpy's range check of every index: about twice as fast.
        return np.take(column, places, out=chosen, mode="clip")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()


def _batches(belongs: npt.NDArray[np.bool_]) -> Iterator[Places]:
    """The rows that belong, a batch at a time."""
    index = np.flatnonzero(belongs)
    for start in range(0, len(index), _BATCH_ROWS):
        rows = index[start : start + _BATCH_ROWS]
        first, last = int(rows[0]), int(rows[-1])
        yield slice(first, last + 1) if last - first == len(rows) - 1 else rows


def _length(places: Places) -> int:
    return places.stop - places.start if isinstance(places, slice) else len(places)


def _offsets(column: Lists, places: Places) -> npt.NDArray[np.int64]:
    if isinstance(places, slice):
        return column.slice(places.start, places.stop).offsets
    lengths = np.diff(column.offsets)[places]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _rows_of(column: Lists, places: Places) -> Lists:
    if isinstance(places, slice):
        return column.slice(places.start, places.stop)
    return column.take(places)
