"""Compression settings in DeepSpeed's JSON, which DeepSpeed no longer reads, as ours.

``compression_training`` and ``quantize_training`` (MoQ) become transforms; batch size, optimizer
and precision become settings of the training. What has no effect here, or had another one there
than its name says, is told in ``warnings``.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqrm.compress.compat.deepspeed_types import (
    BATCH_KEYS,
    check_bits,
    check_choice,
    check_few_bits,
    check_positive,
    check_range,
    check_types,
)
from dqrm.compress.transforms.config import (
    ActivationGrid,
    BitSchedule,
    NMTransform,
    QuantTransform,
    TransformConfig,
)

_LARGEST_GROUP = 16
_WEIGHT = "compression_training.weight_quantization"
_WEIGHT_SHARED = f"{_WEIGHT}.shared_parameters"
_GRIDS = ("symmetric", "asymmetric")
_ROUNDINGS = ("nearest", "stochastic")
_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")
_LEFT = "auto leaves it to Hugging Face's Trainer"
_AUTO = f"{_LEFT}; our default counts"
_IN_FORWARD = "no effect with quantize_weight_in_forward, as in DeepSpeed"
_TOPK = "topk learns scores for weights, which no transform does; sr_ste is the nearest"


@dataclass
class Imported:
    """What a file of DeepSpeed's says, in our words."""

    transforms: list[TransformConfig] = field(default_factory=list)
    layers: tuple[int, ...] | int | None = None
    """Layers to keep, or how many."""
    training: dict[str, Any] = field(default_factory=dict)
    """Of batch_size, lr, weight_decay, max_grad_norm, precision."""
    warnings: list[str] = field(default_factory=list)

    def warn(self, key: str, text: str) -> None:
        """Note something about a key."""
        self.warnings.append(f"{key}: {text}")


