"""Files of DeepSpeed's, read as our settings."""

import math
import re

import pytest
import torch
from deepspeed_files import ACTIVATIONS, MOQ, SPARSE, WEIGHTS, XTC, changed
from torch import nn

from dqrm.compress.compat.deepspeed import convert
from dqrm.compress.transforms.build import build_compression
from dqrm.compress.transforms.config import (
    ActivationGrid,
    BitSchedule,
    NMTransform,
    QuantTransform,
    WeightGrid,
)


def test_xtc():
    found = convert(XTC)
    assert found.layers == (2, 4, 6, 8, 10)
    assert found.transforms == [
        QuantTransform(
            kind="quant",
            match=(".*(?:attention.self).*", ".*(?:word_embeddings).*"),
            weight=WeightGrid(bits=1, groups=64),
        ),
        QuantTransform(kind="quant", match=(".*(?:attention.self).*",), act=ActivationGrid()),
    ]
    assert found.training == {
        "batch_size": 32,
        "max_grad_norm": 1.0,
        "lr": 2e-5,
        "weight_decay": 0.01,
    }
    assert sorted(warning.partition(":")[0] for warning in found.warnings) == [
        "compression_training.layer_reduction.module_name_prefix",
        "compression_training.layer_reduction.other_module_name",
        "fp16",
        "optimizer.params.betas",
        "steps_per_print",
    ]


def test_moq():
    found = convert(MOQ)
    assert found.transforms == [
        QuantTransform(
            kind="quant",
            match=(".*",),
            weight=WeightGrid(bits=8, groups=8, range="full", rounding="nearest"),
            schedule=BitSchedule(
                start=12,
                period=10,
                offset=0,
                mix_ratio=0.01,
                sensitivity="eigenvalue",
                mixed_end=True,
            ),
        )
    ]
    kernel, everything, mixed, *unused = found.warnings
    assert "kernel took stochastic" in kernel
    assert "every linear layer and embedding" in everything
    assert "mixed_end" in mixed
    # Layers are found; what lies in none is quantized, too, and not measured.
    assert unused == [
        f"eigenvalue.{key}: no effect" for key in ("max_iter", "layer_name", "layer_num")
    ]


