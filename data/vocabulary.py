"""Vocabularies: merged from the shards in bounded memory, saved, and looked up.

Keys are uniform 64-bit hashes, so cutting their range into equal parts cuts the work into equal
parts: one part of the range at a time, the shards' keys and counts are added up.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dqrm.data.files import new_file
from dqrm.data.records import Record
from dqrm.data.schema import CategoricalColumn, Schema
from dqrm.kernels.keys import KeyIndex, encode_keys

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_ENTRY_BYTES = 56
"""Memory per key in a part of the range: key, counts, id, hash table."""

_RANGE = 2**16
"""Parts of the range are told apart by the first 16 bits of a key."""

_MAX_KEYS = 2**31 - 2
"""Ids are int32 and id 0 is taken."""


@dataclass(frozen=True)
class Base:
    """The vocabularies that those of new rows begin with."""

    folder: Path
    """Holds COLUMN.npy of every column that is not hashed."""
    features_digest: str
    """Of the data set that they are of."""
    grows: bool
    """Whether values that are new get ids, after all that there are; otherwise they get id 0."""


@dataclass(frozen=True)
class ShardKeys:
    """Where a shard keeps its keys and its training counts of them."""

    parsed: Path
    counted: Path
    """The same file, unless the shard was counted again."""


def merge_vocabulary(
    column: CategoricalColumn,
    at: int,
    shards: Sequence[ShardKeys],
    memory_bytes: int,
    vocabulary_file: Path,
    remap_file: Path,
    base: Base | None = None,
) -> None:
    """Write the vocabulary of table column `at` and the id of every shard's every key.

    vocabulary_file: uint64 [size], by descending training count, ties by ascending key; those of
        `base`, in their order, come before all others.
    remap_file: plain int32, for all shards one after the other, ids of their keys.

    Needs memory_bytes plus 48 bytes for each key of the vocabulary.

    Raises:
        ValueError: more values than ids can number.
    """
    if remap_file.exists():
        return
    records = [Record(shard.parsed) for shard in shards]
    counted = [
        record if shard.counted == shard.parsed else Record(shard.counted)
        for record, shard in zip(records, shards, strict=True)
    ]
    name_keys, name_counts = f"keys{at}", f"counts{at}"
    entries = sum(record.length(name_keys) for record in records)
    parts = min(max(1, -(-entries * _ENTRY_BYTES // memory_bytes)), _RANGE)

    known = (
        np.zeros(0, np.uint64) if base is None else load_keys(base.folder / vocabulary_file.name)
    )
    known_index = KeyIndex(known)
    room = None if column.max_size is None else max(0, column.max_size - len(known))
    kept = np.zeros(0, np.uint64)
    kept_counts = np.zeros(0, np.int64)
    for low, high in _ranges(parts if base is None or base.grows else 0):
        keys: list[U64] = []
        counts: list[npt.NDArray[np.uint32]] = []
        for record, count_record in zip(records, counted, strict=True):
            all_keys = record.array(name_keys)
            inside = _inside(all_keys, low, high)
            # Copies, so that no more of the shards is mapped than one.
            keys.append(all_keys[inside].copy())
            counts.append(count_record.array(name_counts)[inside].copy())
        found, totals = _add_up(keys, counts)
        # A value only seen outside training is as unknown as one never seen.
        frequent = totals >= (column.min_frequency or 1)
        if len(known):
            frequent &= known_index.lookup(found) == 0
        kept = np.concatenate([kept, found[frequent]])
        kept_counts = np.concatenate([kept_counts, totals[frequent]])
        if room is not None and len(kept) > room:
            best = _by_count(kept, kept_counts)[:room]
            kept, kept_counts = kept[best], kept_counts[best]
    if len(known) + len(kept) > _MAX_KEYS:
        raise ValueError(
            f"column {column.name!r}: {len(known) + len(kept)} values; ids number at most "
            f"{_MAX_KEYS}; set max_size, min_frequency or hash_buckets"
        )
    vocabulary = np.concatenate([known, kept[_by_count(kept, kept_counts)]])
    del kept, kept_counts, known_index
    save_keys(vocabulary_file, vocabulary)
    _write_remap(remap_file, records, name_keys, vocabulary, parts)


def range_order(keys: U64) -> I64:
    """An order of keys in which those of each part of the range lie together.

    Sorting by the first 16 bits is several times faster than sorting, and fine enough: there are
    never more parts than 2^16.
    """
    return np.argsort((keys >> np.uint64(48)).astype(np.uint16), kind="stable")


def _ranges(parts: int) -> Iterator[tuple[int, int]]:
    """Bounds [low, high) of equal parts of the first 16 bits of keys; none of no parts."""
    for part in range(parts):
        yield part * _RANGE // parts, (part + 1) * _RANGE // parts


def _inside(ordered_keys: U64, low: int, high: int) -> slice:
    """The keys of a part of the range, in an array in `range_order`."""
    if high - low == _RANGE:
        return slice(0, len(ordered_keys))
    # The last of the four 16-bit words of a little-endian key; a view, nothing is read here.
    first_bits = ordered_keys.astype("<u8", copy=False).view("<u2")[3::4]
    start, stop = np.searchsorted(first_bits, [low, high])
    return slice(int(start), int(stop))


def _add_up(keys: list[U64], counts: list[npt.NDArray[np.uint32]]) -> tuple[U64, I64]:
    """Distinct keys, and the sum of the counts of each."""
    all_keys = np.concatenate([np.zeros(0, np.uint64), *keys])
    ids, distinct = encode_keys(all_keys)
    assert distinct is not None
    # Sums in double are exact up to 2^53.
    totals = np.bincount(ids, np.concatenate([np.zeros(0, np.uint32), *counts]), len(distinct))
    return distinct, totals.astype(np.int64)


def _by_count(keys: U64, counts: I64) -> I64:
    """Positions by descending count, ties by ascending key."""
    # One word holds the count and the first bits of the key: sorting one plain word is several
    # times faster than sorting by two columns. Two words are hardly ever equal.
    largest = int(counts.max(initial=0))
    count_bits = max(largest.bit_length(), 1)
    words = (np.uint64(largest) - counts.astype(np.uint64)) << np.uint64(64 - count_bits)
    words |= keys >> np.uint64(count_bits)
    order = np.argsort(words)
    words = words[order]
    if np.any(words[1:] == words[:-1]):
        return np.lexsort((keys, -counts))
    return order


def _write_remap(
    path: Path, records: Sequence[Record], name: str, vocabulary: U64, parts: int
) -> None:
    """Write the ids of the keys of all shards, in their order."""
    starts = np.cumsum([0, *(record.length(name) for record in records)])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A range of one part needs no order.
    order = range_order(vocabulary) if parts > 1 else np.arange(len(vocabulary))
    ordered = vocabulary[order] if parts > 1 else vocabulary
    remap = np.zeros(0, np.int32)
    if starts[-1]:  # There is no map of nothing.
        remap = np.memmap(temporary, np.int32, "w+", shape=(int(starts[-1]),))
    else:
        temporary.touch()
    for low, high in _ranges(parts):
        inside = _inside(ordered, low, high)
        # The id of the i-th key of this part; first the id of unknown keys.
        ids = np.concatenate([np.zeros(1, np.int32), order[inside].astype(np.int32) + 1])
        index = KeyIndex(ordered[inside])
        for start, record in zip(starts, records, strict=False):
            keys = record.array(name)
            wanted = _inside(keys, low, high)
            place = slice(start + wanted.start, start + wanted.stop)
            np.take(ids, index.lookup(keys[wanted]), out=remap[place], mode="clip")
    del remap
    temporary.replace(path)


def new_ids(vocabulary: Path, base: Base) -> int:
    """How many keys of a vocabulary follow those of the base."""
    return len(load_keys(vocabulary)) - len(load_keys(base.folder / vocabulary.name))


def read_remap(path: Path, start: int, count: int) -> npt.NDArray[np.int32]:
    """A shard's part of a remap file."""
    return np.fromfile(path, np.int32, count, offset=4 * start)


