"""Labelled sentences, or pairs of them, from TSV, CSV and Parquet files and data frames."""

import io
import lzma
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import zstandard

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
TEXTS = frozenset(name for pair in _TEXT_COLUMNS for name in pair if name is not None)
"""Columns that are taken for texts where none are named."""

_NAMES_TOLD = 5
_NAME_LENGTH = 40


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    text: str
    text_pair: str | None
    label: str

    def __str__(self) -> str:
        """For people."""
        texts = self.text if self.text_pair is None else f"{self.text} and {self.text_pair}"
        return f"text in {texts}, label in {self.label}"


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


def read_table(
    path: Path,
    form: Format = "auto",
    rows: int | None = None,
    texts: Collection[str] = TEXTS,
) -> pd.DataFrame:
    """Read a table.

    TSV is read as GLUE writes it: quotes are literal. No text counts as a missing value.

    Args:
        path: the file; text may be packed (.gz, .bz2, .xz, .zst).
        form: told by the name of the file if auto.
        rows: read no more than these, of text files.
        texts: columns of text files to read as they are written; what others hold is guessed.

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
        if form in ("tsv", "csv"):
            quoting: dict[str, Any] = {"sep": "\t", "quoting": 3} if form == "tsv" else {}
            source = _zstd_text(path) if path.suffix == ".zst" else path
            # Read in parts, a column may hold numbers of one part beside text of another.
            return _without_index(
                pd.read_csv(
                    source,
                    keep_default_na=False,
                    low_memory=False,
                    nrows=rows,
                    # Else 00001 is 1 in a file that has numbers alone.
                    dtype=dict.fromkeys(texts, str),
                    **quoting,
                )
            )
        if form == "parquet":
            return pd.read_parquet(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a {form} table: {error}") from error
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # What unpacks names no file.
        raise ValueError(f"{path}: cut off or damaged: {error}; copy it again") from error
    raise ValueError(f"{path}: cannot tell its format by its name; say tsv, csv or parquet")


def _zstd_text(path: Path) -> io.BytesIO:
    """Unpack all frames: pandas takes what there is of a file that is cut off for all of it."""
    packed, text = path.read_bytes(), io.BytesIO()
    while packed:
        frame = zstandard.ZstdDecompressor().decompressobj()
        text.write(frame.decompress(packed))
        if not frame.eof:
            raise EOFError("it ends within a frame")
        packed = frame.unused_data
    text.seek(0)
    return text


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
        ValueError: there are none, or a text or a label is missing or not a single value;
            ``where`` begins the message.
    """
    if frame.empty:
        raise ValueError(f"{where}: has no rows")
    labels = frame[columns.label]
    for row, value in enumerate(labels, start=1):
        if not pd.api.types.is_scalar(value):
            raise ValueError(f"{where}: row {row}: label {value!r} is not a single value")
        if pd.isna(value) or value == "":
            raise ValueError(f"{where}: row {row} has no label; add it, or take the row out")
    pair = columns.text_pair
    return Examples(
        _texts(frame, columns.text, where),
        None if pair is None else _texts(frame, pair, where),
        labels.reset_index(drop=True),
    )


def _texts(frame: pd.DataFrame, column: str, where: str) -> list[str]:
    """A column of texts; they may be empty, and Parquet may hold numbers."""
    for row, value in enumerate(frame[column], start=1):
        if isinstance(value, bytes) or not pd.api.types.is_scalar(value):
            raise ValueError(f"{where}: row {row}: {column} {value!r} is no text")
        if pd.isna(value):
            raise ValueError(f"{where}: row {row} has no {column}; add it, or take the row out")
    return frame[column].astype(str).tolist()


