"""The symmetric grid against hand-computed values and hostile weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqrm.compress import grids


def test_int4_codes_and_values_by_hand():
    weight = torch.tensor([0.7, -0.7, 0.34, 0.05, -0.05, 0.0])
    scale = grids.scale_of(weight.abs().max(), 7)
    assert scale.item() == pytest.approx(0.1)
    codes = grids.quantize(weight, torch.tensor(0.1), 7)
    # 0.05 / 0.1 rounds half to even: in float32 0.05 / 0.1 is exactly 0.5, hence 0.
    assert codes.tolist() == [7, -7, 3, 0, 0, 0]
    assert grids.dequantize(codes, torch.tensor(0.1)).tolist() == pytest.approx(
        [0.7, -0.7, 0.3, 0.0, 0.0, 0.0]
    )


def test_rounding_is_half_to_even():
    codes = grids.quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0), 7)
    assert codes.tolist() == [0, 2, 2, 0, -2]


def test_stale_scale_clamps_to_the_asymmetric_range():
    codes = grids.quantize(torch.tensor([20.0, -20.0]), torch.tensor(1.0), 7)
    assert codes.tolist() == [7, -8]


def test_zero_is_never_negative():
    codes = grids.quantize(torch.tensor([-0.01, -0.0]), torch.tensor(1.0), 7)
    assert [math.copysign(1, code) for code in codes.tolist()] == [1, 1]


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (8, 127), (16, 32767)])
def test_largest_code(bits, largest):
    assert grids.largest_code(bits) == largest


def test_unknown_bits_are_refused():
    with pytest.raises(ValueError, match="bits=17: must be from 2 to 16"):
        grids.largest_code(17)


@pytest.mark.parametrize(
    "value", [0.0, 1e-45, 1e-38, 1e30], ids=["zero", "denormal", "tiny", "huge"]
)
def test_extreme_weights_stay_finite(value):
    weight = torch.tensor([value, -value])
    scale = grids.scale_of(weight.abs().max(), 7)
    hat = grids.dequantize(grids.quantize(weight, scale, 7), scale)
    assert torch.isfinite(hat).all()
    assert (hat - weight).abs().max() <= scale / 2 * (1 + 1e-6)


def test_nan_is_propagated():
    codes = grids.quantize(torch.tensor([math.nan, 1.0]), torch.tensor(1.0), 7)
    assert math.isnan(codes[0])
    assert codes[1] == 1


def test_error_is_at_most_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(1000, 16)
    for bits in (2, 4, 8, 16):
        scale = grids.scale_of(weight.abs().max(), grids.largest_code(bits))
        hat = grids.fake_quantize(weight, scale, bits)
        # Division and product each round once: relative 2**-24 of values up to n * scale.
        assert (hat - weight).abs().max() <= scale * (0.5 + 2**-22 * grids.largest_code(bits))


def test_gradient_passes_straight_through():
    weight = torch.tensor([0.3, -5.0, 0.0], requires_grad=True)
    hat = grids.fake_quantize(weight, torch.tensor(0.1), 4)
    hat.backward(torch.tensor([1.0, 2.0, -3.0]))
    assert weight.grad.tolist() == [1.0, 2.0, -3.0]


def test_inside_grid_marks_what_is_not_clamped():
    weight = torch.tensor([7.4, 7.6, -8.4, -8.6, 0.0])
    inside = grids.inside_grid(weight, torch.tensor(1.0), 7)
    assert inside.tolist() == [True, False, True, False, True]


def test_int4_layout_keeps_the_first_half_in_low_nibbles():
    codes = torch.tensor([[1.0, -1.0, 7.0, -8.0]])
    packed = grids.pack(codes, 4)
    # Element 0 (1) with element 2 (7), element 1 (-1 = 0xF) with element 3 (-8 = 0x8).
    assert packed.tolist() == [[0x71, 0x8F]]


def test_int2_layout_keeps_quarters():
    packed = grids.pack(torch.tensor([[1.0, -1.0, 0.0, -2.0]]), 2)
    # One byte, lowest bits first: 1 = 01, -1 = 11, 0 = 00, -2 = 10.
    assert packed.tolist() == [[0b10_00_11_01]]


@given(
    bits=st.sampled_from([2, 4, 8, 16]),
    rows=st.integers(0, 5),
    dim=st.integers(1, 19),
    seed=st.integers(0, 2**31),
)
def test_unpack_inverts_pack(bits, rows, dim, seed):
    largest = grids.largest_code(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-largest - 1, largest + 1, (rows, dim), generator=generator).float()
    packed = grids.pack(codes, bits)
    assert torch.equal(grids.unpack(packed, bits, dim), codes)
    assert packed.nbytes == rows * grids.packed_row_bytes(dim, bits)
