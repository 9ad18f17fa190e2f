"""Some training rows to look at a model with, and what its layers are run on."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.tables import Examples


def draw_rows(examples: Examples, count: int, seed: int) -> Examples:
    """Return ``count`` of the rows, or all of fewer, drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator)[:count]
    return examples.take(order.tolist())


def forwards(
    model: Any, text: EncodedText, batches: Sequence[Sequence[int]]
) -> Iterator[Callable[[], object]]:
    """Yield calls of ``model``, one a batch of rows of ``text``."""
    for rows in batches:
        yield partial(model, **text.batch(rows))


def valid_tokens(text: EncodedText, batches: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return which tokens of each batch are no padding, bool [rows, tokens]."""
    return [text.batch(rows)["attention_mask"].bool() for rows in batches]
