"""Token ids, and batches of sentences that are about as long as each other."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dqrm.pipelines.text.tables import Examples

# Lengths are sorted within so many batches: nearly all padding is gone, and batches still mix.
_POOL_BATCHES = 50
# Short sentences are padded little, and there are half as many widths to make code for as lengths.
_WIDTH_MULTIPLE = 2


class EncodedText:
    """Sentences as token ids.

    Args:
        tokenizer: of transformers.
        examples: the sentences.
        max_length: tokens after which they are cut, those of the pair together.
    """

    def __init__(self, tokenizer: Any, examples: Examples, max_length: int) -> None:
        self._tokenizer = tokenizer
        encoded = tokenizer(
            examples.text, examples.text_pair, truncation=True, max_length=max_length
        )
        self._columns: dict[str, list[list[int]]] = dict(encoded)
        self.lengths = [len(ids) for ids in encoded["input_ids"]]

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the model's inputs, int64 [rows, tokens], padded to the longest."""
        columns = {name: [values[row] for row in rows] for name, values in self._columns.items()}
        padded = self._tokenizer.pad(
            columns, return_tensors="pt", pad_to_multiple_of=_WIDTH_MULTIPLE
        )
        return dict(padded)

    def in_order_of_length(self, batch_size: int) -> Iterator[list[int]]:
        """Yield the rows of each batch, the longest first: what needs most memory fails at once."""
        order = sorted(range(len(self)), key=lambda row: -self.lengths[row])
        for begin in range(0, len(order), batch_size):
            yield order[begin : begin + batch_size]

    def shuffled(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """Return the rows of each batch of an epoch: every row once, fixed by seed and epoch."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        pool = batch_size * _POOL_BATCHES
        batches = []
        for begin in range(0, len(order), pool):
            part = sorted(order[begin : begin + pool], key=lambda row: self.lengths[row])
            batches += [part[b : b + batch_size] for b in range(0, len(part), batch_size)]
        return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]
