"""Real click logs through the native parser, against the plain one and against pandas."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dqrm.kernels.delimited import Field, ParsedRows, Plan, Role, parse_delimited

NAMES = ["label"] + [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
PLAN = Plan(
    (
        Field(Role.LABEL),
        *(Field(Role.DENSE, log1p=True),) * 13,
        *(Field(Role.CATEGORICAL), Field(Role.CATEGORICAL, buckets=100_003)) * 13,
    )
)


@pytest.mark.parametrize(
    ("name", "rows", "positives"),
    [("criteo_kaggle_12k.tsv.gz", 12_000, 2_618), ("criteo_terabyte_1k.tsv.gz", 1_000, 21)],
    ids=["kaggle", "terabyte"],
)
def test_criteo_is_parsed_as_the_reference_does(
    ctr_data: Path,
    parse_checked: Callable[..., ParsedRows],
    name: str,
    rows: int,
    positives: int,
) -> None:
    parsed = parse_checked(gzip.decompress((ctr_data / name).read_bytes()), PLAN)
    assert (parsed.rows, parsed.lines, parsed.malformed_count) == (rows, rows, 0)
    assert parsed.label.sum() == positives


def test_criteo_means_what_pandas_reads(ctr_data: Path) -> None:
    import pandas as pd

    path = ctr_data / "criteo_kaggle_12k.tsv.gz"
    frame = pd.read_csv(path, sep="\t", names=NAMES, dtype=dict.fromkeys(NAMES[14:], str))
    parsed = parse_delimited(gzip.decompress(path.read_bytes()), PLAN)
    np.testing.assert_array_equal(parsed.missing, frame.isna().sum().to_numpy()[1:])
    for column, name in zip(parsed.dense, NAMES[1:14], strict=True):
        # One rounding to float32; before it numpy's log1p may be off by a double's last bit.
        expected = np.log1p(frame[name].fillna(0).clip(lower=0).to_numpy())
        np.testing.assert_allclose(column, expected, rtol=2**-23)
    for column, name in zip(parsed.ids[::2], NAMES[14::2], strict=True):
        codes, _ = pd.factorize(frame[name].fillna(""))
        np.testing.assert_array_equal(column, codes)
