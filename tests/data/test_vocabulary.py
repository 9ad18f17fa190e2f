"""Merging vocabularies against a dictionary, in one part and in many."""

from collections import Counter

import numpy as np
import pytest

from dqrm.data.records import Record, write_record
from dqrm.data.schema import CategoricalColumn
from dqrm.data.vocabulary import (
    ShardKeys,
    keys_digest,
    load_keys,
    merge_vocabulary,
    range_order,
    save_keys,
)


def make_shards(folder, num_shards, rng, distinct):
    """Records of shards, and the look-ups in each as {key: count}."""
    universe = rng.integers(0, 2**64, distinct, dtype=np.uint64, endpoint=False)
    # The ends of the range are keys too.
    universe[:2] = 0, 2**64 - 1
    shards, contents = [], []
    for number in range(num_shards):
        keys = rng.choice(universe, rng.integers(0, distinct), replace=False)
        keys = keys[range_order(keys)]
        counts = rng.integers(0, 4, len(keys)).astype(np.uint32)
        path = folder / f"{number}.rec"
        write_record(path, {}, {"keys0": keys, "counts0": counts})
        shards.append(ShardKeys(path, path))
        contents.append(dict(zip(keys.tolist(), counts.tolist(), strict=True)))
    return shards, contents


@pytest.mark.parametrize("memory", [2**30, 5000, 1], ids=["one-part", "some-parts", "65536-parts"])
@pytest.mark.parametrize(
    ("min_frequency", "max_size"), [(None, None), (3, None), (None, 17), (2, 10**6), (99, None)]
)
def test_merge_equals_counting(memory, min_frequency, max_size, tmp_path):
    distinct = 40 if memory == 1 else 400
    shards, contents = make_shards(tmp_path, 5, np.random.default_rng(1), distinct)
    column = CategoricalColumn(name="c", min_frequency=min_frequency, max_size=max_size)
    merge_vocabulary(column, 0, shards, memory, tmp_path / "v.npy", tmp_path / "r.ids")

    totals = Counter()
    for content in contents:
        totals.update(content)
    kept = [key for key, count in totals.items() if count >= (min_frequency or 1)]
    kept.sort(key=lambda key: (-totals[key], key))
    kept = kept[:max_size]
    assert load_keys(tmp_path / "v.npy").tolist() == kept
    ids = {key: place + 1 for place, key in enumerate(kept)}
    remap = np.fromfile(tmp_path / "r.ids", np.int32)
    assert remap.tolist() == [ids.get(key, 0) for content in contents for key in content]


def test_recounted_shards_count(tmp_path):
    """Counts come from the second record where a shard was counted again."""
    keys = np.array([5, 2**60], np.uint64)
    write_record(tmp_path / "a", {}, {"keys0": keys, "counts0": np.array([9, 1], np.uint32)})
    write_record(tmp_path / "b", {}, {"counts0": np.array([0, 1], np.uint32)})
    shards = [ShardKeys(tmp_path / "a", tmp_path / "b")]
    column = CategoricalColumn(name="c")
    merge_vocabulary(column, 0, shards, 2**20, tmp_path / "v.npy", tmp_path / "r.ids")
    assert load_keys(tmp_path / "v.npy").tolist() == [2**60]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY junk", b"PK\x03\x04"])
def test_damaged_vocabulary(content, tmp_path):
    (tmp_path / "v.npy").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable vocabulary"):
        load_keys(tmp_path / "v.npy")


def test_wrong_array_is_no_vocabulary(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="not uint64 keys"):
        load_keys(tmp_path / "v.npy")
    save_keys(tmp_path / "v.npy", np.array([3, 1], np.uint64))
    assert load_keys(tmp_path / "v.npy").tolist() == [3, 1]
    digest = "b1c93bd2e1cb2b8ee7b6e8bbb4ee0d3e"  # Only its length is of interest.
    assert len(keys_digest(load_keys(tmp_path / "v.npy"))) == 2 * len(digest)


def test_record_round_trip(tmp_path):
    arrays = {
        "matrix": np.arange(12, dtype=np.float32).reshape(3, 4)[:, 1:],
        "empty": np.zeros((2, 0), np.int32),
        "bytes": np.arange(3, dtype=np.uint8),
        "keys": np.array([2**64 - 1], np.uint64),
    }
    write_record(tmp_path / "r", {"rows": 3, "text": "Köln"}, arrays)
    record = Record(tmp_path / "r")
    assert record.meta == {"rows": 3, "text": "Köln"}
    for name, array in arrays.items():
        assert name in record
        np.testing.assert_array_equal(record.array(name), array)
        assert record.array(name).dtype == array.dtype
    assert "other" not in record


def test_damaged_record(tmp_path):
    (tmp_path / "r").write_bytes(b"DQRMREC1" + b"\xff" * 8)
    with pytest.raises(ValueError, match="not a record"):
        Record(tmp_path / "r")
