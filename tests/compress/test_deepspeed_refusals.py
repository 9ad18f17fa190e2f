"""Files of DeepSpeed's that cannot be read, and what is said of them."""

import json
import math
import re

import pytest
from deepspeed_files import ACTIVATIONS, MOQ, SHARED, SPARSE, WEIGHTS, XTC, changed

from dqrm.compress.compat.deepspeed import convert, load
from dqrm.compress.transforms.config import WeightGrid


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
