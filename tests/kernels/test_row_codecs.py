"""Codes of rows and blocks: the oracle's bits at every level, and what they promise."""

import pytest
import torch

from dqrm.kernels.block_codecs import block_code_bytes, dequantize_blocks, quantize_blocks
from dqrm.kernels.rounding import random_bits_reference, step_key
from dqrm.kernels.row_codecs import (
    add_dequantized_rows,
    code_bytes,
    dequantize_rows,
    quantize_rows,
)
from dqrm.kernels.row_codecs_reference import dequantize_rows_reference, quantize_rows_reference

DTYPES = [torch.float32, torch.bfloat16]
DIMS = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 256]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hostile(dim: int) -> torch.Tensor:
    """Rows of ordinary, huge, tiny, denormal and equal values, ties, zeros of both signs."""
    rows = random(12, dim)
    rows[1] = rows[1] / rows[1].abs().max() * 1e38
    rows[2] *= 1e-30
    rows[3] = rows[3] / rows[3].abs().max() * 1e-37
    rows[4] *= 1e-41
    rows[5] = 0.0
    rows[6] = -0.0
    rows[7] = 127.0
    rows[8] = torch.arange(dim) % 255 / 2.0 - 63.5
    rows[8, 0] = -127.0
    rows[9, :-1] = 0.0
    rows[10] = rows[10].sign() * 3.4028235e38
    return rows


def unaligned(count: int) -> torch.Tensor:
    """Bytes at an odd address, as a slice of a message is."""
    return torch.full((count + 8,), 201, dtype=torch.uint8)[3 : 3 + count]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_codes_scales_residuals_and_values_have_the_oracles_bits(
    each_level, dim, bits, scale_dtype
):
    values, before = hostile(dim), random(12, dim, seed=1) * 1e-3
    key, numbers = step_key(3, 4), torch.arange(12) * 2**33 + 5
    for carried in (False, True):
        compensated = values + before if carried else values
        for chosen in (None, numbers):
            random_bits = None if chosen is None else random_bits_reference(key, chosen, 0, dim)
            codes, scales, lost = quantize_rows_reference(
                compensated, bits=bits, scale_dtype=scale_dtype, random=random_bits
            )
            expected = dequantize_rows_reference(codes, scales, dim, bits=bits)
            for level in each_level():
                got_codes = unaligned(codes.numel())
                got_scales = unaligned(12 * scale_dtype.itemsize)
                residual, out = before.clone(), torch.empty(12, dim)
                found = quantize_rows(
                    values,
                    got_codes,
                    got_scales,
                    bits=bits,
                    scale_dtype=scale_dtype,
                    residual=residual,
                    carried=carried,
                    key=None if chosen is None else key,
                    numbers=chosen,
                )
                assert found is None, level
                assert torch.equal(got_codes, codes.view(-1)), level
                assert torch.equal(got_scales, bits_of(scales)), level
                assert torch.equal(bits_of(residual), bits_of(lost)), level
                dequantize_rows(got_codes, got_scales, out, bits=bits, scale_dtype=scale_dtype)
                assert torch.equal(bits_of(out + 0.0), bits_of(expected + 0.0)), level


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_what_is_lost_is_at_most_half_a_step_and_nothing_is_clipped(
    each_level, bits, largest, scale_dtype
):
    values = random(200, 24)
    max_abs = values.abs().amax(dim=1, keepdim=True)
    # Rounding a scale up to bfloat16 widens the step by at most 2**-7.
    step = max_abs / largest * (1 + 2.0**-7 if scale_dtype == torch.bfloat16 else 1)
    for _ in each_level():
        codes = torch.empty(200, code_bytes(24, bits), dtype=torch.uint8)
        scales = torch.empty(200, dtype=scale_dtype)
        residual = torch.empty_like(values)
        quantize_rows(values, codes, scales, bits=bits, scale_dtype=scale_dtype, residual=residual)
        # Three roundings of float32 come on top: of 1 / s, of v / s and of s * q.
        assert (residual.abs() <= step * (0.5 + largest * 3 * 2.0**-24)).all()


