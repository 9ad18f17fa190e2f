"""Compiled updates against the plain ones, bit for bit, at every instruction set."""

import pytest
import torch

from dqrm.kernels.cpu import native_available
from dqrm.kernels.embedding import TableBatch
from dqrm.kernels.embedding_reference import TableBatchReference
from dqrm.kernels.row_storage import FloatRows
from dqrm.kernels.rules import RowRule
from dqrm.kernels.tables import TableLayout

pytestmark = pytest.mark.skipif(not native_available(), reason="compiled kernels not installed")

ROWS = (1, 3, 200, 70, 5000)
LARGEST = (7, 0, 127, 7, 1)
RULES = ["sgd", "adagrad", "adam"]


def layout_of(rows=ROWS, largest=LARGEST, **settings):
    return TableLayout(tuple(f"t{n}" for n in range(len(rows))), rows, largest, **settings)


def random_batch(rows, batch, dim, seed, longest=None, dtype=torch.int32):
    """Ids, offsets or None, and a gradient whose samples do not lie next to each other."""
    generator = torch.Generator().manual_seed(seed)
    bags = len(rows) * batch
    lengths = torch.ones(bags, dtype=torch.int64)
    if longest is not None:
        lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    counts = lengths.view(len(rows), batch).sum(dim=1).tolist()
    pairs = zip(rows, counts, strict=True)
    ids = torch.cat([torch.randint(0, r, (n,), generator=generator) for r, n in pairs]).to(dtype)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    grad = torch.randn(batch, len(rows) + 1, dim, generator=generator)[:, 1:]
    return ids, None if longest is None else offsets, grad


class Side:
    """One kernel with weights, scales and an optimizer of its own."""

    def __init__(self, compiled, layout, dim, name="sgd", **rule):
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.empty(sum(layout.rows) * dim + 1)[1:].view(-1, dim)
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator))
        self.scales = torch.full((len(layout.rows),), 0.25)
        storage = FloatRows(self.weight, dim)
        self.rule = RowRule(name, storage, **rule)
        self.kernel = (
            TableBatch(layout, storage, self.scales)
            if compiled
            else TableBatchReference(layout, storage, self.scales)
        )
        self.kernel.rebuild()

    def tensors(self):
        return {"weight": self.weight, "scales": self.scales, **self.rule.state()}


def assert_equal(left, right):
    for (name, a), b in zip(left.tensors().items(), right.tensors().values(), strict=True):
        assert torch.equal(a, b), name


def assert_exact(layout, side):
    """Scales equal those of a scan; tables in full precision keep theirs."""
    tables = zip(side.weight.split(list(layout.rows)), layout.largest, side.scales, strict=True)
    expected = [rows.abs().max().clamp_min(1e-8) / n if n else scale for rows, n, scale in tables]
    assert torch.equal(side.scales, torch.stack(expected))


@pytest.mark.parametrize("dim", [1, 5, 16, 17, 64, 128])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_and_width_equals_the_reference(each_level, name, dim):
    layout = layout_of(exact=True)
    for _ in each_level():
        sides = [Side(compiled, layout, dim, name, eps=1e-3) for compiled in (True, False)]
        for step in range(3):
            dtype = torch.int64 if step else torch.int32
            ids, offsets, grad = random_batch(ROWS, 40, dim, step, (None, 3, 1)[step], dtype)
            for side in sides:
                side.kernel.update(ids, offsets, grad, side.rule, 0.1)
            assert_equal(*sides)
            assert_exact(layout, sides[0])


@pytest.mark.parametrize("granularity", ["table", "row"])
@pytest.mark.parametrize("name", RULES)
def test_decay_clipped_gradients_weights_and_means(each_level, name, granularity):
    for pooling in ("sum", "mean"):
        layout = layout_of(granularity=granularity, pooling=pooling, clip=True)
        for _ in each_level():
            sides = [Side(c, layout, 16, name, weight_decay=0.3) for c in (True, False)]
            for step in range(3):
                ids, offsets, grad = random_batch(ROWS, 40, 16, step, 4)
                factors = None
                if pooling == "sum":
                    factors = torch.randn(len(ids), generator=torch.Generator().manual_seed(step))
                for side in sides:
                    side.kernel.update(ids, offsets, grad, side.rule, 0.1, factors)
                assert_equal(*sides)


