"""Residuals by name: buckets are cut anew, learning rates and worlds change, nothing is lost."""

import pytest
import torch
from torch import Tensor

from dqrm.comm.codecs import Blocks
from dqrm.comm.error_feedback import ErrorFeedback, reshard
from dqrm.comm.layout import Layout, runs, shares
from dqrm.comm.row_residuals import RowResiduals, reshard_rows
from dqrm.kernels.tables import RowGradient

A, B, C = 1000, 17, 300


def owed(ranks: list[ErrorFeedback], name: str, count: int) -> Tensor:
    """(Sum of e) / W + f of a parameter."""
    total = torch.zeros(count)
    for rank in ranks:
        state = rank.state_dict()
        total += state[f"worker/{name}"] / len(ranks)
        if f"owner/{name}" in state:
            begin, part = int(state[f"owner_begin/{name}"]), state[f"owner/{name}"]
            total[begin : begin + part.numel()] += part
    return total


def world_with_residuals(world: int, layout: Layout) -> list[ErrorFeedback]:
    ranks = [ErrorFeedback(world) for _ in range(world)]
    for feedback, share in zip(ranks, shares(layout, world, 64), strict=True):
        feedback.worker(layout).normal_()
        feedback.owner(layout, share).normal_()
    return ranks


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("align", [1, 64, 256])
def test_shares_cover_everything_once_and_cut_at_blocks(world: int, align: int) -> None:
    for counts in [(A, B, C), (0,), (1, 0, 2), (5000,), ()]:
        layout = Layout(tuple(f"p{i}" for i in range(len(counts))), counts)
        parts = shares(layout, world, align)
        assert len(parts) == world
        flat = [piece for part in parts for piece in part]
        assert sum(piece.count for piece in flat) == layout.count
        at = 0
        for piece in flat:
            assert piece.at == at
            at += piece.count
            assert piece.begin % align == 0
            end = piece.begin + piece.count
            whole = counts[layout.names.index(piece.name)]
            assert end % align == 0 or end == whole


def test_parameters_keep_their_residuals_in_other_buckets() -> None:
    feedback = ErrorFeedback(2)
    first = feedback.worker(Layout(("a", "b"), (3, 2)))
    first.copy_(torch.arange(5.0))
    second = feedback.worker(Layout(("c", "b"), (2, 2)))
    assert second.tolist() == [0, 0, 3, 4]
    second += 1
    third = feedback.worker(Layout(("b", "a"), (2, 3)))
    assert third.tolist() == [4, 5, 0, 1, 2]
    assert feedback.worker(Layout(("b", "a"), (2, 3))) is third
    with pytest.raises(ValueError, match="residual of 'a' has 3 values, the parameter 4"):
        feedback.worker(Layout(("a",), (4,)))


def test_owners_of_other_shares_return_what_they_owe() -> None:
    layout = Layout(("a", "b", "c"), (A, B, C))
    ranks = world_with_residuals(3, layout)
    before = {name: owed(ranks, name, n) for name, n in (("a", A), ("b", B), ("c", C))}
    again = Layout(("c", "b", "a"), (C, B, A))
    for feedback, share in zip(ranks, shares(again, 3, 64), strict=True):
        feedback.worker(again)
        feedback.owner(again, share)
    for name, expected in before.items():
        torch.testing.assert_close(owed(ranks, name, expected.numel()), expected)
    for feedback in ranks:
        feedback.owner(again, ())
        assert not any(key.startswith("owner/") for key in feedback.state_dict())
    for name, expected in before.items():
        torch.testing.assert_close(owed(ranks, name, expected.numel()), expected)


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 2), (4, 1), (1, 4), (5, 2)])
def test_another_world_owes_the_same(old: int, new: int) -> None:
    layout = Layout(("a", "b", "c"), (A, B, C))
    ranks = world_with_residuals(old, layout)
    fresh = [ErrorFeedback(new) for _ in range(new)]
    for feedback, state in zip(fresh, reshard([r.state_dict() for r in ranks], new), strict=True):
        feedback.load_state_dict(state)
    for feedback, share in zip(fresh, shares(layout, new, 64), strict=True):
        feedback.worker(layout)
        feedback.owner(layout, share)
    for name, count in (("a", A), ("b", B), ("c", C)):
        torch.testing.assert_close(owed(fresh, name, count), owed(ranks, name, count))
    parts = torch.cat(
        [
            feedback.owner(layout, s)
            for feedback, s in zip(ranks, shares(layout, old, 64), strict=True)
        ]
    )
    again = torch.cat(
        [
            feedback.owner(layout, s)
            for feedback, s in zip(fresh, shares(layout, new, 64), strict=True)
        ]
    )
    assert torch.equal(parts, again)


