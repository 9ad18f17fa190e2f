"""The account of a compressed model against the file it is packed into, byte by byte."""

import types

import pytest
import torch
from torch import nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.lower.folder import tensor_bytes, write_lowered
from dqrm.compress.recon.gptq import gptq
from dqrm.compress.recon.targets import Target, put
from dqrm.compress.report import account, weight_cost
from dqrm.compress.transforms.activations import QuantizeActivations
from dqrm.compress.transforms.base import Compression
from dqrm.compress.transforms.sparsify import OneShot
from dqrm.compress.transforms.weights import QuantizeWeights

LAYERS = ["layer.*"]
PATTERNS = [None, NM(2, 4), NM(1, 4), NM(3, 8)]


class Model(nn.Module):
    """A table and two layers; the second's inputs are no multiple of anything."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 24)
        self.layer0 = nn.Linear(24, 40)
        self.layer1 = nn.Linear(41, 7)
        self.head = nn.Linear(7, 2)
        self.config = types.SimpleNamespace(save_pretrained=lambda folder: None)


def compressed(*transforms):
    model = Model()
    compression = Compression(transforms)
    compression.attach(model, 10)
    compression.freeze()
    return model


@pytest.mark.parametrize(
    ("bits", "pattern"),
    [
        *((bits, pattern) for bits in (1, 2, 3, 4, 8) for pattern in PATTERNS),
        *((None, pattern) for pattern in PATTERNS[1:]),
        *(((bits, "asymmetric"), pattern) for bits in (2, 4, 8, 12) for pattern in PATTERNS[:2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("granularity", [Granularity("row"), Granularity("k_groups", 16)], ids=str)
def test_the_account_is_the_file_that_is_not_deflated(bits, pattern, granularity, tmp_path):
    transforms = [] if pattern is None else [OneShot(LAYERS, pattern)]
    bits, grid = bits if isinstance(bits, tuple) else (bits, None)
    if bits is not None:
        transforms.append(QuantizeWeights([*LAYERS, "table"], bits, granularity, grid))
    model = compressed(*transforms)
    write_lowered(model, tmp_path / "plain", shrink=False)
    write_lowered(model, tmp_path / "small", shrink=True)
    found, on_disk = account(model), tensor_bytes(tmp_path / "plain")
    for name, cost in found.weights.items():
        parts = {part: on_disk.get(f"{name}.weight_{part}", 0) for part in ("codes", "places")}
        assert (cost.code_bytes, cost.place_bytes) == (parts["codes"], parts["places"]), name
    assert found.stored_bytes == sum(on_disk.values())
    assert sum(tensor_bytes(tmp_path / "small").values()) <= found.stored_bytes
    assert found.fp32_bytes == 4 * sum(p.numel() for p in Model().parameters())


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
@pytest.mark.parametrize("full_range", [False, True], ids=["restricted", "full"])
def test_two_symmetric_bits_may_say_more_than_trits(pattern, full_range, tmp_path):
    sparse = [] if pattern is None else [OneShot(LAYERS, pattern)]
    grid = QuantizeWeights(LAYERS, 2, grid="symmetric", full_range=full_range)
    model = compressed(*sparse, grid)
    write_lowered(model, tmp_path, shrink=False)
    assert account(model).stored_bytes == sum(tensor_bytes(tmp_path).values())
    for name, cost in account(model).weights.items():
        shape = model.get_submodule(name).weight.shape
        known = weight_cost(shape, "symmetric", 2, grid.granularity, pattern, full_range=full_range)
        assert cost == known, name


def test_gptq_may_go_beyond_the_scale_it_began_with(tmp_path):
    model = Model()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 8, generator=generator) @ torch.randn(8, 24, generator=generator)
    row = Granularity("row")
    weight = model.layer0.weight.detach()
    rounded, scale = gptq(weight, (inputs.T @ inputs).double(), 2, row)
    assert float((rounded / scale).min()) == -2.0
    put(model.layer0, rounded, scale, Target(2, row, "symmetric"))
    write_lowered(model, tmp_path, shrink=False)
    assert account(model).stored_bytes == sum(tensor_bytes(tmp_path).values())


def test_by_hand():
    # 4 bits and 2:4 of 8 x 16: 64 codes of 4 bits, 64 places of 2, a scale a row.
    cost = weight_cost((8, 16), "symmetric", 4, Granularity("row"), NM(2, 4))
    assert (cost.code_bytes, cost.place_bytes, cost.scale_bytes) == (32, 16, 32)
    assert (cost.fp32_bytes, cost.macs, cost.kept_macs) == (512, 128, 64)
    # 10 inputs: two full groups, and one of two of which both stay.
    assert weight_cost((1, 10), "fp32", 32, Granularity("row"), NM(2, 4)).kept_macs == 6
    # Sparse ternary: places would take more than the zeros do.
    dense = weight_cost((8, 16), "ternary", 2, Granularity("tensor"))
    assert weight_cost((8, 16), "ternary", 2, Granularity("tensor"), NM(2, 4)).place_bytes == 0
    assert dense.code_bytes == 26
    assert dense.scale_bytes == 4


def test_bert_base_is_fifty_times_smaller_as_published():
    """5 layers of 1 bit of 12 in FP32, embeddings as well (arXiv 2206.01859, abstract)."""
    hidden, inner, words = 768, 3072, 30522 + 512 + 2
    row = Granularity("row")

    def layer(grid, bits):
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]
        costs = [weight_cost(shape, grid, bits, row) for shape in shapes]
        rest = 4 * (9 * hidden + inner + 4 * hidden)
        return sum(cost.stored_bytes for cost in costs) + rest

    plain = 12 * layer("fp32", 32) + 4 * words * hidden
    table = weight_cost((words, hidden), "binary", 1, row, multiplies=False)
    assert table.macs == 0
    small = 5 * layer("binary", 1) + table.stored_bytes
    assert 45 <= plain / small <= 55


def test_the_layers_alone_are_those_in_numbered_lists():
    model = compressed(QuantizeWeights(["layer0", "table"], 4), QuantizeActivations(["layer0"]))
    deeper = nn.ModuleDict({"layers": nn.ModuleList([model.layer0, model.layer1])})
    part = account(nn.ModuleDict({"encoder": deeper, "table": model.table}), layers_only=True)
    assert list(part.weights) == ["encoder.layers.0"]
    assert part.rest_bytes == 4 * (40 + 41 * 7 + 7)
    assert part.rest_macs == 41 * 7
    whole = account(model)
    assert whole.rest_macs == 41 * 7 + 7 * 2
    metrics = whole.metrics()
    assert metrics["size/packed_bytes"] == whole.stored_bytes
    parts = ["code", "place", "scale", "rest"]
    assert sum(metrics[f"size/{part}_bytes"] for part in parts) == whole.stored_bytes
