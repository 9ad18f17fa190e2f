"""Packed weights: what comes back is what went in, in as many bytes as the grid asks for."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM, project
from dqrm.compress.grids.record import WeightRecord, codes, dequantize, fit_record
from dqrm.compress.lower.codes import code_bytes, decode, deflate, encode, inflate
from dqrm.compress.lower.packing import Layout, PackedWeight, pack_weight, unpack_weight

GRIDS = [("symmetric", bits) for bits in (2, 3, 4, 5, 8, 11, 16)] + [("ternary", 2), ("binary", 1)]
GRIDS += [("asymmetric", bits) for bits in (2, 3, 4, 8, 11, 16)]


def compressed(shape, grid, bits, granularity, mask=None, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    kept = None
    if mask is not None:
        kept = mask.mask(weight)
        weight = project(weight, mask)
    if grid == "fp32":
        return weight, WeightRecord(grid, bits, granularity, torch.empty(0), mask)
    found, record = fit_record(weight, grid, bits, granularity, kept)
    record = replace(record, mask=mask, activation_bits=8)
    return dequantize(found, record), record


def through_json(packed):
    described = json.loads(json.dumps(packed.layout.to_json()))
    return PackedWeight(Layout.from_json(described), packed.tensors)


@pytest.mark.parametrize(("grid", "bits"), [*GRIDS, ("fp32", 32)])
@pytest.mark.parametrize("mask", [None, NM(2, 4), NM(1, 2), NM(3, 5)])
def test_a_weight_comes_back_bit_for_bit(grid, bits, mask):
    granularities = [Granularity("tensor"), Granularity("row"), Granularity("k_groups", 4)]
    granularities.append(Granularity("row_groups", 2))
    for shape, granularity, shrink in itertools.product(
        [(16, 24), (2, 13), (4, 1)], granularities, [False, True]
    ):
        weight, record = compressed(shape, grid, bits, granularity, mask)
        packed = through_json(pack_weight(codes(weight, record), record, shrink=shrink))
        found, read = unpack_weight(packed)
        assert torch.equal(dequantize(found, read), weight)
        assert torch.equal(read.scale, record.scale)
        assert (read.zero is None) == (record.zero is None)
        assert read.zero is None or torch.equal(read.zero, record.zero)
        assert (read.grid, read.bits, read.granularity) == (grid, bits, granularity)
        assert (read.mask, read.activation_bits) == (mask, record.activation_bits)


@pytest.mark.parametrize(
    ("grid", "bits", "mask", "wanted"),
    [
        ("symmetric", 8, None, 40 * 64),
        ("symmetric", 4, None, 40 * 64 // 2),
        ("symmetric", 3, None, 40 * 64 * 3 // 8),
        ("ternary", 2, None, 40 * 64 // 5),
        ("symmetric", 2, None, 40 * 64 // 5),
        ("binary", 1, None, 40 * 64 // 8),
        # Two bits hold -2 here, and a byte says which code is zero.
        ("asymmetric", 2, None, 40 * 64 // 4 + 1),
        ("asymmetric", 8, None, 40 * 64 + 1),
        # Half the codes, and two bits for the place of each.
        ("symmetric", 8, NM(2, 4), 40 * 32 + 40 * 32 // 4),
        ("binary", 1, NM(2, 4), 40 * 32 // 8 + 40 * 32 // 4),
        # The places would take more than zeros do.
        ("ternary", 2, NM(2, 4), 40 * 64 // 5),
        ("fp32", 32, NM(2, 4), 4 * 40 * 32 + 40 * 32 // 4),
    ],
)
def test_bytes_are_those_of_the_grid(grid, bits, mask, wanted):
    weight, record = compressed((40, 64), grid, bits, Granularity("tensor"), mask)
    packed = pack_weight(codes(weight, record), record, shrink=False)
    assert packed.nbytes == wanted + (4 if grid != "fp32" else 0)
    assert pack_weight(codes(weight, record), record).nbytes <= packed.nbytes


def test_uneven_codes_get_smaller_and_even_ones_stay_as_they_are():
    weight, record = compressed((256, 256), "symmetric", 8, Granularity("row"))
    plain = pack_weight(codes(weight, record), record, shrink=False)
    small = pack_weight(codes(weight, record), record)
    assert small.tensors["codes"].nbytes < 0.97 * plain.tensors["codes"].nbytes
    noise = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    assert deflate(noise) is noise


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_deflated_codes_come_near_their_entropy(bits):
    weight, record = compressed((256, 256), "symmetric", bits, Granularity("row"))
    found = codes(weight, record)
    share = torch.unique(found, return_counts=True)[1].double() / found.numel()
    entropy = -(share * share.log2()).sum() * found.numel() / 8
    packed = pack_weight(found, record)
    assert packed.tensors["codes"].nbytes < 1.04 * entropy
    assert torch.equal(unpack_weight(through_json(packed))[0], found)


def test_scales_are_halved_only_where_that_is_exact():
    weight, record = compressed((4, 8), "symmetric", 8, Granularity("row"))
    packed = pack_weight(codes(weight, record), record)
    assert packed.tensors["scale"].dtype == torch.float32
    exact = WeightRecord("symmetric", 8, Granularity("row"), torch.full((4, 1), 0.125))
    packed = pack_weight(codes(weight, record), exact)
    assert packed.tensors["scale"].dtype == torch.float16
    assert torch.equal(unpack_weight(packed)[1].scale, exact.scale)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 7, 8, 9, 1000])
def test_every_code_of_every_width(count):
    for bits in range(2, 17):
        codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (count,)).float()
        data = encode(codes, "bits", bits)
        assert data.dtype == torch.uint8
        assert len(data) == code_bytes(count, "bits", bits)
        assert torch.equal(decode(data, count, "bits", bits), codes), bits
        if bits <= 8:
            cells = encode(codes, "cells", bits)
            assert len(cells) == code_bytes(count, "cells", bits)
            assert torch.equal(decode(cells, count, "cells", bits), codes), bits
    trits = torch.randint(-1, 2, (count,)).float()
    assert torch.equal(decode(encode(trits, "trits", 2), count, "trits", 2), trits)
    signs = torch.randint(0, 2, (count,)).float() * 2 - 1
    assert torch.equal(decode(encode(signs, "signs", 1), count, "signs", 1), signs)


def test_what_does_not_fit_is_refused():
    row = Granularity("row")
    record = WeightRecord("symmetric", 4, row, torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"1 of 3 codes are not in -8..7"):
        pack_weight(torch.tensor([[1.0, 8.0, -8.0]]), record)
    with pytest.raises(ValueError, match="1 of 2 codes"):
        pack_weight(torch.tensor([[float("nan"), 0.0]]), record)
    masked = WeightRecord("symmetric", 4, row, torch.ones(1, 1), NM(1, 4))
    with pytest.raises(ValueError, match="a group has 2 weights, 1:4 keeps 1"):
        pack_weight(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), masked)


def test_damaged_tensors_are_refused():
    weight, record = compressed((8, 16), "symmetric", 8, Granularity("row"), NM(2, 4))
    packed = pack_weight(codes(weight, record), record, shrink=False)

    def changed(**tensors):
        return PackedWeight(packed.layout, packed.tensors | tensors)

    with pytest.raises(ValueError, match="codes are uint8"):
        unpack_weight(changed(codes=packed.tensors["codes"].to(torch.int8)))
    with pytest.raises(ValueError, match="cannot be inflated"):
        unpack_weight(changed(codes=packed.tensors["codes"][1:]))
    with pytest.raises(ValueError, match="without its places"):
        unpack_weight(PackedWeight(packed.layout, {"codes": packed.tensors["codes"]}))
    with pytest.raises(ValueError, match=r"scales of shape \[7, 1\], wanted \[8, 1\]"):
        unpack_weight(changed(scale=packed.tensors["scale"][1:]))
    with pytest.raises(ValueError, match="bytes inflate to 5,000, wanted 4"):
        inflate(deflate(torch.zeros(5000, dtype=torch.uint8)), 4)
    with pytest.raises(ValueError, match="a byte above 242"):
        decode(torch.tensor([243], dtype=torch.uint8), 5, "trits", 2)
    with pytest.raises(ValueError, match="no code of 3 bits"):
        decode(torch.tensor([0x04], dtype=torch.uint8), 2, "cells", 3)
    with pytest.raises(ValueError, match="coding 'runs': must be signs, trits, bits, cells"):
        replace(packed.layout, coding="runs")
    with pytest.raises(ValueError, match="no layout"):
        Layout.from_json({"shape": [1, 2]})
