"""Exchange in two levels: the mean over all ranks, compressed between nodes only."""

import pytest
import torch
from backends_here import CCL
from torch import Tensor
from worlds import run_world

from dqrm.comm import (
    Blocks,
    Cast,
    Exchange,
    Nodes,
    Policy,
    Recipe,
    RefusedError,
    RowRecipe,
    Rows,
    TableRows,
    make_nodes,
)
from dqrm.kernels.tables import RowGradient

ROWS, DIM, COUNT = 500, 8, 3000


def rows_of(rank: int) -> RowGradient:
    generator = torch.Generator().manual_seed(rank)
    count = 40 * rank  # none on rank 0
    rows = torch.randperm(ROWS, generator=generator)[:count].sort()[0]
    return RowGradient(rows, torch.randn(count, DIM, generator=generator))


def dense_of(rank: int) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(rank + 50))


def table(gradient: RowGradient) -> Tensor:
    return torch.zeros(ROWS, DIM).index_add_(0, gradient.rows, gradient.values)


def exchange_of(nodes: Nodes, dense: Recipe, rows: RowRecipe) -> Exchange:
    policy = Policy([("tables", rows), ("*", dense)])
    return Exchange(policy, {"w": COUNT}, {"tables": TableRows(ROWS, DIM)}, nodes=nodes)


def in_nodes(rank: int, world: int, per_node: int) -> None:
    nodes = make_nodes(per_node)
    mean_rows = torch.stack([table(rows_of(one)) for one in range(world)]).mean(0)
    mean = torch.stack([dense_of(one) for one in range(world)]).mean(0)
    for dense, rows, within in (
        (Recipe(Cast()), RowRecipe(Rows(32)), 1e-6),
        (Recipe(Blocks()), RowRecipe(Rows(8), residual_rows=ROWS), 0.05),
    ):
        exchange = exchange_of(nodes, dense, rows)
        for step in range(3):
            exchange.start_step(step)
            own = dense_of(rank)
            pending = exchange.reduce_rows("tables", rows_of(rank))
            exchange.reduce_dense({"w": own}).wait(20)
            merged = pending.wait(20)
            exchange.require_equal({"w": own, "rows": merged.rows, "values": merged.values}).wait()
            torch.testing.assert_close(own, mean, atol=within, rtol=within)
            torch.testing.assert_close(table(merged), mean_rows, atol=within, rtol=within)
        phases = {phase for _, phase in exchange.meter.traffic}
        leads, several = rank % per_node == 0, nodes.count > 1
        between = {"gather"} if dense.codec.linear else {"gather", "scatter", "collect"}
        assert leads or phases <= {"node", "gather"}
        assert not (leads and several) or phases & between
        # What leaders keep is not kept by others.
        assert bool(exchange.row_residuals) == (leads and several and rows.kept_rows > 0)
        bad = dense_of(rank)
        bad[5] = torch.nan if rank == world - 1 else 1.0
        if not dense.codec.linear and several:
            with pytest.raises(RefusedError, match=r"leaders of nodes, .*'w' has NaN"):
                exchange.reduce_dense({"w": bad}).wait(20)
        wrong = rows_of(rank)
        if rank == world - 1:
            wrong.values[3, 2] = torch.inf
        with pytest.raises(RefusedError, match="'tables' has NaN or infinity in row"):
            exchange.reduce_rows("tables", wrong).wait(20)
        exchange.reduce_dense({"w": dense_of(rank)}).wait(20)
        exchange.close(20)


@pytest.mark.parametrize(("world", "per_node"), [(4, 2), (3, 2), (2, 2), (2, 1)])
def test_two_levels(world: int, per_node: int) -> None:
    run_world(in_nodes, world, per_node=per_node, timeout=60)


@pytest.mark.parametrize("backend", [CCL])
def test_two_levels_over_oneccl(backend: str) -> None:
    run_world(in_nodes, 3, backend=backend, per_node=2, timeout=60)
