"""Types and ranges of the values in DeepSpeed's JSON that mean something here."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""The first is the product of the others and the number of processes."""

_AUTO_KEYS = frozenset(
    (*BATCH_KEYS, "gradient_clipping", "optimizer.params.lr", "optimizer.params.weight_decay")
)
"""Paths of what Hugging Face's Trainer fills in where it is auto."""

_SECTIONS = frozenset(
    (
        "compression_training",
        "layer_reduction",
        "weight_quantization",
        "activation_quantization",
        "sparse_pruning",
        "row_pruning",
        "head_pruning",
        "channel_pruning",
        "shared_parameters",
        "different_groups",
        "params",
        "fp16_mixed_quantize",
        "eigenvalue",
        "quantize_training",
        "quantize_bits",
        "quantize_schedule",
        "quantize_algo",
        "fp16",
        "bf16",
        "optimizer",
    )
)
_WHOLE_NUMBERS = frozenset(
    (
        "keep_number_layer",
        "bits",
        "start_bits",
        "target_bits",
        "quantization_period",
        "quantize_period",
        "quantize_groups",
        "schedule_offset",
    )
)
_NUMBERS = frozenset(("dense_ratio", "quantize_change_ratio"))
_NUMBER_PATHS = frozenset(
    ("gradient_clipping", "optimizer.params.lr", "optimizer.params.weight_decay")
)
"""Of keys that have other meanings elsewhere."""
_SWITCHES = frozenset(("enabled", "quantize_weight_in_forward", "quantizer_kernel"))
_MOST_BITS = 16
_AUTO_SWITCHES = ("fp16", "bf16", "amp")
"""Sections that Hugging Face's Trainer turns on or off where enabled is auto."""


def check_types(section: Mapping[str, Any], where: str = "") -> None:
    """Refuse values of another type than a key's.

    Args:
        section: of the file, or all of it.
        where: dotted path of the section; empty for all of the file.

    Raises:
        ValueError: naming the key, at any depth.
    """
    for key, value in section.items():
        place = f"{where}.{key}" if where else key
        a_group = where.endswith(".different_groups")
        if (a_group or key in _SECTIONS) and not isinstance(value, dict):
            raise ValueError(f"{place}={json.dumps(value)}: must be an object")
        if key in _SWITCHES and not (
            isinstance(value, bool) or (value == "auto" and where in _AUTO_SWITCHES)
        ):
            raise ValueError(f"{place}={json.dumps(value)}: must be true or false")
        if place in _AUTO_KEYS and value == "auto":
            continue
        if (key in _WHOLE_NUMBERS or place in BATCH_KEYS) and not _is_whole(value):
            raise ValueError(f"{place}={json.dumps(value)}: must be a whole number")
        if (key in _NUMBERS or place in _NUMBER_PATHS) and not _is_number(value):
            raise ValueError(f"{place}={json.dumps(value)}: must be a number")
        if key == "modules" and not _is_texts([value] if isinstance(value, str) else value):
            raise ValueError(f"{place}={json.dumps(value)}: must be text or a list of texts")
        if key == "teacher_layer" and not (isinstance(value, list) and all(map(_is_whole, value))):
            raise ValueError(f"{place}={json.dumps(value)}: must be a list of whole numbers")
        if isinstance(value, dict):
            check_types(value, place)


def check_range(value: float, key: str, least: float, most: float = math.inf) -> None:
    """Refuse a number below ``least`` or above ``most``.

    Raises:
        ValueError: naming the key, given as its path.
    """
    if not least <= value <= most:
        wanted = f"{least} or more" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{key}={json.dumps(value)}: must be {wanted}")


def check_positive(value: float, key: str) -> None:
    """Refuse a number that is not above 0, as :func:`check_range` does."""
    if not value > 0:
        raise ValueError(f"{key}={json.dumps(value)}: must be greater than 0")


def check_choice(value: object, key: str, known: Sequence[str]) -> None:
    """Refuse what is not among the ``known``, as :func:`check_range` does."""
    if value not in known:
        shown = value if isinstance(value, str) else json.dumps(value)
        raise ValueError(f"{key}={shown}: must be {' or '.join(known)}")


def check_bits(start: int, target: int, where: str) -> None:
    """Refuse bits of weights that no grid has, or that go up, as :func:`check_range` does."""
    check_range(target, f"{where}.target_bits", 1, _MOST_BITS)
    check_range(start, f"{where}.start_bits", 1, _MOST_BITS)
    if start < target:
        raise ValueError(f"{where}.start_bits={start}: must be target_bits={target} or more")


def check_few_bits(target: int, grid: Mapping[str, Any], kind_key: str, rounding_key: str) -> None:
    """Refuse 1 and 2 bits with what DeepSpeed refuses once weights have as few.

    Raises:
        ValueError: naming one of the keys.
    """
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


def _is_number(value: object) -> bool:
    """Whether it is one that a float can hold: NaN is none, nor is infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
