"""Settings of labelled sentences, and the rows they name."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from dqrm.pipelines.digests import file_digest
from dqrm.pipelines.stage import Problem
from dqrm.settings import Settings

if TYPE_CHECKING:
    from dqrm.pipelines.text.tables import Columns, Examples

_ROWS_CHECKED = 200


def _absent(value: Any) -> bool:
    return value is None


class TextData(Settings):
    """Labelled sentences, or pairs of them."""

    train: Path
    """TSV, CSV or Parquet with a header; text may be packed (.gz)."""

    dev: Path | None = None
    """What to select on; without it, some of the training rows."""

    dev_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the training rows to select on where dev is not given; the same ones for every
    seed."""

    test: Path | None = None
    """Measured once, with the selected model."""

    test_fraction: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        # A stage that was complete before there was this setting stays so.
        exclude_if=_absent,
    )
    """Share of the training rows to test on where there is no file of them; drawn before those of
    dev_fraction, the same ones for every seed. None tests nothing."""

    text: str | None = None
    """Column of the sentence; found by the names of GLUE's tasks when not given, the same ones in
    all files."""

    text_pair: str | None = None
    """Column of the second sentence, of pairs."""

    label: str | None = None
    """Column of the class or the score; label or score when not given."""

    format: Literal["auto", "tsv", "csv", "parquet"] = "auto"
    """auto goes by the name of the file. Quotes of TSV are literal, as GLUE writes them."""

    @model_validator(mode="after")
    def _tests_once(self) -> Self:
        if self.test is not None and self.test_fraction is not None:
            raise ValueError("set test or test_fraction: rows to test on come from one of them")
        return self

    def files(self) -> dict[str, Path]:
        """The files, by field."""
        given = {"train": self.train, "dev": self.dev, "test": self.test}
        return {name: path for name, path in given.items() if path is not None}

    def digests(self) -> dict[str, str]:
        """Digest of each file, by field."""
        return {name: file_digest(path) for name, path in self.files().items()}

    def problems(self) -> list[Problem]:
        """Files that are not there, lack a column or have faults in their first rows."""
        found: list[Problem] = []
        first, columns = {}, {}
        for name, path in self.files().items():
            if not path.is_file():
                found.append(Problem(f"data.{name}", f"{path}: no such file"))
                continue
            try:
                first[name], columns[name] = self._take(path, _ROWS_CHECKED)
                self._require_same(name, columns)
            except (OSError, ValueError) as error:
                found.append(Problem(f"data.{name}", str(error)))
        if found:
            return found
        try:
            self._split(first)
        except ValueError:
            # The rows behind them may be enough.
            try:
                self.read()
            except (OSError, ValueError) as error:
                return [Problem("data", str(error))]
        return []

    def read(self) -> "tuple[Examples, Examples, Examples | None]":
        """The rows to train on, to select on and to test on."""
        taken, columns = {}, {}
        for name, path in self.files().items():
            taken[name], columns[name] = self._take(path)
            self._require_same(name, columns)
        return self._split(taken)

    def _take(self, path: Path, rows: int | None = None) -> "tuple[Examples, Columns]":
        """The rows of a file, no more than ``rows`` of them where it is text, and their columns."""
        from dqrm.pipelines.text.tables import TEXTS, find_columns, read_table, take_examples

        texts = {*TEXTS} if self.text is None else {self.text}
        if self.text_pair is not None:
            texts.add(self.text_pair)
        frame = read_table(path, self.format, rows, texts - {self.label})
        columns = find_columns(frame, str(path), self.text, self.text_pair, self.label)
        return take_examples(frame, columns, str(path)), columns

    def _require_same(self, name: str, columns: "Mapping[str, Columns]") -> None:
        """Hold the texts of a file against those of the training rows, where they were found.

        Raises:
            ValueError: they are in other columns: pairs beside single sentences, say.
        """
        own, wanted = columns[name], columns.get("train", columns[name])
        if (own.text, own.text_pair) != (wanted.text, wanted.text_pair):
            raise ValueError(
                f"{self.files()[name]}: {own}; {self.train}: {wanted}; name the texts alike, or "
                "set data.text and data.text_pair to columns that both have"
            )

    def _split(self, taken: "dict[str, Examples]") -> "tuple[Examples, Examples, Examples | None]":
        """The rows of each split, from those of each file."""
        from dqrm.pipelines.text.tables import split_examples

        train, test, where = taken["train"], taken.get("test"), str(self.train)
        if self.test_fraction is not None:
            train, test = split_examples(train, self.test_fraction, where, "data.test")
        dev = taken.get("dev")
        if dev is None:
            train, dev = split_examples(train, self.dev_fraction, where, "data.dev")
        return train, dev, test
