"""Native loops and their plain twins: parsing of delimited text, hashing, dictionary encoding."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dqrm.kernels.delimited import Field, Plan, Role, parse_delimited
    from dqrm.kernels.keys import KeyIndex, bucket_of, encode_keys, hash_strings

__all__ = [
    "Field",
    "KeyIndex",
    "Plan",
    "Role",
    "bucket_of",
    "encode_keys",
    "hash_strings",
    "parse_delimited",
]


def __getattr__(name: str) -> object:
    # Imported on first use: numpy takes a tenth of a second that `dqrm doctor --help` need not pay.
    if name in __all__:
        from dqrm.kernels import delimited, keys

        return getattr(keys if hasattr(keys, name) else delimited, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
