"""The bundled example: Census-Income (KDD), prepared into a cache on first use.

The columns left out, the changes made and the licence: ``examples/README.md`` beside this file.
"""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import pyarrow.parquet as pq

from dqrm.data.config import PrepareConfig, TimeSplit
from dqrm.data.manifest import FORMAT_VERSION, read_manifest
from dqrm.data.prepare import prepare
from dqrm.data.schema import CategoricalColumn, DenseColumn, Schema

EXAMPLE_FILE = Path(__file__).parent / "examples" / "census_income.parquet"

TEST_YEAR = 95
"""Rows of 94 train and validate, rows of 95 are the test."""

VALIDATION_SHARE = 0.1
SPLIT_SEED = 94

_DENSE = ("wage_per_hour", "stock_dividends")
_LABEL, _YEAR = "label", "year"


def census_config() -> PrepareConfig:
    """How the example is prepared; `examples/README.md` says why few numbers are dense."""
    names = pq.read_schema(EXAMPLE_FILE).names
    categorical = [name for name in names if name not in (*_DENSE, _LABEL, _YEAR)]
    schema = Schema(
        label=_LABEL,
        dense=tuple(DenseColumn(name=name) for name in _DENSE),
        categorical=tuple(CategoricalColumn(name=name) for name in categorical),
        time=_YEAR,
    )
    return PrepareConfig(
        schema=schema,
        format="parquet",
        split=TimeSplit(test_from=TEST_YEAR, validation_fraction=VALIDATION_SHARE, seed=SPLIT_SEED),
        # One process: a caller's script may not be importable by workers, and seconds suffice.
        workers=1,
    )


def cached_census() -> Path:
    """Folder of the prepared example; prepares it when the cache lacks it.

    The cache is ``$DQRM_CACHE``, else ``$XDG_CACHE_HOME/dqrm``, else ``~/.cache/dqrm``. Two
    processes may do this at once: the first to finish wins, the other drops its own copy.

    Raises:
        ValueError: the cache cannot be written.
    """
    config = census_config()
    content = hashlib.sha256(EXAMPLE_FILE.read_bytes())
    content.update(f"{FORMAT_VERSION} {config.model_dump_json()}".encode())
    folder = _cache_root() / f"census-{content.hexdigest()[:16]}"
    if _readable(folder):
        return folder
    # What cannot be read there, a cut-short copy or another version's, makes room.
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        work.mkdir()
    except OSError as error:
        raise ValueError(
            f"{folder.parent}: cannot keep the prepared example there ({error.strerror}); set "
            "DQRM_CACHE to a folder that can be written"
        ) from None
    try:
        prepare([EXAMPLE_FILE], work, config)
        try:
            work.rename(folder)
        except OSError:
            # A folder that is not empty cannot be replaced: another process was first.
            if not _readable(folder):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _readable(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except ValueError:
        return False
    return True


def _cache_root() -> Path:
    if root := os.environ.get("DQRM_CACHE"):
        return Path(root)
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "dqrm"
    return Path.home() / ".cache" / "dqrm"
