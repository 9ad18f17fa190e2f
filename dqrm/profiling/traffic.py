"""Bytes that operators move: every tensor that is read or written, once a call.

This is what reaches memory where nothing stays in caches from one operator to the next. A view
moves nothing, a value that is broadcast is read once, and of a table only the rows that are looked
up are read, each once.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_LOOKUPS = {
    "aten.embedding": 1,
    "aten._embedding_bag": 1,
    "aten._embedding_bag_forward_only": 1,
    "quantized.embedding_bag_byte_rowwise_offsets": 1,
    "quantized.embedding_bag_4bit_rowwise_offsets": 1,
}
"""Operators whose first argument is a table; the argument with the numbers of its rows."""


def operator_bytes(function: Any, arguments: tuple[Any, ...], options: Any, result: Any) -> int:
    """Bytes that one call of an operator reads and writes."""
    packet = str(function.overloadpacket)
    if function.is_view or packet.removeprefix("aten.").startswith(("empty", "new_empty")):
        return 0
    if packet in _LOOKUPS:
        ids = arguments[_LOOKUPS[packet]]
        pooled = result[0] if isinstance(result, tuple) else result
        return _rows_bytes(arguments[0], ids) + total_bytes((arguments[1:], options, pooled))
    if packet == "aten.index_select" and arguments[1] == 0:
        return _rows_bytes(arguments[0], arguments[2]) + total_bytes((arguments[2], result))
    if packet == "aten.index":
        ids = arguments[1]
        whole = len(ids) == 1 and ids[0].dtype != torch.bool
        read = _rows_bytes(arguments[0], ids[0]) if whole else total_bytes(result)
        return read + total_bytes((ids, result))
    if packet == "aten.gather":
        return 2 * total_bytes(result) + total_bytes(arguments[2])
    inputs = _by_address((arguments, options))
    written = _by_address(result)
    if not function._schema.is_mutable and written and written.keys() <= inputs.keys():
        # A view that torch does not declare as one.
        return 0
    return sum(inputs.values()) + sum(written.values())


def distinct_rows(indices: Tensor, offsets: Tensor | None, tables: int) -> list[int]:
    """Number of different rows that a batch of bags reads of each table.

    Args:
        indices: int [N], table-major, as EmbeddingBagCollection takes them.
        offsets: int64 [T * B + 1], or None for one id a bag.
        tables: T.
    """
    if offsets is None:
        bounds = [table * (len(indices) // tables) for table in range(tables + 1)]
    else:
        batch = (len(offsets) - 1) // tables
        bounds = [int(offsets[table * batch]) for table in range(tables + 1)]
    return [_distinct(indices[begin:end]) for begin, end in itertools.pairwise(bounds)]


def total_bytes(tensors: Any) -> int:
    """Bytes of all tensors in a nest of containers, each once."""
    return sum(_by_address(tensors).values())


def _rows_bytes(table: Tensor, ids: Tensor) -> int:
    return _distinct(ids) * _bytes(table) // max(1, len(table))


def _distinct(ids: Tensor) -> int:
    return len(torch.unique(ids))


def _by_address(nest: Any) -> dict[int, int]:
    found: dict[int, int] = {}
    for tensor in tree_leaves(nest):
        if isinstance(tensor, Tensor) and tensor.numel():
            # oneDNN's own layouts have no address.
            address = tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)
            found[address] = max(found.get(address, 0), _bytes(tensor))
    return found


def _bytes(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    stored = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in stored if stride)
