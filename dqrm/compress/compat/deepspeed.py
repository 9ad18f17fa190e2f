"""Compression settings in DeepSpeed's JSON, which DeepSpeed no longer reads, as ours.

``compression_training`` and ``quantize_training`` (MoQ) become transforms; batch size, optimizer
and precision become settings of the training. What has no effect here, or had another one there
than its name says, is told in ``warnings``.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dqrm.compress.compat.deepspeed_imported import Imported, sections, taken, warn_unknown
from dqrm.compress.compat.deepspeed_types import (
    BATCH_KEYS,
    check_positive,
    check_range,
    check_types,
)
from dqrm.compress.compat.deepspeed_weights import read_activations, read_moq, read_weights
from dqrm.compress.transforms.config import NMTransform

_LARGEST_GROUP = 16
_LEFT = "auto leaves it to Hugging Face's Trainer"
_AUTO = f"{_LEFT}; our default counts"
_TOPK = "topk learns scores for weights, which no transform does; sr_ste is the nearest"


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
        read_moq(found, moq, eigenvalue)
    elif eigenvalue is not None:
        found.warn("eigenvalue", "no effect without quantize_training")
    _layers(found, dict(compression.pop("layer_reduction", {})))
    _sparse(found, dict(compression.pop("sparse_pruning", {})))
    read_weights(found, dict(compression.pop("weight_quantization", {})))
    read_activations(found, dict(compression.pop("activation_quantization", {})))
    for name in ("row_pruning", "head_pruning", "channel_pruning"):
        section = compression.pop(name, {})
        if section.get("shared_parameters", {}).get("enabled"):
            found.warn(
                f"compression_training.{name}",
                "no effect; whole rows and heads are taken out by a stage of its own, prune",
            )
    warn_unknown(found, "compression_training", compression)
    for key in rest:
        found.warn(key, "no effect")
    if not found.transforms and found.layers is None:
        raise ValueError("no compression is enabled in it")
    return found


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
    shared, groups = sections(found, where, section)
    if not groups:
        return
    shared.pop("method", None)
    offset = shared.pop("schedule_offset", 1000)
    if method == "topk":
        found.warn(f"{common}.method", _TOPK)
    elif offset:
        found.warn(f"{common}.schedule_offset", "no effect: masks are there from the first step on")
    warn_unknown(found, common, shared)
    for place, (params, match) in groups.items():
        ratio = taken(params, "dense_ratio", f"{place}.params")
        keep, group = _pattern(ratio, f"{place}.params.dense_ratio")
        found.warn(place, f"weights are taken out as {keep}:{group}, not anywhere")
        via = {"l1": "one_shot", "topk": "sr_ste"}[method]
        found.transforms.append(
            NMTransform.model_validate(
                {"kind": "nm", "match": match, "keep": keep, "group": group, "via": via}
            )
        )
        warn_unknown(found, f"{place}.params", params)


def _pattern(ratio: float, where: str) -> tuple[int, int]:
    for group in (4, 8, _LARGEST_GROUP):
        keep = ratio * group
        if 0 < keep < group and math.isclose(keep, round(keep)):
            return round(keep), group
    raise ValueError(f"{where}={ratio}: must be a multiple of 1/{_LARGEST_GROUP} between 0 and 1")
