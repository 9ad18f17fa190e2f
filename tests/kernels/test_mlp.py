"""Stacks of linear layers against their definition, at every level.

Most inputs are small integers over powers of two: every product and sum is then exact in FP32,
in any order, so results must be equal bit for bit, rounding to bfloat16 included.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dqrm.compress.linear import QuantLinear
from dqrm.kernels import mlp_engine
from dqrm.kernels.cpu import isa_level, native
from dqrm.kernels.mlp import (
    DenseStack,
    LayerSpec,
    Precision,
    mlp_backward_reference,
    mlp_forward_reference,
)
from dqrm.kernels.mlp_reference import codes_and_scale

Levels = Callable[[], Iterator[str]]

SHAPES = {
    "single": ([1, 1], [False]),
    "bottom": ([13, 512, 256, 64, 16], [True] * 4),
    "top": ([367, 512, 256, 1], [True, True, False]),
    "odd": ([1, 5, 33, 17, 3], [True, False, True, True]),
    "full-panels": ([32, 64, 32], [True, False]),
}
BATCHES = [0, 1, 2, 3, 7, 25, 128]


def integers(generator: torch.Generator, largest: int, *shape: int) -> Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def exact_layers(seed: int, widths: list[int], relu: list[bool], bits: int) -> list[LayerSpec]:
    """Few non-zero weights a row, so that values stay small; scales are powers of two."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for (inputs, outputs), after in zip(itertools.pairwise(widths), relu, strict=True):
        keep = torch.rand(outputs, inputs, generator=generator) < min(1.0, 4 / inputs)
        weight = integers(generator, 3, outputs, inputs) * keep
        if bits != 32:
            # The largest weight of a row is a power of two times the largest code; the others
            # lie off the grid, half-way points among them.
            weight = weight / 2 + torch.rand(weight.shape, generator=generator).round() / 4
            largest = (1 << (bits - 1)) - 1
            column = torch.randint(inputs, (outputs,), generator=generator)
            weight[torch.arange(outputs), column] = float(largest)
        layers.append(LayerSpec(weight / 8, integers(generator, 3, outputs), bits, after))
    return layers


def gradients(stack: DenseStack) -> list[Tensor]:
    return [tensor for pair in stack.gradients for tensor in pair]


def used_by(stack: DenseStack) -> Precision:
    """Where the processor has no bfloat16, or a slow one, "bf16" computes in FP32."""
    module = native()
    assert module is not None
    fast = module.has_amx() or (module.has_fast_avx512_bf16() and isa_level() == "avx512")
    return "bf16" if stack.precision == "bf16" and fast else "fp32"


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    assert torch.equal(got, expected), f"{what}: {(got != expected).sum()} of {got.numel()} differ"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of torch's wait on each other where tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Eight bits over four layers are more than FP32 holds exactly.
@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        (shape, bits)
        for shape in SHAPES
        for bits in (4, 8, 32)
        if bits != 8 or len(SHAPES[shape][1]) < 4
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exact_arithmetic_gives_the_bits_of_the_definition(
    each_level: Levels, shape: str, precision: Precision, bits: int
) -> None:
    widths, relu = SHAPES[shape]
    generator = torch.Generator().manual_seed(bits)
    for batch in BATCHES:
        layers = exact_layers(batch, widths, relu, bits)
        x = integers(generator, 3, batch, widths[0])
        grad_y = integers(generator, 2, batch, widths[-1])
        expected = {}
        for used in {"fp32", precision}:
            y, saved = mlp_forward_reference(x, layers, used)
            grad_x, parameters = mlp_backward_reference(grad_y, layers, saved)
            expected[used] = [y, grad_x, *itertools.chain(*parameters)]
        for level in each_level():
            stack = DenseStack(layers, precision)
            got = [stack.forward(x), stack.backward(grad_y), *gradients(stack)]
            for number, (mine, theirs) in enumerate(
                zip(got, expected[used_by(stack)], strict=True)
            ):
                assert mine is not None
                assert_same(mine, theirs, f"{level}, batch {batch}, result {number}")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_numbers_agree_with_the_definition(
    each_level: Levels, precision: Precision, bits: int
) -> None:
    torch.manual_seed(0)
    widths = [367, 512, 256, 1]
    layers = [
        LayerSpec(torch.randn(n, k) / math.sqrt(k), torch.randn(n), bits, n > 1)
        for k, n in itertools.pairwise(widths)
    ]
    x, grad_y = torch.randn(777, 367), torch.randn(777, 1)
    for level in each_level():
        stack = DenseStack(layers, precision)
        used = used_by(stack)
        y, saved = mlp_forward_reference(x, layers, used)
        grad_x, parameters = mlp_backward_reference(grad_y, layers, saved)
        # Sums of up to 777 terms in another order differ by 2^-24 * sqrt(777) or less. In
        # bfloat16 an activation at a rounding border then moves by 2^-8, one in some hundreds.
        # A ReLU decided otherwise moves one of 200,000 gradients by all of itself.
        limit = 5e-3 if used == "bf16" else 2e-3
        assert relative(stack.forward(x), y) < (1e-3 if used == "bf16" else 2e-6), level
        got = stack.backward(grad_y)
        assert got is not None
        assert relative(got, grad_x) < limit, level
        for mine, theirs in zip(stack.gradients, parameters, strict=True):
            assert relative(mine[0], theirs[0]) < limit, level
            assert relative(mine[1], theirs[1]) < limit, level


