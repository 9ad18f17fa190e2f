"""Compression settings in DeepSpeed's JSON, which DeepSpeed no longer reads, as ours.

``compression_training`` and ``quantize_training`` (MoQ) become transforms; batch size, optimizer
and precision become settings of the training. What has no effect here, or had another one there
than its name says, is told in ``warnings``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dqrm.compress.compat.deepspeed_types import AUTO_KEYS, check_types
from dqrm.compress.transforms.config import (
    ActivationGrid,
    BitSchedule,
    NMTransform,
    QuantTransform,
    TransformConfig,
)
from dqrm.configuration import first_fault

Made = TypeVar("Made", bound=BaseModel)

_LARGEST_GROUP = 16
_WEIGHT = "compression_training.weight_quantization"
_AUTO = "auto leaves it to Hugging Face's Trainer; our default counts"
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
    except ValueError as error:
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
    for key in AUTO_KEYS:
        if rest.get(key) == "auto":
            del rest[key]
            found.warn(key, _AUTO)
    batch = rest.pop("train_batch_size", None)
    micro = rest.pop("train_micro_batch_size_per_gpu", batch)
    if batch is not None or micro is not None:
        found.training["batch_size"] = batch if batch is not None else micro
    clip = rest.pop("gradient_clipping", None)
    if clip:
        found.training["max_grad_norm"] = clip
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
        for name in ("lr", "weight_decay"):
            if isinstance(params.get(name), (int, float)):
                found.training[name] = params.pop(name)
        for name, value in params.items():
            text = _AUTO if value == "auto" and name in ("lr", "weight_decay") else "no effect"
            found.warn(f"optimizer.params.{name}", text)


def _layers(found: Imported, section: dict[str, Any]) -> None:
    if not section.get("enabled"):
        return
    where = "compression_training.layer_reduction"
    kept, count = section.get("teacher_layer"), section.get("keep_number_layer")
    if kept is None and count is None:
        raise ValueError(f"{where}: neither teacher_layer nor keep_number_layer is there")
    if kept is not None and count is not None and len(kept) != count:
        raise ValueError(f"{where}: keep_number_layer={count}, teacher_layer has {len(kept)}")
    found.layers = count if kept is None else tuple(kept)
    for key in section.keys() - {"enabled", "teacher_layer", "keep_number_layer"}:
        if key in ("module_name_prefix", "other_module_name"):
            found.warn(f"{where}.{key}", "no effect: layers are found, all else is kept")
        else:
            found.warn(f"{where}.{key}", "no effect")


def _sparse(found: Imported, section: dict[str, Any]) -> None:
    where = "compression_training.sparse_pruning"
    asked = section.get("shared_parameters", {})
    method = asked.get("method", "l1")
    # Before the groups, as DeepSpeed's third method, snip_momentum, comes without any.
    if asked.get("enabled") and method not in ("l1", "topk"):
        raise ValueError(f"{where}.method={method}: only l1 and topk have a counterpart")
    shared, groups = _sections(found, where, section)
    if not groups:
        return
    shared.pop("method", None)
    offset = shared.pop("schedule_offset", 1000)
    if method == "topk":
        found.warn(f"{where}.method", _TOPK)
    elif offset:
        found.warn(f"{where}.schedule_offset", "no effect: masks are there from the first step on")
    _unknown(found, where, shared)
    for name, (params, match) in groups.items():
        ratio = _taken(params, "dense_ratio", f"{where}.{name}.params")
        keep, group = _pattern(ratio, f"{where}.{name}.dense_ratio")
        found.warn(f"{where}.{name}", f"weights are taken out as {keep}:{group}, not anywhere")
        via = {"l1": "one_shot", "topk": "sr_ste"}[method]
        found.transforms.append(
            NMTransform.model_validate(
                {"kind": "nm", "match": match, "keep": keep, "group": group, "via": via}
            )
        )
        _unknown(found, f"{where}.{name}.params", params)


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
    mix = _mix(shared)
    grid = _grid(found, _WEIGHT, shared)
    _unknown(found, _WEIGHT, shared)
    for name, (params, match) in groups.items():
        where = f"{_WEIGHT}.{name}.params"
        start, target = _taken(params, "start_bits", where), _taken(params, "target_bits", where)
        period = params.pop("quantization_period", 1)
        if in_forward and start != target:
            found.warn(f"{where}.start_bits", f"{_IN_FORWARD}: target_bits at once")
            start = target
        _check_few_bits(target, grid, f"{_WEIGHT}.quantization_type", f"{_WEIGHT}.rounding")
        schedule = _schedule(start, target, period, offset, mix)
        found.transforms.append(_quant(match, target, grid, schedule))
        _unknown(found, where, params)


def _without_moq(found: Imported, shared: dict[str, Any]) -> None:
    """Take out what DeepSpeed's optimizer does to weights, and their forward does not."""
    if shared.pop("fp16_mixed_quantize", {}).get("enabled"):
        found.warn(f"{_WEIGHT}.fp16_mixed_quantize", f"{_IN_FORWARD}: weights are never part FP32")
    if shared.get("rounding") == "stochastic":
        del shared["rounding"]
        found.warn(f"{_WEIGHT}.rounding", f"{_IN_FORWARD}: nearest")
    # Its kernel, which took stochastic for nearest, is not used there either.
    shared.pop("quantizer_kernel", None)


