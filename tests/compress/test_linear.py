"""The quantized linear layer against hand-computed values."""

import pytest
import torch
from torch.nn import functional

from dqrm.compress.linear import QuantLinear


def test_each_output_channel_has_its_own_scale():
    layer = QuantLinear(2, 2, bits=4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[7.0, 1.4], [0.07, -0.012]]))
        layer.bias.copy_(torch.tensor([100.0, 0.0]))
    assert layer.scale().flatten().tolist() == pytest.approx([1.0, 0.01])
    assert layer.codes().tolist() == [[7, 1], [7, -1]]
    # The bias stays as it is, far outside the weights' grid.
    assert layer(torch.tensor([[1.0, 1.0]])).tolist() == [pytest.approx([108.0, 0.06])]


def test_gradients_equal_those_at_the_quantized_weight():
    torch.manual_seed(0)
    layer = QuantLinear(5, 3, bits=8)
    x = torch.randn(4, 5, requires_grad=True)
    layer(x).square().sum().backward()
    hat = (layer.scale() * layer.codes()).requires_grad_()
    y = x.detach().clone().requires_grad_()
    functional.linear(y, hat, layer.bias).square().sum().backward()
    assert torch.equal(layer.weight.grad, hat.grad)
    assert torch.equal(x.grad, y.grad)


def test_an_all_zero_channel_gives_the_bias():
    layer = QuantLinear(3, 1, bits=4)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(torch.ones(1, 3)), layer.bias[None])
