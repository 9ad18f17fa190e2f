"""`dataset.json`: what a prepared data set holds, versioned and checked when read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from dqrm.data.files import write_json
from dqrm.data.schema import Schema

FORMAT_VERSION = 1
"""Raised when a reader of the old version could misread a folder."""

MANIFEST_FILE = "dataset.json"
WORK_FOLDER = ".work"
"""Left in the folder by a preparation that has not finished."""

VOCABULARY_FOLDER = "vocabulary"
SPLITS = ("train", "validation", "test")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TableInfo(_Strict):
    """One categorical column, which is one embedding table."""

    name: str
    """Column name."""

    num_rows: PositiveInt
    """Embedding rows: vocabulary size + 1 (id 0 is unknown or infrequent), or hash buckets."""

    multi_hot: bool = False
    """Whether a row of data holds a list of ids."""

    hashed: bool = False
    """Whether ids are hash buckets; then there is no vocabulary."""

    vocabulary_digest: str | None = None
    """SHA-256 of the vocabulary's keys, little-endian uint64; None when hashed or generated."""

    missing_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of rows, of all splits, whose field was empty."""

    lookups: NonNegativeInt = 0
    """Ids in the training split: its rows for one-hot, the sum of list lengths for multi-hot."""


class DenseInfo(_Strict):
    """One dense column."""

    name: str
    """Column name."""

    missing_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of rows, of all splits, whose field was empty (then 0)."""


class ShardInfo(_Strict):
    """One Arrow file."""

    file: str
    """Path relative to the data set's folder, with forward slashes."""

    num_rows: NonNegativeInt
    """Rows in the file."""

    bytes: PositiveInt
    """Size of the file, to notice a copy that was cut short."""


class SplitInfo(_Strict):
    """One split, in file order."""

    num_rows: NonNegativeInt
    """Rows of all shards together."""

    positives: NonNegativeInt
    """Rows with label 1."""

    shards: tuple[ShardInfo, ...] = ()
    """The files, in row order."""

    @model_validator(mode="after")
    def _rows_add_up(self) -> Self:
        total = sum(shard.num_rows for shard in self.shards)
        if total != self.num_rows:
            raise ValueError(f"num_rows is {self.num_rows} but its shards hold {total} rows")
        if self.positives > self.num_rows:
            raise ValueError(f"{self.positives} positives in {self.num_rows} rows")
        return self


class SourceInfo(_Strict):
    """A file (or frame) the rows were read from."""

    name: str
    """File name without its folder, or what a frame or generator calls itself."""

    checksum: str
    """Of the file's bytes as they lie on disk: the method, a colon, hexadecimal digits. The method
    xxh64-blocks is described at `dqrm.data.sources.CHECKSUM`."""

    bytes: NonNegativeInt
    """Size of the file."""

    rows: NonNegativeInt
    """Rows read from it, malformed lines not counted."""

    malformed: NonNegativeInt = 0
    """Lines left out because they could not be read."""


class Manifest(_Strict):
    """Everything a reader must know about a prepared data set."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )

    version: int = FORMAT_VERSION
    """Format of the folder."""

    schema_: Schema = Field(alias="schema")
    """The columns and their roles."""

    dense: tuple[DenseInfo, ...]
    """The dense columns, in the order of the schema."""

    tables: tuple[TableInfo, ...]
    """The categorical columns, in the order of the schema."""

    splits: dict[str, SplitInfo]
    """train and, where they have rows, validation and test."""

    sources: tuple[SourceInfo, ...] = ()
    """Where the rows came from, in the order they were read."""

    settings: dict[str, Any] = {}
    """How the rows were prepared (split rule and the like); part of the digest."""

    report: dict[str, Any] = {}
    """Figures for people, such as the known Bayes AUC of generated data."""

    @model_validator(mode="after")
    def _matches_schema(self) -> Self:
        columns = [column.name for column in self.schema_.categorical]
        if [table.name for table in self.tables] != columns:
            raise ValueError("tables are not the categorical columns of the schema, in order")
        if [info.name for info in self.dense] != [column.name for column in self.schema_.dense]:
            raise ValueError("dense is not the dense columns of the schema, in order")
        if unknown := set(self.splits) - set(SPLITS):
            raise ValueError(f"unknown split {sorted(unknown)[0]!r}; splits are {SPLITS}")
        return self

    @property
    def digest(self) -> str:
        """Content id, 32 hexadecimal digits.

        The same sources prepared with the same schema and settings give the same digest, however
        many workers, wherever the folder lies and however the rows are cut into shards.
        """
        content = {
            "version": self.version,
            "schema": self.schema_.model_dump(mode="json"),
            "tables": [
                [table.name, table.num_rows, table.vocabulary_digest] for table in self.tables
            ],
            "splits": {
                name: [split.num_rows, split.positives] for name, split in self.splits.items()
            },
            "sources": [[source.checksum, source.rows] for source in self.sources],
            "settings": self.settings,
        }
        return _digest(content)

    @property
    def features(self) -> dict[str, Any]:
        """What a model sees, as JSON: dense columns; name, rows, multi_hot, digest of tables."""
        return {
            "dense": [column.model_dump(mode="json") for column in self.schema_.dense],
            "tables": [
                [table.name, table.num_rows, table.multi_hot, table.vocabulary_digest]
                for table in self.tables
            ],
        }

    @property
    def features_digest(self) -> str:
        """Content id of `features`, 32 hexadecimal digits.

        Data sets that agree in it can be read by the same model: the one it was trained on, and
        new rows prepared with its vocabularies.
        """
        return _digest(self.features)

    def write(self, folder: Path) -> None:
        """Write `dataset.json` atomically: it appears complete or not at all."""
        content = self.model_dump(mode="json", by_alias=True) | {"digest": self.digest}
        write_json(folder / MANIFEST_FILE, content)


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_manifest(folder: Path) -> Manifest:
    """Read and check `dataset.json`.

    Raises:
        ValueError: there is no prepared data set, it is half-written, it was written by a newer
            version, or its manifest is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(_why_missing(folder)) from None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); prepare the data again") from None
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path}: no format version; this is not a prepared data set of dqrm")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {version} was written by a newer dqrm; this one reads up to "
            f"{FORMAT_VERSION}; upgrade dqrm or prepare the data again"
        )
    digest = content.pop("digest", None)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ValueError(f"{path}: {field}: {first['msg']}; prepare the data again") from None
    if digest != manifest.digest:
        raise ValueError(
            f"{path}: its digest does not match its content, so it was edited by hand; "
            "prepare the data again"
        )
    return manifest


def _why_missing(folder: Path) -> str:
    if folder.is_file():
        return f"{folder}: is a file; give the folder written by `dqrm data prepare`"
    if not folder.is_dir():
        return f"{folder}: no such folder; `dqrm data prepare` makes one"
    if (folder / WORK_FOLDER).exists():
        return (
            f"{folder}: its preparation has not finished; run the same `dqrm data prepare` again "
            "to continue"
        )
    return f"{folder}: no {MANIFEST_FILE} in it; give a folder written by `dqrm data prepare`"
