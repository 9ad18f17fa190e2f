"""The asymmetric grid against its definition, value by value, and all the way to what runs."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from dqrm.compress.grids import affine
from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import (
    WeightRecord,
    codes,
    dequantize,
    fit_record,
    set_weight_record,
    weight_record,
)
from dqrm.compress.grids.records_file import load_records, save_records
from dqrm.compress.lower.build import build_linear, no_integers_because
from dqrm.compress.transforms.activations import QuantizeActivations
from dqrm.compress.transforms.base import Compression
from dqrm.compress.transforms.sparsify import OneShot
from dqrm.compress.transforms.weights import QuantizeWeights

ROW = Granularity("row")

HOSTILE = {
    "zeros": [0.0, -0.0, 0.0],
    "constant": [3.7, 3.7, 3.7],
    "negative-constant": [-0.1, -0.1, -0.1],
    "positive": [1.0, 2.0, 2.5],
    "negative": [-1.0, -2.0, -9.0],
    "one-far": [1e-3, -2e-3, 1e6],
    "huge": [3e38, -3e38, 1e38],
    "denormal": [1e-40, -1e-42, 0.0],
    "tiny": [1e-9, -3e-9, 0.0],
    "one": [5.0],
    "halves": [-0.5, 0.5, 1.5, 2.5, 14.5],
}


def roundings(value):
    """Half to even, of a fraction; both neighbours where a float32 quotient may be a tie."""
    low = math.floor(value)
    rest = value - low
    if abs(rest - Fraction(1, 2)) < abs(value) / 2**22 and rest != Fraction(1, 2):
        return {low, low + 1}
    return {low + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1))}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", HOSTILE)
def test_codes_are_those_of_the_definition(name, bits):
    weight = torch.tensor([HOSTILE[name]])
    found, record = fit_record(weight, "asymmetric", bits, ROW)
    most = 2**bits - 1
    scale, zero = record.scale.item(), int(record.zero.item())
    values = [Fraction(value) for value in weight[0].tolist()]
    low, high = min(*values, 0, 0), max(*values, 0, 0)
    # A rounding each of two quotients and of their difference.
    wanted = max((high - low) / most, Fraction(1e-8) / most)
    assert abs(Fraction(scale) - wanted) <= wanted / 2**21
    assert zero in {min(most, max(0, z)) for z in roundings(-low / Fraction(scale))}
    for value, code in zip(values, found[0].tolist(), strict=True):
        q = code + zero
        assert q == int(q)
        assert 0 <= q <= most
        allowed = {min(most, max(0, c + zero)) for c in roundings(value / Fraction(scale))}
        assert q in allowed
        assert abs(Fraction(scale) * int(code) - value) <= Fraction(scale) * Fraction(51, 100)
    value = dequantize(found, record)
    assert torch.equal(codes(value, record), found)
    assert not (found == 0).logical_and(found.signbit()).any()


def test_zero_is_a_value_and_not_finite_groups_say_so():
    weight = torch.tensor([[1.0, 2.0, 0.0], [math.nan, 1, 2], [math.inf, 1, 0], [-math.inf, 2, 1]])
    found, record = fit_record(weight, "asymmetric", 4, ROW)
    value = dequantize(found, record)
    assert value[0, 2] == 0
    assert value[1:].isnan().all()
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(value)
    with pytest.raises(ValueError, match="weights are not on the grid of 4 bits"):
        set_weight_record(layer, record)
    for shape in [(0, 4), (4, 0)]:
        found, record = fit_record(torch.empty(shape), "asymmetric", 4, ROW)
        assert found.shape == shape
        assert record.scale.shape == record.zero.shape == (shape[0], 1)
    with pytest.raises(ValueError, match="an asymmetric grid has zeros, and no other does"):
        WeightRecord("asymmetric", 4, ROW, torch.ones(1, 1))
    with pytest.raises(ValueError, match="bits=1: must be from 2 to 16"):
        affine.most_codes(1)


def test_one_sided_groups_lose_half_as_much_and_holes_stay():
    torch.manual_seed(0)
    weight = torch.rand(8, 64)
    errors = {}
    for grid in ("symmetric", "asymmetric"):
        found, record = fit_record(weight, grid, 4, ROW)
        errors[grid] = float((dequantize(found, record) - weight).square().mean())
    assert errors["asymmetric"] < 0.3 * errors["symmetric"]
    pattern = NM(2, 4)
    kept = pattern.mask(weight - 0.5)
    found, record = fit_record(weight - 0.5, "asymmetric", 3, Granularity("k_groups", 16), kept)
    assert pattern.holds(dequantize(found, record))
    stochastic = torch.stack(
        [fit_record(weight, "asymmetric", 2, ROW, None, "stochastic")[0] for _ in range(200)]
    )
    mean = dequantize(stochastic.mean(0), fit_record(weight, "asymmetric", 2, ROW)[1])
    assert float((mean - weight).abs().max()) < 0.1


class Model(nn.Module):
    """A table, a layer whose inputs have one sign, and one more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 5)
        with torch.no_grad():
            self.up.weight.add_(0.1)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.table(ids))))


