"""Without the compiled module the exchange primitives do the same, bit for bit."""

from collections.abc import Callable

import pytest
import torch

from dqrm.kernels import cpu
from dqrm.kernels.block_codecs import dequantize_blocks, quantize_blocks
from dqrm.kernels.merge_rows import merge_rows
from dqrm.kernels.row_codecs import add_dequantized_rows, dequantize_rows, quantize_rows
from dqrm.kernels.sign_codec import pack_signs, unpack_signs

Results = list[torch.Tensor | int | None]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows() -> Results:
    values, residual = random(9, 7), random(9, 7, seed=1)
    values[4, 3] = torch.nan
    codes, scales = torch.zeros(9 * 4, dtype=torch.uint8), torch.zeros(18, dtype=torch.uint8)
    found = quantize_rows(
        values, codes, scales, bits=4, residual=residual, carried=True, key=7,
        numbers=torch.arange(9) * 3,
    )  # fmt: skip
    out, sums = torch.zeros(9, 7), random(20, 7, seed=2)
    dequantize_rows(codes, scales, out, bits=4)
    add_dequantized_rows(codes, scales, torch.tensor([9, 8, 8, 0, 1, 2, 19, 3, 4]), sums, bits=4)
    return [found, codes, scales, residual, out, sums]


def blocks() -> Results:
    values, residual = random(10, 10), torch.zeros(10, 10)
    values[9, 9] = torch.inf
    codes, scales = torch.zeros(100, dtype=torch.int8), torch.zeros(4)
    found = quantize_blocks(values, codes, scales, block=32, residual=residual, key=9)
    out = torch.ones(100)
    dequantize_blocks(codes, scales, out, block=32, add=True, alpha=0.5)
    return [found, codes, scales, residual, out]


def signs() -> Results:
    gradient, residual = random(7, 11), random(7, 11, seed=1)
    gradient[3] = torch.inf
    bits, scales = torch.zeros(10, dtype=torch.uint8), torch.zeros(20, dtype=torch.uint8)
    found = pack_signs(gradient, residual, bits, scales, block=16, scale="l1")
    out, added = torch.zeros(7, 11), random(7, 11, seed=2)
    unpack_signs(bits, scales, out, block=16, alpha=0.25)
    unpack_signs(bits, scales, added, block=16, add=True)
    return [found, bits, scales, residual, out, added]


def merged() -> Results:
    return list(merge_rows(torch.tensor([5, 2, 5, 2**40, 0]), random(5, 3)))


def outside() -> Results:
    codes, scales = torch.zeros(4, dtype=torch.uint8), torch.zeros(2)
    with pytest.raises(IndexError, match="rows: 3 at position 1 is outside the 3 rows of out"):
        add_dequantized_rows(
            codes, scales, torch.tensor([0, 3]), torch.zeros(3, 2), scale_dtype=torch.float32
        )
    with pytest.raises(ValueError, match="rows: -2 "):
        merge_rows(torch.tensor([1, -2]), torch.zeros(2, 2))
    return []


@pytest.mark.parametrize("run", [rows, blocks, signs, merged, outside])
def test_the_plain_path_gives_the_same_bits(
    each_level, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Results]
) -> None:
    with monkeypatch.context() as context:
        context.setattr(cpu, "native", lambda: None)
        expected = run()
    for level in each_level():
        for got, plain in zip(run(), expected, strict=True):
            if isinstance(got, torch.Tensor):
                same = torch.equal(got.view(torch.uint8), plain.view(torch.uint8))
                # All NaN are one here: their sign and payload are the processor's.
                assert same or torch.equal(got.nan_to_num(9e9), plain.nan_to_num(9e9)), level
            else:
                assert got == plain, level
