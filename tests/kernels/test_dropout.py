"""Dropout against its definition, alone and between the layers of a stack."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dqrm.kernels import dropout
from dqrm.kernels.dropout import dropout_, dropout_reference
from dqrm.kernels.mlp import DenseStack, LayerSpec, StackPrecision
from dqrm.kernels.rounding import step_key

Levels = Callable[[], Iterator[str]]

KEY = step_key(3, 7)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 15), (2, 16), (7, 33), (700, 301)])
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1 - 2**-30])
def test_every_level_has_the_bits_of_the_definition(
    each_level: Levels, shape: tuple[int, int], probability: float
) -> None:
    values = torch.randn(shape)
    expected = dropout_reference(values, probability, KEY, 5)
    for level in each_level():
        got = values.clone()
        assert dropout_(got, probability, KEY, 5) is got
        assert torch.equal(got, expected), level


def test_parts_drop_what_the_whole_drops(each_level: Levels) -> None:
    values = torch.randn(50, 20)
    for level in each_level():
        whole = dropout_(values.clone(), 0.5, KEY, 3)
        part = dropout_(values[30:].clone(), 0.5, KEY, 3, first_row=30)
        assert torch.equal(part, whole[30:]), level
        assert torch.equal(part, dropout_reference(values[30:], 0.5, KEY, 3, 30)), level


def test_what_is_not_finite_and_what_is_tiny(each_level: Levels) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e-45, 3e38, -0.0]).repeat(40, 3)
    expected = dropout_reference(values, 0.5, KEY)
    assert expected[:, 0].isnan().all()
    for level in each_level():
        got = dropout_(values.clone(), 0.5, KEY)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=level)


def test_any_number_of_threads_drops_the_same_values() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(dropout_(torch.ones(900, 400), 0.3, KEY))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_values_keep_their_mean_and_are_dropped_independently() -> None:
    count = 2000
    first = dropout_(torch.ones(count, 64), 0.3, KEY)
    assert first.unique().tolist() == [0.0, pytest.approx(1.0 / 0.7)]
    # Six standard deviations of a mean of independent values.
    assert (first.mean() - 1.0).abs() < 6 * math.sqrt(0.3 / 0.7 / first.numel())
    for key, stream in ((KEY, 1), (step_key(3, 8), 0), (step_key(4, 7), 0)):
        other = dropout_(torch.ones(count, 64), 0.3, key, stream)
        together = ((first == 0) & (other == 0)).double().mean()
        assert (together - 0.09).abs() < 6 * math.sqrt(0.09 * 0.91 / first.numel())


def test_wrong_arguments() -> None:
    ones = torch.ones(2, 3)
    for values in (ones.double(), ones.T, ones[0]):
        with pytest.raises(ValueError, match="must be contiguous float32 with 2 dimensions"):
            dropout_(values, 0.5, KEY)
    for probability in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="must be at least 0 and below 1"):
            dropout_(ones, probability, KEY)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "native", lambda: None)
    assert torch.equal(
        dropout_(torch.ones(9, 9), 0.5, KEY), dropout_reference(torch.ones(9, 9), 0.5, KEY)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_stack_drops_between_its_layers(each_level: Levels, precision: StackPrecision) -> None:
    torch.manual_seed(1)
    widths, rates = [40, 70, 33, 1], [0.5, 0.25, 0.0]
    layers = [
        LayerSpec(torch.randn(n, k) / math.sqrt(k), torch.randn(n), 4, n > 1, dropout=rate)
        for k, n, rate in zip(widths, widths[1:], rates, strict=False)
    ]
    x, grad_y = torch.randn(50, 40), torch.randn(50, 1)
    for level in each_level():
        stack = DenseStack(layers, precision)
        alone = [DenseStack([layer._replace(dropout=0.0)], precision) for layer in layers]
        hidden = x
        for number, (single, rate) in enumerate(zip(alone, rates, strict=True)):
            hidden = single.forward(hidden)
            hidden = dropout_reference(hidden, rate, KEY, (1 << 30) + number + 1)
        assert torch.equal(stack.forward(x, key=KEY), hidden), level
        grad_x = stack.backward(grad_y, key=KEY)
        assert grad_x is not None
        if precision != "int8":  # whose random bits count the layers of their own stack
            grad: Tensor | None = grad_y
            for number in (2, 1, 0):
                assert grad is not None
                grad = alone[number].backward(grad)
                assert grad is not None
                if number:
                    grad = dropout_reference(grad, rates[number - 1], KEY, (1 << 30) + number)
                for mine, theirs in zip(
                    stack.gradients[number], alone[number].gradients[0], strict=True
                ):
                    assert torch.equal(mine, theirs), level
            assert grad is not None
            assert torch.equal(grad_x, grad), level
        plain = DenseStack([layer._replace(dropout=0.0) for layer in layers], precision)
        torch.testing.assert_close(
            stack.forward(x, training=False), plain.forward(x, training=False), rtol=2e-2, atol=2e-2
        )


def test_a_stack_with_dropout_needs_a_key_and_ends_without() -> None:
    layer = LayerSpec(torch.randn(3, 3), torch.zeros(3), relu=True, dropout=0.5)
    stack = DenseStack([layer, layer._replace(dropout=0.0)])
    with pytest.raises(ValueError, match="forward needs a key"):
        stack.forward(torch.ones(2, 3))
    stack.forward(torch.ones(2, 3), training=False)
    with pytest.raises(ValueError, match=r"layer 0: dropout=0.5: .* 0 in the last layer"):
        DenseStack([layer])
