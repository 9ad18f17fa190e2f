"""How settings name a model of the registry."""

import re
from dataclasses import dataclass

CHAMPION = "champion"
"""Alias of the version that serves."""

PREVIOUS = "previous"
"""Alias of the version that served before it."""

MODEL_NAME = r"[^/:@'\"]+"

_REFERENCE = re.compile(rf"models:/({MODEL_NAME})(?:@([^/@']+)|/([0-9]+))")


@dataclass(frozen=True)
class ModelReference:
    """``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``, as MLflow writes them."""

    name: str
    alias: str | None
    version: str | None

    @classmethod
    def parse(cls, text: str) -> "ModelReference | None":
        """Return what ``text`` names; None where it does not begin with ``models:``.

        Raises:
            ValueError: it begins so and goes on wrongly.
        """
        if not text.startswith("models:"):
            return None
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text}: write models:/NAME@{CHAMPION}, another alias, or models:/NAME/VERSION"
            )
        return cls(*match.groups())
