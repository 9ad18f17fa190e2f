"""Names of the tensors in the state of an exchange: kind/name/part, the name without for dense."""

from collections.abc import Mapping
from typing import Final

from torch import Tensor

DENSE: Final = "dense"
ROWS: Final = "rows"
OWNED: Final = "owned"


def joined(kind: str, name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parts under their full keys."""
    prefix = f"{kind}/{name}/" if name else f"{kind}/"
    return {prefix + key: value for key, value in parts.items()}


def split(state: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Return the parts of each kind and name.

    Raises:
        ValueError: a key is none of an exchange's.
    """
    result: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, rest = key.partition("/")
        if kind == DENSE:
            result.setdefault((DENSE, ""), {})[rest] = value
        elif kind in (ROWS, OWNED):
            name, _, part = rest.rpartition("/")
            result.setdefault((kind, name), {})[part] = value
        else:
            raise ValueError(f"state of an exchange: what is {key!r}?")
    return result
