"""Settings of a stage as overrides of the configuration they stand in for."""

from collections.abc import Iterator, Mapping
from typing import Any

from dqrm.yaml_text import dump_value


def as_overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``{"quant": {"bits": 8}}`` as ``["quant.bits=8"]``."""
    return list(_overrides(settings, prefix))


def _overrides(settings: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _overrides(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={dump_value(value)}"
