"""The tasks of preparation that run in worker processes, one shard (or stream) at a time.

Files in the work folder, by shard key:

- ``parsed/KEY.rec``: what parsing found; without a second phase only the figures.
- ``recounted/KEY.rec``: training counts of a shard that holds the border between splits.
- ``encoded/SPLIT/KEY.arrow``: the rows of a split, labels and dense columns as soon as their split
  is known, ids when the vocabularies are;
- ``encoded/KEY.rec``: says that those are complete.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dqrm.data.config import PrepareConfig, RowsSplit, SplitConfig
from dqrm.data.local import (
    LocalRows,
    Remap,
    in_schema_order,
    table_columns,
    text_plan,
)
from dqrm.data.manifest import SPLITS
from dqrm.data.pool import should_stop
from dqrm.data.records import Record, write_record
from dqrm.data.rows import Lists
from dqrm.data.scatter import IdFigures, ShardSplits
from dqrm.data.schema import Schema
from dqrm.data.sources import (
    Part,
    Source,
    hash_blocks,
    map_text,
    read_compressed,
)
from dqrm.data.splits import TRAIN, U8, ShardKey, assign
from dqrm.data.vocabulary import Base, Vocabularies, range_order, read_remap
from dqrm.kernels.delimited import parse_delimited

PARSED, RECOUNTED, ENCODED, REMAP = "parsed", "recounted", "encoded", "remap"

_MAX_MESSAGES = 10_000
"""Malformed lines described for each shard; all are counted."""


@dataclass(frozen=True)
class Job:
    """What every task needs to know."""

    work: Path
    schema: Schema
    """With the defaults for categorical columns filled in."""
    config: PrepareConfig
    split: SplitConfig | str
    """How to split, or the name of the one split that takes all rows."""
    vocabularies: Path | None = None
    """Folder of ready vocabularies; rows are then encoded as soon as they are parsed."""
    base: Base | None = None
    """Vocabularies that those of the rows begin with."""

    @property
    def split_is_known(self) -> bool:
        """Whether the split of a row is known before all rows are counted."""
        return not isinstance(self.split, RowsSplit)

    @property
    def one_pass(self) -> bool:
        """Whether rows can be encoded as soon as they are parsed."""
        if isinstance(self.split, str):
            return True
        hashed = all(column.hash_buckets for column in self.schema.categorical)
        return hashed and self.split_is_known

    def record(self, folder: str, key: ShardKey) -> Path:
        """Path of a shard's record."""
        return self.work / folder / f"{key}.rec"

    def remap(self, column: int) -> Path:
        """Path of the vocabulary's ids of the local ids of all shards."""
        return self.work / REMAP / f"{column}.ids"


def parse_part(job: Job, source: Source, part: Part, file_code: int) -> tuple[Part, int]:
    """Parse one part of a source into shard records; those that exist are left alone.

    Returns the part and how many shards it has.
    """
    number = -1
    if source.is_parquet:
        return part, _parse_parquet(job, source, part, file_code)
    if source.compression is None:
        key = ShardKey(part.file, part.part, 0)
        if job.record(PARSED, key).exists():
            return part, 1
        text = map_text(source, part)
        try:
            with text.lines() as view:
                local = _parse_text(job, source, view)
        finally:
            text.close()
        _store(job, key, local, file_code, text.blocks, part.stop - part.start)
        return part, 1
    stream = read_compressed(source, job.config.shard_bytes)
    for number, (lines, blocks, size) in enumerate(stream):
        if should_stop():
            break
        key = ShardKey(part.file, part.part, number)
        if not job.record(PARSED, key).exists():
            _store(job, key, _parse_text(job, source, lines), file_code, blocks, size)
    return part, number + 1


def _parse_text(job: Job, source: Source, lines: bytes | memoryview) -> LocalRows:
    plan = text_plan(source.columns, job.schema, job.config)
    parsed = parse_delimited(lines, plan, max_malformed=_MAX_MESSAGES)
    return in_schema_order(parsed, source.columns, job.schema)


def _parse_parquet(job: Job, source: Source, part: Part, file_code: int) -> int:
    import pyarrow.parquet as pq

    from dqrm.data.columnar import local_rows

    names = list(job.schema.names)
    with pq.ParquetFile(source.path, memory_map=True) as file:
        groups = range(part.start, part.stop)
        size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
        rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        batches = file.iter_batches(job.config.shard_rows, list(groups), names, use_threads=False)
        number = -1
        for number, table in enumerate(_slices(batches, job.config.shard_rows)):
            if should_stop():
                break
            key = ShardKey(part.file, part.part, number)
            if job.record(PARSED, key).exists():
                continue
            try:
                local = local_rows(table, job.schema)
            except ValueError as error:
                raise ValueError(f"{source.path}: {error}") from None
            share = size * table.num_rows // max(rows, 1)
            _store(job, key, local, file_code, np.zeros(0, np.uint64), share)
    return number + 1


