"""Integer layers and tables against the fake-quantized ones, on random and on hostile inputs."""

import copy
import itertools
import math
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import dequantize, fit_record
from dqrm.compress.lower import engines
from dqrm.compress.lower.build import (
    build_embedding,
    build_linear,
    no_integers_because,
    share_inputs,
)
from dqrm.compress.lower.engines import OnednnLinear, fastest_engine
from dqrm.compress.lower.modules import CodeEmbedding, Int8Linear
from dqrm.compress.transforms.activations import fake_quantize_tokens
from dqrm.kernels.cpu import native
from dqrm.kernels.int8 import CodeLayer, code_stack_reference

HAS_VNNI = native() is not None and native().has_avx512_vnni()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer_of(grid, bits, granularity, outputs=24, inputs=40, bias=True):
    weight = torch.randn(outputs, inputs) * 0.1
    codes, record = fit_record(weight, grid, bits, granularity)
    record = replace(record, activation_bits=8)
    return codes, record, torch.randn(outputs) if bias else None


def hostile(inputs):
    """Rows of zeros, of denormals, of huge values, of one large value, and random ones."""
    x = torch.randn(7, inputs)
    x[1], x[2], x[3] = 0.0, 1e-40, 3e37
    x[4, 3] = 1e20
    x[5] = torch.linspace(-127, 127, inputs).round() + 0.5
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("grid", "bits", "granularity"),
    [
        ("symmetric", 8, Granularity("row")),
        ("symmetric", 4, Granularity("row_groups", 6)),
        ("symmetric", 3, Granularity("tensor")),
        ("ternary", 2, Granularity("tensor")),
        ("binary", 1, Granularity("row")),
        ("symmetric", 4, Granularity("k_groups", 64)),
        # Counted from their zero, codes of up to 7 bits are of 8.
        ("asymmetric", 7, Granularity("row")),
        ("asymmetric", 4, Granularity("tensor")),
    ],
)
def test_integers_give_what_fake_quantization_gives(grid, bits, granularity, bias):
    torch.manual_seed(0)
    codes, record, shift = layer_of(grid, bits, granularity, bias=bias)
    layer = build_linear(codes, record, shift, "int8")
    assert isinstance(layer, Int8Linear)
    weight = dequantize(codes, record)
    fake = build_linear(codes, record, shift, "fp32")
    for x in (torch.randn(3, 5, 40), hostile(40), torch.randn(1, 40), torch.empty(2, 0, 40)):
        got = layer(x)
        exact = functional.linear(fake_quantize_tokens(x).double(), weight.double())
        size = fake_quantize_tokens(x).abs().double() @ weight.abs().double().T
        if shift is not None:
            exact, size = exact + shift.double(), size + shift.abs().double()
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        # Scales, their product with the sum, and the bias: a rounding each, and those of the
        # values that the other side multiplies.
        assert ((got - exact).abs() <= 6 * 2**-24 * size).all()
        # Forty sums in FP32, each rounded.
        assert ((got - fake(x)).abs() <= 50 * 2**-24 * size).all()


@pytest.mark.skipif(not HAS_VNNI, reason="oneDNN saturates sums without VNNI")
@pytest.mark.parametrize("inputs", [1, 40, 1536])
def test_onednn_gives_the_bits_of_the_definition(inputs):
    torch.manual_seed(1)
    layer = CodeLayer(
        torch.randint(-128, 128, (24, inputs), dtype=torch.int8), torch.rand(24), torch.randn(24)
    )
    x = hostile(inputs) if inputs > 3 else torch.randn(7, inputs)
    x[6, 0] = math.inf
    for rows in (x, x[:1], x[:0]):
        got, wanted = OnednnLinear(layer).forward(rows), code_stack_reference(rows, [layer])
        assert torch.equal(got.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))


@pytest.mark.skipif(not HAS_VNNI, reason="oneDNN saturates sums without VNNI")
@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_engine_is_taken_where_there_is_a_choice(monkeypatch, faster):
    class Module:
        @staticmethod
        def has_amx():
            return True

    layer = CodeLayer(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), torch.zeros(4))
    assert not isinstance(fastest_engine(layer), OnednnLinear) or native().has_amx()
    monkeypatch.setattr(engines, "native", lambda: Module)
    monkeypatch.setattr(
        engines,
        "_seconds",
        lambda run, x: 1.0 + (isinstance(run.__self__, OnednnLinear) != faster),
    )
    assert isinstance(fastest_engine(layer), OnednnLinear) is faster


