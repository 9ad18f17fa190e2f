"""Labelled sentences, or pairs of them, from TSV, CSV and Parquet files and data frames."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

Format = Literal["auto", "tsv", "csv", "parquet"]
Task = Literal["auto", "classification", "regression"]

_PACKED = (".gz", ".bz2", ".xz", ".zst")
# Pairs first: a table of pairs may also have a column that single sentences use.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence", None),
    ("text", None),
)
_LABEL_COLUMNS = ("label", "score")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    text: str
    text_pair: str | None
    label: str


@dataclass(frozen=True)
class Examples:
    """Rows of a table."""

    text: list[str]
    text_pair: list[str] | None
    labels: pd.Series

    def __len__(self) -> int:
        return len(self.text)

    def take(self, rows: Sequence[int]) -> "Examples":
        """Some of the rows."""
        pair = self.text_pair
        return Examples(
            [self.text[row] for row in rows],
            None if pair is None else [pair[row] for row in rows],
            self.labels.iloc[list(rows)],
        )


def read_table(path: Path, form: Format = "auto", rows: int | None = None) -> pd.DataFrame:
    """Read a table.

    TSV is read as GLUE writes it: quotes are literal. No text counts as a missing value.

    Args:
        path: the file; text may be packed (.gz, .bz2, .xz, .zst).
        form: told by the name of the file if auto.
        rows: read no more than these, of text files.

    Raises:
        ValueError: the form is not known, or the file is not of that form: cut off, say, or with
            rows longer than its header.
    """
    if form == "auto":
        name = path.name
        for packed in _PACKED:
            name = name.removesuffix(packed)
        form = {".tsv": "tsv", ".csv": "csv", ".parquet": "parquet"}.get(  # type: ignore[assignment]
            Path(name).suffix, "auto"
        )
    try:
        if form == "tsv":
            return _without_index(
                pd.read_csv(path, sep="\t", quoting=3, keep_default_na=False, nrows=rows)
            )
        if form == "csv":
            return _without_index(pd.read_csv(path, keep_default_na=False, nrows=rows))
        if form == "parquet":
            return pd.read_parquet(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a {form} table: {error}") from error
    raise ValueError(f"{path}: cannot tell its format by its name; say tsv, csv or parquet")


def _without_index(frame: pd.DataFrame) -> pd.DataFrame:
    """Refuse what pandas took for an index: fields of the first row that the header does not name.

    Rows behind it that are longer than the header are an error of pandas, which names the line.
    """
    if not isinstance(frame.index, pd.RangeIndex):
        named = len(frame.columns)
        raise ValueError(
            f"row 1, after the header, has {named + frame.index.nlevels} fields and the header "
            f"{named}: name all columns, or take out what is too many"
        )
    return frame


def find_columns(
    frame: pd.DataFrame,
    where: str,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
) -> Columns:
    """Return the columns given, or those that GLUE's tasks use.

    Raises:
        ValueError: they are not there; ``where`` begins the message.
    """
    there = [str(column) for column in frame.columns]
    if text is None:
        found = [
            pair for pair in _TEXT_COLUMNS if all(name is None or name in there for name in pair)
        ]
        if not found:
            raise ValueError(f"{where}: which column is the text? there are: {', '.join(there)}")
        text, pair = found[0]
        text_pair = pair if text_pair is None else text_pair
    if label is None:
        label = next((name for name in _LABEL_COLUMNS if name in there), None)
        if label is None:
            raise ValueError(f"{where}: which column is the label? there are: {', '.join(there)}")
    for name in (text, text_pair, label):
        if name is not None and name not in there:
            raise ValueError(f"{where}: no column '{name}'; there are: {', '.join(there)}")
    return Columns(text, text_pair, label)


def take_examples(frame: pd.DataFrame, columns: Columns, where: str) -> Examples:
    """Return the rows of a table.

    Raises:
        ValueError: there are none, or a label is missing; ``where`` begins the message.
    """
    if frame.empty:
        raise ValueError(f"{where}: has no rows")
    labels = frame[columns.label]
    missing = labels.isna() | (labels.astype(str) == "")
    if missing.any():
        raise ValueError(f"{where}: row {int(missing.to_numpy().argmax()) + 1} has no label")
    pair = columns.text_pair
    return Examples(
        frame[columns.text].astype(str).tolist(),
        None if pair is None else frame[pair].astype(str).tolist(),
        labels.reset_index(drop=True),
    )


def split_examples(
    examples: Examples, fraction: float, where: str, field: str
) -> tuple[Examples, Examples]:
    """Return the other rows, and a ``fraction`` of them drawn once and for all.

    Args:
        examples: to draw from.
        fraction: of them, more than 0 and less than 1.
        where: the file they are from, for messages.
        field: the setting of a file that makes drawing needless, for messages.

    Raises:
        ValueError: there are too few; ``where`` begins the message.
    """
    count = round(fraction * len(examples))
    if not 0 < count < len(examples):
        raise ValueError(
            f"{where}: {fraction:g} of {len(examples)} rows cannot be set apart; give {field}"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    return examples.take(sorted(order[count:])), examples.take(sorted(order[:count]))


@dataclass(frozen=True)
class Labels:
    """What a model learns to say."""

    classes: tuple[str, ...] | None
    """Names of the classes, in the order of the model's outputs; None for a regression."""

    @classmethod
    def of(cls, labels: pd.Series, task: Task, where: str) -> "Labels":
        """Learn the classes from training labels; fractions among them mean a regression."""
        numeric = pd.api.types.is_numeric_dtype(labels)
        if task == "auto":
            whole = numeric and bool((labels == labels.round()).all())
            task = "classification" if whole or not numeric else "regression"
        if task == "regression":
            if not numeric:
                raise ValueError(f"{where}: the labels of a regression must be numbers")
            return cls(None)
        ordered = sorted(labels.unique())
        if len(ordered) < 2:
            raise ValueError(f"{where}: has one class only, {ordered[0]}")
        return cls(tuple(_class_name(value) for value in ordered))

    @property
    def num_outputs(self) -> int:
        """Width of the model's head."""
        return 1 if self.classes is None else len(self.classes)

    def ordered_as(self, names: Iterable[str]) -> "Labels":
        """The same classes in the order of ``names``; as they are where those name other ones.

        Names that differ in upper and lower case alone are one, unless two classes do.
        """
        wanted = list(names)
        for key in (str, str.casefold):
            own = {key(name): name for name in self.classes or ()}
            if len(own) == self.num_outputs and sorted(map(key, wanted)) == sorted(own):
                return Labels(tuple(own[key(name)] for name in wanted))
        return self

    def encode(self, labels: pd.Series, where: str) -> torch.Tensor:
        """Labels as int64 classes [rows], or float32 values [rows].

        Raises:
            ValueError: a class was never trained on; ``where`` begins the message.
        """
        if self.classes is None:
            return torch.tensor(pd.to_numeric(labels).to_numpy(dtype="float32"))
        index = {name: position for position, name in enumerate(self.classes)}
        names = [_class_name(value) for value in labels]
        unknown = sorted(set(names) - set(index))
        if unknown:
            raise ValueError(
                f"{where}: label {unknown[0]} is not in the training data, which has "
                f"{', '.join(self.classes)}"
            )
        return torch.tensor([index[name] for name in names])


def _class_name(value: object) -> str:
    # A column of whole numbers may be read as 1 in one file and as 1.0 in another.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
