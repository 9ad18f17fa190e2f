"""Transformers whose layers differ in width: where their units are, and how they are cut.

A layer may have fewer heads or feed-forward neurons than its configuration says, or none. The
configuration of a saved model then holds, under ``pruned_shapes``, the numbers of every layer; it
travels with the model through whatever reads and writes it. ``num_attention_heads`` stays what it
was, as the width of a head follows from it.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

SHAPES = "pruned_shapes"
"""Key of config.json."""

_PARTS_OF_LAYERS = {"attention", "intermediate", "output"}


@dataclass(frozen=True)
class LayerUnits:
    """The matrices of one layer that its heads and neurons are parts of."""

    layer: nn.Module
    attention: nn.Module
    """Holds query, key and value; takes the layer's input."""
    attention_output: nn.Module
    """Called with what the heads made and with the layer's input; its ``dense`` mixes heads."""
    up: nn.Linear
    """To the neurons."""
    output: nn.Module
    """Called with the neurons and with its residual; its ``dense`` mixes neurons."""
    head_size: int

    @property
    def num_heads(self) -> int:
        """Heads the layer has."""
        return linear_of(self.attention_output).in_features // self.head_size

    @property
    def num_neurons(self) -> int:
        """Feed-forward neurons the layer has."""
        return self.up.out_features


class NoHeads(nn.Module):
    """Stands in for the attention of a layer without heads: no value for any token."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return float [rows, tokens, 0], and no weights."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 0), None


def encoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of a model's layers. Raises ValueError as :func:`encoder_path`."""
    layers = model.get_submodule(encoder_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def encoder_path(model: Any) -> str:
    """Return the name of the list of a model's layers, the one as long as its configuration says.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    count = model.config.num_hidden_layers
    found = [
        str(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        # Of a weight: a list of as many steps as there happen to be layers.
        and not isinstance(module, parametrize.ParametrizationList)
    ]
    if len(found) != 1:
        which = f"several lists ({', '.join(found)})" if found else "no list"
        raise ValueError(f"{type(model).__name__}: {which} of {count} layers to take one by one")
    return found[0]


def layer_units(model: Any) -> list[LayerUnits]:
    """Return the units of each layer of an encoder that is built as BERT is.

    Such are BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA.

    Raises:
        ValueError: it is built otherwise.
    """
    config = model.config
    found = []
    for layer in encoder_layers(model):
        more = sorted({name for name, _ in layer.named_children()} - _PARTS_OF_LAYERS)
        if more:
            # MobileBERT's bottlenecks, say, which its heads and neurons work between.
            raise ValueError(
                f"{type(model).__name__}: its layers are not built as BERT's are, which have no "
                f"{', '.join(more)}"
            )
        try:
            units = LayerUnits(
                layer=layer,
                attention=layer.get_submodule("attention.self"),
                attention_output=layer.get_submodule("attention.output"),
                up=_linear(layer.get_submodule("intermediate.dense")),
                output=layer.get_submodule("output"),
                head_size=config.hidden_size // config.num_attention_heads,
            )
            linear_of(units.attention_output), linear_of(units.output)
            if not isinstance(units.attention, NoHeads):
                _projections(units)
        except AttributeError as error:
            raise ValueError(
                f"{type(model).__name__}: its layers are not built as BERT's are ({error})"
            ) from error
        found.append(units)
    return found


def linear_of(output: nn.Module) -> nn.Linear:
    """The matrix of an output module."""
    return _linear(output.get_submodule("dense"))


def keep_units(units: LayerUnits, heads: Tensor, neurons: Tensor) -> None:
    """Take all other heads and neurons out of a layer, in place.

    Args:
        units: of the layer; not used afterwards, as its attention may be another module.
        heads: bool [heads].
        neurons: bool [neurons].
    """
    rows = heads.repeat_interleave(units.head_size).nonzero()[:, 0]
    _cut(units, rows, neurons.nonzero()[:, 0], bool(heads.any()))


def _cut(units: LayerUnits, rows: Tensor | slice, neurons: Tensor | slice, attention: bool) -> None:
    """Keep these rows of query, key and value and these neurons; ``attention``: there are heads."""
    if attention:
        for linear in _projections(units):
            _put(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    else:
        units.layer.get_submodule("attention").add_module("self", NoHeads())
    mixing = linear_of(units.attention_output)
    _put(mixing, mixing.weight[:, rows], mixing.bias)
    up = units.up
    _put(up, up.weight[neurons], None if up.bias is None else up.bias[neurons])
    mixing = linear_of(units.output)
    _put(mixing, mixing.weight[:, neurons], mixing.bias)


def record_shapes(model: Any) -> None:
    """Make the configuration of ``model`` say the widths of its layers, where it did not."""
    config = model.config
    try:
        layers = layer_units(model)
    except ValueError:
        # Built otherwise, so nothing here can have cut it.
        return
    heads = [units.num_heads for units in layers]
    neurons = [units.num_neurons for units in layers]
    if {*heads} == {config.num_attention_heads} and {*neurons} == {config.intermediate_size}:
        if hasattr(config, SHAPES):
            delattr(config, SHAPES)
    else:
        setattr(config, SHAPES, {"heads": heads, "neurons": neurons})


def restore_shapes(model: Any) -> None:
    """Cut a model made from a configuration to the widths that this says; values mean nothing.

    Raises:
        ValueError: the configuration says widths that the model cannot have.
    """
    shapes = getattr(model.config, SHAPES, None)
    if shapes is None:
        return
    layers = layer_units(model)
    heads, neurons = shapes["heads"], shapes["neurons"]
    if not len(heads) == len(neurons) == len(layers):
        raise ValueError(
            f"config.json: {SHAPES} is of {len(heads)} and {len(neurons)} layers, the model has "
            f"{len(layers)}"
        )
    for units, num_heads, num_neurons in zip(layers, heads, neurons, strict=True):
        if not (0 <= num_heads <= units.num_heads and 0 <= num_neurons <= units.num_neurons):
            raise ValueError(
                f"config.json: {SHAPES} has {num_heads} heads and {num_neurons} neurons for a "
                f"layer of {units.num_heads} and {units.num_neurons}"
            )
        rows = slice(num_heads * units.head_size)
        _cut(units, rows, slice(num_neurons), num_heads > 0)


def _projections(units: LayerUnits) -> list[nn.Linear]:
    return [_linear(units.attention.get_submodule(name)) for name in ("query", "key", "value")]


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise AttributeError(f"a {type(module).__name__} where a linear layer should be")
    return module


def _put(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = nn.Parameter(weight.detach().clone(), linear.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), linear.bias.requires_grad)
    linear.out_features, linear.in_features = weight.shape
