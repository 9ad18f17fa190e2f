"""Which rows go where, and that vocabularies know the training rows only."""

import numpy as np
import pandas as pd
import pytest

from dqrm.data.config import PrepareConfig
from dqrm.data.manifest import read_manifest
from dqrm.data.prepare import prepare
from dqrm.data.splits import ShardKey, row_hash

# A row's number is its dense value, so that rows can be followed.
SCHEMA = {
    "label": "label",
    "dense": [{"name": "number", "transform": "none"}],
    "categorical": ["value"],
    "time": "time",
}


def rows(numbers) -> pd.DataFrame:
    numbers = np.asarray(numbers)
    return pd.DataFrame(
        {"label": numbers % 2, "number": numbers, "value": numbers // 3, "time": numbers * 10}
    )


def write(folder, numbers, name="rows.csv"):
    path = folder / name
    rows(numbers).to_csv(path, index=False)
    return path


@pytest.fixture
def numbers_of(split_table):
    def read(folder) -> dict[str, list[int]]:
        return {
            name: [int(n) for n in split_table(folder, name)["number"].to_pylist()]
            for name in read_manifest(folder).splits
        }

    return read


def config(split, **settings) -> PrepareConfig:
    return PrepareConfig(
        schema=SCHEMA, format="csv", split=split, workers=1, shard_bytes=65536, **settings
    )


# 12,000 rows are about 210 KiB: four shards.
ROWS = 12_000


def test_fraction(tmp_path, numbers_of):
    source = write(tmp_path, range(ROWS))
    split = {"by": "fraction", "validation": 0.2, "test": 0.1, "seed": 1}
    prepare([source], tmp_path / "a", config(split))
    found = numbers_of(tmp_path / "a")
    # Six standard deviations of a binomial around each share.
    for name, share in (("validation", 0.2), ("test", 0.1), ("train", 0.7)):
        deviation = (share * (1 - share) * ROWS) ** 0.5
        assert abs(len(found[name]) - share * ROWS) < 6 * deviation
    assert sorted(n for numbers in found.values() for n in numbers) == list(range(ROWS))
    assert all(numbers == sorted(numbers) for numbers in found.values())
    prepare([source], tmp_path / "b", config({**split, "seed": 2}))
    other = numbers_of(tmp_path / "b")
    # Another seed draws anew: about a tenth of one test is in the other.
    both = set(found["test"]) & set(other["test"])
    assert len(both) < 0.2 * len(found["test"])


def test_fraction_without_test(tmp_path, numbers_of):
    source = write(tmp_path, range(500))
    prepare([source], tmp_path / "a", config({"by": "fraction", "validation": 0.2, "test": 0}))
    assert set(numbers_of(tmp_path / "a")) == {"train", "validation"}
    assert not (tmp_path / "a" / "test").exists()


def test_time(tmp_path, numbers_of):
    order = np.random.default_rng(0).permutation(ROWS)
    source = write(tmp_path, order)
    split = {"by": "time", "validation_from": 80_000, "test_from": 100_000}
    prepare([source], tmp_path / "a", config(split))
    assert numbers_of(tmp_path / "a") == {
        "train": [n for n in order if n < 8_000],
        "validation": [n for n in order if 8_000 <= n < 10_000],
        "test": [n for n in order if n >= 10_000],
    }


def test_time_with_carved_validation(tmp_path, numbers_of):
    source = write(tmp_path, range(ROWS))
    split = {"by": "time", "test_from": 60_000, "validation_fraction": 0.25, "seed": 3}
    prepare([source], tmp_path / "a", config(split))
    found = numbers_of(tmp_path / "a")
    assert found["test"] == list(range(6_000, ROWS))
    assert sorted(found["train"] + found["validation"]) == list(range(6_000))
    assert abs(len(found["validation"]) - 1500) < 6 * (0.25 * 0.75 * 6000) ** 0.5


def test_time_past_the_rows_warns(tmp_path, caplog):
    source = write(tmp_path, range(100))
    prepare([source], tmp_path / "a", config({"by": "time", "test_from": 10**9}))
    assert "no row falls into the test split" in caplog.text


def test_files(tmp_path, numbers_of):
    days = [
        write(tmp_path, range(day * 100, day * 100 + 100), f"day_{day}.csv") for day in range(4)
    ]
    split = {"by": "file", "validation": ["day_2.*"], "test": ["day_3.csv"]}
    prepare(days, tmp_path / "a", config(split))
    assert numbers_of(tmp_path / "a") == {
        "train": list(range(200)),
        "validation": list(range(200, 300)),
        "test": list(range(300, 400)),
    }


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"validation": ["x*"]}, "split.validation: no source matches 'x\\*'"),
        ({"test": ["*.csv"]}, "leave no file for training"),
        ({"validation": ["day_0.csv"], "test": ["day_*"]}, "matches split.validation and"),
    ],
)
def test_file_patterns_refused(split, message, tmp_path):
    days = [write(tmp_path, range(10), f"day_{day}.csv") for day in range(2)]
    with pytest.raises(ValueError, match=message):
        prepare(days, tmp_path / "a", config({"by": "file", **split}))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(
    ("validation", "test", "borders"),
    [(0, 500, (11_500, 11_500)), (0.25, 0.25, (6_000, 9_000)), (11_000, 999, (1, 11_001))],
    ids=["count", "share", "one-training-row"],
)
def test_last_rows(validation, test, borders, hashed, tmp_path, numbers_of):
    first, second = write(tmp_path, range(7000), "a.csv"), write(tmp_path, range(7000, ROWS), "b")
    split = {"by": "rows", "validation": validation, "test": test}
    settings = {"hash_buckets": 100} if hashed else {}
    prepare([first, second], tmp_path / "a", config(split, **settings))
    expected = {
        "train": list(range(borders[0])),
        "validation": list(range(*borders)),
        "test": list(range(borders[1], ROWS)),
    }
    assert numbers_of(tmp_path / "a") == {name: n for name, n in expected.items() if n}


