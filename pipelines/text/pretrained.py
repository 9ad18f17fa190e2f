"""Reading transformers whose layers differ in width (``dqrm.compress.lower.shapes``)."""

from pathlib import Path
from typing import Any

import torch

from dqrm.compress.lower.shapes import SHAPES, restore_shapes
from dqrm.pipelines.text.library import import_transformers


def read_pretrained(auto: Any, folder: Path, **settings: Any) -> Any:
    """``auto.from_pretrained`` for a folder whose layers may differ in width.

    Args:
        auto: a class of transformers, AutoModel for example.
        folder: in Hugging Face's format.
        settings: names of the configuration, and whatever else from_pretrained takes.
    """
    transformers = import_transformers()
    config, rest = transformers.AutoConfig.from_pretrained(
        str(folder), local_files_only=True, return_unused_kwargs=True, **settings
    )
    if getattr(config, SHAPES, None) is None:
        return auto.from_pretrained(str(folder), local_files_only=True, **settings)
    with torch.device("meta"):
        plain = type(auto.from_config(config))

    def cut_at_once(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        restore_shapes(self)

    # Widths have to be right before values are read: a value of another width would be made anew.
    shaped: Any = type(plain.__name__, (plain,), {"__init__": cut_at_once})
    model = shaped.from_pretrained(str(folder), config=config, local_files_only=True, **rest)
    model.__class__ = plain
    return model
