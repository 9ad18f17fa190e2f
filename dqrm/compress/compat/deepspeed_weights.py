"""Weights and inputs on grids, in DeepSpeed's JSON: ``weight_quantization`` and MoQ."""

from typing import Any

from dqrm.compress.compat.deepspeed_imported import Imported, sections, taken, warn_unknown
from dqrm.compress.compat.deepspeed_types import (
    check_bits,
    check_choice,
    check_few_bits,
    check_range,
)
from dqrm.compress.transforms.config import ActivationGrid, BitSchedule, QuantTransform

_WEIGHT = "compression_training.weight_quantization"
_WEIGHT_SHARED = f"{_WEIGHT}.shared_parameters"
_GRIDS = ("symmetric", "asymmetric")
_ROUNDINGS = ("nearest", "stochastic")
_IN_FORWARD = "no effect with quantize_weight_in_forward, as in DeepSpeed"


def read_weights(found: Imported, section: dict[str, Any]) -> None:
    """Take over ``weight_quantization``."""
    shared, groups = sections(found, _WEIGHT, section)
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
    warn_unknown(found, _WEIGHT_SHARED, shared)
    for place, (params, match) in groups.items():
        where = f"{place}.params"
        start, target = taken(params, "start_bits", where), taken(params, "target_bits", where)
        period = params.pop("quantization_period", 1)
        if in_forward and start != target:
            found.warn(f"{where}.start_bits", f"{_IN_FORWARD}: target_bits at once")
            start = target
        check_bits(start, target, where)
        check_few_bits(target, grid, *keys)
        _check_period(found, period, f"{where}.quantization_period", start - target)
        schedule = _schedule(start, target, period, offset, mix)
        found.transforms.append(_quant(match, target, grid, schedule))
        warn_unknown(found, where, params)


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


def read_activations(found: Imported, section: dict[str, Any]) -> None:
    """Take over ``activation_quantization``."""
    where = "compression_training.activation_quantization"
    shared, groups = sections(found, where, section)
    if not groups:
        return
    common = f"{where}.shared_parameters"
    grid = shared.pop("quantization_type", "symmetric")
    check_choice(grid, f"{common}.quantization_type", _GRIDS)
    if shared.pop("range_calibration", "dynamic") != "dynamic":
        found.warn(f"{common}.range_calibration", "dynamic, a scale a token, in its place")
    if shared.pop("schedule_offset", 1000):
        found.warn(f"{common}.schedule_offset", "no effect: quantized from the first step on")
    warn_unknown(found, common, shared)
    for place, (params, match) in groups.items():
        bits = taken(params, "bits", f"{place}.params")
        if bits != 8:
            raise ValueError(f"{place}.params.bits={bits}: must be 8")
        act = ActivationGrid.model_validate({} if grid == "symmetric" else {"grid": grid})
        found.transforms.append(QuantTransform(kind="quant", match=match, act=act))
        warn_unknown(found, f"{place}.params", params)


def read_moq(found: Imported, moq: dict[str, Any], eigenvalue: Any) -> None:
    """Take over ``quantize_training``, and ``eigenvalue`` where it stands beside."""
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
        warn_unknown(found, name, section)


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
