"""Files of DeepSpeed's, read as our settings."""

import copy
import json
import math
import re

import pytest
import torch
from torch import nn

from dqrm.compress.compat.deepspeed import convert, load
from dqrm.compress.transforms.build import build_compression
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


@pytest.mark.parametrize("start", [12, 2])
@pytest.mark.parametrize(
    ("key", "value", "only"),
    [
        ("quantization_type", "asymmetric", "symmetric"),
        ("rounding", "stochastic", "nearest"),
    ],
)
def test_two_bits_are_refused_where_deepspeed_refused_them(start, key, value, only):
    params = {"start_bits": start, "target_bits": 2, "quantization_period": 1}
    tree = changed(XTC, f"{WEIGHTS}/different_groups/wq1/params", params)
    tree = changed(tree, f"{WEIGHTS}/shared_parameters/{key}", value)
    message = rf"shared_parameters\.{key}={value}: must be {only} with target_bits=2"
    with pytest.raises(ValueError, match=message):
        convert(tree)
    in_forward = changed(tree, f"{WEIGHTS}/shared_parameters/quantize_weight_in_forward", True)
    if key == "quantization_type":
        with pytest.raises(ValueError, match=message):
            convert(in_forward)
    else:
        assert convert(in_forward).transforms[0].weight == WeightGrid(bits=2, groups=64)
    enough = changed(tree, f"{WEIGHTS}/different_groups/wq1/params/start_bits", 12)
    enough = changed(enough, f"{WEIGHTS}/different_groups/wq1/params/target_bits", 3)
    weight = convert(enough).transforms[0].weight
    assert value in (weight.grid, weight.rounding)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"quantize_type": "asymmetric"}, "quantize_type=asymmetric"),
        ({"rounding": "stochastic"}, "rounding=stochastic"),
        ({"quantize_algo": {"q_type": "asymmetric"}}, r"quantize_algo\.q_type=asymmetric"),
        ({"quantize_algo": {"rounding": "stochastic"}}, r"quantize_algo\.rounding=stochastic"),
    ],
)
def test_two_bits_of_moq_are_refused_by_the_names_of_its_keys(section, key):
    tree = changed(MOQ, "quantize_training/quantize_bits/target_bits", 2)
    assert convert(tree).transforms[0].weight == WeightGrid(bits=2, groups=8, range="full")
    tree["quantize_training"] |= section
    with pytest.raises(ValueError, match=rf"quantize_training\.{key}: must be "):
        convert(tree)


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
        (
            f"{WEIGHTS}/different_groups/wq1/params/target_bits",
            40,
            r"bits=40: must be from 1 to 16",
        ),
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
        (
            SPARSE,
            {"shared_parameters": {"enabled": True, "method": "snip_momentum"}},
            "method=snip_momentum: only l1 and topk have a counterpart",
        ),
        (
            SPARSE,
            {
                "shared_parameters": {"enabled": True, "method": "snip_momentum"},
                "different_groups": {},
            },
            "method=snip_momentum: only l1 and topk have a counterpart",
        ),
        (
            f"{WEIGHTS}/different_groups/wq1/params/quantization_period",
            "auto",
            'quantization_period="auto": must be a whole number',
        ),
        (f"{WEIGHTS}/shared_parameters/quantize_groups", "auto", '"auto": must be a whole number'),
        (
            f"{WEIGHTS}/shared_parameters/enabled",
            "false",
            r'shared_parameters\.enabled="false": must be true or false',
        ),
        (f"{WEIGHTS}/shared_parameters/fp16_mixed_quantize/enabled", "auto", "be true or false"),
        ("compression_training/layer_reduction/enabled", 1, "enabled=1: must be true or false"),
        ("compression_training/head_pruning/shared_parameters/enabled", None, "be true or false"),
        ("quantize_training", {"enabled": "false"}, r'quantize_training\.enabled="false": must be'),
        ("fp16/enabled", "true", r'fp16\.enabled="true": must be true or false'),
        (
            f"{WEIGHTS}/shared_parameters/quantize_weight_in_forward",
            "false",
            'quantize_weight_in_forward="false": must be true or false',
        ),
    ],
)
def test_what_cannot_be_read_is_refused(path, value, message, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(changed(XTC, path, value)))
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert str(file) in str(error.value)


