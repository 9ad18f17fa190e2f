"""Lengths of time as people write them: ``30 s``, ``5m``, ``6h``, ``1 day``."""

import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_NAMES = {
    **_UNITS,
    "min": "minutes",
    **{name: name for name in _UNITS.values()},
    **{name.removesuffix("s"): name for name in _UNITS.values()},
}
_TEXT = re.compile(r"(\d+)\s*([a-z]+)")


def parse_duration(text: object) -> timedelta:
    """Read ``90 s``, ``5m``, ``2 hours``, ``1d``.

    Raises ValueError for anything else, a number without a unit among it.
    """
    if isinstance(text, timedelta):
        return text
    match = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2] not in _NAMES:
        raise ValueError("must be a length of time such as 30s, 5m, 2h or 1d")
    try:
        return timedelta(**{_NAMES[match[2]]: int(match[1])})
    except OverflowError:
        raise ValueError("must be shorter") from None


def duration_text(length: timedelta) -> str:
    """The shortest text that reads back as ``length``, a whole number of seconds."""
    seconds = int(length.total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _positive(value: Any) -> timedelta:
    length = parse_duration(value)
    if not length:
        raise ValueError("must be longer than nothing")
    return length


Duration = Annotated[
    timedelta, BeforeValidator(_positive), PlainSerializer(duration_text, return_type=str)
]
