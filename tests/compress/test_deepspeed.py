"""Files of DeepSpeed's, read as our settings."""

import copy
import json

import pytest

from dqrm.compress.compat.deepspeed import convert, load
from dqrm.compress.transforms.config import (
    ActivationGrid,
    BitSchedule,
    NMTransform,
    QuantTransform,
    WeightGrid,
)

# Of the shape of the XTC example: binary weights and embeddings, 8-bit activations, five layers.
XTC = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 16,
    "steps_per_print": 200,
    "fp16": {"enabled": True},
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "weight_decay": 0.01, "betas": [1, 2]}},
    "compression_training": {
        "layer_reduction": {
            "enabled": True,
            "keep_number_layer": 5,
            "module_name_prefix": "bert.encoder.layer",
            "teacher_layer": [2, 4, 6, 8, 10],
            "other_module_name": ["bert.pooler"],
        },
        "weight_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantizer_kernel": False,
                "schedule_offset": 0,
                "quantize_groups": 64,
                "quantize_verbose": False,
                "quantization_type": "symmetric",
                "quantize_weight_in_forward": False,
                "rounding": "nearest",
                "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 0.1},
            },
            "different_groups": {
                "wq1": {
                    "params": {"start_bits": 1, "target_bits": 1, "quantization_period": 0},
                    "modules": ["attention.self", "word_embeddings"],
                }
            },
        },
        "activation_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantization_type": "symmetric",
                "range_calibration": "dynamic",
                "schedule_offset": 0,
            },
            "different_groups": {"aq1": {"params": {"bits": 8}, "modules": ["attention.self"]}},
        },
        "head_pruning": {"shared_parameters": {"enabled": False}, "different_groups": {}},
    },
}

MOQ = {
    "quantize_training": {
        "enabled": True,
        "quantize_verbose": True,
        "quantizer_kernel": True,
        "quantize_type": "symmetric",
        "quantize_bits": {"start_bits": 12, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 10, "schedule_offset": 0},
        "quantize_groups": 8,
        "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.01},
        "eigenvalue": {
            "enabled": True,
            "max_iter": 50,
            "layer_name": "bert.encoder.layer",
            "layer_num": 12,
        },
    }
}


def changed(tree, path, value):
    tree = copy.deepcopy(tree)
    *way, last = path.split("/")
    at = tree
    for key in way:
        at = at[key]
    at[last] = value
    return tree


SPARSE = "compression_training/sparse_pruning"
WEIGHTS = "compression_training/weight_quantization"
ACTIVATIONS = "compression_training/activation_quantization"


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
    tree["fp16"] = {"enabled": "auto"}
    found = convert(tree)
    assert found.training == {"batch_size": 16, "weight_decay": 0.01}, "that of one process"
    auto = {w.partition(":")[0] for w in found.warnings if "our default counts" in w}
    assert auto == {"train_batch_size", "gradient_clipping", "optimizer.params.lr"}


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


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{ACTIVATIONS}/different_groups/aq1/params/bits", 4, "bits=4: must be 8"),
        (f"{WEIGHTS}/different_groups", {}, "different_groups is empty"),
        (
            f"{WEIGHTS}/different_groups/wq1/params",
            {"start_bits": 4},
            r"wq1\.params\.target_bits: is missing",
        ),
        (f"{WEIGHTS}/different_groups/wq1/params/target_bits", 40, "less than or equal to 16"),
        ("compression_training/layer_reduction/keep_number_layer", 4, "teacher_layer has 5"),
        ("compression_training", {}, "no compression is enabled"),
        ("compression_training", 7, "compression_training=7: must be an object"),
        ("compression_training/row_pruning", None, "row_pruning=null: must be an object"),
        (f"{WEIGHTS}/different_groups/wq1", 3, r"different_groups\.wq1=3: must be an object"),
        (f"{WEIGHTS}/different_groups/wq1/modules", 3, r"wq1\.modules=3: must be text or a list"),
        (
            f"{WEIGHTS}/different_groups/wq1/params/target_bits",
            4.5,
            "target_bits=4.5: must be a wh",
        ),
        (f"{WEIGHTS}/shared_parameters/quantize_groups", True, "groups=true: must be a whole"),
        ("compression_training/layer_reduction/keep_number_layer", "5", '="5": must be a whole'),
        ("compression_training/layer_reduction/teacher_layer", "10", "must be a list of whole"),
        (SPARSE, {"different_groups": {"a": {"params": {"dense_ratio": "1"}}}}, "be a number"),
    ],
)
def test_what_cannot_be_read_is_refused(path, value, message, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(changed(XTC, path, value)))
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert str(file) in str(error.value)


def test_asymmetric_grids_are_taken_over():
    tree = changed(XTC, f"{WEIGHTS}/shared_parameters/quantization_type", "asymmetric")
    tree = changed(tree, f"{ACTIVATIONS}/shared_parameters/quantization_type", "asymmetric")
    params = {"start_bits": 8, "target_bits": 4, "quantization_period": 10}
    wide = changed(tree, f"{WEIGHTS}/different_groups/wq1/params", params)
    weights, inputs = convert(wide).transforms
    assert (weights.weight.grid, weights.weight.range) == ("asymmetric", "full")
    assert inputs.act == ActivationGrid(grid="asymmetric")
    assert convert(wide).warnings == convert(XTC).warnings
    # Of one bit there is one grid, there and here.
    assert convert(tree).transforms[0].weight == WeightGrid(bits=1, groups=64)
    for section in (WEIGHTS, ACTIVATIONS):
        odd = changed(XTC, f"{section}/shared_parameters/quantization_type", "skew")
        with pytest.raises(ValueError, match="quantization_type=skew: must be symmetric or asym"):
            convert(odd)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Expecting"), ("[]", "object"), ('{"fp16": {}, "fp16": {}}', "fp16 is there twice")],
)
def test_what_is_no_json_object_is_refused(text, message, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(file)


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
