"""The exchange in worlds of real processes: exact sums, the same bits everywhere, nothing lost.

Every rank makes the gradients of all ranks from their seeds and so knows what must come out.
"""

from functools import cache
from typing import Any

import pytest
import torch
from backends_here import BACKENDS
from torch import Tensor, distributed
from worlds import run_world

from dqrm.comm import (
    Blocks,
    Cast,
    Codec,
    Exchange,
    Largest,
    MessageError,
    Meter,
    Policy,
    Recipe,
    RefusedError,
    ReplicasDifferError,
    RowRecipe,
    Rows,
    Signs,
    TableRows,
)
from dqrm.comm.message import name_checksum
from dqrm.comm.wire import Wire
from dqrm.kernels.tables import RowGradient

ROWS, DIM = 700, 16
SHAPES = {"a.weight": (40, 30), "a.bias": (30,), "b.weight": (3, 7, 50), "empty": (0,), "c": (1,)}
WORLDS = [1, 2, 3, 4]


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


def exact_sums(rank: int, world: int) -> None:
    for algorithm in ("gather", "owner"):
        exchange = make(
            Recipe(Cast()),
            RowRecipe(Rows(32), algorithm=algorithm),  # type: ignore[arg-type]
        )
        for step in range(3):
            merged, dense = step_of(exchange, step)
            rows, total = mean_rows(world, step)
            assert torch.equal(merged.rows, rows)
            assert torch.equal(as_table(merged), total)
            for name, mean in mean_dense(world, step).items():
                torch.testing.assert_close(dense[name], mean)
        exchange.close(20)


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


def nothing_is_lost_of_rows(rank: int, world: int, bits: int, algorithm: str) -> None:
    recipe = RowRecipe(Rows(bits), residual_rows=ROWS, algorithm=algorithm)  # type: ignore[arg-type]
    exchange = make(Recipe(Cast()), recipe)
    given, applied = torch.zeros(ROWS, DIM), torch.zeros(ROWS, DIM)
    for step in range(6):
        merged, _ = step_of(exchange, step)
        rows, total = mean_rows(world, step)
        assert torch.equal(merged.rows, rows)
        given += total
        applied += as_table(merged)
    torch.testing.assert_close(applied + owed_rows(exchange), given, rtol=1e-5, atol=1e-5)
    assert 0 < owed_rows(exchange).norm() < {16: 0.01, 8: 0.05, 4: 0.5}[bits] * given.norm()
    exchange.close(20)


def nothing_is_lost_of_parameters(rank: int, world: int, codec: Codec, algorithm: str) -> None:
    exchange = make(Recipe(codec, algorithm=algorithm), RowRecipe(Rows(8)))  # type: ignore[arg-type]
    given = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    applied = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(5):
        _, dense = step_of(exchange, step)
        for name, mean in mean_dense(world, step).items():
            given[name] += mean
            applied[name] += dense[name]
    for name, owed in owed_dense(exchange).items():
        torch.testing.assert_close(applied[name] + owed, given[name], rtol=1e-4, atol=1e-4)
    exchange.close(20)


def few_places_for_residuals(rank: int, world: int) -> None:
    """The cache overflows: rows leave it and are sent; ranks stay equal, errors bounded."""
    exchange = make(Recipe(Cast()), RowRecipe(Rows(4), residual_rows=64))
    given, applied = torch.zeros(ROWS, DIM), torch.zeros(ROWS, DIM)
    sent_more = False
    for step in range(40):
        merged, _ = step_of(exchange, step)
        rows, total = mean_rows(world, step)
        assert torch.isin(rows, merged.rows).all()
        sent_more |= len(merged.rows) > len(rows)
        given += total
        applied += as_table(merged)
    assert sent_more
    # Each element is a sum of up to 40 roundings, each right on average, of steps of about 0.5 / W.
    assert (applied - given).abs().max() < 4.0
    assert abs(float((applied - given).mean())) < 0.02
    exchange.close(20)


def bad_gradients_are_told_to_all(rank: int, world: int) -> None:
    exchange = make(Recipe(Blocks()), RowRecipe(Rows(8)))
    exchange.start_step(0)
    last = world - 1
    bad = dense_gradients(rank, 0)
    if rank == last:
        bad["b.weight"][1, 2, 3] = torch.nan
    said = rf"rank {last}: the gradient of 'b\.weight' has NaN or infinity"
    with pytest.raises(RefusedError, match=said):
        exchange.reduce_dense(bad).wait(20)
    rows = row_gradient(rank, 0)
    if rank == last:
        rows.values[4, 5] = torch.inf
    said = (
        rf"rank {last}: the gradient of 'tables' has NaN .* in row {row_gradient(last, 0).rows[4]}"
    )
    with pytest.raises(RefusedError, match=said):
        exchange.reduce_rows("tables", rows).wait(20)
    rows = row_gradient(rank, 0)
    if rank == last:
        rows = RowGradient(rows.rows.flip(0), rows.values)
    with pytest.raises(RefusedError, match=rf"rank {last}: .*must ascend"):
        exchange.reduce_rows("tables", rows).wait(20)
    rows = row_gradient(rank, 0)
    if rank == last:
        rows.rows[-1] = ROWS
    with pytest.raises(RefusedError, match=f"row {ROWS} is outside the {ROWS} rows of 'tables'"):
        exchange.reduce_rows("tables", rows).wait(20)
    differing = {"same": torch.ones(3), "other": torch.tensor([float(rank == last)])}
    with pytest.raises(ReplicasDifferError, match=rf"rank 0 holds: 'other' of rank {last}$"):
        exchange.require_equal(differing).wait(20)
    step_of(exchange, 1)
    exchange.close(20)


