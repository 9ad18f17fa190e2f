"""Keys of categorical values: hashing text, bucketing, dictionary encoding, look-up.

A key is the XXH64 (seed 0) of a value's UTF-8 bytes. N strings or keys below. Each function has a
plain twin named `*_reference`, which gives the same and serves where nothing is compiled.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.plan import MAX_BUCKETS, ByteBuffer
from dqrm.kernels.xxh64 import xxh64_reference

_LOW_BITS = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def hash_strings(offsets: NDArray[np.integer[Any]], data: ByteBuffer) -> NDArray[np.uint64]:
    """Keys of N strings that lie one after the other, as in an Arrow string array.

    offsets: int32 or int64 [N + 1], ascending, in bytes into data. Returns uint64 [N].
    Raises ValueError when offsets descend or leave data.
    """
    module = native()
    if module is None:
        announce_fallback()
        return hash_strings_reference(offsets, data)
    _check_offsets(offsets, memoryview(data).nbytes)
    keys: NDArray[np.uint64] = module.hash_strings(
        np.ascontiguousarray(offsets, dtype=np.int64), data
    )
    return keys


def hash_strings_reference(
    offsets: NDArray[np.integer[Any]], data: ByteBuffer
) -> NDArray[np.uint64]:
    """Same as hash_strings; remembers strings it has seen within the call."""
    text = memoryview(data).cast("B")
    _check_offsets(offsets, text.nbytes)
    seen: dict[bytes, int] = {}
    keys = np.empty(max(len(offsets) - 1, 0), dtype=np.uint64)
    for at, (start, stop) in enumerate(pairwise(offsets.tolist())):
        string = bytes(text[start:stop])
        key = seen.get(string)
        if key is None:
            key = seen[string] = xxh64_reference(string)
        keys[at] = key
    return keys


def bucket_of(keys: ArrayLike, buckets: int) -> NDArray[np.int32]:
    """The high 64 bits of key * buckets: uint64 [N] to int32 [N] in [0, buckets)."""
    module = native()
    if module is None:
        return bucket_of_reference(keys, buckets)
    _check_buckets(buckets)
    ids: NDArray[np.int32] = module.bucket(_as_keys(keys), buckets, isa_level())
    return ids


def bucket_of_reference(keys: ArrayLike, buckets: int) -> NDArray[np.int32]:
    """Same as bucket_of."""
    _check_buckets(buckets)
    key = _as_keys(keys)
    count = np.uint64(buckets)
    # count < 2^31, so neither product nor their sum overflows 64 bits.
    carry = ((key & _LOW_BITS) * count) >> _HALF
    return (((key >> _HALF) * count + carry) >> _HALF).astype(np.int32)


def encode_keys(
    keys: ArrayLike, buckets: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.uint64] | None]:
    """Ids of N keys.

    keys: uint64 [N]. buckets = 0: ids count the distinct keys in order of first sight, and those
    keys come second. buckets > 0: ids are bucket_of(keys, buckets), second is None.
    Returns int32 [N] and uint64 [number of distinct keys] or None.
    """
    module = native()
    if module is None:
        return encode_keys_reference(keys, buckets)
    if buckets:
        return bucket_of(keys, buckets), None
    ids, unique_keys = module.encode(_as_keys(keys))
    return ids, unique_keys


def encode_keys_reference(
    keys: ArrayLike, buckets: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.uint64] | None]:
    """Same as encode_keys, by sorting."""
    if buckets:
        return bucket_of_reference(keys, buckets), None
    sorted_keys, first, inverse = np.unique(_as_keys(keys), return_index=True, return_inverse=True)
    by_sight = np.argsort(first)
    rank = np.empty(len(by_sight), dtype=np.int32)
    rank[by_sight] = np.arange(len(by_sight), dtype=np.int32)
    return rank[inverse], sorted_keys[by_sight]


class KeyIndex:
    """Ids of a vocabulary's keys: keys[i] has id i + 1, every other key has id 0.

    keys: uint64 [rows], distinct, may be memory-mapped and is held, not copied.
    Raises ValueError for a repeated key. Takes 13 bytes a key besides the keys.
    """

    def __init__(self, keys: ArrayLike) -> None:
        self._keys = _as_keys(keys)
        module = native()
        self._table: Any = (
            KeyIndexReference(self._keys) if module is None else module.KeyTable(self._keys)
        )

    def __len__(self) -> int:
        return len(self._keys)

    def lookup(self, query: ArrayLike) -> NDArray[np.int32]:
        """Ids of N keys: uint64 [N] to int32 [N], 0 = unknown."""
        ids: NDArray[np.int32] = self._table.look_up(_as_keys(query))
        return ids


class KeyIndexReference:
    """Same as KeyIndex, by binary search."""

    def __init__(self, keys: ArrayLike) -> None:
        array = _as_keys(keys)
        self._order = np.argsort(array, kind="stable").astype(np.int32)
        self._sorted = array[self._order]
        repeated = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(repeated):
            at = repeated[np.argmin(self._order[repeated + 1])]
            raise ValueError(
                f"vocabulary: keys {self._order[at]} and {self._order[at + 1]} are equal"
            )

    def look_up(self, query: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Ids of N keys: uint64 [N] to int32 [N], 0 = unknown."""
        if not len(self._sorted):
            return np.zeros(len(query), dtype=np.int32)
        at = np.searchsorted(self._sorted, query)
        at[at == len(self._sorted)] = 0
        return np.where(self._sorted[at] == query, self._order[at] + 1, 0).astype(np.int32)


def _as_keys(keys: ArrayLike) -> NDArray[np.uint64]:
    array = np.asarray(keys)
    if array.dtype != np.uint64 or array.ndim != 1:
        raise ValueError(f"keys: expected uint64 [N], got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array)


def _check_buckets(buckets: int) -> None:
    if not 1 <= buckets <= MAX_BUCKETS:
        raise ValueError(f"buckets={buckets}: must be between 1 and {MAX_BUCKETS}")


def _check_offsets(offsets: NDArray[np.integer[Any]], data_bytes: int) -> None:
    if offsets.dtype not in (np.int32, np.int64) or offsets.ndim != 1:
        raise ValueError(
            f"offsets: expected int32 or int64 [N + 1], got {offsets.dtype} {list(offsets.shape)}"
        )
    if len(offsets) and (
        offsets[0] < 0 or offsets[-1] > data_bytes or bool(np.any(offsets[1:] < offsets[:-1]))
    ):
        raise ValueError(f"offsets: must ascend within 0 and the {data_bytes} bytes of data")