def test_last_rows_with_carved_validation(tmp_path, numbers_of):
    source = write(tmp_path, range(ROWS))
    split = {"by": "rows", "test": 2000, "validation_fraction": 0.1}
    prepare([source], tmp_path / "a", config(split))
    found = numbers_of(tmp_path / "a")
    assert found["test"] == list(range(10_000, ROWS))
    assert abs(len(found["validation"]) - 1000) < 6 * (0.1 * 0.9 * 10_000) ** 0.5


def test_no_training_row_is_refused(tmp_path):
    source = write(tmp_path, range(10))
    for split in ({"by": "rows", "test": 10}, {"by": "time", "test_from": 0}):
        with pytest.raises(ValueError, match="training"):
            prepare([source], tmp_path / "a", config(split))
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "split",
    [
        {"by": "rows", "test": 3000, "validation": 1000},
        {"by": "rows", "test": 3000, "validation_fraction": 0.2},
        {"by": "time", "test_from": 90_000, "validation_from": 80_000},
        {"by": "fraction"},
    ],
    ids=["rows", "rows-carved", "time", "fraction"],
)
def test_vocabulary_knows_training_rows_only(split, tmp_path, split_table):
    """Ids by descending training count; a value without training rows has id 0 everywhere."""
    source = write(tmp_path, range(ROWS))
    prepare([source], tmp_path / "a", config(split, min_frequency=2))
    train = split_table(tmp_path / "a", "train")
    values = np.array(train["number"]).astype(int) // 3
    counts = pd.Series(values).value_counts()
    known = set(counts.index[counts >= 2])
    ids = dict(zip(values, train["value"].to_pylist(), strict=True))
    assert {value for value, id_ in ids.items() if id_ > 0} == known
    by_id = sorted(known, key=ids.get)
    assert [ids[value] for value in by_id] == list(range(1, len(known) + 1))
    assert [counts[v] for v in by_id] == sorted((counts[v] for v in known), reverse=True)
    assert read_manifest(tmp_path / "a").tables[0].num_rows == len(known) + 1
    for name in ("validation", "test"):
        table = split_table(tmp_path / "a", name)
        values = np.array(table["number"]).astype(int) // 3
        for value, id_ in zip(values, table["value"].to_pylist(), strict=True):
            assert id_ == (ids[value] if value in known else 0)


def test_row_hash_is_uniform_and_differs_between_shards():
    hashes = [row_hash(7, ShardKey(0, part, 0), 20_000) for part in range(3)]
    assert len(np.unique(np.concatenate(hashes))) == 60_000
    for found in hashes:
        filled = np.bincount((found >> np.uint64(60)).astype(int), minlength=16)
        assert abs(filled - 1250).max() < 6 * 1250**0.5


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"by": "fraction", "validation": 0.5, "test": 0.5}, "must be below 1"),
        ({"by": "rows", "test": 1.5}, "whole rows"),
        ({"by": "rows", "validation": 10, "validation_fraction": 0.1}, "validation_fraction"),
        ({"by": "time"}, "give split.test_from"),
        ({"by": "time", "validation_from": 5, "test_from": 5}, "is not before"),
        ({"by": "time", "test_from": "soon"}, "neither a number nor an ISO date"),
    ],
)
def test_contradictory_splits_are_refused(split, message):
    with pytest.raises(ValueError, match=message):
        config(split)


def test_time_split_needs_a_time_column():
    with pytest.raises(ValueError, match=r"schema\.time"):
        PrepareConfig(split={"by": "time", "test_from": 5})
