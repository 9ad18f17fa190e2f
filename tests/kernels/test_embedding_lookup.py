"""Compiled look-ups against the plain ones, bit for bit, at every instruction set."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqrm.compress import grids
from dqrm.kernels.cpu import native_available
from dqrm.kernels.embedding import EmbeddingTables, TableBatch
from dqrm.kernels.embedding_reference import TableBatchReference
from dqrm.kernels.row_storage import FloatRows
from dqrm.kernels.tables import TableLayout

pytestmark = pytest.mark.skipif(not native_available(), reason="compiled kernels not installed")

ROWS = (1, 3, 200, 70)
LARGEST = (7, 0, 127, 7)


def layout_of(rows=ROWS, largest=LARGEST, **settings):
    return TableLayout(tuple(f"t{n}" for n in range(len(rows))), rows, largest, **settings)


def unaligned(*shape):
    """Uninitialised floats that begin at 4 bytes past a multiple of 64."""
    return torch.empty(torch.Size(shape).numel() + 1)[1:].view(shape)


def weights_of(layout, dim, generator):
    weight = unaligned(sum(layout.rows), dim)
    return weight.copy_(torch.randn(weight.shape, generator=generator))


def batch_of(rows, batch, generator, dtype=torch.int32, longest=None):
    """Random ids; bags of 0 to ``longest`` ids, or of one."""
    bags = len(rows) * batch
    lengths = torch.ones(bags, dtype=torch.int64)
    if longest is not None:
        lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    counts = lengths.view(len(rows), batch).sum(dim=1).tolist()
    ids = [
        torch.randint(0, r, (n,), generator=generator) for r, n in zip(rows, counts, strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.cat(ids).to(dtype), None if longest is None else offsets


def lookup_both(layout, weight, scales, indices, offsets, sample_weights=None):
    """The compiled result, after comparing it with the plain one."""
    count = (len(indices) if offsets is None else len(offsets) - 1) // len(layout.rows)
    outs = []
    for kernel in (
        TableBatch(layout, FloatRows(weight, weight.shape[1]), scales),
        TableBatchReference(layout, FloatRows(weight, weight.shape[1]), scales),
    ):
        # A neighbour's vector on either side shows writes that go too far.
        buffer = torch.full((count, len(layout.rows) + 2, weight.shape[1]), 777.0)
        kernel.lookup(indices, offsets, buffer[:, 1:-1], sample_weights)
        assert bool((buffer[:, 0] == 777).all())
        assert bool((buffer[:, -1] == 777).all())
        outs.append(buffer[:, 1:-1])
    assert torch.equal(
        outs[0].contiguous().view(torch.int32), outs[1].contiguous().view(torch.int32)
    )
    return outs[0]


@pytest.mark.parametrize("dim", [1, 4, 7, 8, 16, 17, 32, 64, 100, 128, 256])
@pytest.mark.parametrize("granularity", ["table", "row"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_every_width_equals_the_reference(each_level, dim, granularity, pooling):
    generator = torch.Generator().manual_seed(dim)
    layout = layout_of(granularity=granularity, pooling=pooling)
    weight = weights_of(layout, dim, generator)
    scales = torch.rand(4, generator=generator) * 0.3 + 0.01
    for _ in each_level():
        for dtype in (torch.int32, torch.int64):
            for longest in (None, 3):
                ids, offsets = batch_of(ROWS, 9, generator, dtype, longest)
                lookup_both(layout, weight, scales, ids, offsets)
                if pooling == "sum":
                    factors = torch.randn(len(ids), generator=generator)
                    lookup_both(layout, weight, scales, ids, offsets, factors)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(finite, min_size=1, max_size=40),
    scale=st.floats(min_value=2.0**-126, max_value=2.0**100, width=32),
    largest=st.sampled_from([1, 7, 127, 32767]),
    granularity=st.sampled_from(["table", "row"]),
)
def test_any_weights_and_scale_equal_the_grid(each_level, values, scale, largest, granularity):
    """Ties, denormals, -0.0, huge ratios: what the grids of training say."""
    layout = layout_of((2,), (largest,), granularity=granularity)
    row = torch.tensor(values)
    weight = torch.stack([row, -row])
    scales = torch.tensor([scale])
    if granularity == "row":
        scales = grids.scale_of(row.abs().max(), largest).view(1)
    codes = grids.quantize(weight, scales, largest)
    expected = grids.dequantize(codes, scales) + 0.0
    for _ in each_level():
        own = torch.tensor([scale]) if granularity == "table" else torch.ones(1)
        out = lookup_both(layout, weight, own, torch.tensor([0, 1]), None)
        assert torch.equal(out[:, 0], expected)


def test_ties_go_to_even_and_minus_zero_becomes_zero(each_level):
    layout = layout_of((1,), (7,))
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -0.4, -7.5, -9.0, 7.5, -0.0]])
    for _ in each_level():
        out = lookup_both(layout, weight, torch.ones(1), torch.tensor([0]), None)
        assert out.flatten().tolist() == [0, 2, 2, 0, 0, -8, -8, 7, 0]
        assert not torch.signbit(out[0, 0, [3, 4, 8]]).any()


@pytest.mark.parametrize("granularity", ["table", "row"])
def test_nan_stays_in_its_element_and_infinity_shows_as_nan(each_level, granularity):
    layout = layout_of((3,), (7,), granularity=granularity)
    weight = torch.ones(3, 16)
    weight[0, 5] = torch.nan
    weight[1, 2] = torch.inf
    scales = torch.tensor([torch.inf if granularity == "table" else 1.0])
    for _ in each_level():
        kernel = TableBatch(layout, FloatRows(weight, weight.shape[1]), scales)
        out = torch.empty(3, 1, 16)
        kernel.lookup(torch.tensor([0, 1, 2]), None, out)
        assert out[0, 0, 5].isnan()
        assert out[1].isnan().any()
        assert bool(out[2].isfinite().all()) == (granularity == "row")


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(each_level, threads):
    generator = torch.Generator().manual_seed(0)
    layout = layout_of((5, 3000), (7, 7))
    weight = weights_of(layout, 16, generator)
    ids, offsets = batch_of((5, 3000), 6000, generator, longest=3)
    before = torch.get_num_threads()
    for _ in each_level():
        kernel = TableBatch(layout, FloatRows(weight, weight.shape[1]), torch.full((2,), 0.1))
        outs = []
        for count in (1, threads):
            torch.set_num_threads(count)
            outs.append(torch.empty(6000, 2, 16))
            kernel.lookup(ids, offsets, outs[-1])
        torch.set_num_threads(before)
        assert torch.equal(*outs)


def test_outputs_larger_than_the_caches(each_level):
    layout = layout_of((50, 7), (7, 0))
    generator = torch.Generator().manual_seed(0)
    weight = weights_of(layout, 64, generator)
    ids, _ = batch_of((50, 7), 1 << 14, generator)  # 8 MiB
    for _ in each_level():
        lookup_both(layout, weight, torch.full((2,), 0.1), ids, None)


def test_nothing_to_look_up(each_level):
    layout = layout_of()
    weight = weights_of(layout, 16, torch.Generator().manual_seed(0))
    for _ in each_level():
        empty = torch.empty(0, dtype=torch.int32)
        lookup_both(layout, weight, torch.ones(4), empty, None)
        lookup_both(layout, weight, torch.ones(4), empty, torch.zeros(1, dtype=torch.int64))
        lookup_both(layout, weight, torch.ones(4), empty, torch.zeros(13, dtype=torch.int64))


def test_the_widest_rows(each_level):
    layout = layout_of((20,), (7,), granularity="row")
    weight = weights_of(layout, 1024, torch.Generator().manual_seed(0))
    for _ in each_level():
        lookup_both(layout, weight, torch.ones(1), torch.tensor([3, 19]), None)


def test_rows_beyond_2_to_the_31(each_level):
    rows = 2**31 + 5
    try:
        weight = torch.empty(rows + 2, 1)  # pages that are never touched take no memory
    except RuntimeError:
        pytest.skip("no 8 GB of address space")
    weight[[0, 2**31, rows - 1, rows, rows + 1]] = torch.tensor([[1.0], [2], [3], [4], [5]])
    layout = layout_of((rows, 2), (0, 0))
    ids = torch.tensor([0, 2**31, rows - 1, 0, 1, 0])
    for _ in each_level():
        kernel = TableBatch(layout, FloatRows(weight, weight.shape[1]), torch.ones(2))
        out = torch.empty(3, 2, 1)
        kernel.lookup(ids, None, out)
        assert out.flatten().tolist() == [1, 4, 2, 5, 3, 4]
        with pytest.raises(IndexError, match=f"id {rows} is outside table 't0' of {rows} rows"):
            kernel.lookup(torch.tensor([rows, 0]), None, out[:1])


BAD_IDS = [
    (torch.int32, 2, -1, "id -1 is outside table 't0' of 1 rows"),
    (torch.int64, 5, 2**40, "id 1099511627776 is outside table 't1' of 3 rows"),
    (torch.int32, 11, 70, "id 70 is outside table 't3' of 70 rows"),
]


@pytest.mark.parametrize(
    ("dtype", "position", "bad", "message"), BAD_IDS, ids=["negative", "huge", "index-at-end"]
)
def test_an_id_outside_its_table_is_named_and_nothing_is_written(
    each_level, dtype, position, bad, message
):
    layout = layout_of()
    weight = torch.ones(sum(ROWS), 16)
    ids = torch.zeros(12, dtype=dtype)
    ids[position] = bad
    for _ in each_level():
        for kernel in kernels(layout, weight):
            out = torch.full((3, 4, 16), 5.0)
            with pytest.raises(IndexError, match=message):
                kernel.lookup(ids, None, out)
            assert bool((out == 5).all())


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 1, 2], "numbers from 0 to 3"),
        ([], "numbers from 0 to 3"),
        ([0, 1, 2, 2, 2], "numbers from 0 to 3"),
        ([1, 1, 2, 2, 3], "numbers from 0 to 3"),
        ([0, 2, 1, 3, 3], "offsets decrease after bag 1"),
        ([0, -(2**40), 1, 3, 3], "offsets decrease after bag 0"),
        ([0, 2**40, 1, 3, 3], "offsets decrease after bag 1"),
    ],
    ids=["too-few", "none", "short-end", "late-start", "decreasing", "negative", "huge"],
)
def test_malformed_offsets_are_refused(each_level, offsets, message):
    layout = layout_of()
    ids = torch.zeros(3, dtype=torch.int64)
    for _ in each_level():
        for kernel in kernels(layout, torch.ones(sum(ROWS), 16)):
            with pytest.raises(ValueError, match=message):
                kernel.lookup(ids, torch.tensor(offsets, dtype=torch.int64), torch.empty(1, 4, 16))


def test_weighted_means_and_misfits_are_refused():
    weight = torch.ones(sum(ROWS), 16)
    ids, factors = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    out = torch.empty(1, 4, 16)
    for kernel in kernels(layout_of(pooling="mean"), weight):
        with pytest.raises(ValueError, match="a weighted mean is undefined"):
            kernel.lookup(ids, None, out, factors)
    for kernel in kernels(layout_of(), weight):
        with pytest.raises(ValueError, match="one weight for each index"):
            kernel.lookup(ids, None, out, factors[:3])
        with pytest.raises(ValueError, match="do not divide into 4 tables"):
            kernel.lookup(ids[:3], None, out)
    compiled = TableBatch(layout_of(), FloatRows(weight, 16), torch.ones(4))
    with pytest.raises(ValueError, match=r"expected shape \[1, 4, 16\]"):
        compiled.lookup(ids, None, torch.empty(2, 4, 16))
    with pytest.raises(ValueError, match="must be contiguous"):
        compiled.lookup(ids, None, torch.empty(1, 16, 4).transpose(1, 2))


def kernels(layout, weight):
    scales = torch.ones(len(layout.rows))
    yield TableBatch(layout, FloatRows(weight, weight.shape[1]), scales)
    yield TableBatchReference(layout, FloatRows(weight, weight.shape[1]), scales)


def test_tables_bind_again_to_moved_memory():
    layout = layout_of((4,), (7,), exact=True)
    weight = torch.full((4, 2), 7.0)
    tables = EmbeddingTables(layout, FloatRows(weight, 2))
    scales = torch.zeros(1)
    first = tables.on(weight, scales)
    assert tables.on(weight, scales) is first
    assert scales.item() == 1
    moved = weight.clone() * 2
    assert tables.on(moved, scales) is not first
    assert scales.item() == 2
    assert tables.storage.tensor.data_ptr() == moved.data_ptr()
    for twin in (copy.deepcopy(tables), pickle.loads(pickle.dumps(tables))):
        assert twin.layout == layout
        assert twin.handle != tables.handle