def load(path: Path) -> Imported:
    """Read a file.

    Raises:
        ValueError: it is no JSON object, asks for no compression, or for one there is not.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    try:
        return convert(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def convert(tree: Mapping[str, Any]) -> Imported:
    """As :func:`load`, from what the file holds."""
    check_types(tree)
    found = Imported()
    rest = dict(tree)
    _training(found, rest)
    compression = dict(rest.pop("compression_training", {}))
    eigenvalue = rest.pop("eigenvalue", None)
    moq = dict(rest.pop("quantize_training", {}))
    if moq.get("enabled"):
        _moq(found, moq, eigenvalue)
    elif eigenvalue is not None:
        found.warn("eigenvalue", "no effect without quantize_training")
    _layers(found, dict(compression.pop("layer_reduction", {})))
    _sparse(found, dict(compression.pop("sparse_pruning", {})))
    _weights(found, dict(compression.pop("weight_quantization", {})))
    _activations(found, dict(compression.pop("activation_quantization", {})))
    for name in ("row_pruning", "head_pruning", "channel_pruning"):
        section = compression.pop(name, {})
        if section.get("shared_parameters", {}).get("enabled"):
            found.warn(
                f"compression_training.{name}",
                "no effect; whole rows and heads are taken out by a stage of its own, prune",
            )
    _unknown(found, "compression_training", compression)
    for key in rest:
        found.warn(key, "no effect")
    if not found.transforms and found.layers is None:
        raise ValueError("no compression is enabled in it")
    return found


def _taken(params: dict[str, Any], key: str, where: str) -> Any:
    if key not in params:
        raise ValueError(f"{where}.{key}: is missing")
    return params.pop(key)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice} is there twice")
    return tree


def _training(found: Imported, rest: dict[str, Any]) -> None:
    _batch(found, rest)
    clip = rest.pop("gradient_clipping", None)
    if clip == "auto":
        found.warn("gradient_clipping", _AUTO)
    elif clip is not None:
        check_range(clip, "gradient_clipping", 0)
        # 0 turns it off there; no gradient is longer than infinity.
        found.training["max_grad_norm"] = clip or math.inf
    half, bf16 = rest.pop("fp16", {}), rest.pop("bf16", {})
    if half.get("enabled") is True:
        found.warn("fp16", "CPUs compute in bf16 where they can, which needs no loss scale")
    elif bf16.get("enabled") is True:
        found.training["precision"] = "bf16"
    optimizer = dict(rest.pop("optimizer", {}))
    if optimizer:
        params = dict(optimizer.get("params", {}))
        if str(optimizer.get("type", "AdamW")).lower() not in ("adam", "adamw"):
            found.warn("optimizer.type", "AdamW in its place")
        for name, value in params.items():
            key = f"optimizer.params.{name}"
            if name not in ("lr", "weight_decay"):
                found.warn(key, "no effect")
            elif value == "auto":
                found.warn(key, _AUTO)
            else:
                if name == "lr":
                    check_positive(value, key)
                else:
                    check_range(value, key, 0)
                found.training[name] = value


def _batch(found: Imported, rest: dict[str, Any]) -> None:
    whole_key, micro_key, times_key = BATCH_KEYS
    given = {key: rest.pop(key) for key in BATCH_KEYS if key in rest}
    known = {key: value for key, value in given.items() if value != "auto"}
    for key, value in known.items():
        check_range(value, key, 1)
    whole, micro, times = (known.get(key) for key in BATCH_KEYS)
    own = (micro or 1) * (times or 1)
    if whole is not None:
        if whole % own:
            parts = [f"{key}={known[key]}" for key in (micro_key, times_key) if key in known]
            raise ValueError(f"{whole_key}={whole}: must be a multiple of {' * '.join(parts)}")
        found.training["batch_size"] = whole
    elif micro is not None:
        found.training["batch_size"] = own
        found.warn(
            micro_key,
            f"batch_size={own} ({micro} * {times or 1}) is that of one process; multiply it by "
            "how many there were",
        )
    for key, value in given.items():
        if value == "auto":
            found.warn(key, _LEFT if "batch_size" in found.training else _AUTO)
    if times is not None and (whole is not None or micro is None):
        found.warn(times_key, "no effect")


def _layers(found: Imported, section: dict[str, Any]) -> None:
    if not section.get("enabled"):
        return
    where = "compression_training.layer_reduction"
    kept, count = section.get("teacher_layer"), section.get("keep_number_layer")
    if kept is None and count is None:
        raise ValueError(f"{where}: neither teacher_layer nor keep_number_layer is there")
    if kept is not None and (not kept or kept[0] < 0 or sorted(set(kept)) != kept):
        raise ValueError(
            f"{where}.teacher_layer={json.dumps(kept)}: must name layers from 0 on, each above the "
            "one before"
        )
    if count is not None:
        check_range(count, f"{where}.keep_number_layer", 1)
    if kept is not None and count is not None and len(kept) != count:
        raise ValueError(f"{where}: keep_number_layer={count}, teacher_layer has {len(kept)}")
    found.layers = count if kept is None else tuple(kept)
    for key in section:
        if key in ("enabled", "teacher_layer", "keep_number_layer"):
            continue
        if key in ("module_name_prefix", "other_module_name"):
            found.warn(f"{where}.{key}", "no effect: layers are found, all else is kept")
        else:
            found.warn(f"{where}.{key}", "no effect")


def _sparse(found: Imported, section: dict[str, Any]) -> None:
    where = "compression_training.sparse_pruning"
    common = f"{where}.shared_parameters"
    asked = section.get("shared_parameters", {})
    method = asked.get("method", "l1")
    # Before the groups, as DeepSpeed's third method, snip_momentum, comes without any.
    if asked.get("enabled") and method not in ("l1", "topk"):
        raise ValueError(f"{common}.method={method}: only l1 and topk have a counterpart")
    shared, groups = _sections(found, where, section)
    if not groups:
        return
    shared.pop("method", None)
    offset = shared.pop("schedule_offset", 1000)
    if method == "topk":
        found.warn(f"{common}.method", _TOPK)
    elif offset:
        found.warn(f"{common}.schedule_offset", "no effect: masks are there from the first step on")
    _unknown(found, common, shared)
    for place, (params, match) in groups.items():
        ratio = _taken(params, "dense_ratio", f"{place}.params")
        keep, group = _pattern(ratio, f"{place}.params.dense_ratio")
        found.warn(place, f"weights are taken out as {keep}:{group}, not anywhere")
        via = {"l1": "one_shot", "topk": "sr_ste"}[method]
        found.transforms.append(
            NMTransform.model_validate(
                {"kind": "nm", "match": match, "keep": keep, "group": group, "via": via}
            )
        )
        _unknown(found, f"{place}.params", params)


def _pattern(ratio: float, where: str) -> tuple[int, int]:
    for group in (4, 8, _LARGEST_GROUP):
        keep = ratio * group
        if 0 < keep < group and math.isclose(keep, round(keep)):
            return round(keep), group
    raise ValueError(f"{where}={ratio}: must be a multiple of 1/{_LARGEST_GROUP} between 0 and 1")


def _weights(found: Imported, section: dict[str, Any]) -> None:
    shared, groups = _sections(found, _WEIGHT, section)
    if not groups:
        return
    in_forward = shared.pop("quantize_weight_in_forward", False)
    if in_forward:
        _without_moq(found, shared)
    offset = shared.pop("schedule_offset", 0)
    check_range(offset, f"{_WEIGHT_SHARED}.schedule_offset", 0)
    mix = _mix(_WEIGHT_SHARED, shared)
    keys = f"{_WEIGHT_SHARED}.quantization_type", f"{_WEIGHT_SHARED}.rounding"
    grid = _grid(found, _WEIGHT_SHARED, shared, *keys)
    _unknown(found, _WEIGHT_SHARED, shared)
    for place, (params, match) in groups.items():
        where = f"{place}.params"
        start, target = _taken(params, "start_bits", where), _taken(params, "target_bits", where)
        period = params.pop("quantization_period", 1)
        if in_forward and start != target:
            found.warn(f"{where}.start_bits", f"{_IN_FORWARD}: target_bits at once")
            start = target
        check_bits(start, target, where)
        check_few_bits(target, grid, *keys)
        _check_period(found, period, f"{where}.quantization_period", start - target)
        schedule = _schedule(start, target, period, offset, mix)
        found.transforms.append(_quant(match, target, grid, schedule))
        _unknown(found, where, params)


def _without_moq(found: Imported, shared: dict[str, Any]) -> None:
    """Take out what DeepSpeed's optimizer does to weights, and their forward does not."""
    if shared.pop("fp16_mixed_quantize", {}).get("enabled"):
        found.warn(
            f"{_WEIGHT_SHARED}.fp16_mixed_quantize", f"{_IN_FORWARD}: weights are never part FP32"
        )
    if shared.get("rounding") == "stochastic":
        del shared["rounding"]
        found.warn(f"{_WEIGHT_SHARED}.rounding", f"{_IN_FORWARD}: nearest")
    # Its kernel, which took stochastic for nearest, is not used there either.
    shared.pop("quantizer_kernel", None)


