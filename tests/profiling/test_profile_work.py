"""Bytes moved, elementwise FLOPs, zeros among weights and own times, against closed forms."""

import pytest
import torch
from torch import nn

from dqrm.compress.grids.nm import NM, project
from dqrm.profiling.counter import Counter
from dqrm.profiling.roofline import Machine
from dqrm.profiling.traffic import distinct_rows
from dqrm.profiling.tree import profile
from dqrm.profiling.work import total
from dqrm.serving.packed_mlp import PackedLinear, PackedMlp


class Calls(nn.Module):
    """A module that does what it is told."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self):
        return self.call()


def work_of(call):
    model = Calls(call)
    counter = Counter(model)
    with torch.no_grad(), counter.attached(), counter:
        model()
    return total(counter.works.values())


def profiled(model, forward, monkeypatch, repeats=1):
    known = Machine(1, dict.fromkeys(("float32", "bfloat16", "int8"), 1e11), 1e10, 1e-6)
    monkeypatch.setattr("dqrm.profiling.tree.measure", lambda types: known)
    return profile(model, forward, repeats)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_linear_layer_reads_weights_and_input_once_and_writes_its_output(dtype, size):
    layer = nn.Linear(16, 8, dtype=dtype)
    x = torch.randn(2, 5, 16, dtype=dtype)
    work = work_of(lambda: layer(x))
    assert work.moved_bytes == size * (10 * 16 + 16 * 8 + 8 + 10 * 8)
    assert work.flops == 2 * work.macs == 2 * 10 * 16 * 8
    assert list(work.flops_by_type) == [str(dtype).removeprefix("torch.")]


VALUES = 4 * 6 * 8
ONE = torch.ones(())

CASES = {
    # name: what is called, FLOPs, bytes
    "add": (lambda x: x + x, VALUES, 2 * 4 * VALUES),
    "add-in-place": (lambda x: x.add_(1.0), VALUES, 2 * 4 * VALUES),
    "broadcast": (lambda x: x * ONE.expand(8), VALUES, 2 * 4 * VALUES + 4),
    "views": (lambda x: x.view(24, 8).T[:3].unsqueeze(0), 0, 0),
    "contiguous": (lambda x: x.transpose(0, 1).contiguous(), 0, 2 * 4 * VALUES),
    "softmax": (lambda x: x.softmax(-1), VALUES, 2 * 4 * VALUES),
    "sum": (lambda x: x.sum(), VALUES, 4 * VALUES + 4),
    "gelu": (lambda x: nn.functional.gelu(x), VALUES, 2 * 4 * VALUES),
    "comparison": (lambda x: x > 0, 0, 5 * VALUES),
    "copy": (lambda x: x.clone(), 0, 2 * 4 * VALUES),
    "conversion": (lambda x: x.bfloat16(), 0, 6 * VALUES),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_without_products(name):
    call, flops, moved = CASES[name]
    x = torch.randn(4, 6, 8)
    work = work_of(lambda: call(x))
    assert work.macs == 0
    assert (work.elementwise, work.moved_bytes) == (flops, moved)


def test_a_norm_has_five_flops_a_value_or_four_without_weight():
    x = torch.randn(4, 8)
    norm = nn.LayerNorm(8)
    assert work_of(lambda: norm(x)).elementwise == 5 * 32
    assert work_of(lambda: nn.functional.layer_norm(x, (8,))).elementwise == 4 * 32


def test_attention_has_a_softmax_and_never_writes_the_scores():
    batch, heads, tokens, dim = 2, 3, 16, 8
    q, k, v = torch.randn(3, batch, heads, tokens, dim)
    work = work_of(lambda: nn.functional.scaled_dot_product_attention(q, k, v))
    scores = batch * heads * tokens * tokens
    assert work.macs == 2 * scores * dim
    assert work.elementwise == scores
    # Besides the output, one number for each query.
    assert work.moved_bytes == 4 * (4 * batch * heads * tokens * dim + batch * heads * tokens)


@pytest.mark.parametrize(("cell", "gates"), [(nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers(cell, gates):
    layer = cell(8, 16)
    work = work_of(lambda: layer(torch.randn(5, 3, 8)))
    assert work.macs == 5 * 3 * gates * 16 * (8 + 16)


def test_a_convolution():
    layer = nn.Conv2d(3, 8, 3, padding=1)
    image = torch.randn(2, 3, 10, 10)
    work = work_of(lambda: layer(image))
    assert work.macs == 2 * 100 * 8 * 27
    assert work.moved_bytes == 4 * (2 * 3 * 100 + 8 * 27 + 8 + 2 * 8 * 100)


def test_autocast_reads_fp32_weights_and_multiplies_in_bf16():
    layer, x = nn.Linear(16, 8, bias=False), torch.randn(5, 16)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    work = work_of(call)
    values = 5 * 16 + 16 * 8
    assert work.flops_by_type == {"bfloat16": 2 * 5 * 16 * 8}
    assert work.moved_bytes == (4 + 2) * values + 2 * values + 2 * 5 * 8


def test_of_a_table_each_different_row_is_read_once():
    table, ids = nn.Embedding(50, 8), torch.tensor([[3, 3, 7], [7, 9, 3]])
    bag = nn.EmbeddingBag(50, 8, mode="sum")
    offsets = torch.tensor([0, 4])
    for work, outputs, extra in (
        (work_of(lambda: table(ids)), 6, 0),
        (work_of(lambda: bag(ids.flatten(), offsets)), 2, offsets.nbytes),
        (work_of(lambda: table.weight[ids]), 6, 0),
        (work_of(lambda: table.weight.index_select(0, ids.flatten())), 6, 0),
    ):
        assert work.flops == 0
        assert work.moved_bytes == 4 * 8 * 3 + ids.nbytes + extra + 4 * 8 * outputs


@pytest.mark.parametrize(
    ("ids", "offsets", "tables", "rows"),
    [
        ([5, 5, 5, 6], None, 2, [1, 2]),
        ([4, 7, 2, 0, 3, 3, 5], [0, 2, 3, 4, 7], 2, [3, 3]),
        ([1, 1], [0, 2, 2, 2, 2], 2, [1, 0]),
        ([], [0], 2, [0, 0]),
    ],
    ids=["one-id-a-bag", "bags", "empty-bags", "empty-batch"],
)
def test_rows_of_each_table(ids, offsets, tables, rows):
    indices = torch.tensor(ids, dtype=torch.int32)
    assert distinct_rows(indices, offsets and torch.tensor(offsets), tables) == rows


def packed(inputs, outputs):
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return PackedLinear(codes, torch.rand(outputs), torch.zeros(outputs))


def test_packed_layers_are_stacks_with_layers_in_fp32_between_them(monkeypatch):
    mlp = PackedMlp(packed(8, 16), nn.ReLU(), packed(16, 4), nn.Linear(4, 6), packed(6, 2))
    x = torch.randn(10, 8)
    tree = profiled(mlp, lambda: mlp(x), monkeypatch).tree
    first, relu, second, float_layer, last = tree.children
    assert first.moved_bytes == (8 + 2 * 4) * 16 + 4 * 10 * 8
    assert second.moved_bytes == (16 + 2 * 4) * 4 + 4 * 10 * 4, "values in between stay in caches"
    assert last.moved_bytes == (6 + 2 * 4) * 2 + 4 * 10 * (6 + 2)
    assert (relu.flops, float_layer.macs) == (10 * 16, 10 * 4 * 6)
    assert tree.flops_by_type["int8"] == 2 * 10 * (8 * 16 + 16 * 4 + 6 * 2)
    assert tree.flops_by_type["float32"] == 10 * 16 + 2 * 10 * 4 * 6
    assert tree.macs == sum(child.macs for child in tree.children)
    assert tree.moved_bytes == sum(child.moved_bytes for child in tree.children)


def test_weights_that_a_pattern_zeroed_are_told_apart(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    model[0].weight.data = project(model[0].weight.data, NM(2, 4))
    x = torch.randn(5, 16)
    tree = profiled(model, lambda: model(x), monkeypatch).tree
    assert [child.macs for child in tree.children] == [5 * 16 * 8, 5 * 8 * 4]
    assert [child.kept_macs for child in tree.children] == [5 * 16 * 8 // 2, 5 * 8 * 4]
    assert tree.kept_macs == 5 * (64 + 32)


class Reused(nn.Module):
    """A layer called in two places, and in a list of lists."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.lists = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])])
        self.outer = nn.Sequential(self.first)

    def forward(self, x):
        x = self.outer(self.first(x)) + 1.0
        for layer in self.lists[0]:
            x = layer(x)
        return x


