"""Where tables lie: every row once, large ones split, loads even, the same every time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqrm.models.placement import Piece, place_tables


def test_large_tables_go_whole_to_the_least_loaded_rank():
    placement = place_tables([500, 10, 400, 300, 200], [1] * 5, 2, shard_over_rows=100)
    assert placement.replicated == (1,)
    assert placement.sharded == (0, 2, 3, 4)
    assert placement.split == ()
    assert placement.pieces == (
        Piece(0, 0, 500, 0),
        Piece(4, 0, 200, 0),
        Piece(2, 0, 400, 1),
        Piece(3, 0, 300, 1),
    )


def test_a_table_larger_than_a_fair_share_is_split_by_rows():
    placement = place_tables([1000, 100, 100], [1, 1, 1], 3, shard_over_rows=0)
    assert placement.split == (0,)
    assert [piece.num_rows for piece in placement.of_table(0)] == [333, 333, 334]
    assert {piece.rank for piece in placement.of_table(0)} == {0, 1, 2}
    assert placement.describe(["a", "b", "c"], 0).startswith("a[")


def test_lookups_count_as_load():
    # By rows alone tables 0 and 3 would meet.
    placement = place_tables([100, 100, 100, 100], [9, 1, 1, 9], 2, shard_over_rows=0)
    assert placement.of_table(0)[0].rank != placement.of_table(3)[0].rank


def test_small_tables_are_replicated():
    placement = place_tables([10, 20], [1, 1], 4, shard_over_rows=20)
    assert placement.pieces == ()
    assert placement.replicated == (0, 1)


def test_too_few_rows_for_the_ranks_are_refused():
    with pytest.raises(ValueError, match="too few for 5 processes"):
        place_tables([3], [1], 5, shard_over_rows=0)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=30), st.integers(1, 8), st.data())
def test_every_row_lies_once_and_every_rank_has_some(rows, world_size, data):
    lookups = data.draw(st.lists(st.integers(0, 1000), min_size=len(rows), max_size=len(rows)))
    limit = data.draw(st.integers(0, 10_000))
    sharded = [count for count in rows if count > limit]
    if 0 < sum(sharded) < world_size**2:
        return
    placement = place_tables(rows, lookups, world_size, limit)
    assert placement == place_tables(rows, lookups, world_size, limit)
    for table, count in enumerate(rows):
        pieces = placement.of_table(table)
        ends = [piece.first_row + piece.num_rows for piece in pieces]
        if count <= limit:
            assert not pieces
            continue
        assert [piece.first_row for piece in pieces] == [0, *ends[:-1]]
        assert ends[-1] == count
        assert len({piece.rank for piece in pieces}) == len(pieces)
    if sharded:
        assert all(placement.of_rank(rank) for rank in range(world_size))
    assert list(placement.pieces) == [
        piece for rank in range(world_size) for piece in placement.of_rank(rank)
    ]