def _activations(found: Imported, section: dict[str, Any]) -> None:
    where = "compression_training.activation_quantization"
    shared, groups = _sections(found, where, section)
    if not groups:
        return
    common = f"{where}.shared_parameters"
    grid = shared.pop("quantization_type", "symmetric")
    check_choice(grid, f"{common}.quantization_type", _GRIDS)
    if shared.pop("range_calibration", "dynamic") != "dynamic":
        found.warn(f"{common}.range_calibration", "dynamic, a scale a token, in its place")
    if shared.pop("schedule_offset", 1000):
        found.warn(f"{common}.schedule_offset", "no effect: quantized from the first step on")
    _unknown(found, common, shared)
    for place, (params, match) in groups.items():
        bits = _taken(params, "bits", f"{place}.params")
        if bits != 8:
            raise ValueError(f"{place}.params.bits={bits}: must be 8")
        act = ActivationGrid.model_validate({} if grid == "symmetric" else {"grid": grid})
        found.transforms.append(QuantTransform(kind="quant", match=match, act=act))
        _unknown(found, f"{place}.params", params)


def _moq(found: Imported, moq: dict[str, Any], eigenvalue: Any) -> None:
    where = "quantize_training"
    moq.pop("enabled")
    # Newer files have it beside quantize_training, older ones within.
    curvature = dict(moq.pop("eigenvalue", None) or eigenvalue or {})
    sensitive = bool(curvature.pop("enabled", False))
    bits, times = dict(moq.pop("quantize_bits", {})), dict(moq.pop("quantize_schedule", {}))
    algorithm = dict(moq.pop("quantize_algo", {}))
    kind_key = f"{where}.{'quantize_algo.q_type' if 'q_type' in algorithm else 'quantize_type'}"
    rounding_key = f"{where}.{'quantize_algo.' if 'rounding' in algorithm else ''}rounding"
    shared = {
        "quantize_groups": moq.pop("quantize_groups", 1),
        "quantization_type": algorithm.pop("q_type", moq.pop("quantize_type", "symmetric")),
        "rounding": algorithm.pop("rounding", moq.pop("rounding", "nearest")),
        "quantizer_kernel": moq.pop("quantizer_kernel", False),
        "quantize_verbose": moq.pop("quantize_verbose", False),
    }
    mix = _mix(where, moq)
    start, target = bits.pop("start_bits", 16), bits.pop("target_bits", 8)
    period, offset = times.pop("quantize_period", 100), times.pop("schedule_offset", 100)
    check_bits(start, target, f"{where}.quantize_bits")
    _check_period(found, period, f"{where}.quantize_schedule.quantize_period", start - target)
    check_range(offset, f"{where}.quantize_schedule.schedule_offset", 0)
    schedule = _schedule(start, target, period, offset, mix, sensitive=sensitive)
    grid = _grid(found, where, shared, kind_key, rounding_key)
    check_few_bits(target, grid, kind_key, rounding_key)
    found.transforms.append(_quant((".*",), target, grid, schedule))
    found.warn(where, "every linear layer and embedding is quantized, the head among them")
    if sensitive:
        found.warn(
            "eigenvalue", "blocks that are too sensitive to reach target_bits keep more (mixed_end)"
        )
    for key in curvature:
        found.warn(f"eigenvalue.{key}", "no effect")
    for name, section in {
        where: moq,
        f"{where}.quantize_bits": bits,
        f"{where}.quantize_schedule": times,
        f"{where}.quantize_algo": algorithm,
    }.items():
        _unknown(found, name, section)


