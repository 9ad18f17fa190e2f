"""Exchange between processes: compressed gradients, and which collective backends there are.

Nothing is imported before it is asked for: ``from dqrm.comm import Exchange`` imports torch,
``import dqrm.comm`` does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dqrm.comm.codecs import Blocks, Cast, Codec, Largest, Signs, codec_named
    from dqrm.comm.exchange import Exchange, ReplicasDifferError, TableRows
    from dqrm.comm.message import MessageError
    from dqrm.comm.meter import Meter
    from dqrm.comm.nodes import Nodes, make_nodes
    from dqrm.comm.policy import Policy, PolicyError, Recipe, RowRecipe
    from dqrm.comm.resharding import reshard
    from dqrm.comm.row_codec import Rows, row_codec_named
    from dqrm.comm.vectors import VectorExchange
    from dqrm.comm.wire import RefusedError

_MODULES = {
    "codecs": ("Blocks", "Cast", "Codec", "Largest", "Signs", "codec_named"),
    "exchange": ("Exchange", "ReplicasDifferError", "TableRows"),
    "message": ("MessageError",),
    "meter": ("Meter",),
    "nodes": ("Nodes", "make_nodes"),
    "policy": ("Policy", "PolicyError", "Recipe", "RowRecipe"),
    "resharding": ("reshard",),
    "row_codec": ("Rows", "row_codec_named"),
    "vectors": ("VectorExchange",),
    "wire": ("RefusedError",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Blocks",
    "Cast",
    "Codec",
    "Exchange",
    "Largest",
    "MessageError",
    "Meter",
    "Nodes",
    "Policy",
    "PolicyError",
    "Recipe",
    "RefusedError",
    "ReplicasDifferError",
    "RowRecipe",
    "Rows",
    "Signs",
    "TableRows",
    "VectorExchange",
    "codec_named",
    "make_nodes",
    "reshard",
    "row_codec_named",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
