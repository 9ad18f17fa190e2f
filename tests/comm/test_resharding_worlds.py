"""A world of another size goes on with the residuals of an earlier one."""

from typing import Any

import pytest
import torch
from exchanges import (
    DIM,
    ROWS,
    SHAPES,
    as_table,
    make,
    mean_dense,
    mean_rows,
    owed_dense,
    owed_rows,
    step_of,
)
from torch import Tensor
from worlds import run_world

from dqrm.comm import Blocks, Recipe, RowRecipe, Rows, reshard


def loop_in(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Steps with owners' residuals, and the state they leave."""
    exchange = make(
        Recipe(Blocks(4, block=64), algorithm="scatter"),
        RowRecipe(Rows(4), residual_rows=64, algorithm="owner"),
    )
    for step in range(4):
        step_of(exchange, step)
    state = exchange.state_dict()
    exchange.close(20)
    return [state]


def go_on_in(rank: int, world: int, states: list[dict[str, Tensor]], algorithm: str) -> Any:
    exchange = make(
        Recipe(Blocks(4, block=64), algorithm="gather" if algorithm == "gather" else "scatter"),
        RowRecipe(Rows(4), residual_rows=ROWS, algorithm=algorithm),  # type: ignore[arg-type]
    )
    exchange.load_state_dict(states[rank])
    given = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    applied = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    given_rows, applied_rows = torch.zeros(ROWS, DIM), torch.zeros(ROWS, DIM)
    for step in range(4, 8):
        merged, dense = step_of(exchange, step)
        applied_rows += as_table(merged)
        given_rows += mean_rows(world, step)[1]
        for name, mean in mean_dense(world, step).items():
            given[name] += mean
            applied[name] += dense[name]
    paid = {name: applied[name] - given[name] for name in SHAPES}
    owed = owed_dense(exchange)
    before_rows = applied_rows - given_rows + owed_rows(exchange)
    exchange.close(20)
    return {name: paid[name] + owed[name] for name in SHAPES}, before_rows


def owed_by(states: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """What the states of a world say is owed to each parameter, and to the rows."""
    world = len(states)
    dense = {}
    for name, shape in SHAPES.items():
        total = torch.zeros(torch.Size(shape).numel())
        for state in states:
            total += state[f"dense/worker/{name}"] / world
            if f"dense/owner/{name}" in state:
                begin = int(state[f"dense/owner_begin/{name}"])
                part = state[f"dense/owner/{name}"]
                total[begin : begin + part.numel()] += part
        dense[name] = total.view(shape)
    rows = torch.zeros(ROWS, DIM)
    for state in states:
        for kind, share in (("rows", world), ("owned", 1)):
            for part in ("", "waiting_"):
                numbers = state[f"{kind}/tables/{part}rows"]
                rows.index_add_(0, numbers, state[f"{kind}/tables/{part}values"] / share)
    return dense, rows


@pytest.mark.parametrize(("world", "algorithm"), [(2, "gather"), (2, "owner"), (4, "owner")])
def test_another_world_pays_what_is_owed(world: int, algorithm: str) -> None:
    states = [state for [state] in run_world(loop_in, 3)]
    dense, rows = owed_by(states)
    assert rows.norm() > 0
    fresh = reshard(states, world)
    results = run_world(go_on_in, world, states=fresh, algorithm=algorithm)
    for found, found_rows in results:
        for name, owed in dense.items():
            torch.testing.assert_close(found[name], owed, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_rows, rows, rtol=1e-4, atol=1e-4)


def test_resharding_to_the_same_world_changes_nothing() -> None:
    states = [{"dense/worker/a": torch.randn(3)} for _ in range(3)]
    fresh = reshard(states, 3)
    assert [state["dense/worker/a"].tolist() for state in fresh] == [
        state["dense/worker/a"].tolist() for state in states
    ]