def test_the_clip_mask_by_hand(each_level):
    layout = layout_of((2, 1), (7, 0), clip=True)
    for _ in each_level():
        side = Side(True, layout, 4)
        side.scales.fill_(1.0)
        side.weight.copy_(torch.tensor([[7.5, 7.6, -8.5, -8.6], [0.0] * 4, [99.0] * 4]))
        rows, values = side.kernel.row_gradient(torch.tensor([0, 0]), None, torch.ones(1, 2, 4))
        assert rows.tolist() == [0, 2]
        assert values.tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("longest", [None, 5], ids=["one-id", "bags"])
def test_update_is_row_gradient_and_apply(each_level, longest):
    layout = layout_of(exact=True, clip=True)
    for _ in each_level():
        for name in RULES:
            one, two, plain = (Side(c, layout, 16, name) for c in (True, True, False))
            for step in range(3):
                ids, offsets, grad = random_batch(ROWS, 300, 16, step, longest)
                gradient = two.kernel.row_gradient(ids, offsets, grad)
                expected = plain.kernel.row_gradient(ids, offsets, grad)
                assert torch.equal(gradient.rows, expected.rows)
                assert torch.equal(gradient.values, expected.values)
                one.kernel.update(ids, offsets, grad, one.rule, 0.1)
                two.kernel.apply(*gradient, two.rule, 0.1)
                plain.kernel.apply(*expected, plain.rule, 0.1)
                assert_equal(one, two)
                assert_equal(one, plain)


def test_duplicates_only(each_level):
    layout = layout_of((100, 7), (7, 7), exact=True)
    ids = torch.cat([torch.full((500,), 99), torch.full((500,), 3)])
    grad = torch.randn(500, 2, 16, generator=torch.Generator().manual_seed(0))
    for _ in each_level():
        sides = [Side(compiled, layout, 16, "adam") for compiled in (True, False)]
        for side in sides:
            side.kernel.update(ids, None, grad, side.rule, 0.1)
        assert_equal(*sides)


@pytest.mark.parametrize("name", RULES)
def test_threads_change_nothing(each_level, name):
    rows = (5, 100_000)
    layout = layout_of(rows, (7, 7), exact=True)
    before = torch.get_num_threads()
    for _ in each_level():
        sides = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            side = Side(True, layout, 16, name)
            for step in range(3):
                ids, offsets, grad = random_batch(rows, 6000, 16, step, 3)
                side.kernel.update(ids, offsets, grad, side.rule, 0.5)
                gradient = side.kernel.row_gradient(ids, offsets, grad)
                side.kernel.apply(*gradient, side.rule, 0.5)
            sides.append(side)
        torch.set_num_threads(before)
        assert_exact(layout, sides[0])
        for other in sides[1:]:
            assert_equal(sides[0], other)


@pytest.mark.parametrize(
    "rows",
    [(1,), (1, 1, 64, 65), (63, 64 * 64, 64 * 64 + 1), (20_000, 2)],
    ids=["one-row", "small", "level-edges", "large"],
)
def test_scales_stay_exact_through_growing_and_shrinking(each_level, rows):
    layout = layout_of(rows, (7,) * len(rows), exact=True)
    for _ in each_level():
        side = Side(True, layout, 4, weight_decay=1.0)
        generator = torch.Generator().manual_seed(2)
        for step in range(80):
            ids, offsets, grad = random_batch(rows, 3, 4, step)
            # The largest rows shrink most of the time: a running maximum would miss it.
            top = torch.stack([t.abs().amax(dim=1).argmax() for t in side.weight.split(list(rows))])
            ids.view(len(rows), 3)[:, 0] = top
            grad *= torch.rand((), generator=generator) * (2 if step % 7 == 0 else 0.01)
            side.kernel.update(ids, offsets, grad, side.rule, 0.5)
            assert_exact(layout, side)


def test_scales_after_rows_were_written_from_outside(each_level):
    layout = layout_of((1, 200, 70, 4100), (7, 7, 0, 7), exact=True)
    for _ in each_level():
        side = Side(True, layout, 4)
        generator = torch.Generator().manual_seed(3)
        for _ in range(80):
            rows = torch.randint(0, sum(layout.rows), (8,), generator=generator)
            size = torch.rand((), generator=generator) * 3
            side.weight[rows] = torch.randn(8, 4, generator=generator) * size
            side.kernel.rows_changed(rows)
            assert_exact(layout, side)
        side.weight *= 0.01
        side.kernel.rebuild()
        assert_exact(layout, side)
        with pytest.raises(ValueError, match="row 4371 is outside the 4371 rows"):
            side.kernel.rows_changed(torch.tensor([4371]))