def test_the_definition_is_the_gradient_autograd_finds() -> None:
    torch.manual_seed(1)
    modules = torch.nn.Sequential(
        QuantLinear(7, 9, 4), torch.nn.ReLU(), torch.nn.Linear(9, 5), QuantLinear(5, 2, 8)
    )
    linears = [module for module in modules if isinstance(module, torch.nn.Linear)]
    layers = [
        LayerSpec(layer.weight, layer.bias, getattr(layer, "bits", 32), number == 0)
        for number, layer in enumerate(linears)
    ]
    x = torch.randn(6, 7, requires_grad=True)
    expected = modules(x)
    grad_y = torch.randn(6, 2)
    expected.backward(grad_y)
    y, saved = mlp_forward_reference(x.detach(), layers)
    grad_x, parameters = mlp_backward_reference(grad_y, layers, saved)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad_x, x.grad)
    for layer, (weight, bias) in zip(linears, parameters, strict=True):
        torch.testing.assert_close(weight, layer.weight.grad)
        torch.testing.assert_close(bias, layer.bias.grad)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_integer_layers_give_the_bits_of_serving_and_the_gradients_of_autograd(
    each_level: Levels, precision: Precision, bits: int
) -> None:
    torch.manual_seed(bits)
    linears = [QuantLinear(k, n, bits, 8) for k, n in [(13, 70), (70, 33), (33, 1)]]
    modules = torch.nn.Sequential(linears[0], torch.nn.ReLU(), linears[1], linears[2])
    layers = [
        LayerSpec(layer.weight, layer.bias, bits, number == 0, 8)
        for number, layer in enumerate(linears)
    ]
    x = torch.randn(301, 13, requires_grad=True)
    y = modules(x)
    grad_y = torch.randn(301, 1)
    y.backward(grad_y)
    assert x.grad is not None
    expected = [x.grad, *itertools.chain(*((p.weight.grad, p.bias.grad) for p in linears))]
    for level in each_level():
        stack = DenseStack(layers, precision)
        assert_same(stack.forward(x.detach(), training=False), y.detach(), level)
        assert_same(stack.forward(x.detach()), y.detach(), level)
        used = used_by(stack)
        _, saved = mlp_forward_reference(x.detach(), layers, used)
        grad_x, parameters = mlp_backward_reference(grad_y, layers, saved)
        reference = [grad_x, *itertools.chain(*parameters)]
        got = [stack.backward(grad_y), *gradients(stack)]
        for number, (mine, same, theirs) in enumerate(zip(got, reference, expected, strict=True)):
            assert mine is not None
            assert theirs is not None
            # Every ReLU decides alike; what is left is the order of sums, and the rounding of
            # gradients to bfloat16, 2^-9 each.
            what = f"{level}, gradient {number}"
            assert relative(mine, same) < (1e-3 if used == "bf16" else 2e-6), what
            assert relative(mine, theirs) < (5e-3 if used == "bf16" else 2e-6), what


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_that_is_not_finite_stays_alone_in_integer_layers(
    each_level: Levels, precision: Precision
) -> None:
    torch.manual_seed(10)
    layers = [
        LayerSpec(torch.randn(n, k), torch.randn(n), 4, n > 1, 8) for k, n in [(5, 33), (33, 1)]
    ]
    x = torch.randn(6, 5)
    x[1, 0], x[2, 1], x[3, 4], x[4] = math.nan, math.inf, -math.inf, 0.0
    for level in each_level():
        stack = DenseStack(layers, precision)
        y, _ = mlp_forward_reference(x, layers, used_by(stack))
        got = stack.forward(x)
        assert got[1:4].isnan().all(), level
        assert y[1:4].isnan().all(), level
        assert_same(got[[0, 4, 5]], y[[0, 4, 5]], level)
        stack.backward(torch.ones(6, 1))
        assert gradients(stack)[0].isnan().any(), level


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_integer_layers_between_others(each_level: Levels, precision: Precision) -> None:
    torch.manual_seed(9)
    layers = [
        LayerSpec(torch.randn(n, k) / k, torch.randn(n), 32 if bits == 32 else 4, True, bits)
        for k, n, bits in [(13, 40, 32), (40, 50, 8), (50, 20, 32), (20, 3, 8)]
    ]
    x, grad_y = torch.randn(100, 13), torch.randn(100, 3)
    for level in each_level():
        stack = DenseStack(layers, precision)
        used = used_by(stack)
        y, saved = mlp_forward_reference(x, layers, used)
        grad_x, parameters = mlp_backward_reference(grad_y, layers, saved)
        # An input at the border of two codes moves a sum by a code of the weight.
        limit = 2e-2
        assert relative(stack.forward(x), y) < limit, level
        got = [stack.backward(grad_y), *gradients(stack)]
        for mine, theirs in zip(got, [grad_x, *itertools.chain(*parameters)], strict=True):
            assert mine is not None
            assert relative(mine, theirs) < limit, level


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_quantized_layer(each_level: Levels, bits: int) -> None:
    torch.manual_seed(2)
    layer = QuantLinear(67, 39, bits)
    with torch.no_grad():
        layer.weight[3] = 0.0
        layer.weight[4] *= 1e-30
        layer.weight[5] = torch.linspace(-1.0, 1.0, 67)
        layer.weight[6] *= 1e30
        # Every other weight half-way between two codes.
        layer.weight[7] = (torch.arange(67) % 7 + 0.5) / 8
        layer.weight[7, 0] = layer.largest / 8
    assert torch.equal(codes_and_scale(layer.weight.detach(), bits)[0], layer.codes())
    value = layer.scale() * layer.codes()
    for level in each_level():
        stack = DenseStack([LayerSpec(layer.weight, torch.zeros(39), bits)])
        # The rows of the identity pick out single columns of the quantized weight.
        assert_same(stack.forward(torch.eye(67)), value.detach().T, level)