def test_stochastic_rounding_is_right_on_average_and_depends_on_the_row_number(each_level):
    values = torch.full((20_000, 4), 0.3)
    values[:, 0] = 1.0
    exact = 0.3 * 127
    for _ in each_level():
        results = []
        for first in (0, 20_000):
            codes = torch.empty(20_000, 4, dtype=torch.int8)
            scales = torch.empty(20_000)
            quantize_rows(
                values,
                codes,
                scales,
                scale_dtype=torch.float32,
                key=step_key(1, 2),
                numbers=torch.arange(first, first + 20_000),
            )
            assert set(codes[:, 1:].unique().tolist()) == {38, 39}
            # Standard error of 60,000 draws between two neighbours; five of them.
            spread = 5 * (0.1 * 0.9 / 60_000) ** 0.5
            assert abs(codes[:, 1:].float().mean().item() - exact) < spread
            results.append(codes)
        assert not torch.equal(*results)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_are_not_finite_decode_to_nan_and_are_forgotten(each_level, bits):
    values = random(9, 20)
    values[2, 19], values[5, 0], values[6, 3] = torch.nan, torch.inf, -torch.inf
    expected = quantize_rows_reference(values, bits=bits)
    for _ in each_level():
        codes = torch.empty(9 * code_bytes(20, bits), dtype=torch.uint8)
        scales, residual = torch.empty(9, dtype=torch.bfloat16), torch.ones(9, 20)
        assert quantize_rows(values, codes, scales, bits=bits, residual=residual) == 2
        assert torch.equal(scales.isnan().nonzero().view(-1), torch.tensor([2, 5, 6]))
        assert torch.equal(codes, expected[0].view(-1))
        assert torch.equal(residual, expected[2])
        assert not residual[[2, 5, 6]].any()
        out = torch.empty(9, 20)
        dequantize_rows(codes, scales, out, bits=bits)
        assert out.isnan().sum() == 60


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "rows", [[0, 2, 3, 8], [5, 5, 1, 5], [7], []], ids=["ascending", "repeated", "one", "none"]
)
def test_decoded_rows_are_added_where_they_belong(each_level, rows, bits):
    values, start = random(len(rows), 11), random(10, 11, seed=1)
    codes, scales, _ = quantize_rows_reference(values.view(-1, 11), bits=bits)
    decoded = dequantize_rows_reference(codes, scales, 11, bits=bits, alpha=0.25)
    expected = start.clone()
    for row, value in zip(rows, decoded, strict=True):
        expected[row] += value
    for _ in each_level():
        out = start.clone()
        add_dequantized_rows(
            codes, scales, torch.tensor(rows, dtype=torch.int64), out, bits=bits, alpha=0.25
        )
        assert torch.equal(out, expected)


def test_a_row_outside_is_named_and_nothing_is_written(each_level):
    codes, scales, _ = quantize_rows_reference(random(3, 4))
    for _ in each_level():
        for row in (10, -1):
            out = torch.zeros(10, 4)
            with pytest.raises(
                IndexError, match=f"rows: {row} at position 2 is outside the 10 rows of out"
            ):
                add_dequantized_rows(codes, scales, torch.tensor([0, 1, row]), out)
            assert not out.any()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_residual_may_take_the_place_of_the_values(each_level, bits):
    values = random(30, 16)
    codes, scales, lost = quantize_rows_reference(values, bits=bits)
    for _ in each_level():
        own = values.clone()
        got = torch.empty_like(codes)
        quantize_rows(own, got, torch.empty_like(scales), bits=bits, residual=own)
        assert torch.equal(got, codes)
        assert torch.equal(own, lost)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [1, 8, 33, 256])
