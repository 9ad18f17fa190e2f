"""How raw rows become a prepared data set."""

import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from dqrm.data.schema import MAX_TABLE_ROWS, Schema, criteo_schema

BLOCK_BYTES = 64 * 1024
"""Unit of the source checksum; text shards begin at multiples of it."""

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )


class _Carved(_Strict):
    validation_fraction: Share = 0.0
    """Share of the training rows moved to validation; only when no validation is named."""

    seed: NonNegativeInt = 0
    """Decides which training rows move."""

    def _one_validation(self, named: bool) -> Self:
        if named and self.validation_fraction:
            raise ValueError(
                "split.validation_fraction takes validation from the training rows; it does not "
                "go with a validation that is named"
            )
        return self


class FractionSplit(_Strict):
    """Each row goes to a split by chance, the same for the same seed."""

    by: Literal["fraction"] = "fraction"
    """Kind of split."""

    validation: Share = 0.1
    """Share of rows for validation."""

    test: Share = 0.1
    """Share of rows for the test; 0 makes no test split."""

    seed: NonNegativeInt = 0
    """Decides which rows."""

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Self:
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"split.validation + split.test = {self.validation + self.test:g}: must be below "
                "1, the rest is for training"
            )
        return self


class RowsSplit(_Carved):
    """The last rows, in the order of the sources, are the test; those before it validation."""

    by: Literal["rows"] = "rows"
    """Kind of split."""

    validation: NonNegativeFloat = 0.0
    """Rows for validation: a share when below 1, else a number of rows."""

    test: NonNegativeFloat = 0.1
    """Rows for the test: a share when below 1, else a number of rows; 0 makes no test split."""

    @model_validator(mode="after")
    def _whole_counts(self) -> Self:
        for name, value in (("validation", self.validation), ("test", self.test)):
            if value >= 1.0 and value != int(value):
                raise ValueError(f"split.{name}={value:g}: give a share below 1 or whole rows")
        return self._one_validation(bool(self.validation))


class FileSplit(_Carved):
    """Whole source files are validation or test; the others train."""

    by: Literal["file"] = "file"
    """Kind of split."""

    validation: tuple[str, ...] = ()
    """Glob patterns of file names (or paths) for validation."""

    test: tuple[str, ...] = ()
    """Glob patterns of file names (or paths) for the test."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        return self._one_validation(bool(self.validation))


def parse_moment(text: str) -> float:
    """A number as it stands, or an ISO date as epoch seconds (UTC where it names no zone).

    Raises:
        ValueError: it is neither.
    """
    try:
        value = float(text)
        if math.isfinite(value):
            return value
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a number nor an ISO date") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _moment(value: Any) -> Any:
    return parse_moment(value) if isinstance(value, str) else value


Moment = Annotated[float, BeforeValidator(_moment)]


class TimeSplit(_Carved):
    """Earlier rows train, later rows validate and test; the schema names the time column."""

    by: Literal["time"] = "time"
    """Kind of split."""

    validation_from: Moment | None = None
    """Rows from this time on are validation: a number, or an ISO date (UTC)."""

    test_from: Moment | None = None
    """Rows from this time on are the test: a number, or an ISO date (UTC)."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.validation_from is None and self.test_from is None:
            raise ValueError("split.by=time: give split.test_from or split.validation_from")
        if (
            self.validation_from is not None
            and self.test_from is not None
            and self.validation_from >= self.test_from
        ):
            raise ValueError(
                f"split.validation_from={self.validation_from:g} is not before "
                f"split.test_from={self.test_from:g}"
            )
        return self._one_validation(self.validation_from is not None)


SplitConfig = Annotated[
    FractionSplit | RowsSplit | FileSplit | TimeSplit, Field(discriminator="by")
]


def _preset(value: Any) -> Any:
    return criteo_schema() if value == "criteo" else value


