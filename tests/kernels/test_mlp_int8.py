"""Stacks with INT8 products against their definition.

All that is not a plain sum of floats is defined to the bit, so that results must be equal bit for
bit; only the gradients of biases and layers that are not INT8 are sums of floats in some order.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dqrm.kernels.cpu import native
from dqrm.kernels.mlp import DenseStack, LayerSpec
from dqrm.kernels.mlp_engine import NativeEngine
from dqrm.kernels.mlp_int8_reference import (
    block_rows,
    int8_backward_reference,
    int8_forward_reference,
    int8_runs,
    stack_backward_reference,
    stack_forward_reference,
)
from dqrm.kernels.mlp_reference import codes_and_scale
from dqrm.kernels.rounding import step_key

Levels = Callable[[], Iterator[str]]

SHAPES = {
    "one": [32, 2],
    "odd": [33, 47, 65, 3],
    "panels": [64, 32, 96],
    "wide": [1100, 40, 35],
    "narrow-end": [367, 70, 256, 16],
}
BATCHES = [0, 1, 3, 7, 33, 130, 700]
KEY = step_key(5, 11)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of torch's wait on each other where tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_layers(widths: list[int], bits: int, last_relu: bool = False) -> list[LayerSpec]:
    count = len(widths) - 1
    return [
        LayerSpec(
            torch.randn(n, k) / math.sqrt(k), torch.randn(n), bits, last_relu or place + 1 < count
        )
        for place, (k, n) in enumerate(itertools.pairwise(widths))
    ]


def is_native(stack: DenseStack) -> bool:
    engines = [run.engine for run in stack._chain._runs]
    return any(isinstance(engine, NativeEngine) and engine._random for engine in engines)


def assert_same(got: Tensor | None, expected: Tensor, what: str) -> None:
    assert got is not None
    assert got.shape == expected.shape, what
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert same.all(), f"{what}: {(~same).sum()} of {got.numel()} differ"


def assert_equals_definition(
    layers: list[LayerSpec], x: Tensor, grad_y: Tensor, what: str
) -> DenseStack:
    y, saved = int8_forward_reference(x, layers)
    grad_x, parameters = int8_backward_reference(grad_y, layers, saved, KEY)
    stack = DenseStack(layers, "int8")
    assert_same(stack.forward(x, training=False), y, f"{what}: y without training")
    assert_same(stack.forward(x), y, f"{what}: y")
    assert_same(stack.backward(grad_y, key=KEY), grad_x, f"{what}: grad_x")
    for number, (mine, theirs) in enumerate(zip(stack.gradients, parameters, strict=True)):
        assert_same(mine[0], theirs[0], f"{what}: weight {number}")
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-4, equal_nan=True)
    return stack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_the_bits_of_the_definition(each_level: Levels, shape: str, bits: int) -> None:
    torch.manual_seed(bits)
    widths = SHAPES[shape]
    for batch in BATCHES:
        layers = make_layers(widths, bits, last_relu=batch % 2 == 1)
        x, grad_y = torch.randn(batch, widths[0]), torch.randn(batch, widths[-1])
        for level in each_level():
            stack = assert_equals_definition(layers, x, grad_y, f"{level}, batch {batch}")
            module = native()
            assert module is not None
            assert is_native(stack) == (level == "avx512" and module.has_avx512_vnni())


def test_hostile_numbers_give_the_bits_of_the_definition(each_level: Levels) -> None:
    torch.manual_seed(0)
    layers = make_layers([40, 37, 34], 4)
    with torch.no_grad():
        layers[0].weight[3] = 0.0
        layers[0].weight[4] *= 1e-30
        layers[0].weight[5] *= 1e30
        layers[0].weight[6] = (torch.arange(40) % 7 + 0.5) / 8
    x, grad_y = torch.randn(150, 40), torch.randn(150, 34)
    x[0] = 0.0
    x[1] *= 1e-40
    x[2] *= 1e-12
    x[3] *= 1e35
    x[4] = torch.arange(40) - 20.5
    x[4, 0] = 127.0
    grad_y[0] = 0.0
    grad_y[1] *= 1e-42
    grad_y[2] *= 1e-30
    grad_y[3] *= 1e30
    grad_y[:, 7] = 0.0
    grad_y[:, 8] *= 1e-36
    for level in each_level():
        assert_equals_definition(layers, x, grad_y, level)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_row_nan(each_level: Levels, value: float) -> None:
    torch.manual_seed(1)
    layers = make_layers([40, 37, 34], 4, last_relu=True)
    x, grad_y = torch.randn(9, 40), torch.randn(9, 34)
    x[2, 39] = value
    for level in each_level():
        stack = assert_equals_definition(layers, x, grad_y, level)
        assert stack.forward(x).isnan().any(dim=1).tolist() == [row == 2 for row in range(9)]
        assert stack.forward(x)[2].isnan().all()
    grad_y[3, 1] = value
    for level in each_level():
        stack = DenseStack([layers[0]._replace(relu=False)], "int8")
        stack.forward(torch.randn(9, 40))
        grad = torch.randn(9, 37)
        grad[3, 36] = value
        grad_x = stack.backward(grad, key=KEY)
        assert grad_x is not None
        assert grad_x.isnan().any(dim=1).tolist() == [row == 3 for row in range(9)], level
        rows = stack.gradients[0][0].isnan().any(dim=1)
        assert rows.tolist() == [row == 36 for row in range(37)], level


@pytest.mark.parametrize(
    ("widths", "bits"),
    [([13, 64, 48, 16], 4), ([70, 40, 33, 1], 4), ([13, 64, 1], 8), ([70, 40], 32)],
)
def test_layers_that_are_not_int8_stand_between(
    each_level: Levels, widths: list[int], bits: int
) -> None:
    torch.manual_seed(2)
    layers = make_layers(widths, bits)
    x, grad_y = torch.randn(700, widths[0]), torch.randn(700, widths[-1])
    y, saved = stack_forward_reference(x, layers)
    grad_x, parameters = stack_backward_reference(grad_y, layers, saved, KEY)
    for level in each_level():
        stack = DenseStack(layers, "int8")

        def near(got: Tensor | None, expected: Tensor, what: str) -> None:
            assert got is not None
            error = float((got - expected).norm() / expected.norm())
            # Rounding to bfloat16 or not moves some ReLUs, codes and random choices.
            assert error < 0.1, f"{level}, {what}: {error}"  # noqa: B023

        near(stack.forward(x), y, "y")
        near(stack.backward(grad_y, key=KEY), grad_x, "grad_x")
        for mine, theirs in zip(stack.gradients, parameters, strict=True):
            near(mine[0], theirs[0], "weight")
            near(mine[1], theirs[1], "bias")
        # Without a gradient of x, those of the parameters are the same.
        before = [tensor.clone() for pair in stack.gradients for tensor in pair]
        assert stack.backward(grad_y, need_grad_input=False, key=KEY) is None
        for got, expected in zip(itertools.chain(*stack.gradients), before, strict=True):
            assert_same(got, expected, level)


def test_which_layers_are_int8() -> None:
    layers = make_layers([13, 64, 32, 31, 40, 1], 4)
    layers[2] = layers[2]._replace(bits=32)
    assert [tuple(run) for run in int8_runs(layers)] == [
        (0, 1, False),
        (1, 2, True),
        (2, 5, False),
    ]


def test_gradients_are_right_on_average(each_level: Levels) -> None:
    torch.manual_seed(3)
    layers = [LayerSpec(torch.randn(40, 36), torch.zeros(40), 4)]
    x, grad_y = torch.randn(50, 36), torch.randn(50, 40) * torch.rand(50, 1) ** 4
    codes, scale = codes_and_scale(layers[0].weight, 4)
    _, saved = int8_forward_reference(x, layers)
    quantized = saved.inputs[0] * saved.input_scales[0][:, None]
    exact_x = grad_y.double() @ (codes * scale[:, None]).double()
    exact_w = grad_y.double().T @ quantized.double()
    draws = 600
    for level in each_level():
        if level == "scalar":
            continue
        stack = DenseStack(layers, "int8")
        stack.forward(x)
        all_x, all_w = [], []
        for step in range(draws):
            grad_x = stack.backward(grad_y, key=step_key(1, step))
            assert grad_x is not None
            all_x.append(grad_x.double())
            all_w.append(stack.gradients[0][0].double())
        for drawn, exact in ((all_x, exact_x), (all_w, exact_w)):
            values = torch.stack(drawn)
            # The means' distances in units of their own standard errors.
            distance = (values.mean(dim=0) - exact) * math.sqrt(draws) / values.std(dim=0)
            assert 0.9 < float(distance.pow(2).mean()) < 1.1, level
            assert float(distance.abs().max()) < 5.0, level
            assert float(distance.mean().abs()) < 0.15, level


def test_equal_keys_give_equal_bits_and_others_do_not(each_level: Levels) -> None:
    torch.manual_seed(4)
    layers = make_layers([64, 40, 33], 4)
    x, grad_y = torch.randn(90, 64), torch.randn(90, 33)
    for _ in each_level():
        stack = DenseStack(layers, "int8")
        stack.forward(x)
        first, again, other = (stack.backward(grad_y, key=key) for key in (1, 1, 2))
        assert first is not None
        assert_same(again, first, "again")
        assert other is not None
        assert not torch.equal(other, first)


def test_results_do_not_depend_on_the_number_of_threads(each_level: Levels) -> None:
    torch.manual_seed(5)
    layers = make_layers([13, 96, 64, 40, 1], 4)
    x, grad_y = torch.randn(1501, 13), torch.randn(1501, 1)
    for level in each_level():
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            stack = DenseStack(layers, "int8")
            y = stack.forward(x)
            grad_x = stack.backward(grad_y, key=KEY)
            assert grad_x is not None
            runs.append([y, grad_x, *itertools.chain(*stack.gradients)])
        for run in runs[1:]:
            for got, expected in zip(run, runs[0], strict=True):
                assert_same(got, expected, level)


def test_rows_may_lie_apart_and_the_workspace_grows(each_level: Levels) -> None:
    torch.manual_seed(6)
    layers = make_layers([45, 40, 34], 8)
    for level in each_level():
        stack = DenseStack(layers, "int8")
        for batch in (3, 200, 1, 0, 60):
            x, grad_y = torch.randn(batch, 50)[:, 2:47], torch.randn(batch, 3, 34)[:, 1]
            y, saved = int8_forward_reference(x, layers)
            grad_x, _ = int8_backward_reference(grad_y, layers, saved, KEY)
            wide_y, wide_x = torch.full((batch, 40), math.nan), torch.full((batch, 50), math.nan)
            assert_same(stack.forward(x, out=wide_y[:, 3:37]), y, level)
            assert_same(stack.backward(grad_y, out=wide_x[:, 2:47], key=KEY), grad_x, level)
            assert wide_y[:, :3].isnan().all()
            assert wide_y[:, 37:].isnan().all()
            assert wide_x[:, :2].isnan().all()
            assert wide_x[:, 47:].isnan().all()


def test_the_weights_are_read_at_every_forward(each_level: Levels) -> None:
    for level in each_level():
        linear = torch.nn.Linear(33, 5)
        layers = [LayerSpec(linear.weight, linear.bias, 4)]
        stack = DenseStack(layers, "int8")
        x = torch.randn(4, 33)
        for _ in range(2):
            assert_same(stack.forward(x), int8_forward_reference(x, layers)[0], level)
            linear.weight.data = torch.randn(5, 33)


def test_backward_needs_a_key() -> None:
    stack = DenseStack(make_layers([40, 33], 4), "int8")
    stack.forward(torch.ones(2, 40))
    with pytest.raises(ValueError, match="needs a key"):
        stack.backward(torch.ones(2, 33))


def test_blocks_depend_on_the_batch_alone() -> None:
    assert [block_rows(batch) for batch in (0, 1, 1024, 1025, 2048, 1 << 20)] == [
        64,
        64,
        64,
        68,
        128,
        128,
    ]
