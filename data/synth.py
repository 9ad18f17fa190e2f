"""`dqrm data synth`: a data set of any size whose best possible AUC and log loss are known."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from dqrm.data.dataset import Split
from dqrm.data.manifest import SPLITS, DenseInfo, Manifest, ShardInfo, SplitInfo, TableInfo
from dqrm.data.rows import F32, I32, I64, Rows
from dqrm.data.schema import CategoricalColumn, Schema, criteo_schema
from dqrm.data.shards import ShardWriter, shard_file
from dqrm.data.teacher import CHUNK_ROWS, DENSE_MISSING, F64, Teacher, bayes_metrics

GENERATOR_VERSION = 1
"""Raised when the same settings give other rows."""

# fmt: off
CRITEO_KAGGLE_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)
# fmt: on
"""Table rows of the Criteo Kaggle set, C1 to C26 (arXiv 2410.20046, table 1)."""

CRITEO_KAGGLE_ROWS = 45_840_617
"""Rows of its train.txt: seven days."""

MIN_TABLE_ROWS = 3
"""Ids that the smallest table keeps at any scale."""

HELD_OUT_SHARE = 1 / 7
"""Last rows that do not train, as the last of Criteo's seven days: validation, then test."""

SHARD_CHUNKS = 16
"""Chunks in a shard: about a million rows, 160 MB."""

RARITY_ROWS = 1 << 18
"""Rows of a split from which the shares of rare rows are taken."""


class SynthConfig(BaseModel):
    """What to generate. The string under each field is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    scale: float = Field(default=0.02, gt=0.0, le=1.0)
    """Table rows as a share of Criteo Kaggle's 33.8 million."""

    rows: PositiveInt | None = None
    """Rows in all splits together; scale times Criteo Kaggle's 45.8 million when not given."""

    seed: NonNegativeInt = 0
    """Decides teacher and rows."""

    zipf: float = Field(default=1.05, ge=0.0, le=4.0)
    """Exponent of the ids' popularity; larger means fewer ids with more of the look-ups."""

    positive_rate: float = Field(default=0.256, gt=0.0, lt=1.0)
    """Share of label 1; Criteo Kaggle has 0.256."""

    bayes_auc: float = Field(default=0.80, gt=0.5, lt=1.0)
    """AUC of the true probabilities, which no model can expect to exceed."""

    multi_hot: tuple[str, ...] = ()
    """Categorical columns (C1 to C26) that hold lists of ids."""

    max_bag: PositiveInt = 8
    """Longest list of a multi-hot column; lengths are uniform from 0."""

    workers: PositiveInt | None = None
    """Threads; the cores this process may use when not given. They do not change the rows."""

    @property
    def num_rows(self) -> int:
        """Rows in all splits together."""
        return self.rows or round(self.scale * CRITEO_KAGGLE_ROWS)

    @property
    def table_rows(self) -> tuple[int, ...]:
        """Ids of each table."""
        return tuple(
            max(MIN_TABLE_ROWS, round(self.scale * rows)) for rows in CRITEO_KAGGLE_CARDINALITIES
        )

    @property
    def schema_(self) -> Schema:
        """Criteo's columns; an id is its own hash bucket, so there is no vocabulary."""
        base = criteo_schema()
        columns = tuple(
            CategoricalColumn(
                name=column.name, hash_buckets=rows, multi_hot=column.name in self.multi_hot
            )
            for column, rows in zip(base.categorical, self.table_rows, strict=True)
        )
        return base.model_copy(update={"categorical": columns})

    def teacher(self) -> Teacher:
        """Draw the teacher."""
        return Teacher(
            self.table_rows,
            seed=self.seed,
            zipf=self.zipf,
            bayes_auc=self.bayes_auc,
            positive_rate=self.positive_rate,
            multi_hot=[column.multi_hot for column in self.schema_.categorical],
            max_bag=self.max_bag,
        )

    @model_validator(mode="after")
    def _check(self) -> "SynthConfig":
        names = [column.name for column in criteo_schema().categorical]
        for name in self.multi_hot:
            if name not in names:
                raise ValueError(f"multi_hot: no column {name!r}; they are C1 to C26")
        if self.num_rows < 100:
            raise ValueError(f"rows={self.num_rows}: generate 100 rows or more")
        if self.seed >= 2**64:
            raise ValueError("seed: must be below 2^64")
        return self


