"""Stochastic rounding: the hash it draws from, its bias, and values it must leave alone."""

import pytest
import torch

from dqrm.kernels.rounding import (
    random_bits_reference,
    round_to_bfloat16_reference,
    round_to_integer_reference,
    step_key,
)

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def mix64(z):
    """splitmix64 as published (Steele, Lea, Flood 2014), in plain integers."""
    z = (z + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def mix32(x):
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK32
    return x ^ (x >> 15)


def bits_by_hand(seed, step, row, element):
    key = mix64((mix64(seed) + step) & MASK64)
    row_key = mix32(mix32((row & MASK32) ^ (key & MASK32)) ^ (row >> 32) ^ (key >> 32))
    return mix32((row_key + 0x9E3779B9 * element) & MASK32)


def test_the_hash_is_the_documented_one():
    assert mix64(0) == 0xE220A8397B1DCDAF  # the published first output of splitmix64 from seed 0
    rows = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 + 5, 2**40])
    for seed, step in [(0, 0), (1, 7), (2**63 - 1, 10**9)]:
        bits = random_bits_reference(step_key(seed, step), rows, 3, 40)
        expected = [[bits_by_hand(seed, step, r, e) for e in range(3, 43)] for r in rows.tolist()]
        assert bits.tolist() == expected


def test_bits_of_a_row_do_not_depend_on_the_other_rows():
    key = step_key(3, 4)
    rows = torch.randperm(1000)
    together = random_bits_reference(key, rows, 0, 16)
    alone = random_bits_reference(key, rows[17:18], 0, 16)
    assert torch.equal(together[17:18], alone)
    assert torch.equal(random_bits_reference(key, rows, 8, 8), together[:, 8:])


def test_neighbours_are_uncorrelated():
    # A correlation of n independent pairs has standard deviation n ** -0.5; five of them is never.
    rows = torch.arange(1 << 16)
    uniform = random_bits_reference(step_key(0, 1), rows, 0, 17).double() / 2**32 - 0.5
    later = random_bits_reference(step_key(0, 2), rows, 0, 17).double() / 2**32 - 0.5
    bound = 5 * 2**-8
    for left, right in [
        (uniform[:, 1:], uniform[:, :-1]),
        (uniform[1:], uniform[:-1]),
        (uniform, later),
    ]:
        assert (12 * (left * right).mean(dim=0)).abs().max() < bound
    assert uniform.mean(dim=0).abs().max() < bound


def test_integers_stay_and_the_mean_of_others_is_right():
    n = 1 << 16
    bits = random_bits_reference(step_key(0, 1), torch.arange(n), 0, 6)
    whole = torch.tensor([-127.0, -1, 0, 1, 7, 127]).expand(n, 6)
    assert torch.equal(round_to_integer_reference(whole, bits), whole)
    parts = torch.tensor([-126.5, -0.75, 1e-3, 0.25, 6.9, 126.125]).expand(n, 6)
    rounded = round_to_integer_reference(parts, bits)
    assert ((rounded == parts.floor()) | (rounded == parts.floor() + 1)).all()
    # The variance of one rounding is at most 1/4: five standard deviations of the mean.
    assert (rounded.mean(dim=0) - parts[0]).abs().max() < 5 * 0.5 * n**-0.5


def test_values_of_bfloat16_stay_and_the_mean_of_others_is_right():
    n = 1 << 16
    bits = random_bits_reference(step_key(0, 1), torch.arange(n), 0, 4)
    whole = torch.tensor([1.0, -0.0, 3.0e38, 1e-40]).bfloat16().float().expand(n, 4)
    assert torch.equal(round_to_bfloat16_reference(whole, bits).float(), whole)
    parts = torch.tensor([1.001, -1.001, 0.1, -1e-40]).expand(n, 4)
    mean = round_to_bfloat16_reference(parts, bits).double().mean(dim=0)
    gap = parts[0].double().abs() * 2**-7
    assert ((mean - parts[0].double()).abs() < 5 * gap * 0.5 * n**-0.5 + 1e-42).all()


@pytest.mark.parametrize("bits", [0, 2**32 - 1], ids=["down", "up"])
def test_values_that_are_not_finite_stay(bits):
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), -float("nan")])
    payload = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    random = torch.full((4,), bits)
    rounded = round_to_bfloat16_reference(values, random)
    assert rounded[:2].tolist() == [float("inf"), -float("inf")]
    assert rounded[2:].isnan().all()
    assert round_to_bfloat16_reference(payload, random[:2]).isnan().all()
