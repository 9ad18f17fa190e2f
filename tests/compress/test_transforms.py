"""Transforms attached to small models, against plain arithmetic."""

import copy

import pytest
import torch
from torch import nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import codes, dequantize, weight_record
from dqrm.compress.grids.records_file import load_records, read_records, records, save_records
from dqrm.compress.transforms.activations import QuantizeActivations, fake_quantize_tokens
from dqrm.compress.transforms.base import Compression
from dqrm.compress.transforms.build import build_compression
from dqrm.compress.transforms.config import QuantTransform
from dqrm.compress.transforms.weights import QuantizeWeights

GRANULARITIES = [
    Granularity("tensor"),
    Granularity("row"),
    Granularity("row_groups", 2),
    Granularity("k_groups", 4),
]


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(9, 10), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 4))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_rows_of_an_embedding_never_share_scales(granularity):
    model = small_model()
    Compression([QuantizeWeights(["0"], 4, granularity)]).attach(model, 1)
    alone = model[0](torch.tensor([4]))
    among_others = model[0](torch.arange(9))
    assert torch.equal(alone[0], among_others[4])
    assert not torch.equal(alone[0], model[0].weight[4])


def test_the_full_range_is_that_of_deepspeed():
    model = small_model()
    with torch.no_grad():
        model[1].weight[0] = torch.tensor([0.8, -0.8, 0.1, 0.05, 0.7, 0, 0, 0, 0, 0])
    compression = Compression([QuantizeWeights(["1"], 4, full_range=True)])
    compression.attach(model, 1)
    compression.freeze()
    # 2 * 0.8 / 2**4 = 0.1 a step, 7 of them upwards and 8 downwards.
    wanted = [0.7, -0.8, 0.1, 0, 0.7, 0, 0, 0, 0, 0]
    assert model[1].weight[0].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_frozen_is_the_last_forward_bit_for_bit(bits, granularity):
    model = small_model()
    compression = Compression(
        [QuantizeWeights(["1", "3"], bits, granularity), QuantizeActivations(["1", "3"])]
    )
    compression.attach(model, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 9, (5,))
    for step in range(3):
        compression.before_forward(step)
        model(ids).square().sum().backward()
        compression.after_backward()
        optimizer.step()
        compression.after_step(step, 0.1)
    before = model.eval()(ids)
    compression.freeze()
    assert torch.equal(model(ids), before)
    compression.freeze()
    assert torch.equal(model(ids), before)
    assert type(model[1]) is nn.Linear
    for layer in (model[1], model[3]):
        record = weight_record(layer)
        assert record.bits == bits
        assert record.activation_bits == 8
        assert torch.equal(dequantize(codes(layer.weight, record), record), layer.weight)


def test_embedding_rows_are_quantized_where_they_are_looked_up():
    model = small_model()
    table = model[0].weight.detach().clone()
    compression = Compression([QuantizeWeights(["0"], 4)])
    compression.attach(model, 1)
    ids = torch.tensor([[3, 3, 5]])
    rows = model[0](ids)
    scale = table[ids].abs().amax(dim=-1, keepdim=True) / 7
    assert torch.equal(rows, scale * (table[ids] / scale).round())
    rows.sum().backward()
    assert model[0].weight.grad.abs().sum(dim=1).tolist() == [0, 0, 0, 20, 0, 10, 0, 0, 0]
    assert torch.equal(model[0].weight, table)
    compression.freeze()
    assert torch.equal(model[0](ids), rows)
    assert weight_record(model[0]).scale.shape == (9, 1)


def test_records_travel_with_the_model(tmp_path):
    model = small_model()
    config = QuantTransform(
        kind="quant", match="[13]", weight={"bits": 4, "group": 3}, act={"bits": 8}
    )
    compression = build_compression([config])
    compression.attach(model, 1)
    compression.freeze()
    save_records(tmp_path, model)
    other = small_model(1)
    other.load_state_dict(model.state_dict())
    load_records(tmp_path, other)
    ids = torch.arange(9)
    assert torch.equal(other(ids), model(ids))
    assert list(records(other)) == list(read_records(tmp_path)) == ["1", "3"]
    assert torch.equal(weight_record(other[1]).scale, weight_record(model[1]).scale)
    with torch.no_grad():
        other[1].weight += 0.01
    with pytest.raises(ValueError, match=r"1: .* weights are not on the grid of 4 bits"):
        load_records(tmp_path, other)


def test_a_pattern_without_a_module_is_refused():
    with pytest.raises(ValueError, match="no Linear has this name; near it are"):
        QuantizeActivations(["11"]).attach(small_model(), 1)
    with pytest.raises(ValueError, match="no regular expression"):
        QuantizeWeights(["("], 4).attach(small_model(), 1)


def test_two_grids_of_one_weight_are_refused():
    model = small_model()
    compression = Compression([QuantizeWeights(["1"], 4), QuantizeWeights([".*"], 8)])
    with pytest.raises(ValueError, match="1: two transforms of one kind match it"):
        compression.attach(model, 1)


def test_a_shared_weight_is_refused():
    model = small_model()
    model.append(nn.Linear(4, 4))
    model.append(copy.copy(model[4]))
    model[5].weight = model[4].weight
    with pytest.raises(ValueError, match=r"4: its weight is also 5\.weight"):
        Compression([QuantizeWeights(["4"], 4)]).attach(model, 1)


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="in this order"):
        Compression([QuantizeActivations(["1"]), QuantizeWeights(["1"], 4)])


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (2, 0, 5), (2, 3, 0)])
def test_inputs_without_values_stay_as_they_are(shape):
    x = torch.randn(shape, requires_grad=True)
    value = fake_quantize_tokens(x)
    assert value.shape == x.shape
    value.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