def test_the_learning_rate_scales_what_is_owed() -> None:
    layout = Layout(("a",), (A,))
    [feedback] = world_with_residuals(1, layout)
    before = owed([feedback], "a", A)
    feedback.rescale(0.5)
    assert torch.equal(owed([feedback], "a", A), 0.5 * before)
    assert feedback.norms()["a"] > 0
    feedback.clear()
    assert feedback.norms()["a"] == 0


def test_states_with_strange_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="what is 'momentum/a'"):
        ErrorFeedback(1).load_state_dict({"momentum/a": torch.zeros(1)})


def rows_of(*rows: int) -> RowGradient:
    return RowGradient(torch.tensor(rows), torch.zeros(len(rows), 2))


def table(residuals: RowResiduals) -> Tensor:
    found = torch.zeros(residuals.rows, 2)
    state = residuals.state_dict()
    found[state["rows"]] += state["values"]
    return found.index_add_(0, state["waiting_rows"], state["waiting_values"])


@pytest.mark.parametrize("capacity", [4, 16, 1000])
@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3), (4, 1)])
def test_rows_owe_the_same_in_another_world(capacity: int, old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = [RowResiduals(100, 2, capacity) for _ in range(old)]
    for residuals in ranks:
        rows = torch.randperm(100, generator=generator)[:30].sort()[0]
        slots, _ = residuals.place(RowGradient(rows, torch.zeros(30, 2)))
        residuals.values[slots[slots >= 0]] = torch.randn(int((slots >= 0).sum()), 2)
    before = sum(table(residuals) for residuals in ranks) / old
    fresh = [RowResiduals(100, 2, capacity) for _ in range(new)]
    for residuals, state in zip(
        fresh, reshard_rows([r.state_dict() for r in ranks], new), strict=True
    ):
        residuals.load_state_dict(state)
    torch.testing.assert_close(sum(table(residuals) for residuals in fresh) / new, before)

    # What waits is handed out to be sent, or joins the row when it comes.
    coming = rows_of(*range(0, 100, 9))
    for residuals in fresh:
        all_of_it = table(residuals)
        slots, gone = residuals.place(coming)
        assert (gone.rows.diff() > 0).all()
        assert not torch.isin(gone.rows, coming.rows).any()
        left = table(residuals).index_add_(0, gone.rows, gone.values)
        torch.testing.assert_close(left, all_of_it)
        held = residuals.state_dict()["waiting_rows"]
        assert torch.isin(held, coming.rows).all()


def test_states_of_another_capacity_are_placed_anew() -> None:
    source = RowResiduals(100, 2, 100)
    source.values.normal_()
    target = RowResiduals(100, 2, 16)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(table(target), source.values)
    source.rescale(2.0)
    back = RowResiduals(100, 2, 100)
    back.load_state_dict(target.state_dict())
    torch.testing.assert_close(back.values * 2, source.values)
    assert back.norm() == pytest.approx(target.norm())


def test_impossible_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        RowResiduals(10, 0, 5)


def test_neighbours_are_joined_where_no_block_reaches_from_one_into_the_next() -> None:
    names, counts = ("a", "b", "c", "d", "e"), (512, 256, 64, 256, 7)
    pieces = Layout(names, counts).pieces
    assert [[p.name for p in run] for run in runs(pieces, 256)] == [["a", "b", "c"], ["d", "e"]]
    assert [[p.name for p in run] for run in runs(pieces, 64)] == [["a", "b", "c", "d", "e"]]
    assert [len(run) for run in runs(pieces, 1)] == [1] * 5
    assert [[p.name for p in run] for run in runs((pieces[0], pieces[3]), 256)] == [["a"], ["d"]]
    assert runs((), 256) == ()


def test_joined_pieces_arrive_as_they_would_alone() -> None:
    codec, count = Blocks(), 512
    values, residual = torch.randn(count + 300), torch.randn(count + 300)
    alone = residual.clone()
    whole = torch.zeros(codec.wire_bytes(count + 300), dtype=torch.uint8)
    assert codec.encode(values, whole, residual) == len(whole)
    got, expected = torch.empty(count + 300), torch.empty(count + 300)
    codec.decode(whole, got)
    for part in (slice(0, count), slice(count, count + 300)):
        payload = torch.zeros(codec.wire_bytes(expected[part].numel()), dtype=torch.uint8)
        assert codec.encode(values[part], payload, alone[part]) == len(payload)
        codec.decode(payload, expected[part])
    assert torch.equal(got, expected)
    assert torch.equal(residual, alone)
