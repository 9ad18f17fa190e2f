"""Records of compressed weights, on modules and on the disk, and settings of transforms."""

import json

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import WeightRecord, fit_record, set_weight_record, weight_record
from dqrm.compress.grids.records_file import (
    RECORDS_FILE,
    load_records,
    read_records,
    save_records,
)
from dqrm.compress.schedules import MoqBits
from dqrm.compress.transforms.activations import has_activation_quantizer
from dqrm.compress.transforms.admm import Admm
from dqrm.compress.transforms.build import build_compression
from dqrm.compress.transforms.config import TransformConfig

ROW = Granularity("row")
EMPTY = torch.empty(0)


def layer_on_grid(grid="symmetric", bits=4, granularity=ROW):
    torch.manual_seed(0)
    layer = nn.Linear(8, 3)
    codes, record = fit_record(layer.weight.detach(), grid, bits, granularity)
    with torch.no_grad():
        layer.weight.copy_(granularity.restore(granularity.view(codes) * record.scale, (3, 8)))
    return layer, record


def test_a_record_is_what_the_weight_is():
    layer, record = layer_on_grid()
    assert weight_record(layer) is None
    set_weight_record(layer, record)
    assert torch.equal(weight_record(layer).scale, record.scale)
    with pytest.raises(ValueError, match=r"scales of shape \[3, 1\]: tensor of a weight \[3, 8\]"):
        set_weight_record(layer, WeightRecord("symmetric", 4, Granularity("tensor"), record.scale))
    with pytest.raises(ValueError, match="2:4 allows"):
        set_weight_record(layer, WeightRecord("symmetric", 4, ROW, record.scale, NM(2, 4)))
    with pytest.raises(ValueError, match="weights are not on the grid of 4 bits"):
        set_weight_record(layer, WeightRecord("symmetric", 4, ROW, record.scale * 1.01))
    for grid, bits in [("symmetric", 1), ("ternary", 4), ("binary", 2), ("fp32", 8)]:
        with pytest.raises(ValueError, match=f"{grid} grid cannot have {bits} bits"):
            WeightRecord(grid, bits, ROW, record.scale)


def test_every_kind_of_record_comes_back(tmp_path):
    model = nn.ModuleDict()
    kinds = [
        ("symmetric", 4, ROW),
        ("symmetric", 16, Granularity("k_groups", 3)),
        ("ternary", 2, Granularity("row_groups", 4)),
        ("binary", 1, Granularity("tensor")),
        ("asymmetric", 4, ROW),
    ]
    for number, kind in enumerate(kinds):
        model[f"q{number}"], record = layer_on_grid(*kind)
        set_weight_record(model[f"q{number}"], record)
    model["sparse"] = nn.Linear(4, 2)
    with torch.no_grad():
        model["sparse"].weight[:, 1:3] = 0
    set_weight_record(model["sparse"], WeightRecord("fp32", 32, ROW, EMPTY, NM(2, 4), 8))
    model["plain"] = nn.Linear(2, 2)
    save_records(tmp_path, model)
    found = read_records(tmp_path)
    assert list(found) == [*(f"q{number}" for number in range(5)), "sparse"]
    for name, record in found.items():
        original = weight_record(model[name])
        assert torch.equal(record.scale, original.scale)
        assert (record.zero is None) == (original.zero is None) == (name != "q4")
        assert record.zero is None or torch.equal(record.zero, original.zero)
        assert record.granularity == original.granularity
        assert (record.grid, record.bits, record.mask) == (
            original.grid,
            original.bits,
            original.mask,
        )
    load_records(tmp_path, model)
    assert [name for name in model if has_activation_quantizer(model[name])] == ["sparse"]
    load_records(tmp_path, model)
    assert len(model["sparse"]._forward_pre_hooks) == 1


def test_a_folder_without_records_has_none(tmp_path):
    assert read_records(tmp_path) == {}
    assert load_records(tmp_path, nn.Linear(2, 2)) == {}


def test_files_that_are_not_right_are_refused(tmp_path):
    model = nn.ModuleDict({"a": layer_on_grid()[0]})
    set_weight_record(model["a"], layer_on_grid()[1])
    save_records(tmp_path, model)
    file = tmp_path / RECORDS_FILE
    whole = file.read_bytes()
    with pytest.raises(ValueError, match=f"{RECORDS_FILE}: a: "):
        load_records(tmp_path, nn.ModuleDict({"b": nn.Linear(8, 3)}))
    file.write_bytes(whole[:50])
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(tmp_path)
    file.write_bytes(whole)
    save_file(load_file(file), file, metadata={"format": json.dumps("other")})
    with pytest.raises(ValueError, match="no file of records this dqrm reads"):
        read_records(tmp_path)


