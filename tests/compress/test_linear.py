"""The quantized linear layer against hand-computed values."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dqrm.compress.linear import QuantLinear
from dqrm.compress.transforms.activations import QuantizeActivations
from dqrm.compress.transforms.base import Compression
from dqrm.compress.transforms.latent import latent_weight
from dqrm.compress.transforms.weights import QuantizeWeights


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


def test_quantized_inputs_and_their_straight_through_gradients():
    torch.manual_seed(1)
    layer = QuantLinear(5, 3, bits=4, activation_bits=8)
    x = torch.randn(4, 2, 5, requires_grad=True)
    y = layer(x)
    scale_x = x.detach().abs().amax(dim=-1, keepdim=True) / 127
    x_hat = (scale_x * (x.detach() / scale_x).round()).requires_grad_()
    hat = (layer.scale() * layer.codes()).requires_grad_()
    expected = functional.linear(x_hat, hat, layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    bias_gradient = layer.bias.grad.clone()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, x_hat.grad)
    torch.testing.assert_close(layer.weight.grad, hat.grad)
    torch.testing.assert_close(bias_gradient, layer.bias.grad - bias_gradient)


def test_quantized_inputs_are_exact_under_autocast():
    torch.manual_seed(2)
    layer = QuantLinear(300, 7, bits=8, activation_bits=8)
    x = torch.randn(11, 300)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(x))
    assert layer.weight.grad.dtype == torch.float32


def test_the_first_layer_needs_no_gradient_of_its_input():
    layer = QuantLinear(3, 2, bits=8, activation_bits=8)
    layer(torch.ones(4, 3)).sum().backward()
    assert layer.bias.grad.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation_bits", [8, 32])
def test_it_is_a_plain_layer_with_transforms(bits, activation_bits):
    torch.manual_seed(3)
    layer = QuantLinear(30, 7, bits, activation_bits)
    plain = nn.Sequential(nn.Linear(30, 7))
    plain[0].load_state_dict(layer.state_dict())
    transforms = [QuantizeWeights(["0"], bits)]
    if activation_bits == 8:
        transforms.append(QuantizeActivations(["0"]))
    Compression(transforms).attach(plain, 1)
    x = torch.randn(11, 30, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    outputs, expected = layer(x), plain(y)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    found = outputs, layer.weight.grad, layer.bias.grad, x.grad
    wanted = expected, latent_weight(plain[0]).grad, plain[0].bias.grad, y.grad
    for ours, theirs in zip(found, wanted, strict=True):
        if activation_bits == 32:
            assert torch.equal(ours, theirs)
        else:
            # Sums of integers here, of products of rounded values there.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