@pytest.mark.parametrize("count", [0, 1, 7, 255, 256, 257, 1000])
def test_blocks_are_rows_of_which_the_last_may_be_short(each_level, count, block, bits):
    values, before = random(count), random(count, seed=1) * 0.01
    whole = count // block * block
    key = step_key(7, 7)
    expected_codes, expected_scales, expected_lost = [], [], []
    numbers = torch.arange(100, 100 + -(-count // block))
    for begin, end, width in ((0, whole, block), (whole, count, count - whole)):
        if begin < end:
            part = (values + before)[begin:end].view(-1, width)
            random_bits = random_bits_reference(
                key, numbers[begin // block :][: len(part)], 0, width
            )
            codes, scales, lost = quantize_rows_reference(
                part, bits=bits, scale_dtype=torch.float32, random=random_bits
            )
            expected_codes.append(codes.view(-1))
            expected_scales.append(scales)
            expected_lost.append(lost.view(-1))
    for _ in each_level():
        codes = unaligned(block_code_bytes(count, bits, block))
        scales, residual = torch.empty(len(numbers)), before.clone()
        found = quantize_blocks(
            values,
            codes,
            scales,
            bits=bits,
            block=block,
            residual=residual,
            carried=True,
            key=key,
            first_block=100,
        )
        assert found is None
        if count == 0:
            continue
        assert torch.equal(codes, torch.cat(expected_codes))
        assert torch.equal(scales, torch.cat(expected_scales))
        assert torch.equal(bits_of(residual), bits_of(torch.cat(expected_lost)))
        out = torch.full((count,), 7.0)
        dequantize_blocks(codes, scales, out, bits=bits, block=block)
        assert torch.equal((values + before) - out, residual)
        dequantize_blocks(codes, scales, out, bits=bits, block=block, add=True, alpha=-1.0)
        assert not out.any()


def test_results_do_not_depend_on_the_threads(each_level):
    values = random(30_000, 16)
    before = torch.get_num_threads()
    try:
        for _ in each_level():
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                codes = torch.empty(30_000, 16, dtype=torch.int8)
                scales, residual = torch.empty(30_000), torch.empty_like(values)
                quantize_rows(
                    values,
                    codes,
                    scales,
                    scale_dtype=torch.float32,
                    residual=residual,
                    key=step_key(0, 0),
                )
                out = torch.zeros_like(values)
                add_dequantized_rows(
                    codes, scales, torch.arange(30_000), out, scale_dtype=torch.float32
                )
                results.append((codes, scales, residual, out))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


VALID = {
    "values": torch.zeros(3, 4),
    "codes": torch.zeros(12, dtype=torch.uint8),
    "scales": torch.zeros(3, dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": torch.zeros(12)}, r"values: must be \[N, D\], is \[12\]"),
        ({"values": torch.zeros(3, 4).half()}, "values: must be contiguous float32"),
        ({"values": torch.zeros(4, 3).T}, "values: must be contiguous float32"),
        ({"values": torch.zeros(3, 0)}, "rows of 0 values cannot be encoded"),
        ({"codes": torch.zeros(11, dtype=torch.uint8)}, "codes: must have 12 bytes, has 11"),
        ({"codes": torch.zeros(12)}, "codes: must be contiguous uint8 or int8, is float32"),
        ({"scales": torch.zeros(3)}, "scales: must be contiguous uint8 or bfloat16, is float32"),
        ({"scales": torch.zeros(5, dtype=torch.uint8)}, "scales: must have 6 bytes, has 5"),
        ({"bits": 3}, "bits=3: must be 4 or 8"),
        ({"scale_dtype": torch.float16}, "scale_dtype=torch.float16: must be float32 or bfloat16"),
        ({"carried": True}, "carried=True: needs a residual"),
        ({"residual": torch.zeros(3, 5)}, r"residual: must be \[3, 4\], is \[3, 5\]"),
        ({"numbers": torch.zeros(2)}, r"numbers: must be int64 \[3\], is float32 \[2\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(each_level, arguments, message):
    for _ in each_level():
        with pytest.raises(ValueError, match=message):
            quantize_rows(**(VALID | arguments))
