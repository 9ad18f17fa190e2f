"""Hashing, bucketing, dictionary encoding and look-up: native, plain and by definition."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dqrm.kernels.keys import (
    KeyIndex,
    KeyIndexReference,
    bucket_of,
    bucket_of_reference,
    encode_keys,
    encode_keys_reference,
    hash_strings,
    hash_strings_reference,
)
from dqrm.kernels.xxh64 import EMPTY_KEY, xxh64_reference

Levels = Callable[[], Iterator[str]]
# Few different ones, so that they repeat; consecutive ones, so that a weak table would crowd.
KEYS = st.lists(
    st.one_of(
        st.integers(0, 40),
        st.integers(2**64 - 3, 2**64 - 1),
        st.sampled_from([1 << 32, 2 << 32, 3 << 32]),
        st.integers(0, 2**64 - 1),
    ),
    max_size=600,
).map(lambda keys: np.array(keys, dtype=np.uint64))


@pytest.mark.parametrize("size", [*range(70), 1000])
def test_hash_is_xxh64(size: int) -> None:
    data = bytes(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))
    assert xxh64_reference(data) == xxhash.xxh64_intdigest(data)
    assert hash_strings(np.array([0, size]), data).tolist() == [xxhash.xxh64_intdigest(data)]


def test_key_of_nothing() -> None:
    assert xxhash.xxh64_intdigest(b"") == EMPTY_KEY


@given(st.lists(st.binary(max_size=50), max_size=30), st.sampled_from(["int32", "int64"]))
def test_hash_strings(strings: list[bytes], dtype: str) -> None:
    ends = np.cumsum([0, *map(len, strings)])
    offsets = ends.astype(np.int32) if dtype == "int32" else ends.astype(np.int64)
    data = b"".join(strings)
    expected = [xxhash.xxh64_intdigest(string) for string in strings]
    assert hash_strings(offsets, data).tolist() == expected
    assert hash_strings_reference(offsets, memoryview(data)).tolist() == expected


@pytest.mark.parametrize("hash_them", [hash_strings, hash_strings_reference])
@pytest.mark.parametrize("offsets", [[0, 3, 2], [-1, 2], [0, 6], [5, 6]], ids=str)
def test_offsets_outside_the_data_are_refused(
    hash_them: Callable[..., object], offsets: list[int]
) -> None:
    with pytest.raises(ValueError, match="offsets: must ascend within 0 and the 5 bytes of data"):
        hash_them(np.array(offsets), b"abcde")


@given(KEYS, st.integers(1, 2**31 - 1))
def test_bucket_is_the_high_half_of_the_product(
    each_level: Levels, keys: NDArray[np.uint64], buckets: int
) -> None:
    expected = [key * buckets >> 64 for key in keys.tolist()]
    assert bucket_of_reference(keys, buckets).tolist() == expected
    for _ in each_level():
        ids = bucket_of(keys, buckets)
        assert ids.dtype == np.int32
        assert ids.tolist() == expected


@settings(max_examples=200)
@given(KEYS)
def test_dictionary_ids_count_keys_in_order_of_first_sight(keys: NDArray[np.uint64]) -> None:
    seen: dict[int, int] = {}
    expected = [seen.setdefault(key, len(seen)) for key in keys.tolist()]
    for encode in (encode_keys, encode_keys_reference):
        ids, unique_keys = encode(keys)
        assert unique_keys is not None
        assert ids.dtype == np.int32
        assert unique_keys.dtype == np.uint64
        assert ids.tolist() == expected
        assert unique_keys.tolist() == list(seen)


@pytest.mark.parametrize("step", [1, 1 << 20, 1 << 32, 1 << 45], ids=hex)
def test_a_dictionary_grows_over_regular_keys(step: int) -> None:
    keys = np.tile(np.arange(100_000, dtype=np.uint64) * np.uint64(step), 2)
    ids, unique_keys = encode_keys(keys)
    expected_ids, expected_keys = encode_keys_reference(keys)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(unique_keys, expected_keys)


def test_encode_keys_into_buckets() -> None:
    keys = np.arange(5, dtype=np.uint64) << np.uint64(61)
    assert encode_keys(keys, buckets=8)[0].tolist() == [0, 1, 2, 3, 4]
    assert encode_keys(keys, buckets=8)[1] is None


@settings(max_examples=200)
@given(KEYS, KEYS)
def test_key_index(keys: NDArray[np.uint64], query: NDArray[np.uint64]) -> None:
    vocabulary = np.array(list(dict.fromkeys(keys.tolist())), dtype=np.uint64)
    ids = {key: at + 1 for at, key in enumerate(vocabulary.tolist())}
    expected = [ids.get(key, 0) for key in query.tolist()]
    index = KeyIndex(vocabulary)
    assert len(index) == len(vocabulary)
    assert index.lookup(query).tolist() == expected
    assert index.lookup(vocabulary).tolist() == list(range(1, len(vocabulary) + 1))
    assert KeyIndexReference(vocabulary).look_up(query).tolist() == expected


def test_key_index_over_a_mapped_file(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).permutation(50_000).astype(np.uint64)
    np.save(tmp_path / "keys.npy", keys)
    index = KeyIndex(np.load(tmp_path / "keys.npy", mmap_mode="r"))
    np.testing.assert_array_equal(index.lookup(keys), np.arange(1, 50_001))
    assert index.lookup(np.array([50_000], np.uint64)).tolist() == [0]


@pytest.mark.parametrize("kind", [KeyIndex, KeyIndexReference])
def test_a_repeated_vocabulary_key_is_refused(kind: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="vocabulary: keys 1 and 3 are equal"):
        kind(np.array([9, 5, 9 << 32, 5, 7, 9, 5], np.uint64))


@pytest.mark.parametrize("keys", [np.array([1]), np.zeros((2, 2), np.uint64)], ids=["int", "2-d"])
def test_keys_of_another_kind_are_refused(keys: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match=r"keys: expected uint64 \[N\], got"):
        encode_keys(keys)


@pytest.mark.parametrize("buckets", [0, -1, 2**31])
def test_impossible_buckets_are_refused(buckets: int) -> None:
    with pytest.raises(ValueError, match=f"buckets={buckets}: must be between 1 and 2147483647"):
        bucket_of(np.array([1], np.uint64), buckets)
