"""One line of delimited text, in plain Python: what its fields mean, or why it is malformed.

These few functions define the accepted text. The native parser decides the same and comes back
here for the wording of its complaints.
"""

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias

import numpy as np

from dqrm.kernels.plan import MAX_LINE_BYTES, Field, Plan, Role

_BLANKS: Final = b" \t"
_NUMBER: Final = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NAN: Final = re.compile(rb"[+-]?nan", re.IGNORECASE)
_INFINITY: Final = re.compile(rb"[+-]?inf(?:inity)?", re.IGNORECASE)
_ISO_TIME: Final = re.compile(
    rb"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    rb"(?:[ T]([0-9]{2}):([0-9]{2}):([0-9]{2})(\.[0-9]+)?(?:Z|([+-])([0-9]{2}):([0-9]{2}))?)?"
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_LABELS: Final = {b"0": 0.0, b"1": 1.0, b"0.0": 0.0, b"1.0": 1.0}
_SHOWN_CHARACTERS: Final = 40

Value: TypeAlias = float | bytes | list[bytes] | None


class RowError(Exception):
    """Why a line is malformed, and in which field if it is one field's fault."""

    def __init__(self, field: int | None, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def split_fields(line: bytes, plan: Plan) -> list[bytes]:
    """Cut a line, without its line break, into unquoted fields. Raises RowError."""
    delimiter = plan.delimiter.encode()
    if plan.quote is None or plan.quote.encode() not in line:
        return line.split(delimiter)
    quote = plan.quote.encode()
    fields: list[bytes] = []
    at = 0
    while True:
        if line[at : at + 1] == quote:
            parts = []
            at += 1
            while True:
                close = line.find(quote, at)
                if close < 0:
                    raise RowError(
                        len(fields),
                        "unterminated quote (line breaks inside quotes are not supported)",
                    )
                parts.append(line[at:close])
                at = close + 1
                if line[at : at + 1] != quote:
                    break
                at += 1
            if line[at : at + 1] not in (delimiter, b""):
                raise RowError(len(fields), "text after the closing quote")
            fields.append(quote.join(parts))
            end = at
        else:
            end = line.find(delimiter, at)
            end = len(line) if end < 0 else end
            fields.append(line[at:end])
        if end == len(line):
            return fields
        at = end + 1


def parse_row(line: bytes, plan: Plan) -> list[Value]:
    """Values of one line without its line break, one per field.

    Label, dense and time are floats (dense already transformed; None where missing),
    categorical is bytes, multi-hot a list of bytes, a skipped field None. Raises RowError.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RowError(None, f"line has {len(line)} bytes, more than {MAX_LINE_BYTES}")
    fields = split_fields(line, plan)
    if len(fields) != len(plan.fields):
        raise RowError(None, f"expected {len(plan.fields)} fields, found {len(fields)}")
    separator = plan.list_separator.encode()
    values: list[Value] = []
    for index, (text, field) in enumerate(zip(fields, plan.fields, strict=True)):
        try:
            values.append(_value(text, field, separator))
        except ValueError as error:
            raise RowError(index, str(error)) from None
    return values


def _value(text: bytes, field: Field, separator: bytes) -> Value:
    match field.role:
        case Role.LABEL:
            return _label(text)
        case Role.DENSE:
            return _dense(text, field.log1p)
        case Role.TIME:
            return _time(text)
        case Role.CATEGORICAL:
            return text
        case Role.MULTI_HOT:
            return [item for item in text.split(separator) if item]
        case Role.SKIP:
            return None


def _label(text: bytes) -> float:
    value = _LABELS.get(text.strip(_BLANKS))
    if value is None:
        raise ValueError(f"label {_shown(text)} is not 0 or 1")
    return value


def _number(text: bytes, what: str) -> float | None:
    """A finite double, or None for an empty field and for nan."""
    number = text.strip(_BLANKS)
    if not number or _NAN.fullmatch(number):
        return None
    if _INFINITY.fullmatch(number):
        raise ValueError(f"{what} {_shown(text)} is not finite")
    if not _NUMBER.fullmatch(number):
        raise ValueError(f"{what} {_shown(text)} is not a number")
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{what} {_shown(text)} is too large")
    # Minus zero would be the only value that differs by bits alone.
    return value + 0.0


def _dense(text: bytes, log1p: bool) -> float | None:
    value = _number(text, "dense value")
    if value is None:
        return None
    if log1p:
        # The C library's log1p in double, as in the native parser, then one rounding to float32.
        return math.log1p(value) if value > 0.0 else 0.0
    if not math.isfinite(_to_float32(value)):
        raise ValueError(f"dense value {_shown(text)} is too large")
    return value


def _to_float32(value: float) -> float:
    if abs(value) <= _FLOAT32_MAX:
        return value
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _time(text: bytes) -> float:
    stripped = text.strip(_BLANKS)
    match = _ISO_TIME.fullmatch(stripped)
    if match is None:
        value = _number(text, "time") if _NUMBER.fullmatch(stripped) else None
        if value is None:
            raise ValueError(
                f"time {_shown(text)} is neither a number nor YYYY-MM-DD[ T]HH:MM:SS[.f][Z]"
            )
        return value
    year, month, day, hour, minute, second, fraction, sign, off_hour, off_minute = match.groups()
    try:
        moment = datetime(
            int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0),
            tzinfo=UTC,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"time {_shown(text)}: {error}") from None
    seconds = (moment - _EPOCH) // timedelta(seconds=1)
    if sign is not None:
        if int(off_hour) > 23 or int(off_minute) > 59:
            raise ValueError(f"time {_shown(text)}: offset must be within a day")
        offset = int(off_hour) * 3600 + int(off_minute) * 60
        seconds += offset if sign == b"-" else -offset
    return float(seconds) + (float(b"0" + fraction) if fraction else 0.0)


def _shown(text: bytes) -> str:
    """The text for a message, cut short, never a character that moves the terminal's cursor."""
    shown = text[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "backslashreplace")
    if len(shown) > _SHOWN_CHARACTERS or len(text) > 4 * _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    return repr(shown)