def test_rows_may_lie_apart_and_outputs_be_given(each_level: Levels) -> None:
    layers = exact_layers(5, [13, 40, 16], [True, True], 4)
    generator = torch.Generator().manual_seed(5)
    x = integers(generator, 3, 50, 13)
    grad_y = integers(generator, 2, 50, 16)
    for _ in each_level():
        stack = DenseStack(layers, "bf16")
        y = stack.forward(x)
        grad_x = stack.backward(grad_y)
        assert grad_x is not None
        before = [tensor.clone() for tensor in gradients(stack)]
        wide_x, wide_y = torch.full((50, 20), math.nan), torch.full((50, 27, 16), math.nan)
        wide_x[:, 3:16] = x
        assert stack.forward(wide_x[:, 3:16], out=wide_y[:, 0]) is not None
        assert_same(wide_y[:, 0], y, "y")
        assert wide_y[:, 1:].isnan().all()
        wide_grad = torch.full((50, 18), math.nan)
        assert stack.backward(wide_y[:, 0].copy_(grad_y), out=wide_grad[:, 2:15]) is not None
        assert_same(wide_grad[:, 2:15], grad_x, "grad_x")
        assert wide_grad[:, :2].isnan().all()
        assert wide_grad[:, 15:].isnan().all()
        for got, expected in zip(gradients(stack), before, strict=True):
            assert_same(got, expected, "gradient")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_do_not_depend_on_the_number_of_threads(
    each_level: Levels, precision: Precision
) -> None:
    torch.manual_seed(3)
    layers = [
        LayerSpec(torch.randn(n, k) / math.sqrt(k), torch.randn(n), 4, n > 1)
        for k, n in itertools.pairwise([61, 96, 1])
    ]
    x, grad_y = torch.randn(1501, 61), torch.randn(1501, 1)
    for level in each_level():
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            stack = DenseStack(layers, precision)
            y = stack.forward(x)
            grad_x = stack.backward(grad_y)
            assert grad_x is not None
            runs.append([y, grad_x, *gradients(stack)])
        for run in runs[1:]:
            for got, expected in zip(run, runs[0], strict=True):
                assert_same(got, expected, level)