def synthesize(
    output: str | Path,
    config: SynthConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Generate a prepared data set into the new folder `output`.

    Rows stand in time order: the first six sevenths train, the next fourteenth is validation, the
    last test. ``manifest.report`` holds what the true probabilities score on the test split and
    how rare the training ids are. The folder appears complete or not at all.

    The rows depend on the settings alone, not on workers; another kind of processor may round a
    dense value's last bit differently. Memory: 200 MB per worker and 4 bytes per table row.

    progress: called with (rows written, rows in all) after each piece.

    Raises:
        ValueError: `output` exists and is not an empty folder.
    """
    config = config or SynthConfig()
    output = new_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        manifest = _generate(work, config, progress or (lambda done, total: None))
        manifest.write(work)
        work.replace(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def new_output(output: str | Path) -> Path:
    """The path, if nothing is there or an empty folder; else raise ValueError."""
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists already; give a new folder")
    return path


def _generate(folder: Path, config: SynthConfig, progress: Callable[[int, int], None]) -> Manifest:
    schema, total = config.schema_, config.num_rows
    held_out = round(total * HELD_OUT_SHARE)
    borders = (0, total - held_out, total - held_out // 2, total)
    teacher = config.teacher()
    counts = [np.zeros(rows, np.int32) for rows in config.table_rows]
    splits: dict[str, SplitInfo] = {}
    truth: list[tuple[F32, F64]] = []
    workers = config.workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        for name, (start, stop) in zip(SPLITS, pairwise(borders), strict=True):
            writer = _SplitWriter(folder, name, schema)
            for at, rows, probability in _pieces(teacher, pool, workers, start, stop):
                writer.write(rows)
                if name == "train":
                    _count(counts, rows, schema)
                elif name == "test":
                    truth.append((rows.label, probability))
                progress(at + len(rows), total)
            splits[name] = writer.close()
    label = np.concatenate([part for part, _ in truth])
    probability = np.concatenate([part for _, part in truth])
    return Manifest(
        schema=schema,
        dense=tuple(
            DenseInfo(name=column.name, missing_rate=rate)
            for column, rate in zip(schema.dense, DENSE_MISSING, strict=True)
        ),
        tables=tuple(
            TableInfo(
                name=column.name,
                num_rows=len(count),
                multi_hot=column.multi_hot,
                hashed=True,
                lookups=int(count.sum()),
            )
            for column, count in zip(schema.categorical, counts, strict=True)
        ),
        splits=splits,
        settings={"generator": "teacher", "generator_version": GENERATOR_VERSION}
        | config.model_dump(mode="json", exclude={"workers"})
        | {"rows": total},
        report={
            "bayes_test": bayes_metrics(label, probability),
            "rarity": _rarity(folder, schema, splits, counts),
        },
    )


def _pieces(
    teacher: Teacher, pool: ThreadPoolExecutor, ahead: int, start: int, stop: int
) -> Iterator[tuple[int, Rows, F64]]:
    """(first row, rows, probabilities) of rows start to stop, in order, drawn `ahead` chunks on."""
    numbers = iter(range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)))
    waiting: deque[tuple[int, Future[tuple[Rows, F64]]]] = deque()
    while True:
        while len(waiting) < ahead and (number := next(numbers, None)) is not None:
            waiting.append((number * CHUNK_ROWS, pool.submit(teacher.chunk, number)))
        if not waiting:
            return
        first, future = waiting.popleft()
        rows, probability = future.result()
        begin, end = max(start - first, 0), min(stop - first, CHUNK_ROWS)
        yield first + begin, rows.slice(begin, end), probability[begin:end]


class _SplitWriter:
    """Cuts one split into shards."""

    def __init__(self, folder: Path, name: str, schema: Schema) -> None:
        self._folder, self._name, self._schema = folder, name, schema
        self._shards: list[ShardInfo] = []
        self._writer: ShardWriter | None = None
        self._writes = 0
        self._num_rows = 0
        self._positives = 0

    def write(self, rows: Rows) -> None:
        if self._writer is None:
            file = shard_file(self._name, len(self._shards))
            self._writer = ShardWriter(self._folder, file, self._schema)
        self._writer.write(rows)
        self._num_rows += len(rows)
        self._positives += int(rows.label.sum())
        self._writes += 1
        if self._writes % SHARD_CHUNKS == 0:
            self._end_shard()

    def close(self) -> SplitInfo:
        self._end_shard()
        return SplitInfo(
            num_rows=self._num_rows, positives=self._positives, shards=tuple(self._shards)
        )

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None


def _ids(rows: Rows, schema: Schema) -> Iterator[tuple[I32, I64 | None]]:
    """Ids of each table in the order of the schema; offsets where a row holds a list."""
    one_hot, lists = iter(rows.one_hot), iter(rows.lists)
    for column in schema.categorical:
        if column.multi_hot:
            bags = next(lists)
            yield bags.ids, bags.offsets
        else:
            yield next(one_hot), None


def _count(counts: list[I32], rows: Rows, schema: Schema) -> None:
    """Add the look-ups of `rows` to the counts of each table's ids."""
    for count, (ids, _) in zip(counts, _ids(rows, schema), strict=True):
        if len(count) <= CHUNK_ROWS:
            count += np.bincount(ids, minlength=len(count)).astype(np.int32)
        else:
            # Touches the ids seen, not the whole table.
            seen, times = np.unique(ids, return_counts=True)
            count[seen] += times.astype(np.int32)


def _rarity(
    folder: Path, schema: Schema, splits: dict[str, SplitInfo], counts: list[I32]
) -> dict[str, float]:
    """How much of the data rests on ids that training sees once or a few times."""
    report = {}
    lookups = sum(int(count.sum()) for count in counts)
    once = sum(int(np.count_nonzero(count == 1)) for count in counts)
    report["train_lookups_of_ids_seen_once"] = once / lookups
    for name, most, key in (
        ("train", 1, "train_rows_with_an_id_seen_once"),
        ("train", 3, "train_rows_with_an_id_seen_3_times_or_less"),
        ("test", 0, "test_rows_with_an_id_never_trained"),
    ):
        split = Split(folder, schema, splits[name])
        rows = split.rows(0, RARITY_ROWS)
        touched = np.zeros(len(rows), bool)
        for count, (ids, offsets) in zip(counts, _ids(rows, schema), strict=True):
            rare = count[ids] <= most
            if offsets is None:
                touched |= rare
            else:
                touched[np.repeat(np.arange(len(rows)), np.diff(offsets))[rare]] = True
        report[key] = float(touched.mean())
    return report
