"""Fewer layers: some entries of a module list stay (arXiv 2206.01859, section 4)."""

from collections.abc import Sequence
from operator import attrgetter

from torch import nn

from dqrm.compress.transforms.base import Transform


class LayerReduction(Transform):
    """Keeps the named layers of a list, with their weights; the others leave the model.

    Args:
        path: of the ``nn.ModuleList``, as in ``bert.encoder.layer``.
        layers: numbers of the layers that stay, in the order they are to have.
        count: attribute that says how many there are, as in ``config.num_hidden_layers``.
    """

    order = 0

    def __init__(self, path: str, layers: Sequence[int], count: str | None = None) -> None:
        if not layers:
            raise ValueError("layers: name at least one that stays")
        self.path = path
        self.layers = tuple(layers)
        self.count = count

    def attach(self, model: nn.Module, steps: int) -> None:
        """Take the other layers out."""
        try:
            listed = model.get_submodule(self.path)
        except AttributeError:
            listed = None
        if not isinstance(listed, nn.ModuleList):
            lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
            raise ValueError(f"path={self.path}: no list of layers; there are: {', '.join(lists)}")
        wrong = [layer for layer in self.layers if not 0 <= layer < len(listed)]
        if wrong or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"layers={list(self.layers)}: must be different numbers from 0 to {len(listed) - 1}"
            )
        if self.count is not None:
            holder, _, name = self.count.rpartition(".")
            owner = attrgetter(holder)(model) if holder else model
            if getattr(owner, name) != len(listed):
                raise ValueError(
                    f"{self.count} is {getattr(owner, name)}, but {self.path} has {len(listed)}"
                )
            setattr(owner, name, len(self.layers))
        kept = nn.ModuleList(listed[layer] for layer in self.layers)
        model.set_submodule(self.path, kept)

    def freeze(self) -> None:
        """Nothing is left to do."""
