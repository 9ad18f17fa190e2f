"""The exchange in worlds of real processes: exact sums, the same bits everywhere, nothing lost.

Every rank makes the gradients of all ranks from their seeds and so knows what must come out.
"""

import pytest
import torch
from backends_here import BACKENDS
from exchanges import (
    DIM,
    ROWS,
    SHAPES,
    as_table,
    dense_gradients,
    exchange_group,
    make,
    mean_dense,
    mean_rows,
    owed_dense,
    owed_rows,
    row_gradient,
    step_of,
)
from worlds import run_world

from dqrm.comm import (
    Blocks,
    Cast,
    Codec,
    Exchange,
    Largest,
    MessageError,
    Meter,
    Recipe,
    RefusedError,
    ReplicasDifferError,
    RowRecipe,
    Rows,
    Signs,
)
from dqrm.comm.message import name_checksum
from dqrm.comm.wire import Outgoing, Wire
from dqrm.kernels.tables import RowGradient

WORLDS = [1, 2, 3, 4]


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


def what_waits_travels_together(rank: int, world: int, algorithm: str) -> None:
    """Without a thread, with the same results, in fewer collectives, and each refusal its own."""

    def fresh(overlap: bool) -> Exchange:
        rows = RowRecipe(Rows(8), residual_rows=64, algorithm=algorithm)  # type: ignore[arg-type]
        return make(Recipe(Blocks(), algorithm="gather"), rows, seed=3, overlap=overlap)

    alone, together = fresh(True), fresh(False)
    for step in (0, 1, 2):
        expected, dense = step_of(alone, step)
        alone_sums = alone.sum([rank + 0.1, 3.0]).wait(20)
        together.start_step(step)
        pending_sums = together.sum([rank + 0.1, 3.0])
        own = {name: value.clone() for name, value in dense_gradients(rank, step).items()}
        halves = {name: own[name] for name in ("a.weight", "a.bias")}
        others = {name: value for name, value in own.items() if name not in halves}
        pending = [
            together.reduce_dense(halves),
            together.reduce_rows("tables", row_gradient(rank, step)),
            together.reduce_dense(others),
        ]
        assert not pending_sums.done()
        assert pending_sums.wait(20) == alone_sums
        assert all(one.done() for one in pending)
        assert alone_sums[1] == 3.0 * world
        assert all(torch.equal(own[name], dense[name]) for name in SHAPES)
        merged = pending[1].wait(20)
        assert merged is not None
        assert torch.equal(merged.rows, expected.rows)
        assert torch.equal(merged.values, expected.values)
    bad = dense_gradients(rank, 4)
    if rank == world - 1:
        bad["a.weight"][0, 0] = torch.nan
    together.start_step(4)
    sums = together.sum([1.0])
    refused = together.reduce_dense(bad)
    rows = together.reduce_rows("tables", row_gradient(rank, 4))
    assert sums.wait(20) == [float(world)]
    with pytest.raises(RefusedError, match=rf"rank {world - 1}: the gradient of 'a\.weight'"):
        refused.wait(20)
    together.require_equal({"rows": rows.wait(20).values}).wait(20)
    alone.close(20)
    together.close(20)


def other_generations_are_refused(rank: int, world: int) -> None:
    wire = Wire(exchange_group(), Meter(), generation=int(rank == world - 1))
    message = torch.zeros(100, dtype=torch.uint8)
    header = wire.header(3, 1, name_checksum("x"), 0, 50)
    with pytest.raises(MessageError, match="generation"):
        wire.gather([Outgoing("x", "gather", message, header)])


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
        what_waits_travels_together(rank, world, algorithm)
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
