"""An exchange of small gradients, and what must come out of it.

Every rank makes the gradients of all ranks from their seeds and so knows the exact mean.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed

from dqrm.comm import Exchange, Policy, Recipe, RowRecipe, TableRows
from dqrm.kernels.tables import RowGradient

ROWS, DIM = 700, 16
SHAPES = {"a.weight": (40, 30), "a.bias": (30,), "b.weight": (3, 7, 50), "empty": (0,), "c": (1,)}


def row_gradient(rank: int, step: int) -> RowGradient:
    """Of one rank; another number of rows on each, and none on rank 1 in every second step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    count = 0 if rank == 1 and step % 2 else 50 + 60 * rank
    rows = torch.randperm(ROWS, generator=generator)[:count].sort()[0]
    return RowGradient(rows, torch.randn(count, DIM, generator=generator))


def dense_gradients(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank + 500)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def as_table(gradient: RowGradient) -> Tensor:
    table = torch.zeros(ROWS, DIM)
    table[gradient.rows] = gradient.values
    return table


def mean_rows(world: int, step: int) -> tuple[Tensor, Tensor]:
    """The union of the rows and, as a table, the mean as the ranks must compute it."""
    alpha = torch.tensor(1 / world, dtype=torch.float32)
    gradients = [row_gradient(rank, step) for rank in range(world)]
    total = torch.zeros(ROWS, DIM)
    for gradient in gradients:
        total = total + alpha * as_table(gradient)
    return torch.cat([gradient.rows for gradient in gradients]).unique(), total


def mean_dense(world: int, step: int) -> dict[str, Tensor]:
    all_ranks = [dense_gradients(rank, step) for rank in range(world)]
    return {name: sum(one[name] for one in all_ranks) / world for name in SHAPES}


@cache
def exchange_group() -> distributed.ProcessGroup:
    """One for all exchanges of a world, one after the other; the tests' own sums use another."""
    return distributed.new_group()


def make(dense: Recipe, rows: RowRecipe, **arguments: Any) -> Exchange:
    warmup = arguments.pop("warmup_steps", 0)
    return Exchange(
        Policy([("tables", rows), ("*", dense)], warmup),
        {name: torch.Size(shape).numel() for name, shape in SHAPES.items()},
        {"tables": TableRows(ROWS, DIM)},
        group=exchange_group(),
        **arguments,
    )


def step_of(exchange: Exchange, step: int) -> tuple[RowGradient, dict[str, Tensor]]:
    """Exchange the gradients of a step, both under way at once, and hold the replicas equal."""
    exchange.start_step(step)
    dense = dense_gradients(exchange.rank, step)
    rows = exchange.reduce_rows("tables", row_gradient(exchange.rank, step))
    done = exchange.reduce_dense(dense)
    merged = rows.wait(20)
    done.wait(20)
    if exchange.world_size > 1:
        exchange.require_equal({"rows": merged.rows, "values": merged.values, **dense}).wait(20)
    return merged, dense


def summed(value: Tensor) -> Tensor:
    value = value.clone()
    distributed.all_reduce(value)
    return value


def owed_rows(exchange: Exchange) -> Tensor:
    """(Sum of residuals) / W and the owners' residuals, the same on all ranks."""
    owed = summed(exchange.row_residuals["tables"].values) / exchange.world_size
    if "tables" in exchange._owned:
        owed += summed(exchange._owned["tables"].values)
    return owed


def owed_dense(exchange: Exchange) -> dict[str, Tensor]:
    owed = {}
    state = exchange.feedback.state_dict()
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        own = state.get(f"worker/{name}", torch.zeros(count)) / exchange.world_size
        if f"owner/{name}" in state:
            begin, part = int(state[f"owner_begin/{name}"]), state[f"owner/{name}"]
            own[begin : begin + part.numel()] += part
        owed[name] = summed(own).view(shape)
    return owed
