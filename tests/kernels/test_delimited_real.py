"""Real click logs through the native parser, against the plain one and against pandas."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dqrm.kernels.delimited import Field, ParsedRows, Plan, Role

CRITEO_NAMES = ["label"] + [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]


def criteo_plan(buckets: int = 0) -> Plan:
    dense = (Field(Role.DENSE, log1p=True),) * 13
    return Plan((Field(Role.LABEL), *dense, *(Field(Role.CATEGORICAL, buckets),) * 26))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("buckets", [0, 100_003], ids=["dictionary", "hashed"])
@pytest.mark.parametrize(
    ("name", "rows", "positives"),
    [("criteo_kaggle_12k.tsv.gz", 12_000, 2_618), ("criteo_terabyte_1k.tsv.gz", 1_000, 21)],
    ids=["kaggle", "terabyte"],
)
def test_criteo_is_parsed_as_the_reference_does(
    ctr_data: Path,
    check_native: Callable[..., ParsedRows],
    name: str,
    rows: int,
    positives: int,
    buckets: int,
) -> None:
    parsed = check_native(gzip.decompress((ctr_data / name).read_bytes()), criteo_plan(buckets))
    assert (parsed.rows, parsed.lines, parsed.malformed_count) == (rows, rows, 0)
    assert parsed.label.sum() == positives


def test_criteo_means_what_pandas_reads(
    ctr_data: Path, check_native: Callable[..., ParsedRows]
) -> None:
    import pandas as pd

    path = ctr_data / "criteo_kaggle_12k.tsv.gz"
    frame = pd.read_csv(
        path, sep="\t", names=CRITEO_NAMES, dtype=dict.fromkeys(CRITEO_NAMES[14:], str)
    )
    parsed = check_native(gzip.decompress(path.read_bytes()), criteo_plan())
    np.testing.assert_array_equal(parsed.missing, frame.isna().sum().to_numpy()[1:])
    for column, name in zip(parsed.dense, CRITEO_NAMES[1:14], strict=True):
        # float32 of a double log1p: one rounding, and numpy's log1p may differ by one before it.
        expected = np.log1p(frame[name].fillna(0).clip(lower=0).to_numpy())
        np.testing.assert_allclose(column, expected, rtol=2**-23)
    for column, name in zip(parsed.ids, CRITEO_NAMES[14:], strict=True):
        codes, _ = pd.factorize(frame[name].fillna(""))
        np.testing.assert_array_equal(column, codes)
