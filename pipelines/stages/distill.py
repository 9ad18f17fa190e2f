"""Settings of learning from a teacher, and whether the layers of two models can be compared."""

from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from dqrm.settings import Settings

WITHOUT_ATTENTION = "attentions are compared head by head: set distill.attention to 0"
"""Ends the reasons why they cannot be."""


class Distill(Settings):
    """A teacher to learn from, all of it in one stage (arXiv 2206.01859)."""

    teacher: str
    """A fine-tuned model of the same task and tokens: stage:NAME, package:NAME or a folder."""

    logits: NonNegativeFloat = 1.0
    """Weight of the cross-entropy against the teacher's probabilities."""

    hidden: NonNegativeFloat = 1.0
    """Weight of the squared differences of hidden states, summed over layers."""

    attention: NonNegativeFloat = 1.0
    """Weight of the squared differences of attention probabilities, summed over layers. Above 0 it
    costs time, as fused attention does not tell them, and both models have the same heads."""

    labels: NonNegativeFloat = 0.0
    """Weight of the loss of the labels themselves."""

    temperature: PositiveFloat = 1.0
    """Both sides' logits are divided by it."""

    average: Literal["batch", "elements"] = "batch"
    """Of the logits' loss: over rows, or over rows and classes as XTC's scripts do (half as much of
    two classes)."""

    map: Literal["auto", "uniform"] | tuple[NonNegativeInt, ...] = "auto"
    """Teacher layer of each layer, from 0. auto: the one it was kept from, else uniform: evenly
    spread, the last on the last."""

    @model_validator(mode="after")
    def _compares_logits(self) -> Self:
        for field in ("temperature", "average"):
            if self.differs(field) and not self.logits:
                raise ValueError(f"{field} has no effect with logits=0; leave it out")
        return self

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not (self.logits or self.layerwise or self.labels):
            raise ValueError(
                "there is nothing to learn from: set logits, hidden, attention or labels above 0"
            )
        return self

    @property
    def layerwise(self) -> bool:
        """Whether anything but logits is compared."""
        return self.hidden > 0 or self.attention > 0


def widths_differ(model: Any, teacher: Any) -> str | None:
    """Why hidden states cannot be held against each other, if they cannot."""
    ours, theirs = (getattr(each.config, "hidden_size", None) for each in (model, teacher))
    if ours == theirs:
        return None
    return (
        f"hidden states are compared value by value, and the model has {ours} a token, the teacher "
        f"{theirs}: set distill.hidden to 0"
    )


def heads_differ(model: Any, teacher: Any, layers: tuple[int, ...]) -> str | None:
    """Why attentions cannot be held against each other, if they cannot.

    Args:
        model: of transformers, with or without values.
        teacher: likewise.
        layers: teacher layer of each layer of the model.
    """
    ours, theirs = _heads(model), _heads(teacher)
    for whose, heads in (("the model", ours), ("the teacher", theirs)):
        # Such a layer has no place among those that tell their attention: others would take it.
        if 0 in heads:
            return f"layer {heads.index(0)} of {whose} has no heads; {WITHOUT_ATTENTION}"
    for layer, (count, its) in enumerate(zip(ours, layers, strict=True)):
        if count != theirs[its]:
            return (
                f"layer {layer} has {count} heads, and layer {its} of the teacher has "
                f"{theirs[its]}; {WITHOUT_ATTENTION}"
            )
    return None


def _heads(model: Any) -> list[int]:
    """Heads of each layer."""
    from dqrm.compress.lower.shapes import layer_units

    try:
        return [units.num_heads for units in layer_units(model)]
    except ValueError:
        # Built otherwise, so nothing can have cut it. Some models have no attention at all.
        return [getattr(model.config, "num_attention_heads", 0)] * model.config.num_hidden_layers
