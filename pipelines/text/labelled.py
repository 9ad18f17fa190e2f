"""Sentences with labels, and the batches that processes take of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dqrm.pipelines.text.batches import EncodedText


@dataclass(frozen=True)
class Share:
    """Factors of averages over the rows of one process.

    With them, the mean over the processes is the average over the rows of all: a process counts by
    how much of what is averaged over it has, not as one among several.
    """

    rows: float = 1.0
    """Of averages over rows."""
    tokens: float = 1.0
    """Of averages over tokens."""
    pairs: float = 1.0
    """Of averages over pairs of tokens of one row."""


WHOLE = Share()
"""All rows are one process's."""


@dataclass(frozen=True)
class TextBatch:
    """Rows of a batch that one process computes."""

    inputs: dict[str, Tensor]
    """Of the model, int64 [rows, tokens]; empty without rows."""
    labels: Tensor
    """Of the rows; there may be none."""
    share: Share


@dataclass(frozen=True)
class LabelledText:
    """Encoded sentences and what is true of them."""

    text: EncodedText
    labels: Tensor
    """int64 [rows], or float32 [rows] of a regression."""

    def batch(self, rows: Sequence[int], rank: int = 0, world_size: int = 1) -> TextBatch:
        """Return what the process ``rank`` of ``world_size`` takes of a batch.

        Rows of a batch are in the order of their lengths: every so manieth of them makes equal
        work.

        Args:
            rows: of the whole batch.
            rank: number of the process.
            world_size: how many there are.
        """
        own = list(rows[rank::world_size])
        inputs = self.text.batch(own) if own else {}
        share = WHOLE
        if world_size > 1:
            lengths = self.text.lengths
            share = Share(
                *(
                    world_size
                    * sum(lengths[row] ** power for row in own)
                    / sum(lengths[row] ** power for row in rows)
                    for power in (0, 1, 2)
                )
            )
        return TextBatch(inputs, self.labels[own], share)
