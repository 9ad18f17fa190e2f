"""One bit a value with error feedback: the oracle's bits at every level."""

import pytest
import torch

from dqrm.kernels.sign_codec import (
    pack_signs,
    pack_signs_reference,
    sign_blocks,
    unpack_signs,
    unpack_signs_reference,
)


def random(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def unaligned(count: int) -> torch.Tensor:
    """Bytes at an odd address, as a slice of a message is."""
    return torch.full((count + 8,), 201, dtype=torch.uint8)[3 : 3 + count]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("scale", ["rms", "l1"])
@pytest.mark.parametrize("block", [8, 64, 2048, None])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 2047, 2048, 2049, 5003])
def test_bits_scales_and_residuals_have_the_oracles_bits(each_level, count, block, scale):
    gradient, before = random(count), random(count, seed=1)
    bits, scales, lost = pack_signs_reference(gradient + before, block=block, scale=scale)
    for level in each_level():
        got_bits, got_scales = unaligned(-(-count // 8)), unaligned(4 * sign_blocks(count, block))
        residual = before.clone()
        found = pack_signs(gradient, residual, got_bits, got_scales, block=block, scale=scale)
        assert found is None, level
        assert torch.equal(got_bits, bits), level
        assert torch.equal(got_scales.clone().view(torch.float32), scales), level
        assert torch.equal(bits_of(residual), bits_of(lost)), level
        out = torch.full((count,), 7.0)
        unpack_signs(got_bits, got_scales, out, block=block, alpha=0.5)
        expected = unpack_signs_reference(bits, scales, count, block=block, alpha=0.5)
        assert torch.equal(out, expected), level
        unpack_signs(got_bits, got_scales, out, block=block, add=True, alpha=-0.5)
        assert not out.any(), level


@pytest.mark.parametrize("scale", ["rms", "l1"])
@pytest.mark.parametrize("block", [2048, 70_000, 131_072, None])
def test_long_blocks_and_any_number_of_threads_give_the_same_bits(each_level, block, scale):
    count = 200_003
    gradient, before = random(count), random(count, seed=1)
    bits, scales, lost = pack_signs_reference(gradient + before, block=block, scale=scale)
    threads_before = torch.get_num_threads()
    try:
        for level in each_level():
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                got_bits, got_scales = torch.empty_like(bits), torch.empty_like(scales)
                residual, out = before.clone(), gradient.clone()
                pack_signs(gradient, residual, got_bits, got_scales, block=block, scale=scale)
                assert torch.equal(got_bits, bits), level
                assert torch.equal(got_scales, scales), level
                assert torch.equal(residual, lost), level
                unpack_signs(got_bits, got_scales, out, block=block, add=True)
                decoded = unpack_signs_reference(bits, scales, count, block=block)
                assert torch.equal(out, gradient + decoded), level
    finally:
        torch.set_num_threads(threads_before)


def test_what_is_sent_and_what_is_lost_are_what_was_given(each_level):
    gradient, residual = random(4096), torch.zeros(4096)
    bits, scales = torch.empty(512, dtype=torch.uint8), torch.empty(2)
    for _ in each_level():
        residual.zero_()
        sent = torch.zeros(4096)
        for _ in range(50):
            pack_signs(gradient, residual, bits, scales)
            unpack_signs(bits, scales, sent, add=True)
        # Every step rounds the compensated value, the residual and the sum of what was sent once.
        bound = 50 * 2.0**-23 * (sent.abs().max() + residual.abs().max())
        assert ((sent + residual) - 50 * gradient).abs().max() <= bound
        assert residual.norm() < 20 * gradient.norm()


def test_zeros_of_both_signs_count_as_positive_and_denormals_keep_theirs(each_level):
    gradient = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38])
    for _ in each_level():
        bits, scales = torch.empty(1, dtype=torch.uint8), torch.empty(1)
        residual = torch.full((8,), -0.0)
        assert pack_signs(gradient, residual, bits, scales) is None
        assert bits.item() == 0b01010111
        assert scales.item() == pytest.approx(1.5e38, rel=1e-6)


def test_a_block_that_is_not_finite_decodes_to_nan_and_is_forgotten(each_level):
    for bad in (torch.nan, torch.inf, -torch.inf):
        for block in (64, None):
            gradient, before = random(200), random(200, seed=1)
            gradient[70] = bad
            bits, scales, lost = pack_signs_reference(gradient + before, block=block)
            for _ in each_level():
                got_bits, got_scales = torch.empty_like(bits), torch.empty_like(scales)
                residual = before.clone()
                found = pack_signs(gradient, residual, got_bits, got_scales, block=block)
                assert found == (1 if block else 0)
                assert torch.equal(got_bits, bits)
                assert torch.equal(residual, lost)
                out = torch.empty(200)
                unpack_signs(got_bits, got_scales, out, block=block)
                assert out.isnan().sum() == (64 if block else 200)
                assert residual.isfinite().all()


def test_infinite_long_blocks_are_forgotten_too(each_level):
    gradient = random(150_000)
    gradient[149_999] = torch.inf
    for _ in each_level():
        residual = torch.zeros(150_000)
        bits, scales = torch.empty(18_750, dtype=torch.uint8), torch.empty(2)
        assert pack_signs(gradient, residual, bits, scales, block=80_000) == 1
        assert scales.isnan().tolist() == [False, True]
        assert residual[:80_000].any()
        assert not residual[80_000:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient": torch.zeros(24).double()}, "gradient: must be contiguous float32"),
        ({"residual": torch.zeros(25)}, r"residual: must be \[24\], is \[25\]"),
        ({"bits": torch.zeros(4, dtype=torch.uint8)}, "bits: must have 3 bytes, has 4"),
        ({"bits": torch.zeros(3, dtype=torch.int8)}, "bits: must be contiguous uint8, is int8"),
        ({"scales": torch.zeros(2)}, "scales: must have 12 bytes, has 8"),
        ({"block": 12}, "block=12: must be a positive multiple of 8"),
        ({"block": 0}, "block=0: must be a positive multiple of 8"),
        ({"scale": "max"}, "scale=max: must be rms or l1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(each_level, arguments, message):
    valid = {
        "gradient": torch.zeros(24),
        "residual": torch.zeros(24),
        "bits": torch.zeros(3, dtype=torch.uint8),
        "scales": torch.zeros(3),
        "block": 8,
    }
    for _ in each_level():
        with pytest.raises(ValueError, match=message):
            pack_signs(**(valid | arguments))