def split_examples(
    examples: Examples, fraction: float, where: str, field: str
) -> tuple[Examples, Examples]:
    """Return the other rows, and a ``fraction`` of them drawn once and for all.

    Args:
        examples: to draw from.
        fraction: of them, more than 0 and less than 1.
        where: the file they are from, for messages.
        field: the setting of a file that makes drawing needless, for messages; that of the
            fraction is called so as well, ``_fraction`` behind it.

    Raises:
        ValueError: there are too few; ``where`` begins the message.
    """
    count = round(fraction * len(examples))
    if not 0 < count < len(examples):
        raise ValueError(
            f"{where}: {fraction:g} of {len(examples)} rows cannot be set apart; change "
            f"{field}_fraction, or give {field}"
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
        """Learn the classes from training labels; fractions among them mean a regression.

        Raises:
            ValueError: labels are of one class, or do not fit the task: a regression takes finite
                numbers, and ``auto`` no column in which most labels are and some are not.
        """
        if task == "auto":
            values = _numbers(labels)
            finite = _finite(values)
            if 2 * np.isnan(values).sum() < len(labels) and not finite.all():
                advice = "correct it, take the row out, or set task: classification"
                raise _no_number(labels, finite, where, advice)
            whole = not finite.all() or bool((values == values.round()).all())
            task = "classification" if whole else "regression"
        if task == "regression":
            _finite_numbers(labels, where)
            return cls(None)
        try:
            ordered = sorted(labels.unique())
        except TypeError as error:
            raise ValueError(f"{where}: labels are of several types: {error}") from error
        if len(ordered) < 2:
            raise ValueError(f"{where}: has one class only, {_short(ordered[0])}")
        return cls(tuple(_class_name(value) for value in ordered))

    def __str__(self) -> str:
        """For people."""
        if self.classes is None:
            return "regression"
        return f"classification, {len(self.classes)} classes ({_listed(self.classes)})"

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
            ValueError: a class was never trained on, or a value is no finite number; ``where``
                begins the message.
        """
        if self.classes is None:
            return torch.tensor(_finite_numbers(labels, where).astype("float32"))
        index = {name: position for position, name in enumerate(self.classes)}
        names = [_class_name(value) for value in labels]
        known = np.array([name in index for name in names])
        if not known.all():
            row, label = _first(labels, ~known)
            raise ValueError(
                f"{where}: row {row}: label '{_short(label)}' is not in the training data, which "
                f"has {_listed(self.classes)}"
            )
        return torch.tensor([index[name] for name in names])


def _numbers(labels: pd.Series) -> np.ndarray:
    """Labels as float64 [rows]; NaN where one is no number."""
    return pd.to_numeric(labels, errors="coerce").to_numpy(dtype="float64", na_value=np.nan)


def _finite(values: np.ndarray) -> np.ndarray:
    """Which of the values FP32 can hold, bool [rows]."""
    held: np.ndarray = np.abs(values) <= np.finfo(np.float32).max
    return held


def _finite_numbers(labels: pd.Series, where: str) -> np.ndarray:
    """The values of a regression, float64 [rows]."""
    values = _numbers(labels)
    finite = _finite(values)
    if not finite.all():
        raise _no_number(labels, finite, where, "correct it, or take the row out")
    return values


def _no_number(labels: pd.Series, finite: np.ndarray, where: str, advice: str) -> ValueError:
    row, label = _first(labels, ~finite)
    return ValueError(f"{where}: row {row}: label '{_short(label)}' is no finite number; {advice}")


def _first(labels: pd.Series, wrong: np.ndarray) -> tuple[int, object]:
    """The first of the wrong labels, and its row in the file: labels keep theirs when drawn."""
    position = int(wrong.argmax())
    return int(labels.index[position]) + 1, labels.iloc[position]


def _listed(names: Sequence[str]) -> str:
    """Names of classes for people: a wrong column may have thousands, whole sentences each."""
    told = ", ".join(map(_short, names[:_NAMES_TOLD]))
    return told if len(names) <= _NAMES_TOLD else f"{told} and {len(names) - _NAMES_TOLD:,} others"


def _short(label: object) -> str:
    text = str(label)
    return text if len(text) <= _NAME_LENGTH else f"{text[:_NAME_LENGTH]}..."


def _class_name(value: object) -> str:
    # A column of whole numbers may be read as 1 in one file and as 1.0 in another.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