def test_a_workspace_is_reused_and_grows(each_level: Levels) -> None:
    layers = exact_layers(6, [9, 20, 2], [True, False], 8)
    generator = torch.Generator().manual_seed(6)
    for level in each_level():
        stack = DenseStack(layers)
        for batch in (3, 200, 1, 0, 60):
            x = integers(generator, 3, batch, 9)
            grad_y = integers(generator, 2, batch, 2)
            y, saved = mlp_forward_reference(x, layers)
            grad_x, _ = mlp_backward_reference(grad_y, layers, saved)
            assert_same(stack.forward(x, training=False), y, level)
            assert_same(stack.forward(x), y, level)
            got = stack.backward(grad_y)
            assert got is not None
            assert_same(got, grad_x, level)
            assert stack.backward(grad_y, need_grad_input=False) is None


def test_the_weights_are_read_at_every_forward(each_level: Levels) -> None:
    for level in each_level():
        linear = torch.nn.Linear(3, 2)
        stack = DenseStack([LayerSpec(linear.weight, linear.bias)])
        x = torch.eye(3)
        for _ in range(2):
            assert_same(stack.forward(x), (linear.weight.T + linear.bias).detach(), level)
            with torch.no_grad():
                linear.weight.mul_(2.0)
            assert_same(stack.forward(x), (linear.weight.T + linear.bias).detach(), level)
            linear.weight.data = torch.randn(2, 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_and_infinity_reach_what_they_would(each_level: Levels, precision: Precision) -> None:
    layers = [
        LayerSpec(torch.ones(5, 3), torch.zeros(5), 4, True),
        LayerSpec(torch.ones(2, 5), torch.zeros(2)),
    ]
    x = torch.ones(4, 3)
    x[1, 0] = math.nan
    x[2, 1] = math.inf
    x[3, 2] = -math.inf
    for level in each_level():
        stack = DenseStack(layers, precision)
        y = stack.forward(x)
        assert y.tolist()[0] == [15.0, 15.0], level
        assert y[1].isnan().all(), level
        assert y.tolist()[2:] == [[math.inf] * 2, [0.0] * 2], level
        grad_x = stack.backward(torch.ones(4, 2))
        assert grad_x is not None
        assert grad_x.tolist()[3] == [0.0] * 3, level
        _, saved = mlp_forward_reference(x, layers, used_by(stack))
        _, parameters = mlp_backward_reference(torch.ones(4, 2), layers, saved)
        for mine, theirs in zip(stack.gradients, parameters, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)
        bad = DenseStack([LayerSpec(torch.tensor([[1.0, math.nan], [1.0, 2.0]]), torch.ones(2), 4)])
        y = bad.forward(torch.ones(1, 2))
        assert y[0, 0].isnan()
        assert y[0, 1] == pytest.approx(4.0, abs=0.2)


def test_numbers_beyond_bfloat16_become_infinite_and_denormals_vanish(each_level: Levels) -> None:
    layers = [LayerSpec(torch.ones(1, 2), torch.zeros(1))]
    for _ in each_level():
        stack = DenseStack(layers, "bf16")
        y = stack.forward(torch.tensor([[3.4e38, 0.0], [1e-40, 0.0], [1e-37, 0.0]]))[:, 0]
        if used_by(stack) == "bf16":
            assert y.tolist()[:2] == [math.inf, 0.0]
            assert y[2] == pytest.approx(1e-37, rel=2**-8)
        else:
            assert torch.equal(y, torch.tensor([3.4e38, 1e-40, 1e-37]))


def test_what_does_not_fit_is_refused() -> None:
    weight, bias = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="at least one layer"):
        DenseStack([])
    with pytest.raises(ValueError, match="precision='fp16': must be"):
        DenseStack([LayerSpec(weight, bias)], "fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 0: bits=3"):
        DenseStack([LayerSpec(weight, bias, 3)])
    for bits, activation_bits in ((32, 8), (4, 4)):
        with pytest.raises(ValueError, match=f"layer 0: activation_bits={activation_bits}: must"):
            DenseStack([LayerSpec(weight, bias, bits, False, activation_bits)])
    with pytest.raises(ValueError, match="precision='int8' rounds inputs its own way"):
        DenseStack([LayerSpec(weight, bias, 4, False, 8)], "int8")
    with pytest.raises(ValueError, match=r"layer 0: weight is torch\.float64 on cpu"):
        DenseStack([LayerSpec(weight.double(), bias)])
    with pytest.raises(ValueError, match=r"layer 0: weight has shape \(3, 2\), must be contiguous"):
        DenseStack([LayerSpec(weight.T, bias)])
    with pytest.raises(ValueError, match="layer 0: 3 biases for 2 outputs"):
        DenseStack([LayerSpec(weight, torch.ones(3))])
    with pytest.raises(ValueError, match="layer 1 takes 3 inputs, the one before gives 2"):
        DenseStack([LayerSpec(weight, bias), LayerSpec(weight, bias)])
    stack = DenseStack([LayerSpec(weight, bias)])
    with pytest.raises(RuntimeError, match="needs a forward"):
        stack.backward(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"x is torch\.float32 of shape \(4, 2\), must be .*4, 3"):
        stack.forward(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        stack.forward(torch.ones(4, 3).double())
    with pytest.raises(ValueError, match="x: the columns of a row must lie side by side"):
        stack.forward(torch.ones(3, 4).T)
    with pytest.raises(ValueError, match=r"out is .* must be float32 \[4, 2\]"):
        stack.forward(torch.ones(4, 3), out=torch.ones(4, 3))
    stack.forward(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"grad_y is .* must be float32 \[4, 2\]"):
        stack.backward(torch.ones(3, 2))
    stack.forward(torch.ones(4, 3), training=False)
    with pytest.raises(RuntimeError, match="needs a forward"):
        stack.backward(torch.ones(4, 2))


@pytest.mark.parametrize(
    ("precision", "amx"),
    [("fp32", False), ("bf16", False), ("bf16", True)],
    ids=["no-build-fp32", "no-build-bf16", "amx"],
)
def test_torch_stands_in_where_it_is_faster_or_all_there_is(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, amx: bool
) -> None:
    class Amx:
        def has_amx(self) -> bool:
            return True

    monkeypatch.setattr(mlp_engine, "native", lambda: Amx() if amx else None)
    layers = exact_layers(7, [13, 20, 3], [True, True], 4)
    generator = torch.Generator().manual_seed(7)
    x, grad_y = integers(generator, 3, 9, 13), integers(generator, 2, 9, 3)
    stack = DenseStack(layers, precision)
    y, saved = mlp_forward_reference(x, layers, precision)
    grad_x, parameters = mlp_backward_reference(grad_y, layers, saved)
    # torch's products round to bfloat16 once more, which can change a ReLU's neighbourhood.
    limit = 0.02 if precision == "bf16" else 1e-6
    assert relative(stack.forward(x), y) < limit
    got = stack.backward(grad_y)
    assert got is not None
    assert relative(got, grad_x) < limit
    for mine, theirs in zip(stack.gradients, parameters, strict=True):
        assert relative(mine[0], theirs[0]) < limit
        assert relative(mine[1], theirs[1]) < limit
    assert stack.backward(grad_y, need_grad_input=False) is None
