"""The base of every configuration section: typed, frozen, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A configuration section. The string under each field is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