def bytes_are_counted(rank: int, world: int) -> None:
    exchange = make(Recipe(Blocks(8, block=256)), RowRecipe(Rows(8)))
    for step in range(3):
        step_of(exchange, step)
    report = exchange.meter.report()
    dense = {key: value for key, value in report.items() if key.startswith("a.weight")}
    count = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    if world == 2:
        blocks = sum(-(-torch.Size(shape).numel() // 256) for shape in SHAPES.values())
        size = 32 + count + 4 * blocks
        [(_, gather)] = dense.items()
        assert gather["sent_bytes"] == gather["received_bytes"] == 3 * size
        assert gather["payload_bytes"] == 3 * size
        assert gather["raw_bytes"] == 3 * 4 * count
    else:
        assert {key.rpartition("/")[2] for key in dense} == {"scatter", "collect"}
        raw = sum(value["raw_bytes"] for value in dense.values())
        assert raw == pytest.approx(3 * 2 * (world - 1) / world * 4 * count)
    rows = report["tables/gather"]
    payload = sum(
        32 + -(-len(one.rows) // 4) + len(one.rows) * (1 + 2 + DIM)
        for one in (row_gradient(rank, step) for step in range(3))
    )
    assert rows["payload_bytes"] == payload
    assert rows["sent_bytes"] >= (world - 1) * rows["payload_bytes"] / 3
    assert rows["messages"] in (3, 4, 5)
    total = report["total"]
    assert total["busy_seconds"] >= total["wire_seconds"] > 0
    assert total["exposed_seconds"] > 0
    exchange.close(20)


def resuming_goes_on_exactly(rank: int, world: int, algorithm: str) -> None:
    def fresh() -> Exchange:
        return make(
            Recipe(Blocks(4, block=64, rounding="stochastic")),
            RowRecipe(Rows(4), residual_rows=64, algorithm=algorithm),  # type: ignore[arg-type]
            seed=7,
        )

    unbroken = fresh()
    for step in range(4):
        step_of(unbroken, step)
    state = unbroken.state_dict()
    expected = [step_of(unbroken, step) for step in range(4, 6)]
    kept = [(RowGradient(m.rows.clone(), m.values.clone()), d) for m, d in expected[-1:]]
    unbroken.close(20)
    resumed = fresh()
    resumed.load_state_dict(state)
    for step in range(4, 6):
        merged, dense = step_of(resumed, step)
    assert torch.equal(merged.rows, kept[0][0].rows)
    assert torch.equal(merged.values, kept[0][0].values)
    assert all(torch.equal(dense[name], kept[0][1][name]) for name in SHAPES)
    assert {key: float(value.sum()) for key, value in resumed.state_dict().items()}
    resumed.close(20)


def warming_up_sends_in_full(rank: int, world: int) -> None:
    exchange = make(Recipe(Signs()), RowRecipe(Rows(4)), warmup_steps=2)
    for step in range(3):
        merged, dense = step_of(exchange, step)
        _, total = mean_rows(world, step)
        exact = torch.equal(as_table(merged), total)
        assert exact == (step < 2) == exchange.warming_up
        close = torch.allclose(dense["a.weight"], mean_dense(world, step)["a.weight"], atol=1e-5)
        assert close == (step < 2)
    exchange.close(20)


def other_generations_are_refused(rank: int, world: int) -> None:
    wire = Wire(exchange_group(), Meter(), generation=int(rank == world - 1))
    message = torch.zeros(100, dtype=torch.uint8)
    header = wire.header(3, 1, name_checksum("x"), 0, 50)
    with pytest.raises(MessageError, match="generation"):
        wire.all_gather("x", "gather", message, header)


def every_dtype_and_layout(rank: int, world: int) -> None:
    exchange = make(Recipe(Blocks()), RowRecipe(Rows(8)))
    gradients = dense_gradients(rank, 0)
    gradients["a.weight"] = gradients["a.weight"].t().contiguous().t()
    gradients["b.weight"] = gradients["b.weight"].to(torch.bfloat16)
    exchange.reduce_dense(gradients).wait(20)
    assert gradients["b.weight"].dtype == torch.bfloat16
    for name, mean in mean_dense(world, 0).items():
        torch.testing.assert_close(gradients[name].float(), mean, atol=0.05, rtol=0.01)
    exchange.close(20)


def all_checks(rank: int, world: int) -> None:
    exact_sums(rank, world)
    if world == 1:
        return
    bytes_are_counted(rank, world)
    bad_gradients_are_told_to_all(rank, world)
    warming_up_sends_in_full(rank, world)
    every_dtype_and_layout(rank, world)
    few_places_for_residuals(rank, world)
    other_generations_are_refused(rank, world)
    for algorithm in ("gather", "owner"):
        resuming_goes_on_exactly(rank, world, algorithm)
        for bits in (16, 8, 4):
            nothing_is_lost_of_rows(rank, world, bits, algorithm)
    codecs = [Blocks(8), Blocks(4, block=64), Signs(block=64), Largest(0.1)]
    for codec in codecs:
        for algorithm in ("gather", "scatter"):
            nothing_is_lost_of_parameters(rank, world, codec, algorithm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", WORLDS)
def test_exchanges(world: int, backend: str) -> None:
    run_world(all_checks, world, backend=backend, timeout=90)


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
    from dqrm.comm import reshard

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
    from dqrm.comm import reshard

    states = [{"dense/worker/a": torch.randn(3)} for _ in range(3)]
    fresh = reshard(states, 3)
    assert [state["dense/worker/a"].tolist() for state in fresh] == [
        state["dense/worker/a"].tolist() for state in states
    ]
