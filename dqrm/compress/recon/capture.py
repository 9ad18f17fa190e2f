"""What the layers of a model are called with, one layer at a time, within a bound of memory.

A model is run only as far as its first layer. From there on each layer's outputs are the next
one's inputs, so that a pass over all layers costs one forward, and only one layer's inputs exist
at a time. What does not fit in memory is kept in files.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class TensorShelf:
    """A list of float tensors; those beyond ``memory_bytes`` are files in ``folder``."""

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        self._folder = folder
        self._left = memory_bytes
        self._tensors: list[Tensor | None] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def append(self, tensor: Tensor) -> None:
        """Keep ``tensor``, without its graph."""
        index, value = len(self._tensors), tensor.detach().contiguous()
        if value.nbytes <= self._left:
            self._left -= value.nbytes
            self._tensors.append(value)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tensors.append(None)
        save_file({"value": value}, self._file(index))

    def __getitem__(self, index: int) -> Tensor:
        value = self._tensors[index]
        return load_file(self._file(index))["value"] if value is None else value

    def replace(self, index: int, tensor: Tensor) -> None:
        """Put a tensor of the same shape in the place of another, where that one is kept."""
        if self._tensors[index] is None:
            save_file({"value": tensor.detach().contiguous()}, self._file(index))
        else:
            self._tensors[index] = tensor.detach().contiguous()

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"


class _Reached(Exception):
    """The layer was called: nothing behind it has to run."""


class LayerStream:
    """The inputs of a model's layers, from the first on.

    Layers take hidden states as their first argument, return them (alone or first of a tuple), are
    called one after another, and share their other arguments, as those of encoders do. All
    forwards run without gradients; put the model into evaluation mode.

    Args:
        layers: in the order they are called in.
        forwards: each calls the model with one batch.
        folder: for what does not fit in memory; its own.
        memory_bytes: hidden states kept in memory.
        check: called before each batch runs through the model or a layer; may raise.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        forwards: Iterable[Callable[[], object]],
        folder: Path,
        memory_bytes: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._layers = layers
        self._check = check
        self._hidden = TensorShelf(folder, memory_bytes)
        self._others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.position = 0
        """Of the layer whose inputs these are."""
        handle = layers[0].register_forward_pre_hook(self._keep, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad():
                for forward in forwards:
                    self._run(forward)
        finally:
            handle.remove()

    def __len__(self) -> int:
        """Batches."""
        return len(self._hidden)

    def hidden(self, batch: int) -> Tensor:
        """Hidden states that the layer takes, float [rows, ..., width]."""
        return self._hidden[batch]

    def call(self, layer: nn.Module, batch: int) -> Tensor:
        """Call ``layer``, with gradients if they are enabled, and return its hidden states."""
        self._check()
        arguments, keywords = self._others[batch]
        result = layer(self._hidden[batch], *arguments, **keywords)
        output = result[0] if isinstance(result, tuple) else result
        assert isinstance(output, Tensor)
        return output

    def calls(self, layer: nn.Module) -> Iterator[Tensor]:
        """Call ``layer`` on every batch."""
        for batch in range(len(self)):
            yield self.call(layer, batch)

    def advance(self) -> None:
        """Go on to the inputs of the next layer, by the layer as it is now."""
        layer = self._layers[self.position]
        with torch.no_grad():
            for batch, output in enumerate(self.calls(layer)):
                self._hidden.replace(batch, output)
        self.position += 1

    def _run(self, forward: Callable[[], object]) -> None:
        self._check()
        try:
            forward()
        except _Reached:
            return
        raise ValueError("a forward never called the first layer")

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            raise ValueError("the layer's hidden states must be its first positional argument")
        self._hidden.append(args[0])
        self._others.append((args[1:], kwargs))
        raise _Reached


def masked_mean_square(error: Tensor, valid: Tensor) -> Tensor:
    """Return the mean square of ``error`` over valid tokens, a scalar with its gradient.

    Args:
        error: float [rows, tokens, width].
        valid: bool [rows, tokens]; False for padding.
    """
    return (error.square().mean(-1) * valid).sum() / valid.sum().clamp_min(1)


def input_gram(
    layer: nn.Module, module: nn.Linear, stream: LayerStream, valid: Sequence[Tensor]
) -> Tensor:
    """Return X^T X of what ``module`` takes when its layer runs on every batch, float64 [in, in].

    Args:
        layer: holds ``module``.
        module: its other pre-hooks (which quantize its input, say) have run on what is summed.
        stream: at the layer's inputs.
        valid: bool [rows, tokens] of each batch; padding is left out.
    """
    gram = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)
    batch = 0

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach()[valid[batch]].reshape(-1, module.in_features)
        # Products in float32 are exact enough for one batch; their sum is not for all.
        gram.add_((rows.T @ rows).double())

    handle = module.register_forward_pre_hook(add)
    try:
        with torch.no_grad():
            for batch in range(len(stream)):
                stream.call(layer, batch)
    finally:
        handle.remove()
    return gram


def called_linears(layer: nn.Module, stream: LayerStream) -> list[str]:
    """Return the names of a layer's linear modules in the order in which they run."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: order.append(name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            stream.call(layer, 0)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))
