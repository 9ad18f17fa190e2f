"""The base of every configuration section: typed, frozen, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A configuration section. The string under each field is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def differs(self, field: str) -> bool:
        """Return whether a field has another value than its default.

        For fields without effect beside others, which are refused then. Not model_fields_set: a
        file with every setting spelled out, such as the record of a run, is to be read again.
        """
        return bool(getattr(self, field) != type(self).model_fields[field].default)
