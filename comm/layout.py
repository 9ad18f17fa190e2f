"""Where the parameters of a bucket lie in its flat buffer, and how ranks share it out."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's values."""

    name: str
    begin: int
    """In the parameter."""
    at: int
    """In the flat buffer."""
    count: int


@dataclass(frozen=True)
class Layout:
    """Parameters one after the other in one float32 buffer."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    """Values of each."""

    @cached_property
    def count(self) -> int:
        """Values of all."""
        return sum(self.counts)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Every parameter, whole."""
        at = 0
        pieces = []
        for name, count in zip(self.names, self.counts, strict=True):
            pieces.append(Piece(name, 0, at, count))
            at += count
        return tuple(pieces)


@lru_cache(maxsize=256)
def shares(layout: Layout, world_size: int, align: int) -> tuple[tuple[Piece, ...], ...]:
    """Split a buffer into about equal parts, one a rank, in order.

    Parameters are cut at multiples of ``align`` from their own beginning, so that blocks of a codec
    stay whole and never reach from one parameter into the next.
    """
    cuts = [0]
    for rank in range(1, world_size):
        wanted = layout.count * rank // world_size
        cut = layout.count
        for piece in layout.pieces:
            if wanted < piece.at + piece.count:
                cut = piece.at + (wanted - piece.at) // align * align
                break
        cuts.append(max(cut, cuts[-1]))
    cuts.append(layout.count)
    return tuple(tuple(_between(layout, begin, end)) for begin, end in pairwise(cuts))


@lru_cache(maxsize=256)
def runs(pieces: tuple[Piece, ...], align: int) -> tuple[tuple[Piece, ...], ...]:
    """Join neighbours that a codec treats alike together and one by one.

    That is where all but the last have a multiple of ``align`` values, so that no block would reach
    from one into the next. A codec that knows no blocks, ``align`` 1, sees every piece as a whole.
    """
    joined: list[list[Piece]] = []
    for piece in pieces:
        before = joined[-1][-1] if joined else None
        if (
            before is not None
            and align > 1
            and before.count % align == 0
            and before.at + before.count == piece.at
        ):
            joined[-1].append(piece)
        else:
            joined.append([piece])
    return tuple(tuple(run) for run in joined)


def _between(layout: Layout, begin: int, end: int) -> list[Piece]:
    parts = []
    for piece in layout.pieces:
        first, last = max(begin, piece.at), min(end, piece.at + piece.count)
        if first < last:
            parts.append(Piece(piece.name, first - piece.at, first, last - first))
    return parts
