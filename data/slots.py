"""Shards whose columns are written one at a time, in any order, each straight to its place.

How many rows and list items a shard has is known before the ids of its rows are: its file can be
laid out, and what is known be written, before the vocabularies exist. Nothing is then written
twice, and one column of one batch in memory is enough.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dqrm.data.schema import Schema
from dqrm.data.shards import arrow_schema

BatchOffsets = Sequence[npt.NDArray[np.integer]]
"""Offsets of every multi-hot column, [rows + 1] each, starting at 0."""


class SlottedShard:
    """One Arrow IPC file, laid out in full and then filled.

    Opening it again with the same arguments finds what was written before; the same writes give
    the same bytes, so that a killed process's file is simply written again.
    """

    def __init__(
        self, path: Path, schema: Schema, batches: Sequence[tuple[int, BatchOffsets]]
    ) -> None:
        """Lay out `path` as record batches of (rows, offsets of the lists).

        Raises:
            ValueError: a batch has more list items than Arrow can number.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not truncated: what was written before stays.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._file = os.fdopen(descriptor, "wb")
        try:
            self._lay_out(path, schema, batches)
        except BaseException:
            self._file.close()
            raise

    def _lay_out(
        self, path: Path, schema: Schema, batches: Sequence[tuple[int, BatchOffsets]]
    ) -> None:
        kinds = arrow_schema(schema)
        num_plain = len(kinds) - len(schema.multi_hot)
        items = [[int(offsets[-1]) for offsets in lists] for _, lists in batches]
        if any(count > np.iinfo(np.int32).max for counts in items for count in counts):
            raise ValueError(f"{path}: too many list items in one batch; make shards smaller")
        # Stands for values that come later. It is never read, so it takes no memory.
        most = max([*(rows for rows, _ in batches), *(n for counts in items for n in counts)])
        blank = pa.allocate_buffer(4 * most)
        sink = _Outline(self._file)
        writer = pa.ipc.new_file(pa.PythonFile(sink, mode="w"), kinds)
        self._slots: list[list[int]] = []
        for (rows, lists), counts in zip(batches, items, strict=True):
            arrays = [_array(kinds.field(at).type, rows, blank) for at in range(num_plain)]
            offset_bytes = [offsets.astype(np.int32).tobytes() for offsets in lists]
            for at, (data, count) in enumerate(zip(offset_bytes, counts, strict=True)):
                kind = kinds.field(num_plain + at).type
                offsets = _array(pa.int32(), rows + 1, pa.py_buffer(data))
                values = _array(kind.value_type, count, blank)
                arrays.append(pa.ListArray.from_arrays(offsets, values, type=kind))
            sink.places = []
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=kinds))
            places = iter(sink.places)
            slots = [next(places) for _ in range(num_plain)]
            for data, count in zip(offset_bytes, counts, strict=True):
                self._write_at(next(places), data)
                # An empty buffer gets no place.
                slots.append(next(places) if count else -1)
            self._slots.append(slots)
        writer.close()
        self._file.truncate(sink.at)
        self.bytes = sink.at

    def write(self, batch: int, column: int, values: npt.NDArray[Any]) -> None:
        """Write one column of a batch: label, dense, one-hot columns, then items of the lists.

        values: float32 or int32, as many as the batch was said to have.
        """
        if len(values):
            self._write_at(self._slots[batch][column], np.ascontiguousarray(values).data)

    def _write_at(self, place: int, data: bytes | memoryview) -> None:
        self._file.seek(place)
        self._file.write(data)

    def sync(self) -> None:
        """Bring everything written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


class _Outline:
    """File object for Arrow: writes its headers, and notes where its buffers go."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self.at = 0
        self.places: list[int] = []

    def write(self, data: Any) -> None:
        if isinstance(data, pa.Buffer):
            if data.size:
                self.places.append(self.at)
            self.at += data.size
            return
        self._file.seek(self.at)
        self._file.write(data)
        self.at += len(data)

    def tell(self) -> int:
        return self.at

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _array(kind: Any, length: int, data: Any) -> Any:
    return pa.Array.from_buffers(kind, length, [None, data.slice(0, 4 * length)])
