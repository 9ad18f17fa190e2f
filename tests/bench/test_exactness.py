"""Packed tables against the training forward, bit for bit, at every instruction set."""

import torch

from dqrm.bench import exactness
from dqrm.kernels.cpu import available_levels


def test_not_one_bit_differs(monkeypatch):
    monkeypatch.setattr(exactness, "ROWS", (5000, 40, 1))
    monkeypatch.setattr(exactness, "SAMPLES", 300)
    compared = exactness.compare_exactness(20_000, seed=1)
    assert {each.level for each in compared} == set(available_levels() or ("reference",))
    assert {each.bits for each in compared} == {2, 4, 8, 16}
    assert {(each.granularity, each.bags) for each in compared} == {
        (granularity, bags) for granularity in ("table", "row") for bags in ("one id", "many ids")
    }
    for level in {each.level for each in compared}:
        assert sum(each.look_ups for each in compared if each.level == level) >= 20_000
    assert sum(each.packed_different_bits + each.training_different_bits for each in compared) == 0


def test_a_difference_is_counted(monkeypatch):
    def spoiled(collection):
        packed = truthful(collection)
        packed.get_buffer("codes0")[7] ^= 1
        return packed

    truthful = exactness.packed_twin
    monkeypatch.setattr(exactness, "packed_twin", spoiled)
    monkeypatch.setattr(exactness, "ROWS", (10,))
    monkeypatch.setattr(exactness, "BITS", (4,))
    compared = exactness.compare_exactness(1000)
    assert all(each.packed_different_bits > 0 for each in compared)
    assert all(each.training_different_bits == 0 for each in compared)


def test_bits_are_counted_one_by_one():
    left = torch.tensor([[1.0, -0.0, 2.0]])
    assert exactness.different_bits(left, left) == 0
    assert exactness.different_bits(left, torch.tensor([[1.0, 0.0, 2.0]])) == 1
    assert exactness.different_bits(left, -left) == 3