def save_keys(path: Path, keys: U64) -> None:
    """Write keys, uint64 [size], as a .npy file: complete or not at all."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, keys.astype("<u8"), allow_pickle=False)


def load_keys(path: Path) -> U64:
    """Keys of a vocabulary, uint64 [size], memory-mapped; key i has id i + 1.

    Raises:
        ValueError: the file is missing or no vocabulary.
    """
    try:
        keys = np.lib.format.open_memmap(path, "r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable vocabulary ({error})") from None
    if keys.dtype != np.dtype("<u8") or keys.ndim != 1:
        raise ValueError(f"{path}: holds {keys.dtype}{list(keys.shape)}, not uint64 keys")
    found: U64 = keys
    return found


def keys_digest(keys: U64) -> str:
    """SHA-256 of the keys, little-endian uint64."""
    return hashlib.sha256(np.ascontiguousarray(keys.astype("<u8", copy=False)).data).hexdigest()


class Vocabularies:
    """Look-up of the keys of every table column, one-hot before multi-hot."""

    def __init__(self, folder: Path, schema: Schema) -> None:
        """Load `folder`/COLUMN.npy for every column that is not hashed."""
        columns = (*schema.one_hot, *schema.multi_hot)
        self._indices = [
            None
            if column.hash_buckets is not None
            else KeyIndex(load_keys(folder / column.vocabulary_file))
            for column in columns
        ]

    def __getitem__(self, at: int) -> KeyIndex:
        index = self._indices[at]
        assert index is not None
        return index

    @staticmethod
    @lru_cache(maxsize=1)
    def shared(folder: Path, schema: Schema) -> "Vocabularies":
        """The same object for the same arguments, so that a process loads them once."""
        return Vocabularies(folder, schema)
