"""Places for what the codec lost of the rows that come again most often: a cache of bounded size.

A row lives in the set of four slots that its hash names. A row that comes anew takes a free slot of
its set, else it counts one use of the slot used least down, and once that has none left takes its
place. What the row that leaves had kept is handed out, to be sent: residuals are moved, not lost.
Rows of the call that is under way stay.

Symbols: S slots, D values a row, N rows, of which E leave.
"""

from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.rounding import mix64_reference
from dqrm.kernels.tables import RowGradient

WAYS = 4
FIRST_USES = 4
MOST_USES = 0x7FFF


def slots_for(rows: int) -> int:
    """Return the smallest number of slots, four times a power of two, that is at least ``rows``."""
    return WAYS * (1 << max(0, -(-rows // WAYS) - 1).bit_length())


def place_rows(
    hot_rows: Tensor,
    uses: Tensor,
    values: Tensor,
    rows: Tensor,
    slots: Tensor,
    evicted: RowGradient,
) -> int:
    """Find or make a slot for each of some rows, and write its number, or -1, to ``slots``.

    Args:
        hot_rows: int64 [S], S from :func:`slots_for`; the row of each slot, -1 where it is free.
        uses: int16 [S].
        values: float32 [S, D], the residuals; zero for rows that are new.
        rows: int64 [N], ascending without repeats, none negative.
        slots: int64 [N], written.
        evicted: room for the rows that leave: int64 [E] and float32 [E, D]. While it is full, none
            leaves.

    Returns:
        How many left with a residual; the first of ``evicted`` are theirs, ascending.

    Raises:
        ValueError: an argument is not as above.
    """
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        return place_rows_reference(hot_rows, uses, values, rows, slots, evicted)
    return int(
        native.place_rows(
            capsule(hot_rows),
            capsule(uses),
            capsule(values),
            capsule(rows),
            capsule(slots),
            capsule(evicted.rows),
            capsule(evicted.values),
        )
    )


def place_rows_reference(
    hot_rows: Tensor,
    uses: Tensor,
    values: Tensor,
    rows: Tensor,
    slots: Tensor,
    evicted: RowGradient,
) -> int:
    """Define :func:`place_rows` in plain Python."""
    if len(rows) and (int(rows[0]) < 0 or bool((rows.diff() <= 0).any())):
        raise ValueError("rows: must ascend without repeats, none negative")
    sets = len(hot_rows) // WAYS
    wanted = [int(row) for row in rows]
    ways = {
        row: range(at := WAYS * (mix64_reference(row) & (sets - 1)), at + WAYS) for row in wanted
    }
    seen = set()
    for i, row in enumerate(wanted):
        hits = [slot for slot in ways[row] if int(hot_rows[slot]) == row]
        slots[i] = hits[0] if hits else -1
        for slot in hits:
            uses[slot] = min(int(uses[slot]) + 1, MOST_USES)
            seen.add(slot)
    gone: list[tuple[int, Tensor]] = []
    for i, row in enumerate(wanted):
        if int(slots[i]) >= 0:
            continue
        free = [slot for slot in ways[row] if int(hot_rows[slot]) < 0]
        others = [slot for slot in ways[row] if slot not in seen]
        if free:
            slot = free[0]
        elif others:
            slot = min(others, key=lambda other: int(uses[other]))
            if int(uses[slot]) > 0:
                uses[slot] -= 1
                continue
            if bool(values[slot].any()):
                if len(gone) == len(evicted.rows):
                    continue
                gone.append((int(hot_rows[slot]), values[slot].clone()))
        else:
            continue
        hot_rows[slot], uses[slot], slots[i] = row, FIRST_USES, slot
        values[slot] = 0.0
        seen.add(slot)
    for i, (row, residual) in enumerate(sorted(gone, key=lambda one: one[0])):
        evicted.rows[i], evicted.values[i] = row, residual
    return len(gone)
