"""Keys of categorical values: hashing text, bucketing, dictionary encoding, look-up.

A key is the XXH64 (seed 0) of a value's UTF-8 bytes. N strings or keys below.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dqrm.kernels.plan import MAX_BUCKETS, ByteBuffer
from dqrm.kernels.xxh64 import xxh64_reference

_LOW_BITS = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def hash_strings_reference(offsets: NDArray[np.integer], data: ByteBuffer) -> NDArray[np.uint64]:
    """Same as hash_strings; remembers strings it has seen within the call."""
    text = memoryview(data).cast("B")
    _check_offsets(offsets, len(text))
    seen: dict[bytes, int] = {}
    keys = np.empty(max(len(offsets) - 1, 0), dtype=np.uint64)
    bounds = offsets.tolist()
    for at, (start, stop) in enumerate(pairwise(bounds)):
        string = bytes(text[start:stop])
        key = seen.get(string)
        if key is None:
            key = seen[string] = xxh64_reference(string)
        keys[at] = key
    return keys


def hash_strings(offsets: NDArray[np.integer], data: ByteBuffer) -> NDArray[np.uint64]:
    """Keys of N strings that lie one after the other, as in an Arrow string array.

    offsets: int32 or int64 [N + 1], ascending, in bytes into data. Returns uint64 [N].
    Raises ValueError when offsets descend or leave data.
    """
    return hash_strings_reference(offsets, data)


def bucket_of(keys: ArrayLike, buckets: int) -> NDArray[np.int32]:
    """The high 64 bits of key * buckets: uint64 [N] to int32 [N] in [0, buckets)."""
    if not 1 <= buckets <= MAX_BUCKETS:
        raise ValueError(f"buckets={buckets}: must be between 1 and {MAX_BUCKETS}")
    key = _as_keys(keys)
    count = np.uint64(buckets)
    # count < 2^31, so neither product nor their sum overflows 64 bits.
    carry = ((key & _LOW_BITS) * count) >> _HALF
    return (((key >> _HALF) * count + carry) >> _HALF).astype(np.int32)


def encode_keys_reference(
    keys: ArrayLike, buckets: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.uint64] | None]:
    """Same as encode_keys, by sorting."""
    if buckets:
        return bucket_of(keys, buckets), None
    sorted_keys, first, inverse = np.unique(_as_keys(keys), return_index=True, return_inverse=True)
    by_sight = np.argsort(first)
    rank = np.empty(len(by_sight), dtype=np.int32)
    rank[by_sight] = np.arange(len(by_sight), dtype=np.int32)
    return rank[inverse], sorted_keys[by_sight]


def encode_keys(
    keys: ArrayLike, buckets: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.uint64] | None]:
    """Ids of N keys.

    keys: uint64 [N]. buckets = 0: ids count the distinct keys in order of first sight, and those
    keys come second. buckets > 0: ids are bucket_of(keys, buckets), second is None.
    Returns int32 [N] and uint64 [number of distinct keys] or None.
    """
    return encode_keys_reference(keys, buckets)


class KeyIndex:
    """Ids of a vocabulary's keys: keys[i] has id i + 1, every other key has id 0.

    keys: uint64 [rows], distinct, may be memory-mapped. Raises ValueError for a repeated key.
    """

    def __init__(self, keys: ArrayLike) -> None:
        self._keys = _as_keys(keys)
        self._order = np.argsort(self._keys, kind="stable").astype(np.int32)
        self._sorted = self._keys[self._order]
        repeated = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(repeated):
            first, second = self._order[repeated[0]], self._order[repeated[0] + 1]
            raise ValueError(f"vocabulary: keys {first} and {second} are equal")

    def __len__(self) -> int:
        return len(self._keys)

    def lookup(self, query: ArrayLike) -> NDArray[np.int32]:
        """Ids of N keys: uint64 [N] to int32 [N], 0 = unknown."""
        wanted = _as_keys(query)
        if not len(self._keys):
            return np.zeros(len(wanted), dtype=np.int32)
        at = np.searchsorted(self._sorted, wanted)
        at[at == len(self._sorted)] = 0
        return np.where(self._sorted[at] == wanted, self._order[at] + 1, 0).astype(np.int32)


def _as_keys(keys: ArrayLike) -> NDArray[np.uint64]:
    array = np.asarray(keys)
    if array.dtype != np.uint64 or array.ndim != 1:
        raise ValueError(f"keys: expected uint64 [N], got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array)


def _check_offsets(offsets: NDArray[np.integer], data_bytes: int) -> None:
    if offsets.dtype not in (np.int32, np.int64) or offsets.ndim != 1:
        raise ValueError(
            f"offsets: expected int32 or int64 [N + 1], got {offsets.dtype} {list(offsets.shape)}"
        )
    if len(offsets) and (
        offsets[0] < 0 or offsets[-1] > data_bytes or bool(np.any(offsets[1:] < offsets[:-1]))
    ):
        raise ValueError(f"offsets: must ascend within 0 and the {data_bytes} bytes of data")
