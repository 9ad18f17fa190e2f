"""What a delimited file looks like (Plan) and what parsing it yields (ParsedRows)."""

from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

ByteBuffer: TypeAlias = bytes | bytearray | memoryview | mmap

# Longest line either parser accepts; more is a missing newline, not a row of a click log.
MAX_LINE_BYTES = 1 << 24
# Ids are int32, so is the number of buckets.
MAX_BUCKETS = (1 << 31) - 1


class Role(IntEnum):
    """What a field of the file is used for. The native parser shares these numbers."""

    SKIP = 0
    LABEL = 1
    DENSE = 2
    CATEGORICAL = 3
    MULTI_HOT = 4
    TIME = 5


@dataclass(frozen=True)
class Field:
    """One field of the file.

    buckets: categorical and multi-hot; 0 encodes by dictionary, n > 0 hashes into n buckets.
    log1p: dense; missing and negative become 0, then log(1 + x). Without it missing becomes 0.
    """

    role: Role
    buckets: int = 0
    log1p: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.buckets <= MAX_BUCKETS:
            raise ValueError(f"buckets={self.buckets}: must be between 0 and {MAX_BUCKETS}")
        if self.buckets and self.role not in (Role.CATEGORICAL, Role.MULTI_HOT):
            raise ValueError(f"buckets={self.buckets}: a {self.role.name} field is not hashed")
        if self.log1p and self.role is not Role.DENSE:
            raise ValueError(f"log1p: a {self.role.name} field has no transform, only DENSE has")


@dataclass(frozen=True)
class Plan:
    r"""The fields of one file, in file order, and the characters between them.

    delimiter, quote and list_separator are single ASCII characters. Lines end in "\n" or "\r\n".
    With `quote` set, a field may be enclosed in it (RFC 4180): delimiters inside are text, a
    doubled quote is one quote. A quote further inside an unquoted field is plain text.
    """

    fields: tuple[Field, ...]
    delimiter: str = "\t"
    quote: str | None = None
    list_separator: str = "|"

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError("fields: a plan needs at least one field")
        special = {"delimiter": self.delimiter, "list_separator": self.list_separator}
        if self.quote is not None:
            special["quote"] = self.quote
        for name, text in special.items():
            if len(text) != 1 or not text.isascii() or text in "\r\n\0":
                raise ValueError(f"{name}={text!r}: must be one ASCII character, no line break")
        if self.quote == self.delimiter:
            raise ValueError(f"quote={self.quote!r}: must differ from the delimiter")
        if self.positions(Role.MULTI_HOT) and self.list_separator in (self.delimiter, self.quote):
            raise ValueError(
                f"list_separator={self.list_separator!r}: must differ from delimiter and quote"
            )
        for role in (Role.LABEL, Role.TIME):
            count = len(self.positions(role))
            if count > 1:
                raise ValueError(f"fields: {count} are {role.name}, at most one can be")

    def positions(self, role: Role) -> tuple[int, ...]:
        """Indices of the fields with this role, in file order."""
        return tuple(i for i, field in enumerate(self.fields) if field.role is role)


@dataclass(frozen=True)
class Malformed:
    """A line that was left out. `line` counts from 0 within the buffer, `field` from 0."""

    line: int
    field: int | None
    reason: str


@dataclass
class ParsedRows:
    """Columns of the well-formed rows, in file order within each kind.

    Blank lines are no rows and not malformed; `lines` counts them. Arrays of a matrix's rows are
    contiguous, the matrix itself may have a longer stride.
    """

    rows: int
    lines: int
    label: NDArray[np.float32]  # [rows]; zeros when the plan has no label
    dense: NDArray[np.float32]  # [num_dense, rows]
    time: NDArray[np.float64] | None  # [rows], epoch seconds or the number as it stood
    ids: NDArray[np.int32]  # [num_one_hot, rows]: bucket, or position in unique_keys
    # Per multi-hot field: int64 offsets [rows + 1] into int32 ids.
    lists: list[tuple[NDArray[np.int64], NDArray[np.int32]]]
    # Per categorical, then per multi-hot field: keys in order of first sight; None when hashed.
    unique_keys: list[NDArray[np.uint64] | None]
    missing: NDArray[np.int64]  # [num_dense + num_one_hot + num_lists]
    malformed: list[Malformed]  # the first max_malformed
    malformed_count: int
