"""Arrow tables (Parquet, pandas) to the same rows that text gives.

Values become what their text would be: integers in decimal, floats that are whole numbers without
a fraction (pandas turns integer columns with gaps into floats), booleans as True and False (as
pandas writes them). So every reader gives a value the same key.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dqrm.data.config import parse_moment
from dqrm.data.local import LocalRows, table_columns
from dqrm.data.rows import Lists, Rows
from dqrm.data.schema import CategoricalColumn, DenseColumn, Schema
from dqrm.kernels.keys import encode_keys, hash_strings
from dqrm.kernels.plan import Malformed

_LARGEST = float(np.finfo(np.float32).max)
_MAX_MESSAGES = 1000

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


class _Faults:
    """Rows that cannot be used, with the first reason for each."""

    def __init__(self, num_rows: int, names: list[str]) -> None:
        self.bad = np.zeros(num_rows, np.bool_)
        self._names = names
        self._found: dict[int, Malformed] = {}

    def add(self, column: str, where: Bools, what: str, values: Any) -> None:
        """Reject the rows of `where`; `what` has one {} for the value."""
        for row in np.flatnonzero(where & ~self.bad)[:_MAX_MESSAGES].tolist():
            reason = what.format(repr(str(values[row].as_py())))
            self._found[row] = Malformed(row, self._names.index(column), f"{column}: {reason}")
        self.bad |= where

    def messages(self) -> tuple[Malformed, ...]:
        return tuple(self._found[row] for row in sorted(self._found)[:_MAX_MESSAGES])


def local_rows(table: pa.Table, schema: Schema, *, need_label: bool = True) -> LocalRows:
    """Rows of an Arrow table whose columns include those of `schema` (defaults filled in).

    need_label: without it a missing label column gives zeros.

    Raises:
        ValueError: a column's type cannot be used in its role.
    """
    num_rows = table.num_rows
    faults = _Faults(num_rows, table.column_names)
    label = np.zeros(num_rows, np.float32)
    if need_label or schema.label in table.column_names:
        label = _label(_column(table, schema.label), schema.label, faults)
    missing: list[Bools] = []
    dense = np.empty((len(schema.dense), num_rows), np.float32)
    for at, column in enumerate(schema.dense):
        dense[at], empty = _dense(_column(table, column.name), column, faults)
        missing.append(empty)
    time = None
    if schema.time is not None and (need_label or schema.time in table.column_names):
        time = _time(_column(table, schema.time), schema.time, faults)

    one_hot = np.empty((len(schema.one_hot), num_rows), np.int32)
    lists: list[Lists] = []
    keys: list[Keys | None] = []
    for at, categorical in enumerate(table_columns(schema)):
        array = _column(table, categorical.name)
        if categorical.multi_hot:
            lengths, values = _split_lists(array, categorical.name, schema.list_separator)
            missing.append(lengths == 0)
            # Values of rejected rows must not enter the vocabulary.
            kept = np.repeat(~faults.bad, lengths)
            found = _keys(values, categorical)[kept]
            lengths = lengths[~faults.bad]
            ids, unique = encode_keys(found, categorical.hash_buckets or 0)
            lists.append(Lists(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), ids))
        else:
            found = _keys(array, categorical)
            missing.append(found == _EMPTY_KEY)
            ids, unique = encode_keys(found[~faults.bad], categorical.hash_buckets or 0)
            one_hot[at, : len(ids)] = ids
        keys.append(unique)

    good = ~faults.bad
    num_good = int(good.sum())
    rows = Rows(label[good], dense[:, good], one_hot[:, :num_good], tuple(lists))
    return LocalRows(
        rows,
        None if time is None else time[good],
        tuple(keys),
        np.array([int(np.count_nonzero(empty & good)) for empty in missing], np.int64),
        num_rows,
        faults.messages(),
        num_rows - num_good,
    )


_EMPTY_KEY = hash_strings(np.zeros(2, np.int64), b"")[0]


def _column(table: pa.Table, name: str) -> Any:
    return pa.chunked_array(table.column(name)).combine_chunks()


def _is_text(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _numbers(array: Any, name: str, what: str, faults: _Faults) -> tuple[F64, Bools]:
    """float64 [n] and where a value is missing (null, NaN or blank text)."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _is_text(array.type):
        texts = pc.utf8_trim(array.cast(pa.large_string()), " \t")
        texts = pc.if_else(pc.equal(texts, ""), None, texts)
        number = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
        nan = pc.fill_null(pc.match_substring_regex(texts, r"^[+-]?[nN][aA][nN]$"), False)
        texts = pc.if_else(nan, None, texts)
        readable = pc.fill_null(pc.match_substring_regex(texts, number), True)
        faults.add(name, ~_bools(readable), what + " {} is not a number", array)
        # Arrow reads no leading plus sign.
        texts = pc.replace_substring_regex(pc.if_else(readable, texts, None), r"^\+", "")
        try:
            array = texts.cast(pa.float64())
        except pa.ArrowInvalid:
            # One value overflows; Python makes it infinite, which is refused below.
            array = pa.array([None if t is None else float(t) for t in texts.to_pylist()])
    elif pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8()).cast(pa.float64())
    elif pa.types.is_null(array.type) or pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        array = array.cast(pa.float64(), safe=False)
    else:
        raise ValueError(f"column {name!r}: {what} of type {array.type}; it must hold numbers")
    missing = _bools(pc.is_null(array, nan_is_null=True))
    values = pc.fill_null(array, 0.0).to_numpy(zero_copy_only=False)
    infinite = ~np.isfinite(values) & ~missing
    if infinite.any():
        faults.add(name, infinite, what + " {} is not finite", array)
    return np.where(missing | infinite, 0.0, values), missing


