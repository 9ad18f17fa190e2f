"""The embedding collection against torch's bags and hand-computed values."""

import pytest
import torch
from torch.nn import functional

from dqrm.compress import grids
from dqrm.kernels.tables import merge_rows
from dqrm.models.embedding import EmbeddingBagCollection, Table


def collection(bits=32, rows=(10, 3, 50), dim=4, **settings):
    torch.manual_seed(0)
    bits = bits if isinstance(bits, tuple) else (bits,) * len(rows)
    tables = [Table(f"t{n}", r, b) for n, (r, b) in enumerate(zip(rows, bits, strict=True))]
    return EmbeddingBagCollection(tables, dim, **settings)


def random_bags(rows, batch, longest=4):
    lengths = torch.randint(0, longest, (len(rows) * batch,))
    per_table = lengths.view(len(rows), batch).sum(dim=1)
    indices = torch.cat(
        [torch.randint(0, r, (int(n),)) for r, n in zip(rows, per_table, strict=True)]
    )
    return indices.int(), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def oracle(emb, indices, offsets, pooling):
    """One torch embedding_bag per table over explicitly quantized weights."""
    batch = (len(offsets) - 1) // len(emb.tables)
    outputs = []
    for number, table in enumerate(emb.tables):
        weight = emb.table_rows()[number]
        if table.bits != 32:
            codes, scale = emb.codes(number)
            weight = codes * (scale if len(scale) == 1 else scale[:, None])
        own = offsets[number * batch : (number + 1) * batch + 1]
        pooled = functional.embedding_bag(
            indices[own[0] : own[-1]].long(),
            weight,
            own - own[0],
            mode="sum",
            include_last_offset=True,
        )
        if pooling == "mean":
            pooled = pooled / own.diff().clamp_min(1).unsqueeze(1)
        outputs.append(pooled)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("granularity", ["table", "row"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2, (4, 32, 8)], ids=str)
def test_equals_bags_over_quantized_tables(bits, granularity, pooling):
    emb = collection(bits, pooling=pooling, granularity=granularity)
    for seed in range(5):
        torch.manual_seed(seed)
        indices, offsets = random_bags((10, 3, 50), batch=6)
        assert torch.equal(emb(indices, offsets), oracle(emb, indices, offsets, pooling))


def test_one_id_a_bag_needs_no_offsets():
    emb = collection(4)
    indices = torch.tensor([1, 9, 2, 0, 49, 5])
    assert torch.equal(emb(indices), emb(indices, torch.arange(7)))
    assert emb(indices).shape == (2, 3, 4)


