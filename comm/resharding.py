"""Residuals for a world of another size; the invariants are in error_feedback and here.

Of the rows that ranks own, each residual belongs to the mean already: joined, and split again by
row % W', bit for bit.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dqrm.comm import error_feedback
from dqrm.comm.row_residuals import reshard_rows
from dqrm.comm.state_keys import DENSE, OWNED, ROWS, joined, split


def reshard(states: Sequence[Mapping[str, Tensor]], world_size: int) -> list[dict[str, Tensor]]:
    """Return the states of ``world_size`` ranks from those of all ranks of another world.

    Args:
        states: what Exchange.state_dict returned, by rank; in two levels, by leader.
        world_size: of the new world; in two levels, its leaders. As many as there are states: they
            are returned as they are.
    """
    if world_size == len(states):
        return [dict(state) for state in states]
    split_states = [split(state) for state in states]
    result: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    for kind, name in sorted({key for state in split_states for key in state}):
        parts = [state.get((kind, name), {}) for state in split_states]
        if kind == DENSE:
            fresh = error_feedback.reshard(parts, world_size)
        elif kind == ROWS:
            fresh = reshard_rows(parts, world_size)
        else:
            assert kind == OWNED
            fresh = _by_owner(parts, world_size)
        for target, part in zip(result, fresh, strict=True):
            target |= joined(kind, name, part)
    return result


def _by_owner(states: Sequence[Mapping[str, Tensor]], world_size: int) -> list[dict[str, Tensor]]:
    rows = torch.cat([state[key] for state in states for key in ("rows", "waiting_rows")])
    values = torch.cat([state[key] for state in states for key in ("values", "waiting_values")])
    order = rows.argsort()
    rows, values = rows[order], values[order]
    result = []
    for rank in range(world_size):
        mine = rows % world_size == rank
        result.append(
            {
                "rows": rows[:0],
                "values": values[:0],
                "waiting_rows": rows[mine],
                "waiting_values": values[mine],
            }
        )
    return result