def test_auto_of_the_trainer_leaves_defaults():
    tree = changed(XTC, "optimizer/params/lr", "auto")
    tree |= {"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    tree |= {"fp16": {"enabled": "auto"}, "amp": {"enabled": "auto", "opt_level": "auto"}}
    found = convert(tree)
    assert found.training == {"batch_size": 16, "weight_decay": 0.01}, "that of one process"
    auto = {w.partition(":")[0] for w in found.warnings if "our default counts" in w}
    assert auto == {"gradient_clipping", "optimizer.params.lr"}
    assert "train_batch_size: auto leaves it to Hugging Face's Trainer" in found.warnings
    del tree["train_micro_batch_size_per_gpu"]
    found = convert(tree)
    assert "batch_size" not in found.training
    (warning,) = (w for w in found.warnings if w.startswith("train_batch_size"))
    assert "our default counts" in warning


@pytest.mark.parametrize(
    ("keys", "size", "warnings"),
    [
        (
            {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
            32,
            [
                "train_micro_batch_size_per_gpu: batch_size=32 (8 * 4) is that of one process; "
                "multiply it by how many there were"
            ],
        ),
        (
            {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": "auto"},
            8,
            [
                "train_micro_batch_size_per_gpu: batch_size=8 (8 * 1) is that of one process; "
                "multiply it by how many there were",
                "gradient_accumulation_steps: auto leaves it to Hugging Face's Trainer",
            ],
        ),
        (
            {
                "train_batch_size": 64,
                "train_micro_batch_size_per_gpu": 8,
                "gradient_accumulation_steps": 4,
            },
            64,
            ["gradient_accumulation_steps: no effect"],
        ),
        ({"gradient_accumulation_steps": 4}, None, ["gradient_accumulation_steps: no effect"]),
    ],
)
def test_the_batch_is_what_a_step_sees(keys, size, warnings):
    sections = {"compression_training": XTC["compression_training"]}
    found = convert({**sections, **keys})
    assert found.training.get("batch_size") == size
    assert found.warnings[: len(warnings)] == warnings
    assert found.warnings[len(warnings) :] == convert(sections).warnings


@pytest.mark.parametrize("zero", [0, 0.0])
def test_clipping_that_is_off_stays_off(zero):
    assert convert(changed(XTC, "gradient_clipping", zero)).training["max_grad_norm"] == math.inf


@pytest.mark.parametrize(("start", "told"), [(4, True), (3, False)])
def test_a_period_of_zero_is_told_where_it_differs(start, told):
    params = {"start_bits": start, "target_bits": 1, "quantization_period": 0}
    found = convert(changed(XTC, f"{WEIGHTS}/different_groups/wq1/params", params))
    assert found.transforms[0].schedule == BitSchedule(start=start, period=1)
    place = "compression_training.weight_quantization.different_groups.wq1.params"
    warning = (
        f"{place}.quantization_period: 0 takes a bit off at every step there; here in the steps "
        "1, 2, 4, ..."
    )
    assert (warning in found.warnings) == told


def test_start_bits_without_effect_may_be_any():
    params = {"start_bits": 32, "target_bits": 8, "quantization_period": 1}
    tree = changed(XTC, f"{WEIGHTS}/different_groups/wq1/params", params)
    tree = changed(tree, f"{WEIGHTS}/shared_parameters/quantize_weight_in_forward", True)
    assert convert(tree).transforms[0].schedule is None


@pytest.mark.parametrize(
    ("modules", "name", "found"),
    [
        ("(?i)SELF|pooler", "bert.self.query", True),
        ("(?i)SELF|pooler", "bert.output.dense", False),
        ("self$", "bert.self", True),
        ("self$", "bert.self.query", False),
        ("*", "any.thing", True),
    ],
)
def test_patterns_find_what_deepspeed_searched_for(modules, name, found):
    tree = changed(XTC, f"{WEIGHTS}/different_groups/wq1/modules", modules)
    (pattern,) = convert(tree).transforms[0].match
    assert (re.fullmatch(pattern, name) is not None) == found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (
            "compression_training/layer_reduction",
            {"enabled": False, "keep_number_layer": 0, "teacher_layer": []},
        ),
        (
            SPARSE,
            {
                "shared_parameters": {"enabled": False, "schedule_offset": -1},
                "different_groups": {"sp1": {"params": {"dense_ratio": 0}, "modules": []}},
            },
        ),
        (
            f"{WEIGHTS}/shared_parameters/fp16_mixed_quantize",
            {"enabled": False, "quantize_change_ratio": -1},
        ),
    ],
)
def test_values_of_what_is_off_are_not_refused(path, value):
    tree = changed(XTC, path, value)
    assert convert(tree).transforms == convert(XTC).transforms


def test_bits_that_go_down_have_a_schedule():
    params = {"start_bits": 8, "target_bits": 4, "quantization_period": 50}
    tree = changed(XTC, f"{WEIGHTS}/different_groups/wq1/params", params)
    transform = convert(tree).transforms[0]
    assert transform.schedule == BitSchedule(start=8, period=50)
    assert transform.weight == WeightGrid(bits=4, groups=64, range="full", rounding="nearest")
    tree = changed(tree, f"{WEIGHTS}/shared_parameters/quantize_weight_in_forward", True)
    found = convert(tree)
    assert found.transforms[0].schedule is None
    assert any("start_bits: no effect with quantize_weight" in w for w in found.warnings)


@pytest.mark.parametrize(("start", "end"), [(5, 2), (4, 1), (3, 2)])
def test_bits_that_end_at_two_or_less_come_from_the_grids_of_deepspeed(start, end):
    tree = changed(XTC, f"{WEIGHTS}/shared_parameters/quantize_groups", 2)
    params = {"start_bits": start, "target_bits": end, "quantization_period": 1}
    tree = changed(tree, f"{WEIGHTS}/different_groups/wq1", {"params": params, "modules": "*"})
    found = convert(tree)
    assert found.warnings == convert(XTC).warnings
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    latent = model[0].weight.detach().reshape(2, -1).clone()
    compression = build_compression(found.transforms[:1])
    compression.attach(model, 40)
    for bits in range(start, end - 1, -1):
        # Bits go down in the steps 1, 2, 4, ...
        compression.before_forward(0 if bits == start else 2 ** (start - bits - 1))
        if bits > 2:
            half = 2 ** (bits - 1)
            scale = latent.abs().amax(1, keepdim=True) / half
            wanted = (latent / scale).round().clamp(-half, half - 1) * scale
        elif bits == 2:
            large = latent.abs() > 0.7 * latent.abs().mean(1, keepdim=True)
            scale = (latent.abs() * large).sum(1, keepdim=True) / large.sum(1, keepdim=True)
            wanted = latent.sign() * large * scale
        else:
            wanted = latent.sign() * latent.abs().mean(1, keepdim=True)
        torch.testing.assert_close(model[0].weight.reshape(2, -1), wanted)


def test_a_schedule_of_two_bits_or_less_has_no_range():
    tree = changed(XTC, f"{WEIGHTS}/different_groups/wq1/params/start_bits", 2)
    transform = convert(tree).transforms[0]
    assert transform.weight == WeightGrid(bits=1, groups=64)
    assert transform.schedule == BitSchedule(start=2, period=1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weights_quantized_in_the_forward_are_neither_mixed_nor_rounded_at_random(bits):
    params = {"start_bits": bits, "target_bits": bits, "quantization_period": 1}
    tree = changed(XTC, f"{WEIGHTS}/different_groups/wq1/params", params)
    tree["compression_training"]["weight_quantization"]["shared_parameters"] |= {
        "quantize_weight_in_forward": True,
        "rounding": "stochastic",
        "quantizer_kernel": True,
        "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.1},
        "schedule_offset": 5,
    }
    found = convert(tree)
    transform = found.transforms[0]
    assert transform.schedule == BitSchedule(start=bits, period=1, offset=5)
    assert transform.weight.rounding == "nearest"
    why = "no effect with quantize_weight_in_forward, as in DeepSpeed"
    shared = "compression_training.weight_quantization.shared_parameters"
    told = [w for w in found.warnings if "weight_quantization" in w]
    assert told == [
        f"{shared}.fp16_mixed_quantize: {why}: weights are never part FP32",
        f"{shared}.rounding: {why}: nearest",
    ]
    tree = changed(tree, f"{WEIGHTS}/shared_parameters/enabled", False)
    assert not any("weight_quantization" in warning for warning in convert(tree).warnings)


def test_an_offset_alone_is_a_schedule():
    tree = changed(XTC, f"{WEIGHTS}/shared_parameters/schedule_offset", 30)
    assert convert(tree).transforms[0].schedule == BitSchedule(start=1, period=1, offset=30)


@pytest.mark.parametrize(
    ("method", "ratio", "keep", "group", "via"),
    [("l1", 0.5, 2, 4, "one_shot"), ("topk", 0.375, 3, 8, "sr_ste")],
)
def test_sparse_weights_become_a_pattern(method, ratio, keep, group, via):
    sparse = {
        "shared_parameters": {"enabled": True, "schedule_offset": 200, "method": method},
        "different_groups": {"sp1": {"params": {"dense_ratio": ratio}, "modules": ["output"]}},
    }
    found = convert({"compression_training": {"sparse_pruning": sparse}})
    match = (".*(?:output).*",)
    wanted = NMTransform(kind="nm", match=match, keep=keep, group=group, via=via)
    assert found.transforms == [wanted]
    assert any(f"taken out as {keep}:{group}" in warning for warning in found.warnings)


def test_asymmetric_grids_are_taken_over():
    tree = changed(XTC, f"{WEIGHTS}/shared_parameters/quantization_type", "asymmetric")
    tree = changed(tree, f"{ACTIVATIONS}/shared_parameters/quantization_type", "asymmetric")
    params = {"start_bits": 8, "target_bits": 4, "quantization_period": 10}
    wide = changed(tree, f"{WEIGHTS}/different_groups/wq1/params", params)
    weights, inputs = convert(wide).transforms
    assert (weights.weight.grid, weights.weight.range) == ("asymmetric", "full")
    assert inputs.act == ActivationGrid(grid="asymmetric")
    assert convert(wide).warnings == convert(XTC).warnings
    for section in (WEIGHTS, ACTIVATIONS):
        odd = changed(XTC, f"{section}/shared_parameters/quantization_type", "skew")
        with pytest.raises(ValueError, match="quantization_type=skew: must be symmetric or asym"):
            convert(odd)


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (f"{ACTIVATIONS}/shared_parameters/range_calibration", "static", "range_calibration"),
        (f"{ACTIVATIONS}/shared_parameters/schedule_offset", 9, "schedule_offset"),
        (f"{WEIGHTS}/shared_parameters/qantize_groups", 3, "qantize_groups: no effect"),
        ("compression_training/head_pruning/shared_parameters/enabled", True, "head_pruning"),
        ("eigenvalue", {"enabled": True}, "eigenvalue: no effect without"),
    ],
)
def test_what_has_no_effect_is_told(path, value, key):
    before, after = convert(XTC).warnings, convert(changed(XTC, path, value)).warnings
    assert any(key in warning for warning in set(after) - set(before))