@pytest.mark.parametrize(
    ("grid", "bits", "granularity"),
    [
        ("symmetric", 4, Granularity("k_groups", 8)),
        ("symmetric", 12, Granularity("row")),
        ("asymmetric", 8, Granularity("row")),
    ],
)
def test_what_no_integer_kernel_can_do_stays_fp32_on_the_same_grids(grid, bits, granularity):
    codes, record, bias = layer_of(grid, bits, granularity)
    assert no_integers_because(codes, record) is not None
    layer = build_linear(codes, record, bias, "int8")
    assert isinstance(layer, nn.Linear)
    x = torch.randn(5, 40)
    wanted = functional.linear(fake_quantize_tokens(x), dequantize(codes, record), bias)
    assert torch.equal(layer(x), wanted)


def test_tables_of_codes():
    granularities = (Granularity("row"), Granularity("tensor"), Granularity("k_groups", 4))
    grids = [("symmetric", 4), ("asymmetric", 4), ("asymmetric", 8)]
    for granularity, grid in itertools.product(granularities, grids):
        codes, record, _ = layer_of(*grid, granularity, 10, 8)
        table = build_embedding(codes, record, 0, "int8")
        assert isinstance(table, CodeEmbedding) == (granularity.kind != "k_groups")
        for ids in (torch.tensor([[1, 9], [0, 1]]), torch.empty(0, 3, dtype=torch.int64)):
            assert torch.equal(table(ids), dequantize(codes, record)[ids])


class Attention(nn.Module):
    """Three layers of one input; ``apart`` gives the last one another."""

    def __init__(self):
        super().__init__()
        parts = [layer_of("symmetric", 8, Granularity("row"), 16, 40) for _ in range(3)]
        self.query, self.key, self.value = (build_linear(*part, "int8") for part in parts)
        self.apart = False

    def forward(self, x):
        outputs = [self.query(x), self.key(x)]
        if self.apart:
            x = x + 1
        return torch.cat([*outputs, self.value(x)], dim=-1)


def test_layers_of_one_input_are_one_product():
    torch.manual_seed(2)
    model = Attention()
    x = torch.randn(2, 3, 40)
    wanted, apart = model(x), model(x + 0)
    model.apart = True
    apart = model(x)
    model.apart = False
    share_inputs(model)
    shared = model.query.shared
    assert shared is not None
    assert shared is model.key.shared is model.value.shared
    for _ in range(2):
        assert torch.equal(model(x), wanted)
    with torch.inference_mode():
        assert torch.equal(model(x), wanted)
    # The copy of a model, and one that was stored, have no shared product, and the same outputs.
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.query.shared is None
        assert torch.equal(other(x), wanted)
    model.apart = True
    assert torch.equal(model(x), apart)
    assert model.query.shared is model.value.shared is None
    model.apart = False
    assert torch.equal(model(x), wanted)


def test_an_input_that_changes_in_between_is_noticed():
    model = Attention()
    share_inputs(model)
    x = torch.randn(4, 40)
    model.query(x)
    x.zero_()
    assert torch.equal(model.key(x), model.key.bias.expand(4, -1))


def test_threads_do_not_see_each_others_products():
    model = Attention()
    share_inputs(model)
    inputs = [torch.randn(4, 40) for _ in range(4)]
    wanted = [model(x) for x in inputs]
    wrong = []

    def work(number):
        for _ in range(50):
            if not torch.equal(model(inputs[number]), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert model.query.shared is not None


def test_conversions_leave_scales_and_codes_alone():
    model = Attention()
    x = torch.randn(4, 40)
    wanted = model(x)
    model.to(torch.bfloat16)
    assert model.query.scale.dtype == torch.float32
    assert torch.equal(model(x), wanted)
    assert torch.equal(model(x.bfloat16()), model(x.bfloat16().float()))