@pytest.mark.parametrize("repeats", [1, 4])
def test_own_times_make_the_time_of_the_model(monkeypatch, repeats):
    model = Reused()
    x = torch.randn(3, 8)
    result = profiled(model, lambda: model(x), monkeypatch, repeats)
    tree = result.tree
    first, lists, outer = tree.children
    (inner,) = lists.children
    own = [node.own_seconds for node in (tree, first, outer, *inner.children)]
    assert sum(own) == pytest.approx(tree.seconds)
    assert tree.seconds <= result.wall_seconds
    assert (first.calls, lists.own_seconds) == (2, 0.0)
    assert lists.seconds == pytest.approx(sum(node.seconds for node in inner.children))
    assert lists.flops_by_type == {"float32": 2 * 3 * 8 * 8 + 3 * 8}
    assert tree.flops == 3 * 2 * 3 * 8 * 8 + 2 * 3 * 8
    assert tree.intensity == tree.flops / tree.moved_bytes


def test_calls_are_those_of_a_forward_that_prepares_nothing(monkeypatch):
    mlp = PackedMlp(packed(8, 16), nn.Linear(16, 6), nn.ReLU())
    x = torch.randn(10, 8)
    first = profiled(mlp, lambda: mlp(x), monkeypatch).tree
    again = profiled(mlp, lambda: mlp(x), monkeypatch).tree
    assert first.overhead_calls == again.overhead_calls
    # Of the layer: itself, the transpose of its weight, the product; then ReLU and its operator.
    assert [child.overhead_calls for child in first.children] == [0, 3, 2]
