"""Record files: a few named arrays and some JSON in one file, written atomically, read lazily.

Layout: magic, length of the header (uint64), header (JSON: meta, and dtype, shape and offset of
each array), then the arrays, each at a multiple of 64 bytes. Used for what preparation must
remember between its phases, so that a killed run continues. Nothing waits for the disk: what a
crash of the whole machine leaves is not used again (see `dqrm.data.workspace`).
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_MAGIC = b"DQRMREC1"
_ALIGNMENT = 64

Array = npt.NDArray[Any]


def write_record(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write `meta` (JSON values) and `arrays` to `path`: complete or not at all.

    Holds when the process is killed, not when the machine fails.
    """
    layout: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        layout[name] = [array.dtype.str, list(array.shape), offset]
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"meta": meta, "arrays": layout}).encode()
    header += b" " * (-(len(_MAGIC) + 8 + len(header)) % _ALIGNMENT)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for array in arrays.values():
                # The rows of a matrix may lie apart; each is contiguous.
                for row in array if array.ndim > 1 else [array]:
                    file.write(np.ascontiguousarray(row).data)
                file.write(b"\0" * (-array.nbytes % _ALIGNMENT))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Record:
    """A record file; arrays are mapped when asked for."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ValueError: the file is no record or was damaged.
        """
        self._path = path
        with path.open("rb") as file:
            start = file.read(len(_MAGIC) + 8)
            size = int.from_bytes(start[len(_MAGIC) :], "little")
            if not start.startswith(_MAGIC) or size > path.stat().st_size:
                raise ValueError(f"{path}: not a record; run again with --overwrite")
            header = json.loads(file.read(size))
            self._start = len(start) + size
        self._arrays: dict[str, tuple[str, list[int], int]] = header["arrays"]
        self.meta: dict[str, Any] = header["meta"]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def length(self, name: str) -> int:
        """Elements of a one-dimensional array."""
        return self._arrays[name][1][0]

    def array(self, name: str) -> Array:
        """The array, memory-mapped and read-only."""
        dtype, shape, offset = self._arrays[name]
        count = math.prod(shape)
        if not count:
            return np.empty(shape, np.dtype(dtype))
        # Each array has its own map, which goes with it: a record of which one array is wanted
        # does not hold the pages of others.
        start = self._start + offset
        before = start % mmap.ALLOCATIONGRANULARITY
        size = before + count * np.dtype(dtype).itemsize
        with self._path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start - before)
        return np.frombuffer(mapped, dtype, count, before).reshape(shape)
