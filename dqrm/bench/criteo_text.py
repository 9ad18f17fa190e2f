"""Text with the shape of the Criteo Kaggle log, for timing what reads it."""

from pathlib import Path

import numpy as np

from dqrm.data.synth import CRITEO_KAGGLE_CARDINALITIES
from dqrm.data.teacher import DENSE_MISSING

CHUNK_ROWS = 50_000

CATEGORICAL_MISSING = {
    **dict.fromkeys((2, 3, 11, 15, 17, 20, 23), 0.035),
    **dict.fromkeys((18, 19, 24, 25), 0.45),
    5: 0.12,
    21: 0.82,
}
"""Share of empty fields by categorical column from 0, about as in the log."""

LETTERS = np.frombuffer(b"0123456789abcdef", np.uint8)


def write_criteo_text(path: Path, rows: int, seed: int = 0) -> None:
    """Write label, 13 counts and 26 values of eight hexadecimal digits a line, tab separated.

    Values are Zipf distributed over the cardinalities of the Kaggle log and empty as often as
    there; a line has about 240 bytes. The labels are coin flips: this is for speed, not quality.
    """
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="ascii") as file:
        for begin in range(0, rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, rows - begin)
            columns = [np.where(rng.random(count) < 0.256, "1", "0").tolist()]
            for missing in DENSE_MISSING:
                values = np.floor(np.exp(rng.normal(1.5, 2.0, count))).astype(np.int64)
                columns.append(_blank(values.astype(str), missing, rng))
            for number, cardinality in enumerate(CRITEO_KAGGLE_CARDINALITIES):
                ids = rng.zipf(1.2, count) % cardinality
                text = _hexadecimal(ids, number)
                columns.append(_blank(text, CATEGORICAL_MISSING.get(number, 0.0), rng))
            file.writelines("\t".join(line) + "\n" for line in zip(*columns, strict=True))


def _hexadecimal(ids: np.ndarray, column: int) -> np.ndarray:
    """Eight digits that look random but belong to the id."""
    mixed = (ids.astype(np.uint64) + np.uint64(column << 32)) * np.uint64(0x9E3779B97F4A7C15)
    digits = (mixed[:, None] >> (np.arange(8, dtype=np.uint64) * np.uint64(4) + np.uint64(32))) & 15
    return np.ascontiguousarray(LETTERS[digits.astype(np.intp)]).view("S8").ravel().astype(str)


def _blank(values: np.ndarray, missing: float, rng: np.random.Generator) -> list[str]:
    texts: list[str] = np.where(rng.random(len(values)) < missing, "", values).tolist()
    return texts
