"""What ``stage: allocate`` writes, and how other stages read it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dqrm.compress.transforms.config import TransformConfig
from dqrm.configuration import first_fault

ALLOCATION_FILE = "transforms.json"
"""Within the stage's output: a list of transforms as a pipeline's file has them."""

_TRANSFORMS: TypeAdapter[tuple[TransformConfig, ...]] = TypeAdapter(tuple[TransformConfig, ...])


def with_match(option: Sequence[Mapping[str, Any]], match: Sequence[str]) -> tuple[Any, ...]:
    """Return the transforms of an option, which has none, with these patterns of names.

    Raises:
        ValueError: they are no transforms.
    """
    tree = [{**transform, "match": tuple(match)} for transform in option]
    try:
        return _TRANSFORMS.validate_python(tree)
    except ValidationError as error:
        raise ValueError(first_fault(error, tree)) from error


def read_allocation(folder: Path) -> tuple[TransformConfig, ...]:
    """Return the transforms that an allocation came to; ``folder`` is the stage's output."""
    return _TRANSFORMS.validate_python(json.loads((folder / ALLOCATION_FILE).read_text("utf-8")))


def write_allocation(folder: Path, transforms: Sequence[TransformConfig]) -> None:
    """Write the transforms, as they were set and no defaults."""
    from dqrm.data.files import write_json

    told = [transform.model_dump(mode="json", exclude_unset=True) for transform in transforms]
    write_json(folder / ALLOCATION_FILE, told)
