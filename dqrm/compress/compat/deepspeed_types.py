"""Types of the values in DeepSpeed's JSON that mean something here."""

import json
from collections.abc import Mapping
from typing import Any

AUTO_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")
"""Keys whose value Hugging Face's Trainer fills in where it is auto."""

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
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
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
_SWITCHES = frozenset(("enabled", "quantize_weight_in_forward", "quantizer_kernel"))
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
        if key in AUTO_KEYS and value == "auto":
            continue
        if key in _WHOLE_NUMBERS and not _is_whole(value):
            raise ValueError(f"{place}={json.dumps(value)}: must be a whole number")
        if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{place}={json.dumps(value)}: must be a number")
        if key == "modules" and not _is_texts([value] if isinstance(value, str) else value):
            raise ValueError(f"{place}={json.dumps(value)}: must be text or a list of texts")
        if key == "teacher_layer" and not (isinstance(value, list) and all(map(_is_whole, value))):
            raise ValueError(f"{place}={json.dumps(value)}: must be a list of whole numbers")
        if isinstance(value, dict):
            check_types(value, place)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
