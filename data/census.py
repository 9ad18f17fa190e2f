"""The bundled example: Census-Income (KDD), prepared into a cache on first use.

The columns left out, the changes made and the licence: ``examples/README.md`` beside this file.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dqrm.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    VOCABULARY_FOLDER,
    DenseInfo,
    Manifest,
    SourceInfo,
    SplitInfo,
    TableInfo,
)
from dqrm.data.rows import Rows
from dqrm.data.schema import CategoricalColumn, DenseColumn, Schema
from dqrm.data.shards import ShardWriter, shard_file
from dqrm.kernels.keys import KeyIndex, encode_keys, hash_strings

EXAMPLE_FILE = Path(__file__).parent / "examples" / "census_income.parquet"

TRAIN_YEAR = 94
TEST_YEAR = 95
VALIDATION_SHARE = 0.1
VALIDATION_SEED = 94

_DENSE = ("wage_per_hour", "stock_dividends")
_NOT_FEATURES = ("label", "year")


def census_schema() -> Schema:
    """Label: income above 50,000 dollars. `examples/README.md` says why few numbers are dense."""
    names = pq.read_schema(EXAMPLE_FILE).names
    categorical = [name for name in names if name not in (*_DENSE, *_NOT_FEATURES)]
    return Schema(
        label="label",
        dense=tuple(DenseColumn(name=name) for name in _DENSE),
        categorical=tuple(CategoricalColumn(name=name) for name in categorical),
    )


def cached_census() -> Path:
    """Folder of the prepared example; prepares it when the cache lacks it.

    The cache is ``$DQRM_CACHE``, else ``$XDG_CACHE_HOME/dqrm``, else ``~/.cache/dqrm``. Two
    processes may do this at once: the first to finish wins, the other drops its own copy.
    """
    key = hashlib.sha256(EXAMPLE_FILE.read_bytes())
    key.update(f"{FORMAT_VERSION} {census_schema().model_dump_json()}".encode())
    folder = _cache_root() / f"census-{key.hexdigest()[:16]}"
    if (folder / MANIFEST_FILE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".census-", dir=folder.parent))
    try:
        prepare_census(work)
        try:
            work.rename(folder)
        except OSError:
            # A folder that is not empty cannot be replaced: another process was first.
            if not (folder / MANIFEST_FILE).is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def prepare_census(folder: Path) -> Manifest:
    """Prepare the example into `folder`: year 94 for training and validation, 95 for test."""
    schema = census_schema()
    table = pq.read_table(EXAMPLE_FILE)
    year = table["year"].to_numpy()
    rng = np.random.Generator(np.random.Philox(VALIDATION_SEED))
    chosen = rng.random(len(year)) < VALIDATION_SHARE
    masks = {
        "train": (year == TRAIN_YEAR) & ~chosen,
        "validation": (year == TRAIN_YEAR) & chosen,
        "test": year == TEST_YEAR,
    }
    dense = np.stack([np.log1p(table[name].to_numpy()) for name in _DENSE]).astype(np.float32)
    label = table["label"].to_numpy().astype(np.float32)
    (folder / VOCABULARY_FOLDER).mkdir(parents=True)
    one_hot = np.empty((len(schema.one_hot), len(label)), np.int32)
    tables = []
    for row, column in enumerate(schema.one_hot):
        text = pc.fill_null(table[column.name].cast(pa.large_string()), "")
        text = text.combine_chunks()
        offsets = np.frombuffer(text.buffers()[1], np.int64)[: len(text) + 1]
        keys = hash_strings(offsets, text.buffers()[2])
        vocabulary = _vocabulary(keys[masks["train"]])
        np.save(folder / VOCABULARY_FOLDER / column.vocabulary_file, vocabulary)
        one_hot[row] = KeyIndex(vocabulary).lookup(keys)
        missing = pc.is_null(table[column.name]).to_numpy()[masks["train"]]
        tables.append(
            TableInfo(
                name=column.name,
                num_rows=len(vocabulary) + 1,
                vocabulary_digest=hashlib.sha256(vocabulary.astype("<u8").tobytes()).hexdigest(),
                missing_rate=float(missing.mean()),
                lookups=int(masks["train"].sum()),
            )
        )
    rows = Rows(label, dense, one_hot)
    splits = {}
    for name, mask in masks.items():
        chosen_rows = rows.take(np.flatnonzero(mask))
        with ShardWriter(folder, shard_file(name, 0), schema) as writer:
            writer.write(chosen_rows)
            shard = writer.close()
        splits[name] = SplitInfo(
            num_rows=shard.num_rows, positives=int(chosen_rows.label.sum()), shards=(shard,)
        )
    manifest = Manifest(
        schema=schema,
        dense=tuple(DenseInfo(name=name) for name in _DENSE),
        tables=tuple(tables),
        splits=splits,
        sources=(
            SourceInfo(
                name=EXAMPLE_FILE.name,
                sha256=hashlib.sha256(EXAMPLE_FILE.read_bytes()).hexdigest(),
                bytes=EXAMPLE_FILE.stat().st_size,
                rows=len(label),
            ),
        ),
        settings={"validation_share": VALIDATION_SHARE, "validation_seed": VALIDATION_SEED},
    )
    manifest.write(folder)
    return manifest


def _vocabulary(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    ids, unique = encode_keys(keys)
    assert unique is not None
    return unique[np.lexsort((unique, -np.bincount(ids)))]


def _cache_root() -> Path:
    if root := os.environ.get("DQRM_CACHE"):
        return Path(root)
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "dqrm"
    return Path.home() / ".cache" / "dqrm"
