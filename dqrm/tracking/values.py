"""Turn configuration and metrics into what MLflow accepts, and say so where something is lost."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# mlflow/utils/validation.py of 3.17: MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH and
# MAX_ENTITY_KEY_LENGTH. MLflow cuts longer values without a word.
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_KEY_LENGTH = 250

_FORBIDDEN = re.compile(r"[^\w\-. /:]")


def flatten(params: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys and text values.

    Values are written as in YAML (``true``, ``null``, ``[512, 256]``), so that what MLflow shows
    can be pasted back as an override. An empty mapping is one value, ``{}``.

    Example: ``{"quant": {"bits": 4}, "name": None}`` gives ``quant.bits = 4`` and
    ``name = null``.
    """
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}.")
        else:
            yield clean_key(path), cut(_text(value), MAX_PARAM_LENGTH, "whole in config.yaml")


def clean_key(key: str) -> str:
    """Return ``key`` with the characters that MLflow refuses replaced by underscores."""
    return _FORBIDDEN.sub("_", key)[:MAX_KEY_LENGTH]


def cut(text: str, limit: int, remedy: str) -> str:
    """Return ``text``, or its beginning and a visible note when it is longer than ``limit``."""
    if len(text) <= limit:
        return text
    note = f" ... [cut: {len(text)} characters, {remedy}]"
    return text[: limit - len(note)] + note


def numbers(values: Mapping[str, object]) -> dict[str, float]:
    """Return the metrics that are numbers; NaN and infinity are numbers, None is not."""
    result = {}
    for key, value in values.items():
        try:
            result[clean_key(key)] = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    return result


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}".replace(".-inf", "-.inf")
    if isinstance(value, Path):
        return str(value)
    return json.dumps(value, default=str)
