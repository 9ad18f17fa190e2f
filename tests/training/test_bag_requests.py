"""What ranks ask of each other, played through in one process against a plain sum of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqrm.models.placement import place_tables
from dqrm.training.bag_requests import Asker, TablePart, serve, take_tables

DIM = 3


def make_batch(generator, rows, size, longest):
    """Indices and offsets of bags of up to ``longest`` ids; one id each where that is 0."""
    if longest == 0:
        lengths = torch.ones(len(rows) * size, dtype=torch.int64)
    else:
        lengths = torch.randint(0, longest + 1, (len(rows) * size,), generator=generator)
    tables = torch.arange(len(rows)).repeat_interleave(size).repeat_interleave(lengths)
    limits = torch.tensor(rows)[tables]
    indices = (torch.rand(len(limits), generator=generator) * limits).to(torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return indices, None if longest == 0 else offsets, lengths


def pooled_sums(weights, indices, lengths):
    """The definition: float64 [T * B, D]."""
    starts = torch.tensor([0, *(len(w) for w in weights)]).cumsum(0)[:-1]
    bags = torch.arange(len(lengths)).repeat_interleave(lengths)
    table = bags // max(1, len(lengths) // len(weights))
    out = torch.zeros(len(lengths), DIM, dtype=torch.float64)
    return out.index_add_(0, bags, torch.cat(weights)[indices.long() + starts[table]])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(20, 90), min_size=1, max_size=6),
    ranks=st.integers(1, 4),
    sizes=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    longest=st.sampled_from([0, 1, 4]),
    seed=st.integers(0, 1000),
)
def test_every_bag_gets_the_sum_of_its_rows(rows, ranks, sizes, longest, seed):
    generator = torch.Generator().manual_seed(seed)
    placement = place_tables(rows, [1] * len(rows), ranks, 0)
    names = [f"t{number}" for number in range(len(rows))]
    asker = Asker(placement, names, rows)
    weights = [torch.randn(count, DIM, generator=generator).double() for count in rows]
    batches = [make_batch(generator, rows, sizes[rank], longest) for rank in range(ranks)]
    scales = torch.rand(ranks, len(placement.split), generator=generator)
    asked = [
        asker.ask(TablePart(indices, offsets), scales[rank])
        for rank, (indices, offsets, _) in enumerate(batches)
    ]
    answers = []
    for owner in range(ranks):
        pieces = placement.of_rank(owner)
        own = [weights[p.table][p.first_row : p.first_row + p.num_rows] for p in pieces]
        lists = [one.lists[owner] for one in asked]
        served = serve(lists, [piece.num_rows for piece in pieces], len(placement.split))
        assert torch.equal(served.scales, scales.amax(0))
        assert served.counts == [one.counts[owner] for one in asked]
        by_piece = pooled_sums(own, served.indices, served.offsets.diff())
        out = by_piece.view(len(own), served.bags, DIM).transpose(0, 1).reshape(-1, DIM)
        answers.append(torch.split(out[served.place], served.counts))
    for rank, (indices, _, lengths) in enumerate(batches):
        vectors = torch.cat([answers[owner][rank] for owner in range(ranks)])
        found = torch.zeros(len(lengths), DIM, dtype=torch.float64)
        found.index_add_(0, asked[rank].bag, vectors[asked[rank].slot])
        torch.testing.assert_close(found, pooled_sums(weights, indices, lengths))
        if longest < 2:
            # Single ids are asked for once.
            starts = torch.tensor([0, *rows]).cumsum(0)[:-1]
            table = torch.arange(len(rows)).repeat_interleave(sizes[rank])
            distinct = (indices + starts[table.repeat_interleave(lengths)]).unique()
            assert len(vectors) == len(distinct)
        if asked[rank].whole:
            assert torch.equal(asked[rank].bag, torch.arange(len(lengths)))


def test_an_id_outside_its_table_is_named():
    asker = Asker(place_tables([50, 60], [1, 1], 2, 0), ["a", "b"], [50, 60])
    with pytest.raises(IndexError, match="id 60 is outside table 'b' of 60 rows"):
        asker.ask(TablePart(torch.tensor([0, 60]), None), torch.empty(0))


def test_tables_are_taken_from_a_batch():
    indices = torch.tensor([4, 7, 2, 0, 3, 3, 5])
    part = take_tables(indices, torch.tensor([0, 2, 3, 4, 7]), [1], 2)
    assert part.indices.tolist() == [0, 3, 3, 5]
    assert part.offsets.tolist() == [0, 1, 4]
    assert take_tables(indices[:6], None, [0, 2], 3).indices.tolist() == [4, 7, 3, 3]
