"""Numbers and tables as people read them."""

from collections.abc import Sequence


def bytes_text(count: float) -> str:
    """``12.3 MiB``: three or four digits in the largest unit that keeps the number above 1."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count /= 1024
        power += 1
    return f"{count:.0f} {units[power]}" if power == 0 else f"{count:.1f} {units[power]}"


def seconds_text(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def shortened(text: str, letters: int) -> str:
    """The text, or its beginning and end where it is longer than that: names differ in both."""
    if len(text) <= letters:
        return text
    end = (letters - 3) // 2
    return f"{text[: letters - 3 - end]}...{text[len(text) - end :]}"


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values below each other, the values aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table with its first ``left`` columns flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