def _slices(batches: Iterator[Any], shard_rows: int) -> Iterator[Any]:
    """Tables of exactly `shard_rows` rows, the last one shorter: batches end at row groups."""
    import pyarrow as pa

    held: list[Any] = []
    held_rows = 0
    for batch in batches:
        held.append(batch)
        held_rows += batch.num_rows
        while held_rows >= shard_rows:
            table = pa.Table.from_batches(held)
            yield table.slice(0, shard_rows)
            rest = table.slice(shard_rows)
            held, held_rows = rest.to_batches(), rest.num_rows
    if held_rows:
        yield pa.Table.from_batches(held)


def parse_frame(job: Job, part: Part, ipc: bytes) -> tuple[Part, int]:
    """Parse a slice of a frame, sent as an Arrow stream; one shard."""
    import pyarrow as pa

    from dqrm.data.columnar import local_rows

    table = pa.ipc.open_stream(ipc).read_all()
    local = local_rows(table, job.schema)
    _store(job, ShardKey(part.file, part.part, 0), local, TRAIN, hash_blocks(ipc), len(ipc))
    return part, 1


def _store(
    job: Job,
    key: ShardKey,
    local: LocalRows,
    file_code: int,
    blocks: npt.NDArray[np.uint64],
    source_bytes: int,
) -> None:
    """Write the record of a parsed shard; before that, what can be written of its rows."""
    meta: dict[str, Any] = {
        "rows": len(local.rows),
        "lines": local.lines,
        "keys": [0 if keys is None else len(keys) for keys in local.keys],
        "missing": local.missing.tolist(),
        "malformed": [[bad.line, bad.reason] for bad in local.malformed],
        "malformed_count": local.malformed_count,
        "bytes": source_bytes,
    }
    arrays: dict[str, npt.NDArray[Any]] = {"blocks": blocks}
    codes = _codes(job, key, len(local.rows), file_code, local.time, None, None)
    rows = local.rows
    if job.split_is_known:
        with ShardSplits(job.work / ENCODED, key, job.schema, codes, rows.lists) as splits:
            meta["splits"] = splits.write_numbers(rows.label, rows.dense)
            if job.one_pass:
                remaps = _vocabulary_remaps(job, local)
                found = splits.write_ids(list(rows.one_hot), rows.lists, remaps)
                _write_encoded(job, key, meta["splits"], found)
    else:
        arrays |= {"label": rows.label, "dense": rows.dense}
    if not job.one_pass:
        arrays |= {"codes": codes} | _local_ids(local, codes)
    write_record(job.record(PARSED, key), meta, arrays)


