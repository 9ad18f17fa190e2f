"""Which tensors of a model a file holds besides packed weights, and which are of its layers."""

import re
from collections.abc import Container

from torch import Tensor, nn

_LAYER = re.compile(r"\.\d+\.")


def in_layers(tensor: str) -> bool:
    """Whether the tensor of that name is of a layer: of a module in a numbered list.

    Those of embeddings, pooler and head are not. Layers that share their weights, and those of an
    encoder and a decoder, are told by this as well.
    """
    return _LAYER.search(tensor) is not None


def dense_tensors(model: nn.Module, packed: Container[str]) -> dict[str, Tensor]:
    """Return a model's tensors by name, without the weights of the modules ``packed``.

    Tied ones are there once, by the first of their names: a file holds no tensor twice, and
    transformers ties those that it does not find.
    """
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not (name.endswith(".weight") and name.removesuffix(".weight") in packed):
            first.setdefault(id(tensor), (name, tensor.detach()))
    return dict(first.values())
