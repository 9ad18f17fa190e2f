"""Raw rows to a prepared data set, in bounded memory, in parallel, resumable.

Phases, each of them by shard:

1. parse: text to numbers, and to ids that count the values of the shard alone;
2. vocabularies: the shards' values and their training counts are merged, column by column;
3. encode: shard ids become ids of the vocabularies, rows go to their splits;
4. ``dataset.json`` is written: the folder is a data set from then on.

Where every column is hashed and rows need not be counted first, parsing writes the finished rows.

Memory of all processes together stays below (`memory_bound`)::

    parent    200 MiB
    worker    200 MiB + 8 x shard_bytes (10 x for compressed files),
              or while merging + merge_bytes / workers + 48 bytes for each value of the column
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqrm.data.config import PrepareConfig, SplitConfig
from dqrm.data.malformed import MalformedLine
from dqrm.data.manifest import VOCABULARY_FOLDER, Manifest
from dqrm.data.pool import Pool, WorkersLost, peak_bytes
from dqrm.data.preparation import FRAME_NAME, Preparation, Progress
from dqrm.data.sources import Source, open_source
from dqrm.data.splits import file_codes
from dqrm.data.stages import ENCODED, PARSED, RECOUNTED, REMAP, Job
from dqrm.data.vocabulary import Base
from dqrm.data.workspace import Workspace
from dqrm.kernels.cpu import announce_fallback, native_available

__all__ = ["PrepareReport", "Progress", "prepare"]

if TYPE_CHECKING:
    import pandas as pd

PLAN_VERSION = 1
"""Raised when the files in the work folder change their meaning."""

SMALL_BYTES = 16 * 1024 * 1024
"""Sources up to this size are prepared without worker processes: 0.1 s with the compiled parser,
a third of what starting the workers takes."""

BASE_BYTES = 200 * 1024 * 1024
"""A process before it works on rows: interpreter and libraries."""

_NOT_CONTENT = {"workers", "merge_bytes", "max_malformed"}
"""Settings that do not change what is written."""


@dataclass(frozen=True)
class PrepareReport:
    """What a preparation did and what it cost."""

    path: Path
    digest: str
    split_rows: dict[str, int]
    rows: int
    malformed: int
    malformed_examples: tuple[MalformedLine, ...]
    """The first few; all of them are in malformed.tsv in the data set's folder."""
    unknown_rates: dict[str, float]
    """Share of look-ups of id 0 by column with a vocabulary, over all splits."""
    new_ids: dict[str, int]
    """Values that got an id after those of the base, by column; empty without a base."""
    wall_seconds: float
    cpu_seconds: float
    """Processor time of this call and of the workers; loading the libraries is not counted."""
    peak_bytes: int
    """Sum of the largest resident memory of every process: an upper bound."""
    memory_bound_bytes: int
    """What peak_bytes may not exceed; see `dqrm.data.prepare`."""


