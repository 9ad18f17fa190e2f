"""What the row codec lost, kept for the rows that come most often (dqrm.kernels.hot_rows).

Up to ``capacity`` rows every row has its own place. Beyond, they share as many places as that, and
a row that comes too seldom to hold one is rounded stochastically instead, which is right on average
without a residual. Memory and time do not grow with the tables.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dqrm.kernels.hot_rows import place_rows, slots_for
from dqrm.kernels.tables import RowGradient

# At most one row in so many may be sent only because it lost its place.
_ROWS_PER_EVICTION = 16


class RowResiduals:
    """Residuals of the rows of a collection of tables on one rank.

    Args:
        rows: of all tables.
        dim: D.
        capacity: places, rounded up to four times a power of two where rows share them.
    """

    def __init__(self, rows: int, dim: int, capacity: int) -> None:
        if rows < 0 or dim < 1 or capacity < 1:
            raise ValueError(f"{rows} rows of {dim} values in {capacity} places cannot be")
        self.rows, self.dim, self.capacity = rows, dim, capacity
        self._direct = rows <= capacity
        slots = rows if self._direct else slots_for(capacity)
        self.values = torch.zeros(slots, dim)
        """float32 [places, D]."""
        self._held = torch.full((0 if self._direct else slots,), -1)
        self._uses = torch.zeros(len(self._held), dtype=torch.int16)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._gone = _no_rows(dim)
        # Rows that found no place when the world changed; they are sent with the next gradient.
        self._waiting = _no_rows(dim)

    def place(self, gradient: RowGradient) -> tuple[Tensor, RowGradient]:
        """Give each row of a gradient its place.

        Returns:
            The places, int64 [N], -1 for none, valid until the next call; and rows that lost
            theirs, to be sent with the residuals they had, none of them in the gradient.
        """
        rows = gradient.rows
        if self._direct:
            slots, gone = rows, _no_rows(self.dim)
        else:
            if len(self._slots) < len(rows):
                self._slots = torch.empty(len(rows) * 5 // 4, dtype=torch.int64)
                room = max(1, len(self._slots) // _ROWS_PER_EVICTION)
                self._gone = RowGradient(
                    torch.empty(room, dtype=torch.int64), torch.empty(room, self.dim)
                )
            slots = self._slots[: len(rows)]
            room = len(rows) // _ROWS_PER_EVICTION
            given = RowGradient(self._gone.rows[:room], self._gone.values[:room])
            count = place_rows(self._held, self._uses, self.values, rows, slots, given)
            gone = RowGradient(given.rows[:count], given.values[:count])
        if len(self._waiting.rows):
            gone = self._with_waiting(rows, slots, gone)
        return slots, gone

    def _with_waiting(self, rows: Tensor, slots: Tensor, gone: RowGradient) -> RowGradient:
        """Return the rows to be sent, waiting ones among them that are not in the gradient."""
        waiting = self._waiting
        among = torch.isin(waiting.rows, rows)
        at = slots[torch.searchsorted(rows, waiting.rows[among])]
        placed = at >= 0
        self.values[at[placed]] += waiting.values[among][placed]
        # Of those in the gradient without a place, the turn comes later.
        self._waiting = RowGradient(waiting.rows[among][~placed], waiting.values[among][~placed])
        return _joined([gone, RowGradient(waiting.rows[~among], waiting.values[~among])], self.dim)

    def add(self, state: Mapping[str, Tensor], factor: float) -> None:
        """Take over the residuals of a state that :meth:`state_dict` returned, times a factor."""
        for kind in ("", "waiting_"):
            rows, values = state[kind + "rows"], state[kind + "values"]
            self._take(RowGradient(rows, values * factor))

    def _take(self, taken: RowGradient) -> None:
        """Add to the residuals of some rows; those for which no place is free wait."""
        taken = _joined([taken], self.dim)
        slots = taken.rows
        if not self._direct:
            slots = torch.empty_like(slots)
            place_rows(self._held, self._uses, self.values, taken.rows, slots, _no_rows(self.dim))
        placed = slots >= 0
        self.values[slots[placed]] += taken.values[placed]
        rest = RowGradient(taken.rows[~placed], taken.values[~placed])
        self._waiting = _joined([self._waiting, rest], self.dim)

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Return the places that are taken and their rows."""
        if self._direct:
            places = self.values.any(dim=1).nonzero().view(-1)
            return places, places
        places = (self._held >= 0).nonzero().view(-1)
        return places, self._held[places]

    def norm(self) -> float:
        """Return the Euclidean norm of all residuals of this rank."""
        return float(torch.hypot(self.values.norm(), self._waiting.values.norm()))

    def rescale(self, factor: float) -> None:
        """Multiply all residuals: old learning rate / new one, when it changes."""
        self.values.mul_(factor)
        self._waiting.values.mul_(factor)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is kept: rows with a residual, their places and uses, and waiting rows."""
        places, rows = self._kept()
        state = {
            "rows": rows,
            "places": places.clone(),
            "values": self.values[places],
            "waiting_rows": self._waiting.rows.clone(),
            "waiting_values": self._waiting.values.clone(),
        }
        if not self._direct:
            state["uses"] = self._uses[places]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` or :func:`reshard_rows` returned.

        With another capacity than the state's, or from another world, rows are placed anew.
        """
        fresh = RowResiduals(self.rows, self.dim, self.capacity)
        places = state.get("places")
        if (
            places is not None
            and ("uses" in state) != fresh._direct
            and _fits(places, fresh.values)
        ):
            fresh.values[places] = state["values"]
            if not fresh._direct:
                fresh._held[places] = state["rows"]
                fresh._uses[places] = state["uses"]
            fresh._waiting = RowGradient(
                state["waiting_rows"].clone(), state["waiting_values"].clone()
            )
        else:
            fresh.add(state, 1.0)
        self.__dict__.update(fresh.__dict__)


def reshard_rows(
    states: Sequence[Mapping[str, Tensor]], world_size: int
) -> list[dict[str, Tensor]]:
    """Return the states of ``world_size`` ranks from those of all ranks of another world.

    (Sum of residuals) / W is conserved, row by row: rank j gets W' / W times the sum of the states
    of ranks i with i % W' = j. As many as there are states: they are returned as they are.
    """
    old = len(states)
    if world_size == old:
        return [dict(state) for state in states]
    result = []
    for rank in range(world_size):
        dim = states[0]["values"].shape[1]
        parts = []
        for state in states[rank::world_size]:
            parts.append(RowGradient(state["rows"], state["values"]))
            parts.append(RowGradient(state["waiting_rows"], state["waiting_values"]))
        joined = _joined(parts, dim)
        nothing = _no_rows(dim)
        result.append(
            {
                "rows": nothing.rows,
                "values": nothing.values,
                "waiting_rows": joined.rows,
                "waiting_values": joined.values * (world_size / old),
            }
        )
    return result


def _fits(places: Tensor, values: Tensor) -> bool:
    return not len(places) or int(places.max()) < len(values)


def _joined(parts: Sequence[RowGradient], dim: int) -> RowGradient:
    """Return the sum of some gradients, rows ascending."""
    if not parts:
        return _no_rows(dim)
    rows, inverse = torch.unique(torch.cat([part.rows for part in parts]), return_inverse=True)
    values = torch.zeros(len(rows), dim)
    values.index_add_(0, inverse, torch.cat([part.values for part in parts]))
    return RowGradient(rows, values)


def _no_rows(dim: int) -> RowGradient:
    return RowGradient(torch.empty(0, dtype=torch.int64), torch.empty(0, dim))