class PrepareConfig(_Strict):
    """Everything that decides what `dqrm data prepare` writes, sources apart."""

    schema_: Annotated[Schema, BeforeValidator(_preset)] = Field(
        default_factory=criteo_schema, alias="schema"
    )
    """The columns and their roles; `criteo` names the Criteo logs' own."""

    format: Literal["criteo", "criteo-terabyte", "csv", "tsv", "parquet"] = "criteo"
    """Layout of the source files. Text may be plain, gzip or zstd. Both Criteo logs are alike."""

    header: bool | None = None
    """Whether the first line of a file names its columns; csv and tsv: yes unless told."""

    columns: tuple[str, ...] | None = None
    """Columns of a text file without header, in order; label, dense, categorical, time of the
    schema unless told."""

    delimiter: str | None = None
    """Character between fields; a comma for csv, else a tab."""

    quote: str | None = None
    """Character around fields that hold a delimiter; csv: a double quote unless told, "" none."""

    split: SplitConfig = FractionSplit()
    """Which rows train, validate and test."""

    max_malformed: NonNegativeFloat = 0.001
    """Malformed lines that are left out before preparation fails: a share of all lines when below
    1, else a number of lines. With a share, a shard that is mostly malformed fails at once."""

    hash_buckets: Annotated[int, Field(ge=1, le=MAX_TABLE_ROWS)] | None = None
    """For categorical columns that do not say: hash into this many ids, keep no vocabulary."""

    min_frequency: PositiveInt | None = None
    """For categorical columns that do not say: rarer values share id 0."""

    max_size: PositiveInt | None = None
    """For categorical columns that do not say: keep this many of the most frequent values."""

    shard_bytes: Annotated[int, Field(ge=BLOCK_BYTES, multiple_of=BLOCK_BYTES)] = 64 * 1024 * 1024
    """Text per shard, uncompressed; a multiple of 64 KiB."""

    shard_rows: PositiveInt = 250_000
    """Rows per shard of Parquet files and frames."""

    merge_bytes: Annotated[int, Field(ge=1024 * 1024)] = 512 * 1024 * 1024
    """Memory for merging vocabularies, all workers together."""

    workers: PositiveInt | None = None
    """Processes; the cores this process may use when not given."""

    @property
    def resolved_schema(self) -> Schema:
        """The schema with the defaults for categorical columns filled in."""
        return self.schema_.with_defaults(
            hash_buckets=self.hash_buckets,
            min_frequency=self.min_frequency,
            max_size=self.max_size,
        )

    @property
    def has_header(self) -> bool:
        """Whether text files begin with the names of their columns."""
        return self.format in ("csv", "tsv") if self.header is None else self.header

    @property
    def field_delimiter(self) -> str:
        """The character between fields."""
        return self.delimiter or ("," if self.format == "csv" else "\t")

    @property
    def field_quote(self) -> str | None:
        """The character around fields, if any."""
        if self.quote is None:
            return '"' if self.format == "csv" else None
        return self.quote or None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_malformed >= 1.0 and self.max_malformed != int(self.max_malformed):
            raise ValueError(
                f"max_malformed={self.max_malformed:g}: give a share below 1 or whole lines"
            )
        if self.hash_buckets is not None and (self.min_frequency or self.max_size):
            raise ValueError(
                "hash_buckets keeps no vocabulary, so min_frequency and max_size do not apply; "
                "give one or the other"
            )
        if self.split.by == "time" and self.schema_.time is None:
            raise ValueError("split.by=time: schema.time must name the column to split by")
        if self.format.startswith("criteo"):
            for name in ("header", "columns", "delimiter", "quote"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: format {self.format} fixes it; use csv or tsv")
            self.schema_.require_columns(criteo_schema().names, f"format {self.format}")
        if self.format == "parquet":
            for name in ("header", "columns", "delimiter", "quote"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: a Parquet file has none to choose")
        if self.columns is not None:
            if self.has_header:
                raise ValueError("columns: only for files without header; set header=false")
            self.schema_.require_columns(self.columns, "columns")
        return self