GROUP = f"{WEIGHTS}/different_groups/wq1"
SHARED = f"{WEIGHTS}/shared_parameters"
LAYERS = "compression_training/layer_reduction"
RISING = "must name layers from 0 on, each above the one before"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("gradient_clipping", -1, "-1: must be 0 or more"),
        ("gradient_clipping", "big", '"big": must be a number'),
        ("gradient_clipping", math.inf, "Infinity: must be a number"),
        ("train_batch_size", 0, "0: must be 1 or more"),
        ("gradient_accumulation_steps", -4, "-4: must be 1 or more"),
        ("gradient_accumulation_steps", 1.5, "1.5: must be a whole number"),
        (
            "train_batch_size",
            40,
            "40: must be a multiple of train_micro_batch_size_per_gpu=16",
        ),
        ("optimizer/params/lr", True, "true: must be a number"),
        ("optimizer/params/lr", "2e-5", '"2e-5": must be a number'),
        ("optimizer/params/lr", math.nan, "NaN: must be a number"),
        pytest.param(
            "optimizer/params/lr", 10**400, f"{10**400}: must be a number", id="beyond floats"
        ),
        ("optimizer/params/lr", 0, "0: must be greater than 0"),
        ("optimizer/params/weight_decay", -0.1, "-0.1: must be 0 or more"),
        (f"{LAYERS}/teacher_layer", [], f"[]: {RISING}"),
        (f"{LAYERS}/teacher_layer", [-1, 2, 4, 6, 8], f"[-1, 2, 4, 6, 8]: {RISING}"),
        (f"{LAYERS}/teacher_layer", [2, 2, 4, 6, 8], f"[2, 2, 4, 6, 8]: {RISING}"),
        (f"{GROUP}/params/quantization_period", -5, "-5: must be 0 or more"),
        (f"{GROUP}/params/start_bits", 32, "32: must be from 1 to 16"),
        (f"{GROUP}/params/target_bits", 0, "0: must be from 1 to 16"),
        (f"{GROUP}/modules", [], "[]: must name a module"),
        (f"{SHARED}/quantize_groups", 0, "0: must be 1 or more"),
        (f"{SHARED}/schedule_offset", -1, "-1: must be 0 or more"),
        (f"{SHARED}/rounding", "up", "up: must be nearest or stochastic"),
        (f"{SHARED}/rounding", 1, "1: must be nearest or stochastic"),
        (f"{SHARED}/quantization_type", "skew", "skew: must be symmetric or asymmetric"),
    ],
)
def test_values_without_sense_are_refused_by_their_paths(path, value, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared as a whole
        convert(changed(XTC, path, value))
    assert str(error.value) == f"{path.replace('/', '.')}={message}"


def test_bits_that_go_up_are_refused_by_their_paths():
    params = {"start_bits": 4, "target_bits": 8}
    with pytest.raises(ValueError, match=r"^compression_training\..*\.wq1\.params\.start_bits=4: "):
        convert(changed(XTC, f"{GROUP}/params", params))


def test_the_ratio_of_mixed_weights_is_a_share():
    mixed = {"enabled": True, "quantize_change_ratio": -1}
    with pytest.raises(ValueError, match=r"mixed_quantize\.quantize_change_ratio=-1: must be "):
        convert(changed(XTC, f"{SHARED}/fp16_mixed_quantize", mixed))


def test_as_many_layers_as_there_must_be():
    with pytest.raises(ValueError, match=r"layer_reduction\.keep_number_layer=0: must be 1 or "):
        convert(changed(XTC, LAYERS, {"enabled": True, "keep_number_layer": 0}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("attention.(self", "missing ), unterminated subpattern at position 10"),
        ("self)|(query", "unbalanced parenthesis at position 4"),
        ("self{99999999999999999999}", "the repetition number is too large"),
    ],
)
@pytest.mark.parametrize("section", [WEIGHTS, ACTIVATIONS])
def test_patterns_that_are_none_are_refused(section, text, reason):
    name = "wq1" if section == WEIGHTS else "aq1"
    path = f"{section}/different_groups/{name}/modules"
    with pytest.raises(ValueError, match="no regular expression") as error:
        convert(changed(XTC, path, ["output", text]))
    place = path.replace("/", ".")
    assert str(error.value) == f'{place}="{text}": no regular expression: {reason}'


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quantize_bits": {"start_bits": 4}}, "quantize_bits.start_bits=4: must be target_bits=8"),
        ({"quantize_bits": {"target_bits": 20}}, "quantize_bits.target_bits=20: must be from 1"),
        (
            {"quantize_schedule": {"quantize_period": -1}},
            "quantize_schedule.quantize_period=-1: must be 0 or more",
        ),
        (
            {"quantize_schedule": {"schedule_offset": -1}},
            "quantize_schedule.schedule_offset=-1: must be 0 or more",
        ),
        ({"quantize_groups": 0}, "quantize_groups=0: must be 1 or more"),
        ({"quantize_type": "skew"}, "quantize_type=skew: must be symmetric or asymmetric"),
        ({"quantize_algo": {"q_type": "skew"}}, "quantize_algo.q_type=skew: must be symmetric or"),
        ({"quantize_algo": {"rounding": "up"}}, "quantize_algo.rounding=up: must be nearest or"),
        (
            {"fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 2}},
            "fp16_mixed_quantize.quantize_change_ratio=2: must be from 0 to 1",
        ),
    ],
)
def test_values_of_moq_without_sense_are_refused_by_their_paths(section, message):
    tree = {"quantize_training": MOQ["quantize_training"] | section}
    with pytest.raises(ValueError, match=rf"^quantize_training\.{re.escape(message)}"):
        convert(tree)


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
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[]", "object"),
        ('{"fp16": {}, "fp16": {}}', "fp16 is there twice"),
        ("[" * 100_000, "recursion"),
    ],
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