def _quant(
    match: tuple[str, ...], bits: int, grid: dict[str, Any], schedule: BitSchedule | None
) -> QuantTransform:
    # Of 1 and 2 bits the grids are the same here and there; those of more, that a schedule may
    # begin with, have DeepSpeed's range.
    most = bits if schedule is None else schedule.start
    used = {k: v for k, v in grid.items() if most > 2 or k in ("groups", "per")}
    chosen: dict[str, Any] = {"kind": "quant", "match": match, "weight": {"bits": bits, **used}}
    if schedule is not None:
        chosen["schedule"] = schedule
    return QuantTransform.model_validate(chosen)


def _schedule(
    start: int, target: int, period: int, offset: int, mix: float, *, sensitive: bool = False
) -> BitSchedule | None:
    if start == target and not offset and not mix:
        return None
    chosen: dict[str, Any] = {
        "start": start,
        "period": max(1, period),
        "offset": offset,
        "mix_ratio": mix,
    }
    if sensitive:
        chosen |= {"sensitivity": "eigenvalue", "mixed_end": True}
    return BitSchedule.model_validate({key: value for key, value in chosen.items() if value})


def _check_period(found: Imported, period: int, key: str, changes: int) -> None:
    check_range(period, key, 0)
    # The first two changes are in the steps 1 and 2 either way.
    if period == 0 and changes > 2:
        found.warn(key, "0 takes a bit off at every step there; here in the steps 1, 2, 4, ...")


def _mix(where: str, shared: dict[str, Any]) -> float:
    mixed = dict(shared.pop("fp16_mixed_quantize", {}))
    if not mixed.get("enabled"):
        return 0.0
    ratio = mixed.get("quantize_change_ratio", 0.001)
    check_range(ratio, f"{where}.fp16_mixed_quantize.quantize_change_ratio", 0, 1)
    return float(ratio)


def _grid(
    found: Imported, where: str, shared: dict[str, Any], kind_key: str, rounding_key: str
) -> dict[str, Any]:
    """Settings of a WeightGrid but its bits."""
    grid = shared.pop("quantization_type", "symmetric")
    check_choice(grid, kind_key, _GRIDS)
    rounding = shared.pop("rounding", "nearest")
    check_choice(rounding, rounding_key, _ROUNDINGS)
    if shared.pop("quantizer_kernel", False) and rounding == "nearest":
        found.warn(rounding_key, "nearest as it says; DeepSpeed's kernel took stochastic")
    shared.pop("quantize_verbose", None)
    groups = shared.pop("quantize_groups", 1)
    check_range(groups, f"{where}.quantize_groups", 1)
    share = {"per": "tensor"} if groups == 1 else {"groups": groups}
    chosen = {**share, "range": "full", "rounding": rounding}
    return chosen if grid == "symmetric" else {**chosen, "grid": grid}


def _sections(
    found: Imported, where: str, section: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], tuple[str, ...]]]]:
    """Shared parameters, and parameters and patterns by the path of a group; none if off."""
    shared = dict(section.get("shared_parameters", {}))
    if not shared.pop("enabled", False):
        return shared, {}
    groups = {}
    for name, group in section.get("different_groups", {}).items():
        place = f"{where}.different_groups.{name}"
        if group.get("related_modules"):
            found.warn(f"{place}.related_modules", "no effect")
        modules = group.get("modules", "*")
        texts = [modules] if isinstance(modules, str) else modules
        if not texts:
            raise ValueError(f"{place}.modules=[]: must name a module")
        params = dict(_taken(dict(group), "params", place))
        groups[place] = params, tuple(_whole(text, f"{place}.modules") for text in texts)
    if not groups:
        raise ValueError(f"{where}: enabled, but different_groups is empty")
    return shared, groups


def _whole(text: str, key: str) -> str:
    """A pattern of whole names for one that DeepSpeed searched for within names."""
    if text == "*":
        return ".*"
    flags = _FLAGS.match(text)
    start = 0 if flags is None else flags.end()
    whole = f"{text[:start]}.*(?:{text[start:]}).*"
    try:
        # Both: a)|(b is none by itself, and would be one within the brackets here.
        re.compile(text)
        re.compile(whole)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key}={json.dumps(text)}: no regular expression: {error}") from error
    return whole


def _unknown(found: Imported, where: str, rest: Mapping[str, Any]) -> None:
    for key in rest:
        found.warn(f"{where}.{key}", "no effect")