def parsed(**settings):
    return TypeAdapter(TransformConfig).validate_python(settings)


def test_settings_become_transforms_in_order():
    configs = [
        parsed(kind="quant", match="a", weight={"bits": 4, "group": 8}, act={"bits": 8}),
        parsed(
            kind="quant", match=["b", "c"], weight={"bits": 3}, schedule={"start": 6, "period": 9}
        ),
        parsed(kind="nm", match="a", keep=1, group=4, rho=5.0, joint=True),
    ]
    made = build_compression(configs).transforms
    assert [type(transform).__name__ for transform in made] == [
        "Admm",
        "QuantizeWeights",
        "QuantizeWeights",
        "QuantizeActivations",
    ]
    admm, first, second, _ = made
    assert isinstance(admm, Admm)
    assert admm.pattern == NM(1, 4)
    assert admm.joint
    assert first.granularity == Granularity("k_groups", 8)
    assert second.match == ("b", "c")
    assert second.schedule == MoqBits(6, 3, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "quant"}, "neither is quantized"),
        ({"kind": "quant", "act": {"bits": 4}}, "8"),
        ({"kind": "quant", "weight": {"bits": 0}}, "greater than or equal to 1"),
        ({"kind": "quant", "weight": {"group": 8, "groups": 2}}, "set one of them"),
        (
            {"kind": "quant", "weight": {"per": "tensor", "group": 8}},
            "per has no effect with group;",
        ),
        (
            {"kind": "quant", "weight": {"per": "tensor", "groups": 2}},
            "per has no effect with groups;",
        ),
        (
            {"kind": "quant", "weight": {"bits": 2, "range": "full"}},
            "range has no effect on a ternary grid",
        ),
        (
            {"kind": "quant", "weight": {"bits": 2, "rounding": "stochastic"}},
            "rounding has no effect on a ternary grid",
        ),
        (
            {"kind": "quant", "weight": {"bits": 1, "grid": "binary", "range": "full"}},
            "range has no effect on a binary grid",
        ),
        (
            {
                "kind": "quant",
                "weight": {"bits": 1, "rounding": "stochastic"},
                "schedule": {"start": 2, "period": 1},
            },
            "rounding has no effect on a binary grid",
        ),
        ({"kind": "quant", "weight": {"bits": 4, "grid": "ternary"}}, "cannot have 4 bits"),
        ({"kind": "quant", "weight": {"bits": 1, "grid": "symmetric"}}, "2 bits or more"),
        ({"kind": "quant", "act": {}, "schedule": {"start": 8, "period": 1}}, "set weight"),
        ({"kind": "quant", "weight": {}, "schedule": {"start": 4, "period": 1}}, "or more"),
        (
            {"kind": "quant", "weight": {"bits": 2, "grid": "ternary"}, "schedule": {"start": 8}},
            "period",
        ),
        (
            {
                "kind": "quant",
                "weight": {"bits": 2, "grid": "ternary"},
                "schedule": {"start": 8, "period": 1},
            },
            "no bits to lower",
        ),
        (
            {
                "kind": "quant",
                "weight": {},
                "schedule": {"start": 8, "period": 1, "mixed_end": True},
            },
            "set sensitivity",
        ),
        ({"kind": "nm", "keep": 4, "group": 4}, "must be below group"),
        ({"kind": "nm", "via": "one_shot", "rho": 3.0}, "rho has no effect with via=one_shot"),
        ({"kind": "nm", "via": "sr_ste", "joint": True}, "joint has no effect"),
        ({"kind": "nm", "n": 2, "m": 4}, "n"),
        ({"kind": "mask"}, "kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        parsed(match="a", **settings)


@pytest.mark.parametrize(
    "weight",
    [
        {"bits": 3},
        {"bits": 2, "grid": "symmetric"},
        {"bits": 2, "grid": "asymmetric"},
        {"bits": 2, "schedule": 3},
        {"bits": 1, "schedule": 8},
    ],
    ids=str,
)
def test_grids_with_steps_have_a_range_and_a_rounding(weight):
    weight = {**weight, "range": "full", "rounding": "stochastic"}
    start = weight.pop("schedule", None)
    schedule = {} if start is None else {"schedule": {"start": start, "period": 1}}
    config = parsed(kind="quant", match="a", weight=weight, **schedule)
    # As other processes and files are given it.
    assert parsed(**config.model_dump(mode="json", exclude_unset=True)) == config
    (made,) = build_compression([config]).transforms
    assert (made.full_range, made.rounding) == (True, "stochastic")
