"""Vocabularies of an earlier data set that those of new rows begin with.

Ids of the earlier set stay what they are; values it did not know get ids after all of its own, or
none. So a model trained on it reads the new rows, and only has to grow by rows for the new ids.
"""

from pathlib import Path
from typing import Any

from dqrm.data.manifest import VOCABULARY_FOLDER, Manifest, read_manifest
from dqrm.data.schema import Schema
from dqrm.data.vocabulary import Base

_READING = ("format", "header", "columns", "delimiter", "quote")
_POLICIES = ("min_frequency", "max_size")


def base_of(dataset: Path | str, *, grows: bool = True) -> tuple[Base, Manifest]:
    """The vocabularies of a prepared data set.

    Raises:
        ValueError: there is none.
    """
    folder = Path(dataset)
    manifest = read_manifest(folder)
    vocabularies = (folder / VOCABULARY_FOLDER).resolve()
    return Base(vocabularies, manifest.features_digest, grows), manifest


def inherited(manifest: Manifest) -> dict[str, Any]:
    """Settings of `PrepareConfig` by which other rows are read as those of a data set were.

    How often a value must come to get an id goes on as well; how rows are split does not.
    """
    settings = {name: manifest.settings[name] for name in _READING if name in manifest.settings}
    schema = manifest.schema_.model_dump(mode="json")
    for policy in _POLICIES:
        given = {column[policy] for column in schema["categorical"] if not column["hash_buckets"]}
        if len(given) == 1 and (value := given.pop()) is not None:
            # As a default, so that it can be set for all columns at once.
            settings[policy] = value
            for column in schema["categorical"]:
                column[policy] = None
    return {**settings, "schema": schema}


def require_same_features(schema: Schema, base: Schema, name: str) -> None:
    """Raise ValueError, naming the column, unless a model sees the same columns in both.

    name: what the base is called in the message.
    """
    for role, own, its in (
        ("dense", _dense(schema), _dense(base)),
        ("categorical", _categorical(schema), _categorical(base)),
    ):
        _require_alike(own, its, role, name)


def _dense(schema: Schema) -> list[tuple[str, str]]:
    return [(column.name, f"transform={column.transform}") for column in schema.dense]


def _categorical(schema: Schema) -> list[tuple[str, str]]:
    return [
        (column.name, f"multi_hot={column.multi_hot} and hash_buckets={column.hash_buckets}")
        for column in schema.categorical
    ]


def _require_alike(
    ours: list[tuple[str, str]], theirs: list[tuple[str, str]], role: str, name: str
) -> None:
    for place, (mine, its) in enumerate(zip(ours, theirs, strict=False)):
        if mine[0] != its[0]:
            raise ValueError(
                f"schema: {role} column {place + 1} is {mine[0]!r}, but {its[0]!r} in {name}; "
                "columns and their order must be those of the base"
            )
        if mine != its:
            raise ValueError(f"schema: column {mine[0]!r} has {mine[1]}, but {its[1]} in {name}")
    if len(ours) != len(theirs):
        raise ValueError(
            f"schema: {len(ours)} {role} columns, but {len(theirs)} in {name}; columns must be "
            "those of the base"
        )