def _local_ids(local: LocalRows, codes: U8) -> dict[str, npt.NDArray[Any]]:
    """The rows' local ids, and every column's keys with their training counts."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for at, ids in enumerate(local.rows.one_hot):
        # Most columns have few values in one shard; a byte or two hold their local ids.
        keys = local.keys[at]
        arrays[f"ids{at}"] = ids if keys is None else ids.astype(np.min_scalar_type(len(keys)))
    for at, lists in enumerate(local.rows.lists):
        arrays |= {f"offsets{at}": lists.offsets, f"items{at}": lists.ids}
    lengths = [None if keys is None else len(keys) for keys in local.keys]
    counts = _training_counts(list(local.rows.one_hot), local.rows.lists, lengths, codes)
    for at, (keys, found) in enumerate(zip(local.keys, counts, strict=True)):
        if keys is not None and found is not None:
            order = range_order(keys)
            arrays[f"order{at}"] = order.astype(np.int32)
            arrays[f"keys{at}"] = keys[order]
            arrays[f"counts{at}"] = found[order]
    return arrays


def _codes(
    job: Job,
    key: ShardKey,
    num_rows: int,
    file_code: int,
    time: npt.NDArray[np.float64] | None,
    first_row: int | None,
    total_rows: int | None,
) -> U8:
    if isinstance(job.split, str):
        return np.full(num_rows, SPLITS.index(job.split), np.uint8)
    return assign(
        job.split,
        key,
        num_rows,
        file_code=file_code,
        time=time,
        first_row=first_row,
        total_rows=total_rows,
    )


def _training_counts(
    one_hot: Sequence[npt.NDArray[Any]],
    lists: Sequence[Lists],
    keys: Sequence[int | None],
    codes: U8,
) -> list[npt.NDArray[np.uint32] | None]:
    """How often training rows look up each local id of each table column.

    keys: number of local ids of each column; None where it is hashed.
    """
    train = np.flatnonzero(codes == TRAIN)
    every = len(train) == len(codes)
    # Buffers used again for each column: fresh memory costs more than what is done in it.
    buffer = np.empty(len(train), np.int32)
    wide = np.empty(len(train), np.intp)
    counts: list[npt.NDArray[np.uint32] | None] = []
    for at, num_keys in enumerate(keys):
        if num_keys is None:
            counts.append(None)
            continue
        if at < len(one_hot):
            ids = one_hot[at]
            chosen = buffer.view(ids.dtype)[: len(train)]
            wide[:] = ids if every else np.take(ids, train, out=chosen, mode="clip")
            used = wide
        else:
            column = lists[at - len(one_hot)]
            used = (column if every else column.take(train)).ids.astype(np.intp)
        counts.append(np.bincount(used, minlength=num_keys).astype(np.uint32))
    return counts


def _vocabulary_remaps(job: Job, local: LocalRows) -> tuple[Remap, ...]:
    if job.vocabularies is None:
        return (None,) * len(local.keys)
    indices = Vocabularies.shared(job.vocabularies, job.schema)
    return tuple(
        None if keys is None else indices[at].lookup(keys) for at, keys in enumerate(local.keys)
    )


def recount(job: Job, key: ShardKey, first_row: int, total_rows: int) -> None:
    """Count a shard's training look-ups again, now that the place of its rows is known."""
    path = job.record(RECOUNTED, key)
    if path.exists():
        return
    record = Record(job.record(PARSED, key))
    codes = _codes(job, key, record.meta["rows"], TRAIN, None, first_row, total_rows)
    columns = range(len(table_columns(job.schema)))
    keys = [record.length(f"keys{at}") if f"keys{at}" in record else None for at in columns]
    counts = _training_counts(*_read_ids(record, job.schema), keys, codes)
    arrays = {
        f"counts{at}": found[record.array(f"order{at}")]
        for at, found in enumerate(counts)
        if found is not None
    }
    write_record(path, {}, arrays)


def encode_shard(
    job: Job, key: ShardKey, first_row: int, total_rows: int, starts: tuple[int, ...]
) -> ShardKey:
    """Write a shard's finished rows; returns its key.

    starts: for every table column, where the shard's ids begin in the column's remap file.
    """
    if job.record(ENCODED, key).exists():
        return key
    record = Record(job.record(PARSED, key))
    remaps: list[Remap] = []
    for at, start in enumerate(starts):
        if f"keys{at}" not in record:
            remaps.append(None)
            continue
        order = record.array(f"order{at}")
        remap = np.empty(len(order), np.int32)
        remap[order] = read_remap(job.remap(at), start, len(order))
        remaps.append(remap)
    one_hot, lists = _read_ids(record, job.schema)
    codes = record.array("codes")
    if not job.split_is_known:
        codes = _codes(job, key, len(codes), TRAIN, None, first_row, total_rows)
    with ShardSplits(job.work / ENCODED, key, job.schema, codes, lists) as splits:
        if job.split_is_known:
            numbers = record.meta["splits"]
        else:
            numbers = splits.write_numbers(record.array("label"), record.array("dense"))
        _write_encoded(job, key, numbers, splits.write_ids(one_hot, lists, remaps))
    return key


def _read_ids(record: Record, schema: Schema) -> tuple[list[npt.NDArray[Any]], list[Lists]]:
    """Local ids of a shard: one-hot columns of any width, and multi-hot columns."""
    one_hot = [record.array(f"ids{at}") for at in range(len(schema.one_hot))]
    lists = [
        Lists(record.array(f"offsets{at}"), record.array(f"items{at}"))
        for at in range(len(schema.multi_hot))
    ]
    return one_hot, lists


def _write_encoded(
    job: Job,
    key: ShardKey,
    numbers: Mapping[str, Mapping[str, int]],
    ids: Mapping[str, IdFigures],
) -> None:
    """Write the record that says that the rows of a shard are complete."""
    splits = {name: {**found, **asdict(ids[name])} for name, found in numbers.items()}
    write_record(job.record(ENCODED, key), {"splits": splits}, {})