def compressed(bits=8):
    model = Model()
    before = model.up.weight.detach().clone()
    compression = Compression(
        [
            OneShot(["down"], NM(2, 4)),
            QuantizeWeights(["table", "up", "down"], bits, ROW, "asymmetric"),
            QuantizeActivations(["up"]),
            QuantizeActivations(["down"], grid="asymmetric"),
        ]
    )
    compression.attach(model, 4)
    ids = torch.arange(11)
    output = model(ids)
    output.square().sum().backward()
    gradient = model.up.parametrizations["weight"].original.grad
    assert gradient is not None
    assert (gradient != 0).any()
    compression.freeze()
    assert torch.equal(model(ids), output)
    assert not torch.equal(model.up.weight, before)
    return model, output.detach()


def test_a_model_comes_back_from_its_records(tmp_path):
    model, output = compressed()
    save_records(tmp_path, model)
    again = Model()
    again.load_state_dict(model.state_dict())
    found = load_records(tmp_path, again)
    assert torch.equal(again(torch.arange(11)), output)
    assert (found["up"].grid, found["up"].activation_grid) == ("asymmetric", "symmetric")
    assert found["down"].activation_grid == "asymmetric"
    assert found["down"].mask == NM(2, 4)
    assert found["down"].mask.holds(again.down.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_runs_is_what_was_trained(bits):
    model, output = compressed(bits)
    reasons = {}
    for name in ("up", "down"):
        layer = model.get_submodule(name)
        record = weight_record(layer)
        found = codes(layer.weight.detach(), record)
        reasons[name] = no_integers_because(found, record)
        model.set_submodule(name, build_linear(found, record, layer.bias.detach(), "int8"))
    torch.testing.assert_close(model(torch.arange(11)), output, rtol=1e-5, atol=1e-5)
    assert reasons["down"] == "inputs are on asymmetric grids"
    assert (reasons["up"] is None) == (bits == 4)


def test_tokens_have_grids_of_their_own():
    x = torch.tensor([[0.0, 1.0, 2.55], [-1.0, 0.0, 0.0], [-1.0, 1.0, 0.3], [0.0, 0.0, 0.0]])
    x.requires_grad_()
    value = affine.fake_quantize_tokens(x)
    torch.testing.assert_close(value[0], x[0], rtol=0, atol=1e-6)
    assert value[3].eq(0).all()
    step = 2 / 255
    assert float((value[2] - x[2]).detach().abs().max()) <= 0.51 * step
    value.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    half = x.detach().bfloat16()
    assert affine.fake_quantize_tokens(half).dtype == torch.bfloat16
    assert affine.fake_quantize_tokens(torch.empty(2, 0)).shape == (2, 0)
    assert affine.fake_quantize_tokens(torch.tensor([[math.nan, 1.0]])).isnan().all()
