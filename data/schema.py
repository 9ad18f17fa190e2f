"""What the columns of a data set mean: label, dense, categorical, optional time."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
    model_validator,
)

MAX_TABLE_ROWS = 2**31 - 1
"""Ids are int32."""

CRITEO_NUM_DENSE = 13
CRITEO_NUM_CATEGORICAL = 26
"""Criteo Kaggle and Terabyte: label, I1-I13, C1-C26, tab separated, no header."""

ColumnName = Annotated[str, StringConstraints(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _name_only(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class DenseColumn(_Strict):
    """A number per row; a missing one counts as 0."""

    name: ColumnName
    """Name of the column in the source."""

    transform: Literal["log1p", "none"] = "log1p"
    """log1p: log(1 + x) with negatives taken as 0; none: the number as it stands."""


class CategoricalColumn(_Strict):
    """One id (one-hot) or a list of ids (multi-hot) per row; one embedding table each."""

    name: ColumnName
    """Name of the column in the source."""

    multi_hot: bool = False
    """Whether a row holds a list of values."""

    hash_buckets: Annotated[int, Field(ge=1, le=MAX_TABLE_ROWS)] | None = None
    """Hash values into this many ids in place of a vocabulary; None builds a vocabulary."""

    min_frequency: PositiveInt | None = None
    """Values seen in fewer training look-ups than this share id 0; None keeps all."""

    max_size: Annotated[int, Field(ge=1, le=MAX_TABLE_ROWS - 1)] | None = None
    """Keep this many of the most frequent values, id 0 not counted; None keeps all."""

    @property
    def vocabulary_file(self) -> str:
        """File name of this column's vocabulary; any column name makes a legal one."""
        return quote(self.name, safe=" ") + ".npy"

    @model_validator(mode="after")
    def _hash_or_vocabulary(self) -> Self:
        if self.hash_buckets is not None and (self.min_frequency or self.max_size):
            raise ValueError(
                f"column {self.name!r}: hash_buckets keeps no vocabulary, so min_frequency and "
                "max_size do not apply; give one or the other"
            )
        return self


class Schema(_Strict):
    """The columns used from a source; all other columns are skipped.

    A dense or categorical column may be given by its name alone.
    """

    label: ColumnName
    """Column holding 0 or 1."""

    dense: tuple[Annotated[DenseColumn, BeforeValidator(_name_only)], ...] = ()
    """Numeric columns, in the order the model sees them."""

    categorical: tuple[Annotated[CategoricalColumn, BeforeValidator(_name_only)], ...] = ()
    """Categorical columns, in the order of the model's embedding tables."""

    time: ColumnName | None = None
    """Column to split by time: a number or an ISO date; it is not a feature."""

    list_separator: Annotated[str, Field(min_length=1, max_length=1)] = "|"
    """Character between the values of a multi-hot column that is held as text."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every column used: label, dense, categorical, time."""
        dense = [column.name for column in self.dense]
        categorical = [column.name for column in self.categorical]
        return (self.label, *dense, *categorical, *([] if self.time is None else [self.time]))

    @property
    def one_hot(self) -> tuple[CategoricalColumn, ...]:
        """Categorical columns with one value per row."""
        return tuple(column for column in self.categorical if not column.multi_hot)

    @property
    def multi_hot(self) -> tuple[CategoricalColumn, ...]:
        """Categorical columns with a list of values per row."""
        return tuple(column for column in self.categorical if column.multi_hot)

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        seen: set[str] = set()
        for name in self.names:
            if name in seen:
                raise ValueError(f"column {name!r} is used twice; each column has one role")
            seen.add(name)
        if not self.dense and not self.categorical:
            raise ValueError("no feature: name at least one dense or categorical column")
        return self

    def with_defaults(
        self,
        *,
        hash_buckets: int | None = None,
        min_frequency: int | None = None,
        max_size: int | None = None,
    ) -> "Schema":
        """Give these settings to every categorical column that sets none of them itself."""
        columns = tuple(
            column
            if column.hash_buckets or column.min_frequency or column.max_size
            else CategoricalColumn(
                name=column.name,
                multi_hot=column.multi_hot,
                hash_buckets=hash_buckets,
                min_frequency=min_frequency,
                max_size=max_size,
            )
            for column in self.categorical
        )
        return self.model_copy(update={"categorical": columns})

    def require_columns(self, available: Iterable[str], source: str) -> None:
        """Raise ValueError when `source` lacks a column, naming the nearest one it has."""
        names = list(available)
        for name in self.names:
            if name not in names:
                near = get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:20])}"
                raise ValueError(f"{source}: no column {name!r}; {hint}")


def criteo_schema() -> Schema:
    """Columns of the Criteo Kaggle and Terabyte logs: label, I1-I13, C1-C26."""
    return Schema(
        label="label",
        dense=tuple(DenseColumn(name=f"I{i}") for i in range(1, CRITEO_NUM_DENSE + 1)),
        categorical=tuple(
            CategoricalColumn(name=f"C{i}") for i in range(1, CRITEO_NUM_CATEGORICAL + 1)
        ),
    )
