"""Which split a row belongs to: decided per row, whatever process looks at it."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dqrm.data.config import FileSplit, FractionSplit, RowsSplit, SplitConfig, TimeSplit

TRAIN, VALIDATION, TEST = 0, 1, 2
"""Codes of the splits, in the order of manifest.SPLITS."""

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of SplitMix64 (Steele, Lea and Flood 2014), a hash of consecutive numbers."""


class ShardKey(NamedTuple):
    """Names a shard of the sources; sorting keys gives the order of the rows."""

    file: int
    """Index of the source."""
    part: int
    """Part of the source that one task reads."""
    number: int
    """Shard within the part."""

    def __str__(self) -> str:
        return f"{self.file:05d}-{self.part:05d}-{self.number:05d}"


def assign(
    split: SplitConfig,
    key: ShardKey,
    num_rows: int,
    *,
    file_code: int,
    time: npt.NDArray[np.float64] | None,
    first_row: int | None,
    total_rows: int | None,
) -> U8:
    """Split codes, uint8 [num_rows], of the rows of one shard.

    file_code: split of the shard's file, where the split goes by file.
    first_row, total_rows: place of the shard among all rows, where the split goes by rows; until
    they are known (None) every row counts as a training row.
    """
    codes = np.zeros(num_rows, np.uint8)
    if isinstance(split, FractionSplit):
        chance = row_hash(split.seed, key, num_rows)
        codes[chance < _threshold(split.test + split.validation)] = VALIDATION
        codes[chance < _threshold(split.test)] = TEST
        return codes
    if split.validation_fraction:
        chance = row_hash(split.seed, key, num_rows)
        codes[chance < _threshold(split.validation_fraction)] = VALIDATION
    if isinstance(split, FileSplit):
        if file_code != TRAIN:
            codes[:] = file_code
    elif isinstance(split, TimeSplit):
        assert time is not None
        if split.validation_from is not None:
            codes[time >= split.validation_from] = VALIDATION
        if split.test_from is not None:
            codes[time >= split.test_from] = TEST
    elif total_rows is not None and first_row is not None:
        validation, test = row_borders(split, total_rows)
        codes[max(validation - first_row, 0) :] = VALIDATION
        codes[max(test - first_row, 0) :] = TEST
    return codes


def row_borders(split: RowsSplit, total_rows: int) -> tuple[int, int]:
    """First validation row and first test row among `total_rows`.

    Raises:
        ValueError: no row is left for training.
    """
    test_rows = _count(split.test, total_rows)
    validation_rows = _count(split.validation, total_rows)
    if test_rows + validation_rows >= total_rows:
        raise ValueError(
            f"split: {validation_rows} validation and {test_rows} test rows leave none of "
            f"{total_rows} for training"
        )
    return total_rows - test_rows - validation_rows, total_rows - test_rows


def _count(share: float, total: int) -> int:
    return round(share * total) if share < 1.0 else int(share)


def file_codes(split: SplitConfig, names: Sequence[str]) -> list[int]:
    """Split code of every source, where the split goes by file; else all are training.

    Raises:
        ValueError: a pattern matches no file, a file is both, or none is left for training.
    """
    codes = [TRAIN] * len(names)
    if not isinstance(split, FileSplit):
        return codes
    for code, field in ((VALIDATION, "validation"), (TEST, "test")):
        for pattern in getattr(split, field):
            found = [
                i
                for i, name in enumerate(names)
                if fnmatch(name, pattern) or fnmatch(Path(name).name, pattern)
            ]
            if not found:
                raise ValueError(f"split.{field}: no source matches {pattern!r}")
            for i in found:
                if codes[i] not in (TRAIN, code):
                    raise ValueError(f"{names[i]}: matches split.validation and split.test")
                codes[i] = code
    if TRAIN not in codes:
        raise ValueError("split: the patterns leave no file for training")
    return codes


def row_hash(seed: int, key: ShardKey, num_rows: int) -> U64:
    """A number per row, uniform over uint64, that depends on seed, shard and row alone."""
    state = seed
    for number in key:
        state = _mix_number((state + _GOLDEN) ^ number)
    rows = np.arange(1, num_rows + 1, dtype=np.uint64)
    # Unsigned arrays wrap around, which is what the hash wants.
    rows *= np.uint64(_GOLDEN)
    rows += np.uint64(state)
    rows ^= rows >> np.uint64(30)
    rows *= np.uint64(_MIX[0])
    rows ^= rows >> np.uint64(27)
    rows *= np.uint64(_MIX[1])
    rows ^= rows >> np.uint64(31)
    return rows


def _mix_number(state: int) -> int:
    mask = 2**64 - 1
    state &= mask
    state = ((state ^ (state >> 30)) * _MIX[0]) & mask
    state = ((state ^ (state >> 27)) * _MIX[1]) & mask
    return state ^ (state >> 31)


def _threshold(share: float) -> np.uint64:
    return np.uint64(int(share * 2.0**64))