def test_all_zero_tables_have_the_smallest_scale(each_level):
    layout = layout_of((100,), (7,), exact=True)
    for _ in each_level():
        side = Side(True, layout, 4, weight_decay=1.0)
        side.kernel.update(torch.arange(100), None, torch.zeros(100, 1, 4), side.rule, 1.0)
        assert not side.weight.any()
        assert side.scales.item() == torch.tensor(1e-8).div(7).item()
        side.kernel.update(torch.tensor([5]), None, torch.ones(1, 1, 4), side.rule, 1.0)
        assert side.scales.item() == torch.tensor(1.0).div(7).item()


def test_nan_is_left_out_of_scales_and_infinity_is_not(each_level):
    layout = layout_of((200,), (7,), exact=True)
    for _ in each_level():
        sides = [Side(compiled, layout, 16) for compiled in (True, False)]
        for value in (torch.nan, torch.inf):
            grad = torch.zeros(2, 1, 16)
            grad[0, 0, 3] = value
            for side in sides:
                side.kernel.update(torch.tensor([9, 150]), None, grad, side.rule, 1.0)
            assert bool(sides[0].scales.isfinite().all()) == (value is torch.nan)
            assert torch.equal(sides[0].scales, sides[1].scales)
            for side in sides:
                side.weight[9] = 0.0
                side.kernel.rows_changed(torch.tensor([9]))
            assert_exact(layout, sides[0])


@pytest.mark.parametrize("name", RULES)
def test_nothing_is_written_when_an_id_is_outside(each_level, name):
    layout = layout_of((4, 5000), (7, 7), exact=True)
    for _ in each_level():
        side = Side(True, layout, 16, name)
        before = {key: tensor.clone() for key, tensor in side.tensors().items()}
        ids = torch.zeros(2000, dtype=torch.int64)
        ids[1999] = 5000
        with pytest.raises(IndexError, match="id 5000 is outside table 't1' of 5000 rows"):
            side.kernel.update(ids, None, torch.ones(1000, 2, 16), side.rule, 0.1)
        with pytest.raises(IndexError, match="id 5000 is outside"):
            side.kernel.row_gradient(ids, None, torch.ones(1000, 2, 16))
        for key, tensor in side.tensors().items():
            assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3, 2], "row 2 follows row 3"),
        ([3, 3], "row 3 follows row 3"),
        ([-1, 3], "row -1 is outside the 5274 rows"),
        ([3, 5274], "row 5274 is outside the 5274 rows"),
    ],
    ids=["descending", "repeated", "negative", "index-at-end"],
)
def test_rows_to_apply_must_ascend_within_the_storage(rows, message):
    for compiled in (True, False):
        side = Side(compiled, layout_of(), 4)
        before = side.weight.clone()
        with pytest.raises(ValueError, match=message):
            side.kernel.apply(torch.tensor(rows), torch.ones(2, 4), side.rule, 1.0)
        assert torch.equal(side.weight, before)


def test_an_empty_batch_changes_nothing(each_level):
    for _ in each_level():
        side = Side(True, layout_of(exact=True), 16)
        before = side.weight.clone()
        empty = torch.empty(0, dtype=torch.int32)
        side.kernel.update(empty, None, torch.empty(0, 5, 16), side.rule, 0.1)
        gradient = side.kernel.row_gradient(empty, None, torch.empty(0, 5, 16))
        assert gradient.rows.shape == (0,)
        assert gradient.values.shape == (0, 16)
        side.kernel.apply(*gradient, side.rule, 0.1)
        assert torch.equal(side.weight, before)


def test_the_largest_ids_of_a_table_beyond_2_to_the_31(each_level):
    rows = 2**31 + 5
    try:
        weight = torch.empty(rows, 1)  # pages that are never touched take no memory
    except RuntimeError:
        pytest.skip("no 8 GB of address space")
    touched = torch.tensor([5, 2**31, rows - 1])
    layout = layout_of((rows,), (0,))
    for _ in each_level():
        weight[touched] = 1.0
        rule = RowRule("sgd", FloatRows(weight[:1], 1))
        kernel = TableBatch(layout, FloatRows(weight, 1), torch.ones(1))
        grad = torch.tensor([1.0, 2, 4, 8]).view(4, 1, 1)
        ids = torch.tensor([2**31, rows - 1, 5, 2**31])
        rows_found, values = kernel.row_gradient(ids, None, grad)
        assert rows_found.tolist() == touched.tolist()
        assert values.flatten().tolist() == [4, 9, 2]
        kernel.update(ids, None, grad, rule, 1.0)
        assert weight[touched].flatten().tolist() == [-3, -8, -1]