def prepare(
    sources: "Sequence[Path | str] | pd.DataFrame",
    output: Path | str,
    config: PrepareConfig,
    *,
    base: Base | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PrepareReport:
    """Prepare `sources` (files in the order of their rows, or a frame) into folder `output`.

    A run that was killed is continued by the same call; the result is the same, byte for byte.
    Work on a frame is not continued. overwrite drops what `output` holds, finished or not.

    base: vocabularies to begin with, see `dqrm.data.base`; ids in them stay what they are.

    Raises:
        ValueError: a source cannot be read, lacks a column or has too many malformed lines; the
            split leaves no training row; or `output` holds something else. No data set is left.
    """
    return run(
        sources, output, config, config.split, None, base, overwrite=overwrite, progress=progress
    )


def run(
    sources: "Sequence[Path | str] | pd.DataFrame",
    output: Path | str,
    config: PrepareConfig,
    split: SplitConfig | str,
    vocabularies: Path | None,
    base: Base | None = None,
    *,
    overwrite: bool,
    progress: Callable[[Progress], None],
) -> PrepareReport:
    """`prepare`, or with ready vocabularies and the name of one split, `apply`."""
    started, cpu_started = time.monotonic(), time.process_time()
    if not native_available():
        announce_fallback()
    opened, frame = _open(sources, config)
    names = [str(source.path) for source in opened] or [FRAME_NAME]
    codes = [0] * len(names) if isinstance(split, str) else file_codes(split, names)
    plan = _plan(config, opened, split, vocabularies, base)
    with Workspace(Path(output), plan, overwrite=overwrite) as workspace:
        for folder in (PARSED, RECOUNTED, ENCODED, REMAP, VOCABULARY_FOLDER):
            workspace.folder(folder)
        job = Job(workspace.path, config.resolved_schema, config, split, vocabularies, base)
        chosen = settings(config) | _base_settings(base)
        work = Preparation(job, workspace, opened, names, codes, frame, progress, chosen)
        pool = Pool(config.workers or _default_workers(opened, frame), workspace.lock)
        try:
            with pool:
                work.parse(pool)
                if not job.one_pass:
                    work.merge_and_encode(pool)
                manifest = work.finish(pool)
        except WorkersLost:
            raise
        except ValueError:
            workspace.remove()
            raise
        workspace.remove()
    return PrepareReport(
        path=Path(output),
        digest=manifest.digest,
        split_rows={name: info.num_rows for name, info in manifest.splits.items()},
        rows=work.total_rows,
        malformed=work.malformed_count,
        malformed_examples=tuple(islice(work.malformed_lines(), 5)),
        unknown_rates=work.unknown_rates,
        new_ids=work.new_ids,
        wall_seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu_started + pool.cpu_seconds,
        peak_bytes=peak_bytes() + pool.peak_bytes,
        memory_bound_bytes=_memory_bound(config, opened, manifest, pool.workers),
    )


def _default_workers(sources: Sequence[Source], frame: "pd.DataFrame | None") -> int:
    """The cores this process may use; one where starting more takes longer than the work."""
    size = sum(source.bytes for source in sources)
    if frame is not None:
        size = int(frame.memory_usage(index=False).sum())
    return 1 if size <= SMALL_BYTES else len(os.sched_getaffinity(0))


def _memory_bound(
    config: PrepareConfig, sources: Sequence[Source], manifest: Manifest, workers: int
) -> int:
    """The formula at the top of this module."""
    compressed = any(source.compression for source in sources)
    parse_bytes = (10 if compressed else 8) * config.shard_bytes
    largest = max((table.num_rows for table in manifest.tables if not table.hashed), default=0)
    merge_bytes = config.merge_bytes // workers + 48 * largest if largest else 0
    processes = workers if workers > 1 else 0
    return (1 + processes) * BASE_BYTES + workers * max(parse_bytes, merge_bytes)


def _open(
    sources: "Sequence[Path | str] | pd.DataFrame", config: PrepareConfig
) -> tuple[list[Source], "pd.DataFrame | None"]:
    if not isinstance(sources, Sequence):
        config.schema_.require_columns([str(name) for name in sources.columns], FRAME_NAME)
        if config.split.by == "file":
            raise ValueError("split.by=file: a frame is not files; split by time, rows or fraction")
        return [], sources
    if isinstance(sources, str):
        raise ValueError(f"sources: give a list of files, not the text {sources!r}")
    if not sources:
        raise ValueError("sources: name at least one file")
    return [open_source(Path(path), config) for path in sources], None


def _plan(
    config: PrepareConfig,
    sources: Sequence[Source],
    split: Any,
    vocabularies: Path | None,
    base: Base | None,
) -> dict[str, Any]:
    """What must be the same for one run to continue another."""
    plan: dict[str, Any] = {
        "version": PLAN_VERSION,
        "settings": settings(config),
        "schema": config.resolved_schema.model_dump(mode="json"),
        "sources": [[str(source.path), source.bytes, source.modified] for source in sources],
        "split": split if isinstance(split, str) else None,
        "vocabularies": None if vocabularies is None else str(vocabularies),
        **_base_settings(base),
    }
    if not sources:
        # A frame lives in one process; nothing tells whether another one is the same.
        plan["frame"] = os.urandom(8).hex()
    return plan


def _base_settings(base: Base | None) -> dict[str, Any]:
    """What the manifest says of the base; without one nothing."""
    if base is None:
        return {}
    return {"base": {"features_digest": base.features_digest, "grows": base.grows}}


def settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings that decide the content of the data set, schema apart."""
    chosen: dict[str, Any] = config.model_dump(mode="json", exclude={"schema_", *_NOT_CONTENT})
    return chosen
