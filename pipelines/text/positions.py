"""How many tokens a transformer takes at a time."""

from typing import Any

from torch import nn


def longest_input(model: Any) -> int | None:
    """Return the most tokens ``model`` has positions for; None where there is no end.

    Args:
        model: of transformers, with or without values.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 0:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count from behind the row of padding.
            return int(
                positions if module.padding_idx is None else positions - module.padding_idx - 1
            )
    return int(positions)


def check_length(model: Any, max_length: int) -> None:
    """Hold the tokens after which sentences are cut against what a model takes.

    Raises:
        ValueError: the model takes fewer.
    """
    longest = longest_input(model)
    if longest is not None and max_length > longest:
        raise ValueError(f"max_length={max_length}: the model takes up to {longest} tokens")
