"""The last step of preparation: shards get their places, `dataset.json` is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dqrm.data.local import table_columns
from dqrm.data.manifest import (
    SPLITS,
    VOCABULARY_FOLDER,
    DenseInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    TableInfo,
)
from dqrm.data.records import Record
from dqrm.data.scatter import split_path
from dqrm.data.shards import shard_file
from dqrm.data.splits import ShardKey
from dqrm.data.stages import ENCODED, Job
from dqrm.data.vocabulary import keys_digest, load_keys


def place_shards(job: Job, output: Path, keys: Sequence[ShardKey]) -> dict[str, SplitInfo]:
    """Move finished shards to their final names; does nothing for those already there."""
    shards: dict[str, list[ShardInfo]] = {name: [] for name in SPLITS}
    positives = dict.fromkeys(SPLITS, 0)
    for key in keys:
        for name, found in Record(job.record(ENCODED, key)).meta["splits"].items():
            file = shard_file(name, len(shards[name]))
            target = output / file
            target.parent.mkdir(exist_ok=True)
            written = split_path(job.work / ENCODED, name, key)
            if written.exists():
                written.replace(target)
            shards[name].append(ShardInfo(file=file, num_rows=found["rows"], bytes=found["bytes"]))
            positives[name] += found["positives"]
    return {
        name: SplitInfo(
            num_rows=sum(shard.num_rows for shard in infos),
            positives=positives[name],
            shards=tuple(infos),
        )
        for name, infos in shards.items()
        if infos
    }


def place_vocabularies(job: Job, output: Path, ready: Path) -> None:
    """Copy the vocabularies in `ready`; a link where the file system has them."""
    columns = [column for column in job.schema.categorical if column.hash_buckets is None]
    if not columns:
        return
    folder = output / VOCABULARY_FOLDER
    folder.mkdir(exist_ok=True)
    for column in columns:
        target = folder / column.vocabulary_file
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.unlink(missing_ok=True)
        _link_or_copy(ready / column.vocabulary_file, temporary)
        temporary.replace(target)


def _link_or_copy(source: Path, target: Path) -> None:
    import shutil

    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def table_infos(
    job: Job,
    output: Path,
    keys: Sequence[ShardKey],
    missing_rates: Sequence[float],
    split: str,
) -> tuple[TableInfo, ...]:
    """Tables in the order of the schema; missing_rates in the order of `table_columns`."""
    columns = table_columns(job.schema)
    lookups = [0] * len(columns)
    for key in keys:
        found = Record(job.record(ENCODED, key)).meta["splits"].get(split)
        if found is not None:
            lookups = [a + b for a, b in zip(lookups, found["lookups"], strict=True)]
    infos = {}
    for column, missing_rate, looked_up in zip(columns, missing_rates, lookups, strict=True):
        num_rows, digest = column.hash_buckets or 0, None
        if column.hash_buckets is None:
            vocabulary = load_keys(output / VOCABULARY_FOLDER / column.vocabulary_file)
            num_rows, digest = len(vocabulary) + 1, keys_digest(vocabulary)
        infos[column.name] = TableInfo(
            name=column.name,
            num_rows=num_rows,
            multi_hot=column.multi_hot,
            hashed=column.hash_buckets is not None,
            vocabulary_digest=digest,
            missing_rate=missing_rate,
            lookups=looked_up,
        )
    return tuple(infos[column.name] for column in job.schema.categorical)


def write_manifest(
    job: Job,
    output: Path,
    keys: Sequence[ShardKey],
    splits: dict[str, SplitInfo],
    sources: Sequence[SourceInfo],
    missing: Sequence[int],
    settings: Mapping[str, Any],
    report: Mapping[str, Any],
) -> Manifest:
    """Write `dataset.json`, which makes the folder a data set."""
    rows = sum(split.num_rows for split in splits.values())
    rates = [count / max(rows, 1) for count in missing]
    num_dense = len(job.schema.dense)
    counted = job.split if isinstance(job.split, str) else "train"
    manifest = Manifest(
        schema=job.schema,
        dense=tuple(
            DenseInfo(name=column.name, missing_rate=rate)
            for column, rate in zip(job.schema.dense, rates, strict=False)
        ),
        tables=table_infos(job, output, keys, rates[num_dense:], counted),
        splits=splits,
        sources=tuple(sources),
        settings=dict(settings),
        report=dict(report),
    )
    manifest.write(output)
    return manifest