def test_rows_are_quantized_before_they_are_pooled():
    emb = collection(4, rows=(3,), dim=2)
    with torch.no_grad():
        emb.weight.copy_(torch.tensor([[7.0, 0.0], [6.6, 0.4], [0.0, -7.0]]))
    emb.refresh_scales()
    # Quantizing the sum would clamp 14 to 7.
    pooled = emb(torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert pooled.flatten().tolist() == [14.0, 0.0]


def test_empty_bags_and_an_empty_batch():
    emb = collection(4)
    assert not emb(torch.empty(0, dtype=torch.int32), torch.zeros(7, dtype=torch.int64)).any()
    assert emb(torch.empty(0, dtype=torch.int32)).shape == (0, 3, 4)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_row_gradient_sums_repeated_rows(pooling):
    emb = collection(4, pooling=pooling)
    indices, offsets = random_bags((10, 3, 50), batch=8)
    gradient = torch.randn(8, 3, 4)
    emb(indices, offsets).backward(gradient)
    rows, values = emb.row_gradient()
    dense = torch.zeros_like(emb.weight.detach()).index_add_(0, rows, values)

    twin = collection(32, pooling=pooling).weight.detach().requires_grad_()
    starts = [0, 10, 13]
    bags = []
    for number in range(3):
        own = offsets[number * 8 : (number + 1) * 8 + 1]
        ids = indices[own[0] : own[-1]].long() + starts[number]
        bags.append(
            functional.embedding_bag(
                ids, twin, own - own[0], mode=pooling, include_last_offset=True
            )
        )
    torch.stack(bags, dim=1).backward(gradient)
    assert rows.tolist() == sorted(set(rows.tolist()))
    # Sums of at most 24 terms in another order: 24 * 2**-24 relative to their magnitudes.
    torch.testing.assert_close(dense, twin.grad, rtol=1e-5, atol=1e-6)


def test_clip_mask_zeroes_the_gradient_of_clamped_weights():
    emb = collection(4, rows=(2,), dim=2, ste="clip", scale_period=100)
    emb.train()
    with torch.no_grad():
        emb.weight.copy_(torch.tensor([[7.0, 1.0], [0.0, 0.0]]))
    emb(torch.tensor([0]))  # takes the scale: 1.0
    with torch.no_grad():
        emb.weight[0, 0] = 9.0  # now outside the grid of the stale scale
    pooled = emb(torch.tensor([0]))
    assert pooled.flatten().tolist() == [7.0, 1.0]
    pooled.sum().backward()
    assert emb.row_gradient().values.tolist() == [[0.0, 1.0]]


def test_full_precision_tables_keep_their_gradient_under_the_clip_mask():
    emb = collection((32,), rows=(2,), dim=2, ste="clip")
    with torch.no_grad():
        emb.weight.fill_(100.0)
    emb(torch.tensor([0])).sum().backward()
    assert emb.row_gradient().values.tolist() == [[1.0, 1.0]]


def test_periodic_scale_is_refreshed_every_t_training_forwards():
    emb = collection(4, rows=(2,), dim=1, scale_period=3)
    emb.train()
    scales = []
    for step in range(1, 8):
        with torch.no_grad():
            emb.weight[0, 0] = 7.0 * step
        emb(torch.tensor([0]))
        scales.append(emb.table_scale.item())
    assert scales == [1, 1, 1, 4, 4, 4, 7]
    emb.eval()
    with torch.no_grad():
        emb.weight[0, 0] = 700.0
    emb(torch.tensor([0]))
    assert emb.table_scale.item() == 7


def test_exact_scale_equals_a_full_scan_after_1000_updates():
    emb = collection(4, rows=(1, 200, 70, 4100), dim=4)
    torch.manual_seed(3)
    for _ in range(1000):
        rows = torch.unique(torch.randint(0, emb.weight.shape[0], (8,)))
        with torch.no_grad():
            emb.weight[rows] = torch.randn(len(rows), 4) * torch.rand(()) * 3
        emb.rows_changed(rows)
    expected = torch.stack([table.abs().max() for table in emb.table_rows()]) / 7
    assert torch.equal(emb.table_scale, expected)


def test_initial_weights_are_uniform_in_the_reference_bounds():
    emb = collection(4, rows=(4, 10_000), dim=16)
    small, large = emb.table_rows()
    assert small.abs().max() <= 0.5
    assert 0.0099 < large.abs().max() <= 0.01
    assert large.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("bad", [10, -1, 2**31 - 1], ids=["index-at-end", "negative", "huge"])
def test_an_id_outside_its_table_names_table_and_id(bad):
    emb = collection(4)
    with pytest.raises(IndexError, match=rf"id {bad} is outside table 't0' of 10 rows"):
        emb(torch.tensor([bad, 0, 0]))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 1, 2], "numbers from 0 to 3"),
        ([0, 1, 2, 2], "numbers from 0 to 3"),
        ([1, 1, 2, 3], "numbers from 0 to 3"),
        ([0, 2, 1, 3], "offsets decrease after bag 1"),
    ],
    ids=["too-few", "short-end", "late-start", "decreasing"],
)
def test_malformed_offsets_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        collection(4)(torch.tensor([0, 0, 0]), torch.tensor(offsets))


def test_indices_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="4 indices do not divide into 3 tables"):
        collection(4)(torch.zeros(4, dtype=torch.int64))


def test_merge_rows_by_hand():
    rows, values = merge_rows(
        torch.tensor([5, 2, 5]), torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.5, 1.0]])
    )
    assert rows.tolist() == [2, 5]
    assert values.tolist() == [[2.0, 2.0], [1.5, 1.0]]


def test_codes_reproduce_the_forward():
    emb = collection((4, 8, 2), granularity="row")
    codes, scale = emb.codes(2)
    rows = grids.dequantize(codes, scale[:, None])
    assert torch.equal(emb(torch.tensor([0, 0, 17]))[0, 2], rows[17])
