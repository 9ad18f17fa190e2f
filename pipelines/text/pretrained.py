"""Reading transformers whole, also those whose layers differ in width (``pruned_shapes``)."""

from pathlib import Path
from typing import Any

import torch

from dqrm.compress.lower.shapes import SHAPES, restore_shapes
from dqrm.pipelines.text.library import import_transformers
from dqrm.tensor_files import require_whole

_NAMES_TOLD = 3


def read_pretrained(auto: Any, folder: Path, *, new_head: bool, **settings: Any) -> Any:
    """``auto.from_pretrained`` for a folder whose layers may differ in width.

    Args:
        auto: a class of transformers, AutoModel for example.
        folder: in Hugging Face's format.
        new_head: make a head or a pooler with random values where the folder has none that fits.
        settings: names of the configuration, and whatever else from_pretrained takes.

    Raises:
        OSError: it lacks a file.
        ValueError: it is no such model, or not all of one.
    """
    require_whole(folder)
    transformers = import_transformers()
    # Sizes that do not fit are refused below, by what they belong to.
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    config, rest = transformers.AutoConfig.from_pretrained(
        str(folder), local_files_only=True, return_unused_kwargs=True, **settings
    )
    if getattr(config, SHAPES, None) is None:
        model, found = auto.from_pretrained(str(folder), local_files_only=True, **settings)
        _require_values(model, found, new_head)
        return model
    with torch.device("meta"):
        plain = type(auto.from_config(config))

    def cut_at_once(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        restore_shapes(self)

    # Widths have to be right before values are read: a value of another width would be made anew.
    shaped: Any = type(plain.__name__, (plain,), {"__init__": cut_at_once})
    model, found = shaped.from_pretrained(str(folder), config=config, local_files_only=True, **rest)
    model.__class__ = plain
    _require_values(model, found, new_head)
    return model


def _require_values(model: Any, found: dict[str, Any], new_head: bool) -> None:
    """Refuse a model with random values in its encoder, as transformers fills what a file lacks."""
    missing = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if new_head:
        encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
        missing = {
            name
            for name in missing
            if name.startswith(encoder) and not name.startswith(f"{encoder}pooler.")
        }
    if missing:
        first = ", ".join(sorted(missing)[:_NAMES_TOLD])
        raise ValueError(
            f"its weights are not those of its config.json; {len(missing)} missing or of another "
            f"shape: {first}{', ...' if len(missing) > _NAMES_TOLD else ''}"
        )