def _label(array: Any, name: str, faults: _Faults) -> npt.NDArray[np.float32]:
    values, missing = _numbers(array, name, "label", faults)
    faults.add(name, missing | ~np.isin(values, (0.0, 1.0)), "label {} is not 0 or 1", array)
    return values.astype(np.float32)


def _dense(
    array: Any, column: DenseColumn, faults: _Faults
) -> tuple[npt.NDArray[np.float32], Bools]:
    values, missing = _numbers(array, column.name, "dense value", faults)
    if column.transform == "log1p":
        # In double, then rounded once, as the text parser does.
        return np.log1p(np.maximum(values, 0.0)).astype(np.float32), missing
    too_large = np.abs(values) > _LARGEST
    faults.add(column.name, too_large, "dense value {} is too large", array)
    return np.where(too_large, 0.0, values).astype(np.float32), missing


def _time(array: Any, name: str, faults: _Faults) -> F64:
    """Epoch seconds of dates and timestamps (UTC where they name no zone), or numbers as is."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _is_text(array.type):
        encoded = array.dictionary_encode()
        moments = np.array([_moment(text) for text in encoded.dictionary.to_pylist()] + [np.nan])
        codes = pc.fill_null(encoded.indices, len(moments) - 1).to_numpy(zero_copy_only=False)
        values: F64 = moments[codes]
        faults.add(name, np.isnan(values), "time {} is neither a number nor an ISO date", array)
        return values
    if pa.types.is_temporal(array.type):
        ticks = array.cast(pa.timestamp("us")) if pa.types.is_date(array.type) else array
        if not pa.types.is_timestamp(ticks.type):
            raise ValueError(f"column {name!r}: type {array.type} is no point in time")
        ticks = ticks.cast(pa.timestamp("us", ticks.type.tz), safe=False).cast(pa.int64())
        missing = _bools(pc.is_null(ticks))
        values = pc.fill_null(ticks, 0).to_numpy(zero_copy_only=False) / 1e6
    else:
        values, missing = _numbers(array, name, "time", faults)
    faults.add(name, missing, "time is missing ({})", array)
    return values


def _moment(text: str) -> float:
    try:
        return parse_moment(text.strip(" \t"))
    except ValueError:
        return math.nan


def _split_lists(array: Any, name: str, separator: str) -> tuple[npt.NDArray[np.int64], Any]:
    """Length of every row's list, int64 [n], and all values; empty and null values dropped."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _is_text(array.type):
        array = pc.split_pattern(pc.fill_null(array, ""), separator)
    kind = array.type
    if pa.types.is_null(kind):
        return np.zeros(len(array), np.int64), pa.array([], pa.string())
    if not (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        raise ValueError(
            f"column {name!r}: multi-hot, but of type {kind}; it must hold lists, or text with "
            f"{separator!r} between values"
        )
    parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
    values = _texts(pc.list_flatten(array), name)
    kept = _bools(pc.not_equal(pc.binary_length(values), 0))
    lengths = np.bincount(parents[kept], minlength=len(array)).astype(np.int64)
    return lengths, values.filter(pa.array(kept))


def _texts(array: Any, name: str) -> Any:
    """The values as large_string, nulls and NaN as the empty string."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _texts(array.dictionary, name).take(array.indices).fill_null("")
    if pa.types.is_boolean(kind):
        array = pc.if_else(array, "True", "False")
    elif pa.types.is_floating(kind):
        whole = pc.and_(pc.equal(array, pc.trunc(array)), pc.less(pc.abs(array), 2.0**53))
        integers = pc.if_else(whole, array, None).cast(pa.int64()).cast(pa.large_string())
        other = pc.if_else(pc.is_nan(array), None, array).cast(pa.large_string())
        array = pc.coalesce(integers, other)
    elif pa.types.is_nested(kind):
        raise ValueError(f"column {name!r}: holds {kind}; set multi_hot to use lists")
    try:
        return pc.fill_null(array.cast(pa.large_string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"column {name!r}: {kind} cannot be read as text ({error})") from None


def _keys(array: Any, column: CategoricalColumn) -> Keys:
    """Key of every value, uint64 [n]."""
    if pa.types.is_dictionary(array.type):
        # Hash each distinct value once.
        distinct = _hash(_texts(array.dictionary, column.name))
        codes = pc.fill_null(array.indices.cast(pa.int64()), len(distinct))
        keys: Keys = np.append(distinct, _EMPTY_KEY)[codes.to_numpy(zero_copy_only=False)]
        return keys
    return _hash(_texts(array, column.name))


def _hash(texts: Any) -> Keys:
    """texts: large_string without nulls."""
    _, offsets, data = texts.buffers()
    if offsets is None:
        return np.zeros(0, np.uint64)
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return hash_strings(bounds, b"" if data is None else memoryview(data))


def _bools(array: Any) -> Bools:
    found: Bools = array.to_numpy(zero_copy_only=False).astype(np.bool_)
    return found
