"""Malformed lines: how many are too many, and where they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqrm.data.files import new_file
from dqrm.data.splits import ShardKey

_SHOWN = 5


@dataclass(frozen=True)
class MalformedLine:
    """One line that was left out."""

    file: str
    line: int
    """From 1, as editors count; header included. In Parquet and frames, the row from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def is_too_many(shard: Mapping[str, Any], malformed: int, limit: float) -> bool:
    """Whether preparation has failed, given one more shard and the malformed lines so far.

    With a share for a limit the total is only known at the end, so a shard that is mostly
    malformed stands for it: the format is wrong, not a line. The rule looks at one shard at a
    time, so the outcome does not depend on which comes first.
    """
    if limit >= 1.0:
        return malformed > limit
    return limit < 0.5 and 2 * int(shard["malformed_count"]) > int(shard["lines"])


def located(
    shards: Mapping[ShardKey, Mapping[str, Any]],
    shard_counts: Mapping[tuple[int, int], int],
    names: Sequence[str],
    header_lines: Sequence[int],
) -> Iterator[MalformedLine]:
    """Malformed lines with their place in the file, in file order.

    shards: figures by key; those after a gap in a file are left out, as their place is unknown.
    shard_counts: number of shards of each (file, part) that is known.
    """
    for file, name in enumerate(names):
        before = header_lines[file]
        part = number = 0
        while (shard := shards.get(ShardKey(file, part, number))) is not None:
            for line, reason in shard["malformed"]:
                yield MalformedLine(name, before + line + 1, reason)
            before += int(shard["lines"])
            number += 1
            if number == shard_counts.get((file, part)):
                part, number = part + 1, 0


def too_many(
    malformed: int, lines: int, limit: float, examples: Iterator[MalformedLine]
) -> ValueError:
    """The error that ends preparation."""
    allowed = f"{limit:g}" if limit < 1.0 else f"{limit:.0f}"
    shown = "; ".join(str(example) for example, _ in zip(examples, range(_SHOWN), strict=False))
    return ValueError(
        f"{malformed} of {lines} lines read are malformed, more than max_malformed={allowed} "
        f"allows; first {shown}; mend the sources, correct format or schema, or raise the limit"
    )


def write_malformed(path: Path, lines: Sequence[MalformedLine]) -> None:
    """Write a tab-separated file: file, line, reason."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("file\tline\treason\n")
        file.writelines(
            f"{bad.file}\t{bad.line}\t{' '.join(bad.reason.split())}\n" for bad in lines
        )
