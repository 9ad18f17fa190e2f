"""Some training rows to look at a model with, and what its layers are run on."""

from collections.abc import Callable, Sequence
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
    model: Any, text: EncodedText, batches: Sequence[Sequence[int]], check: Callable[[], None]
) -> list[Callable[[], object]]:
    """Return calls of ``model``, one a batch.

    Args:
        model: takes what ``text`` makes of rows.
        text: encoded sentences.
        batches: rows of each call.
        check: called before each of them; may raise.
    """

    def forward(rows: Sequence[int]) -> object:
        check()
        return model(**text.batch(rows))

    return [partial(forward, rows) for rows in batches]


def valid_tokens(text: EncodedText, batches: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return which tokens of each batch are no padding, bool [rows, tokens]."""
    return [text.batch(rows)["attention_mask"].bool() for rows in batches]
