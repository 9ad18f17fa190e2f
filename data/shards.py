"""Shards: uncompressed Arrow IPC files, written atomically and read through a memory map."""

import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from dqrm.data.manifest import ShardInfo
from dqrm.data.rows import Lists, PackedRows, Rows
from dqrm.data.schema import Schema


def shard_file(split: str, number: int) -> str:
    """Path of a shard within the data set: ``train/00003.arrow``."""
    return f"{split}/{number:05d}.arrow"


def arrow_schema(schema: Schema) -> Any:
    """Columns of a shard: label, dense, categorical in the order of `schema`."""
    fields = [pa.field(schema.label, pa.float32(), nullable=False)]
    fields += [pa.field(column.name, pa.float32(), nullable=False) for column in schema.dense]
    # One-hot columns come first, as in Rows; the order of tables is that of the schema.
    fields += [pa.field(column.name, pa.int32(), nullable=False) for column in schema.one_hot]
    item = pa.field("item", pa.int32(), nullable=False)
    fields += [pa.field(column.name, pa.list_(item), nullable=False) for column in schema.multi_hot]
    return pa.schema(fields)


class ShardWriter:
    """Writes one shard; the file appears under its name when complete.

    Every `write` becomes one record batch, which is one piece of memory when read back: give it
    ten thousand rows or more. Leaving the ``with`` block by an exception leaves no file.
    """

    def __init__(self, folder: Path, file: str, schema: Schema) -> None:
        """Open `file`, a path relative to the data set's `folder`."""
        self._file = file
        self._path = folder / file
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        self._schema = arrow_schema(schema)
        self._sink: Any = self._temporary.open("wb")
        self._writer: Any = pa.ipc.new_file(self._sink, self._schema)
        self._num_rows = 0

    def write(self, rows: Rows) -> None:
        """Append rows; dtypes as `Rows` says."""
        if len(rows) == 0:
            return
        columns = [rows.label, *rows.dense, *rows.one_hot]
        arrays = [
            _array(column, field.type) for column, field in zip(columns, self._schema, strict=False)
        ]
        for column in rows.lists:
            # A list column's offsets are int32 in Arrow; from_arrays checks nothing.
            if column.offsets[-1] > np.iinfo(np.int32).max:
                raise ValueError(
                    f"{self._path}: {column.offsets[-1]} list items in one write; "
                    "write fewer rows at a time"
                )
            offsets = _array(column.offsets.astype(np.int32), pa.int32())
            kind = self._schema.field(len(arrays)).type
            ids = _array(column.ids, pa.int32())
            arrays.append(pa.ListArray.from_arrays(offsets, ids, type=kind))
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._num_rows += len(rows)

    def close(self) -> ShardInfo:
        """Flush to disk, give the file its name, and describe it."""
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        self._temporary.replace(self._path)
        return ShardInfo(file=self._file, num_rows=self._num_rows, bytes=self._path.stat().st_size)

    def abort(self) -> None:
        """Drop what was written; does nothing after `close`."""
        self._sink.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._sink.closed:
            self.close()


class Shard:
    """One memory-mapped shard; columns are views of the file, nothing is copied."""

    def __init__(self, folder: Path, info: ShardInfo, schema: Schema) -> None:
        """Map the file.

        Raises:
            ValueError: the file is missing, was cut short, or holds other columns.
        """
        path = folder / info.file
        check_size(folder, info)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable Arrow file ({error})") from None
        if reader.schema != arrow_schema(schema):
            raise ValueError(f"{path}: its columns are not those of the data set's schema")
        self._batches = [[_view(column) for column in batch.columns] for batch in batches]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        """[number of record batches + 1]: first row of each, then the number of rows."""
        if self.starts[-1] != info.num_rows:
            raise ValueError(
                f"{path}: holds {self.starts[-1]} rows, dataset.json says {info.num_rows}"
            )

    def copy_rows(self, start: int, stop: int, target: Rows, at: int) -> list[list[Lists]]:
        """Copy label, dense and one-hot columns of rows start to stop into `target` from `at`.

        Returns the multi-hot columns of these rows, as one list of M columns for each record
        batch they lie in; their ids are views of the file.
        """
        num_dense, num_one_hot = len(target.dense), len(target.one_hot)
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        lists = []
        while start < stop:
            begin, end = int(self.starts[number]), min(stop, int(self.starts[number + 1]))
            columns = self._batches[number]
            here = slice(start - begin, end - begin)
            there = slice(at, at + end - start)
            target.label[there] = columns[0][here]
            for d in range(num_dense):
                target.dense[d, there] = columns[1 + d][here]
            for s in range(num_one_hot):
                target.one_hot[s, there] = columns[1 + num_dense + s][here]
            multi_hot = columns[1 + num_dense + num_one_hot :]
            lists.append([column.slice(here.start, here.stop) for column in multi_hot])
            at, start, number = there.stop, end, number + 1
        return lists


def check_size(folder: Path, info: ShardInfo) -> None:
    """Raise ValueError when the file is missing or not as long as it was written."""
    path = folder / info.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy it again or prepare the data again") from None
    if size != info.bytes:
        raise ValueError(
            f"{path}: {size} bytes, {info.bytes} were written; copy it again or prepare the data "
            "again"
        )


def empty_rows(num_rows: int, schema: Schema) -> Rows:
    """Uninitialised rows without lists, to be filled; each column lies in one place."""
    return Rows(
        np.empty(num_rows, np.float32),
        np.empty((len(schema.dense), num_rows), np.float32),
        np.empty((len(schema.one_hot), num_rows), np.int32),
    )


def empty_packed_rows(num_rows: int, schema: Schema) -> Rows:
    """The same, each row in one place: to be taken in random order."""
    num_columns = 1 + len(schema.dense) + len(schema.one_hot)
    return PackedRows.of(np.empty((num_rows, num_columns), np.int32), len(schema.dense))


def with_lists(rows: Rows, parts: list[list[Lists]], num_lists: int) -> Rows:
    """`rows` with their multi-hot columns: parts[p][m] is column m of the p-th run of rows."""
    columns = ([part[m] for part in parts] for m in range(num_lists))
    return replace(rows, lists=tuple(map(Lists.concat, columns)))


def _array(values: Any, kind: Any) -> Any:
    """An Arrow array over numpy's memory; pa.array would import pandas (0.5 s) to look at it."""
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [None, data])


def _view(column: Any) -> Any:
    if pa.types.is_list(column.type):
        # These offsets stay int32, as in the file; slicing them makes int64.
        offsets = column.offsets.to_numpy(zero_copy_only=True)
        return Lists(offsets, column.values.to_numpy(zero_copy_only=True))
    return column.to_numpy(zero_copy_only=True)
