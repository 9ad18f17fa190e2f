"""What a file of DeepSpeed's says in our words, and how its sections are read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dqrm.compress.transforms.config import TransformConfig

_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")


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


def taken(params: dict[str, Any], key: str, where: str) -> Any:
    """Take a value that must be there out of ``params``."""
    if key not in params:
        raise ValueError(f"{where}.{key}: is missing")
    return params.pop(key)


def sections(
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
        params = dict(taken(dict(group), "params", place))
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


def warn_unknown(found: Imported, where: str, rest: Mapping[str, Any]) -> None:
    """Note what is left of a section."""
    for key in rest:
        found.warn(f"{where}.{key}", "no effect")
