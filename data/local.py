"""Rows of one shard whose categorical ids still count the values of that shard alone."""

from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from dqrm.data.config import PrepareConfig
from dqrm.data.rows import Lists, Rows
from dqrm.data.schema import CategoricalColumn, Schema
from dqrm.kernels.plan import Field, Malformed, ParsedRows, Plan, Role

T = TypeVar("T", bound=np.generic)

Remap: TypeAlias = "npt.NDArray[np.int32] | None"
"""Global id of every local id of a column; None leaves ids (hash buckets) as they are."""


def table_columns(schema: Schema) -> tuple[CategoricalColumn, ...]:
    """Categorical columns in the order of `Rows`: one-hot, then multi-hot."""
    return (*schema.one_hot, *schema.multi_hot)


@dataclass(frozen=True)
class LocalRows:
    """n well-formed rows, columns in the order of the schema, one-hot before multi-hot."""

    rows: Rows
    """Ids are hash buckets, or positions in `keys`."""
    time: npt.NDArray[np.float64] | None
    """[n]"""
    keys: tuple[npt.NDArray[np.uint64] | None, ...]
    """Distinct keys of each table column; None where it is hashed."""
    missing: npt.NDArray[np.int64]
    """Empty fields: dense columns, then table columns."""
    lines: int
    """Lines read, malformed ones included."""
    malformed: tuple[Malformed, ...]
    """The first malformed lines."""
    malformed_count: int
    """All malformed lines."""


def text_plan(columns: tuple[str, ...], schema: Schema, config: PrepareConfig) -> Plan:
    """How to parse a text file with these columns; schema has its defaults filled in."""
    fields = {schema.label: Field(Role.LABEL)}
    for dense in schema.dense:
        fields[dense.name] = Field(Role.DENSE, log1p=dense.transform == "log1p")
    for column in schema.categorical:
        role = Role.MULTI_HOT if column.multi_hot else Role.CATEGORICAL
        fields[column.name] = Field(role, buckets=column.hash_buckets or 0)
    if schema.time is not None:
        fields[schema.time] = Field(Role.TIME)
    return Plan(
        fields=tuple(fields.get(name, Field(Role.SKIP)) for name in columns),
        delimiter=config.field_delimiter,
        quote=config.field_quote,
        list_separator=schema.list_separator,
    )


def in_schema_order(parsed: ParsedRows, columns: tuple[str, ...], schema: Schema) -> LocalRows:
    """Parsed columns, which come in the order of the file, in the order of the schema."""
    place = {name: at for at, name in enumerate(columns)}

    def order(names: list[str]) -> list[int]:
        """For each of `names`, which one of them in file order it is."""
        by_place = sorted(names, key=place.__getitem__)
        return [by_place.index(name) for name in names]

    dense = order([column.name for column in schema.dense])
    one_hot = order([column.name for column in schema.one_hot])
    lists = order([column.name for column in schema.multi_hot])
    tables = [*one_hot, *(len(one_hot) + m for m in lists)]
    rows = Rows(
        parsed.label,
        _reordered(parsed.dense, dense),
        _reordered(parsed.ids, one_hot),
        tuple(Lists(*parsed.lists[m]) for m in lists),
    )
    return LocalRows(
        rows,
        parsed.time,
        tuple(parsed.unique_keys[t] for t in tables),
        parsed.missing[[*dense, *(len(dense) + t for t in tables)]],
        parsed.lines,
        tuple(parsed.malformed),
        parsed.malformed_count,
    )


def _reordered(matrix: npt.NDArray[T], order: list[int]) -> npt.NDArray[T]:
    return matrix if order == list(range(len(order))) else matrix[order]


def to_global(rows: Rows, remaps: tuple[Remap, ...]) -> Rows:
    """Replace local ids, in place, by the ids of the vocabularies; one remap a table column."""
    for ids, remap in zip(rows.one_hot, remaps, strict=False):
        if remap is not None:
            # Local ids are in range by construction; clip skips numpy's slower check.
            ids[:] = np.take(remap, ids, mode="clip")
    lists = tuple(
        column if remap is None else Lists(column.offsets, remap[column.ids])
        for column, remap in zip(rows.lists, remaps[len(rows.one_hot) :], strict=True)
    )
    return Rows(rows.label, rows.dense, rows.one_hot, lists)