def _activations(found: Imported, section: dict[str, Any]) -> None:
    where = "compression_training.activation_quantization"
    shared, groups = _sections(found, where, section)
    if not groups:
        return
    grid = _kind(where, shared)
    if shared.pop("range_calibration", "dynamic") != "dynamic":
        found.warn(f"{where}.range_calibration", "dynamic, a scale a token, in its place")
    if shared.pop("schedule_offset", 1000):
        found.warn(f"{where}.schedule_offset", "no effect: quantized from the first step on")
    _unknown(found, where, shared)
    for name, (params, match) in groups.items():
        bits = _taken(params, "bits", f"{where}.{name}.params")
        if bits != 8:
            raise ValueError(f"{where}.{name}.params.bits={bits}: must be 8")
        act = ActivationGrid.model_validate({} if grid == "symmetric" else {"grid": grid})
        found.transforms.append(QuantTransform(kind="quant", match=match, act=act))
        _unknown(found, f"{where}.{name}.params", params)


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
    mix = _mix(moq)
    start, target = bits.pop("start_bits", 16), bits.pop("target_bits", 8)
    period, offset = times.pop("quantize_period", 100), times.pop("schedule_offset", 100)
    schedule = _schedule(start, target, period, offset, mix, sensitive=sensitive)
    grid = _grid(found, where, shared)
    _check_few_bits(target, grid, kind_key, rounding_key)
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
    return _made(QuantTransform, chosen)


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
    return _made(BitSchedule, {key: value for key, value in chosen.items() if value})


def _made(kind: type[Made], tree: dict[str, Any]) -> Made:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ValueError(first_fault(error, tree)) from error


def _mix(shared: dict[str, Any]) -> float:
    mixed = dict(shared.pop("fp16_mixed_quantize", {}))
    return float(mixed.get("quantize_change_ratio", 0.001)) if mixed.get("enabled") else 0.0


def _grid(found: Imported, where: str, shared: dict[str, Any]) -> dict[str, Any]:
    """Settings of a WeightGrid but its bits."""
    grid = _kind(where, shared)
    rounding = shared.pop("rounding", "nearest")
    if shared.pop("quantizer_kernel", False) and rounding == "nearest":
        found.warn(f"{where}.rounding", "nearest as it says; DeepSpeed's kernel took stochastic")
    shared.pop("quantize_verbose", None)
    groups = shared.pop("quantize_groups", 1)
    share = {"per": "tensor"} if groups == 1 else {"groups": groups}
    chosen = {**share, "range": "full", "rounding": rounding}
    return chosen if grid == "symmetric" else {**chosen, "grid": grid}


def _check_few_bits(target: int, grid: Mapping[str, Any], kind_key: str, rounding_key: str) -> None:
    """Refuse 1 and 2 bits with what DeepSpeed refuses once weights have as few."""
    if target > 2:
        return
    for key, value, only in (
        (kind_key, grid.get("grid", "symmetric"), "symmetric"),
        (rounding_key, grid["rounding"], "nearest"),
    ):
        if value != only:
            raise ValueError(
                f"{key}={value}: must be {only} with target_bits={target}, as in DeepSpeed"
            )


def _kind(where: str, shared: dict[str, Any]) -> str:
    """The quantization_type."""
    kind = str(shared.pop("quantization_type", "symmetric"))
    if kind not in ("symmetric", "asymmetric"):
        raise ValueError(f"{where}.quantization_type={kind}: must be symmetric or asymmetric")
    return kind


def _sections(
    found: Imported, where: str, section: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], tuple[str, ...]]]]:
    """Shared parameters, and parameters and patterns of each group; none of what is not enabled."""
    shared = dict(section.get("shared_parameters", {}))
    if not shared.pop("enabled", False):
        return shared, {}
    groups = {}
    for name, group in section.get("different_groups", {}).items():
        if group.get("related_modules"):
            found.warn(f"{where}.{name}.related_modules", "no effect")
        modules = group.get("modules", "*")
        texts = [modules] if isinstance(modules, str) else modules
        params = dict(_taken(dict(group), "params", f"{where}.{name}"))
        groups[name] = params, tuple(_whole(text) for text in texts)
    if not groups:
        raise ValueError(f"{where}: enabled, but different_groups is empty")
    return shared, groups


def _whole(text: str) -> str:
    """A pattern of whole names for one that DeepSpeed searched for within names."""
    return ".*" if text == "*" else f".*(?:{text}).*"


def _unknown(found: Imported, where: str, rest: Mapping[str, Any]) -> None:
    for key in rest:
        found.warn(f"{where}.{key}", "no effect")
