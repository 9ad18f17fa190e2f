"""Integer layers: the same bits as the definition, and as a layer in training, at every level."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dqrm.compress.linear import QuantLinear
from dqrm.kernels import int8
from dqrm.kernels.int8 import CodeLayer, CodeStack, code_stack_reference
from dqrm.kernels.int8_reference import quantize_rows

Levels = Callable[[], Iterator[str]]

SHAPES = {
    "single": [1, 1],
    "bottom": [13, 512, 256, 64, 16],
    "top": [367, 512, 256, 1],
    "odd": [3, 33, 1, 17, 5],
    "beyond-fp32-sums": [1500, 70],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of torch's wait on each other where tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_layers(widths: list[int], largest: int = 127) -> list[CodeLayer]:
    return [
        CodeLayer(
            torch.randint(-largest, largest + 1, (n, k), dtype=torch.int8),
            torch.rand(n) / (largest * math.sqrt(k)),
            torch.randn(n) * 0.1,
            number < len(widths) - 2,
        )
        for number, (k, n) in enumerate(itertools.pairwise(widths))
    ]


def assert_bits(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert same.all(), f"{what}: {(~same).sum()} of {same.numel()} differ"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("largest", [7, 127])
def test_every_level_gives_the_bits_of_the_definition(
    each_level: Levels, shape: str, largest: int
) -> None:
    torch.manual_seed(0)
    layers = random_layers(SHAPES[shape], largest)
    for batch in (0, 1, 2, 7, 12, 13, 129):
        x = torch.randn(batch, SHAPES[shape][0]) * 3
        expected = code_stack_reference(x, layers)
        for level in each_level():
            assert_bits(CodeStack(layers).forward(x), expected, f"{level}, batch {batch}")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("autocast", [False, True])
def test_serving_gives_the_bits_of_training(each_level: Levels, bits: int, autocast: bool) -> None:
    torch.manual_seed(bits)
    modules = torch.nn.Sequential(
        QuantLinear(367, 96, bits, 8), torch.nn.ReLU(), QuantLinear(96, 1, bits, 8)
    )
    x = torch.randn(300, 367)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = modules(x).detach()
    layers = [
        CodeLayer(
            layer.codes().to(torch.int8),
            layer.scale()[:, 0].contiguous(),
            layer.bias.detach(),
            number == 0,
        )
        for number, layer in enumerate(m for m in modules if isinstance(m, QuantLinear))
    ]
    for level in each_level():
        assert_bits(CodeStack(layers).forward(x), expected, level)


def test_codes_at_half_way_and_at_the_ends(each_level: Levels) -> None:
    # One row whose scale is 1: halves round to even, the largest magnitudes are 127.
    row = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 1e-30, -0.0])
    codes, scale = quantize_rows(row[None])
    assert codes.tolist() == [[127, -127, 0, 2, 2, 0, -2, 126, 0, 0]]
    assert scale.item() == 1.0
    layers = [CodeLayer(torch.eye(10, dtype=torch.int8), torch.ones(10), torch.zeros(10))]
    for level in each_level():
        assert_bits(CodeStack(layers).forward(row[None]), codes, level)


def test_extreme_sums_do_not_overflow(each_level: Levels) -> None:
    for sign in (-1, 1):
        layers = [
            CodeLayer(
                torch.full((3, 1 << 17), sign * 127, dtype=torch.int8),
                torch.ones(3),
                torch.zeros(3),
            )
        ]
        x = torch.ones(2, 1 << 17)
        for level in each_level():
            got = CodeStack(layers).forward(x)
            assert_bits(got, code_stack_reference(x, layers), level)
            assert got[0, 0] == pytest.approx(sign * 127 * (1 << 17))


def test_rows_that_are_not_finite_zero_or_extreme(each_level: Levels) -> None:
    torch.manual_seed(1)
    layers = random_layers([5, 9, 2])
    x = torch.randn(9, 5)
    x[1, 0], x[2, 1], x[3, 4] = math.nan, math.inf, -math.inf
    x[4], x[5], x[6] = 0.0, 1e-40, 3e38
    x[7, 2] = 1e30
    expected = code_stack_reference(x, layers)
    assert expected[1:4].isnan().all()
    assert expected[[0, 4, 5, 6, 7, 8]].isfinite().all()
    for level in each_level():
        assert_bits(CodeStack(layers).forward(x), expected, level)


def test_strided_rows_threads_and_given_outputs(each_level: Levels) -> None:
    torch.manual_seed(2)
    layers = random_layers([13, 40, 16])
    x = torch.randn(700, 13)
    expected = code_stack_reference(x, layers)
    wide_x, wide_y = torch.full((700, 20), math.nan), torch.full((700, 3, 16), math.nan)
    wide_x[:, 2:15] = x
    for level in each_level():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            CodeStack(layers).forward(wide_x[:, 2:15], out=wide_y[:, 1])
            assert_bits(wide_y[:, 1], expected, level)
            assert wide_y[:, ::2].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    codes, ones = torch.ones(2, 3, dtype=torch.int8), torch.ones(2)
    with pytest.raises(ValueError, match="at least one layer"):
        CodeStack([])
    with pytest.raises(ValueError, match="layer 0: codes must be contiguous int8"):
        CodeStack([CodeLayer(codes.float(), ones, ones)])
    with pytest.raises(ValueError, match=r"layer 0: bias must be float32 \[2\]"):
        CodeStack([CodeLayer(codes, ones, torch.ones(3))])
    with pytest.raises(ValueError, match="layer 1 takes 3 inputs, the one before gives 2"):
        CodeStack([CodeLayer(codes, ones, ones), CodeLayer(codes, ones, ones)])
    with pytest.raises(ValueError, match=r"x is torch.float32 of shape \(4, 2\)"):
        CodeStack([CodeLayer(codes, ones, ones)]).forward(torch.ones(4, 2))


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "native", lambda: None)
    layers = random_layers([13, 20, 3])
    x = torch.randn(9, 13)
    assert_bits(CodeStack(layers).forward(x), code_stack_reference(x, layers), "reference")
