"""The phases of a preparation, run from one process; `dqrm.data.prepare` is the way in."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqrm.data import finish, malformed
from dqrm.data.config import RowsSplit
from dqrm.data.local import table_columns
from dqrm.data.malformed import MalformedLine
from dqrm.data.manifest import SPLITS, VOCABULARY_FOLDER, Manifest, SourceInfo
from dqrm.data.pool import Pool
from dqrm.data.records import Record
from dqrm.data.sources import Part, Source, checksum, hash_file, plan_parts
from dqrm.data.splits import ShardKey, row_borders
from dqrm.data.stages import (
    ENCODED,
    PARSED,
    RECOUNTED,
    Job,
    encode_shard,
    parse_frame,
    parse_part,
    recount,
)
from dqrm.data.vocabulary import ShardKeys, merge_vocabulary, new_ids
from dqrm.data.workspace import MALFORMED_FILE, Workspace

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

FRAME_NAME = "DataFrame"


@dataclass(frozen=True)
class Progress:
    """How far a phase has come."""

    phase: str
    """parse, vocabularies or encode."""
    done: int
    total: int
    unit: str
    """bytes, columns or rows."""


@dataclass
class Preparation:
    """One preparation: its shards' figures and its phases."""

    job: Job
    workspace: Workspace
    sources: list[Source]
    names: list[str]
    codes: list[int]
    frame: "pd.DataFrame | None"
    progress: Callable[[Progress], None]
    settings: dict[str, Any]
    """What the manifest says about how the rows were prepared."""
    shards: dict[ShardKey, dict[str, Any]] = field(default_factory=dict)
    """Figures of every parsed shard."""
    shard_counts: dict[tuple[int, int], int] = field(default_factory=dict)
    """Number of shards of every part that is known."""
    parts: list[Part] = field(default_factory=list)
    unknown_rates: dict[str, float] = field(default_factory=dict)
    """Share of look-ups of id 0, by column with a vocabulary."""
    new_ids: dict[str, int] = field(default_factory=dict)
    """Values that got an id after those of the base, by column with a vocabulary."""
    malformed_count: int = 0
    bytes_read: int = 0

    @property
    def keys(self) -> list[ShardKey]:
        """All shards in the order of their rows."""
        return sorted(self.shards)

    @property
    def total_rows(self) -> int:
        """Well-formed rows."""
        return sum(shard["rows"] for shard in self.shards.values())

    # Phase 1

    def parse(self, pool: Pool) -> None:
        """Parse all parts; raises ValueError when too many lines are malformed."""
        if self.frame is None:
            self.parts = [
                part
                for index, source in enumerate(self.sources)
                for part in plan_parts(index, source, self.job.config)
            ]
            for part in self.parts:
                source = self.sources[part.file]
                if source.compression is None and not source.is_parquet:
                    self.shard_counts[part.file, part.part] = 1
            tasks = (
                (self.job, self.sources[part.file], part, self.codes[part.file])
                for part in self.parts
            )
            results = pool.run(parse_part, tasks, lambda: self._collect_streams(pool))
        else:
            results = pool.run(parse_frame, self._frame_tasks(self.frame))
        for part, count in results:
            self.shard_counts[part.file, part.part] = count
            for number in range(count):
                self._collect(ShardKey(part.file, part.part, number), pool)
        lines = sum(shard["lines"] for shard in self.shards.values())
        limit = self.job.config.max_malformed
        if self.malformed_count > (limit if limit >= 1.0 else limit * lines):
            self._fail(pool)
        if not self.total_rows:
            raise ValueError(f"{', '.join(self.names[:3])}: no rows")

    def _frame_tasks(self, frame: "pd.DataFrame") -> Iterator[tuple[Any, ...]]:
        import pyarrow as pa

        step = self.job.config.shard_rows
        names = list(self.job.schema.names)
        for number, start in enumerate(range(0, len(frame), step)):
            part = frame.iloc[start : start + step][names]
            try:
                table = pa.Table.from_pandas(part, preserve_index=False)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise ValueError(
                    f"{FRAME_NAME}: {' '.join(str(error).split())}; convert the column to one type"
                ) from None
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            yield self.job, Part(0, number, start, start + len(part)), sink.getvalue().to_pybytes()

    def _collect_streams(self, pool: Pool) -> None:
        """Look for shards of files that are still being read."""
        for part in self.parts:
            number = 0
            while (part.file, part.part) not in self.shard_counts:
                key = ShardKey(part.file, part.part, number)
                if not self.job.record(PARSED, key).exists():
                    break
                self._collect(key, pool)
                number += 1

    def _collect(self, key: ShardKey, pool: Pool) -> None:
        if key in self.shards:
            return
        shard = Record(self.job.record(PARSED, key)).meta
        self.shards[key] = shard
        self.malformed_count += shard["malformed_count"]
        self.bytes_read += shard["bytes"]
        total = sum(source.bytes for source in self.sources)
        self.progress(Progress("parse", self.bytes_read, max(total, self.bytes_read), "bytes"))
        if malformed.is_too_many(shard, self.malformed_count, self.job.config.max_malformed):
            self._fail(pool)

    def _fail(self, pool: Pool) -> None:
        """Raise the error for too many malformed lines."""
        pool.finish()
        for part in self.parts:
            # Parts started before the one that failed may hold earlier lines.
            key = ShardKey(part.file, part.part, 0)
            if key not in self.shards and self.job.record(PARSED, key).exists():
                self.shards[key] = Record(self.job.record(PARSED, key)).meta
        raise malformed.too_many(
            sum(shard["malformed_count"] for shard in self.shards.values()),
            sum(shard["lines"] for shard in self.shards.values()),
            self.job.config.max_malformed,
            self.malformed_lines(),
        )

    def malformed_lines(self) -> Iterator[MalformedLine]:
        """The malformed lines with their places."""
        header_lines = [source.header_lines for source in self.sources] or [0]
        return malformed.located(self.shards, self.shard_counts, self.names, header_lines)

    # Phases 2 and 3

    def merge_and_encode(self, pool: Pool) -> None:
        """Build the vocabularies and write the finished rows."""
        job, keys, total = self.job, self.keys, self.total_rows
        first_rows = {}
        before = 0
        for key in keys:
            first_rows[key] = before
            before += self.shards[key]["rows"]
        recounted = set()
        if isinstance(job.split, RowsSplit):
            border, _ = row_borders(job.split, total)
            recounted = {k for k in keys if first_rows[k] + self.shards[k]["rows"] > border}
            for _ in pool.run(recount, ((job, k, first_rows[k], total) for k in sorted(recounted))):
                pass
        self._merge(pool, recounted)
        starts = self._remap_starts()
        tasks = ((job, key, first_rows[key], total, starts[key]) for key in keys)
        done = 0
        for key in pool.run(encode_shard, tasks):
            done += self.shards[key]["rows"]
            self.progress(Progress("encode", done, total, "rows"))

    def _merge(self, pool: Pool, recounted: set[ShardKey]) -> None:
        job = self.job
        shards = [
            ShardKeys(
                job.record(PARSED, key),
                job.record(RECOUNTED if key in recounted else PARSED, key),
            )
            for key in self.keys
        ]
        memory_bytes = job.config.merge_bytes // pool.workers
        columns = [
            (column, at, shards, memory_bytes, self._vocabulary(column), job.remap(at), job.base)
            for at, column in enumerate(table_columns(job.schema))
            if column.hash_buckets is None
        ]
        for done, _ in enumerate(pool.run(merge_vocabulary, columns), start=1):
            self.progress(Progress("vocabularies", done, len(columns), "columns"))

    def _vocabulary(self, column: Any) -> Path:
        path: Path = self.job.work / VOCABULARY_FOLDER / column.vocabulary_file
        return path

    def _remap_starts(self) -> dict[ShardKey, tuple[int, ...]]:
        """Where the ids of each shard begin in the remap file of each column."""
        starts = {}
        at = [0] * len(table_columns(self.job.schema))
        for key in self.keys:
            starts[key] = tuple(at)
            at = [a + count for a, count in zip(at, self.shards[key]["keys"], strict=True)]
        return starts

    # Phase 4

    def finish(self, pool: Pool) -> Manifest:
        """Give everything its place and write the manifest."""
        job, output = self.job, self.workspace.output
        keys = self.keys
        encoded = [Record(job.record(ENCODED, key)).meta["splits"] for key in keys]
        train = job.split if isinstance(job.split, str) else SPLITS[0]
        if not any(train in splits for splits in encoded):
            raise ValueError("split: no row is left for training")
        self.unknown_rates = self._unknown_rates(encoded)
        sources = self._source_infos(pool)
        splits = finish.place_shards(job, output, keys)
        for name in self._wanted_splits():
            if name not in splits:
                _log.warning("%s: no row falls into the %s split", output, name)
        finish.place_vocabularies(job, output, job.vocabularies or job.work / VOCABULARY_FOLDER)
        if job.base is not None:
            folder = output / VOCABULARY_FOLDER
            self.new_ids = {
                column.name: new_ids(folder / column.vocabulary_file, job.base)
                for column in job.schema.categorical
                if column.hash_buckets is None
            }
        lines = list(self.malformed_lines())
        if lines:
            malformed.write_malformed(output / MALFORMED_FILE, lines)
        num_columns = len(job.schema.dense) + len(job.schema.categorical)
        missing = [
            sum(shard["missing"][at] for shard in self.shards.values()) for at in range(num_columns)
        ]
        report = {"new_ids": self.new_ids} if self.new_ids else {}
        return finish.write_manifest(
            job, output, keys, splits, sources, missing, self.settings, report
        )

    def _unknown_rates(self, encoded: list[dict[str, Any]]) -> dict[str, float]:
        rates = {}
        for at, column in enumerate(table_columns(self.job.schema)):
            if column.hash_buckets is None:
                found = [split for splits in encoded for split in splits.values()]
                lookups = sum(split["lookups"][at] for split in found)
                rates[column.name] = sum(split["unknown"][at] for split in found) / max(lookups, 1)
        return rates

    def _wanted_splits(self) -> list[str]:
        split = self.job.split
        if isinstance(split, str):
            return []
        wanted = {
            "validation": getattr(split, "validation", None)
            or getattr(split, "validation_from", None) is not None
            or getattr(split, "validation_fraction", 0),
            "test": getattr(split, "test", None) or getattr(split, "test_from", None) is not None,
        }
        return [name for name, value in wanted.items() if value]

    def _source_infos(self, pool: Pool) -> list[SourceInfo]:
        whole_files = [source.path for source in self.sources if source.is_parquet]
        hashes = dict(pool.run(hash_file, [(path,) for path in whole_files]))
        infos = []
        for file, name in enumerate(self.names):
            keys = [key for key in self.keys if key.file == file]
            shards = [self.shards[key] for key in keys]
            source = self.sources[file] if self.sources else None
            if source is not None and source.is_parquet:
                blocks = [hashes[source.path]]
            else:
                blocks = [Record(self.job.record(PARSED, key)).array("blocks") for key in keys]
            infos.append(
                SourceInfo(
                    name=Path(name).name,
                    checksum=checksum(blocks),
                    bytes=source.bytes if source else sum(shard["bytes"] for shard in shards),
                    rows=sum(shard["rows"] for shard in shards),
                    malformed=sum(shard["malformed_count"] for shard in shards),
                )
            )
        return infos
