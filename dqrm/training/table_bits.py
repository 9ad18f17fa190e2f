"""How many bits each embedding table gets under a budget of bytes.

What bits cost a table is foreseen by the empirical Fisher information of a trained model: half the
squared rounding error of every weight, times its mean squared gradient over batches. Gradients of
tables are sparse, so only the rows of a batch are rounded and nothing of a table's size is made.
Rows count by how often they are looked up and by how much the loss depends on them. The bits of
all tables are then a multiple-choice knapsack (:mod:`dqrm.compress.signals.allocate`).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dqrm.compress import grids
from dqrm.compress.config import Bits, TableGranularity
from dqrm.compress.signals.allocate import Candidate
from dqrm.compress.signals.budget import Allocated, Budget, spend
from dqrm.data.batch import Batch
from dqrm.data.dataset import PreparedDataset
from dqrm.data.order import RowOrder
from dqrm.models.dlrm import DLRM
from dqrm.models.embedding import EmbeddingBagCollection, row_blocks
from dqrm.models.sizes import packed_table_bytes
from dqrm.training.saved import load_saved, training_data
from dqrm.training.warm_start import find_model

OPTIONS: tuple[Bits, ...] = (8, 4, 2)
"""What a table may have where nothing else is said."""


@dataclass(frozen=True)
class TableBits:
    """Bits of each table, and what they cost."""

    options: tuple[Bits, ...]
    """What a table may have."""
    granularity: TableGranularity
    """Of the scales that bytes and losses are of."""
    rows: dict[str, int]
    """Of each table."""
    allocated: Allocated
    """Position of the option of each table, and what any other would cost."""

    @property
    def bits(self) -> dict[str, Bits]:
        """Of each table, as ``quant.table_bits`` takes them."""
        return {name: self.options[chosen] for name, chosen in self.allocated.chosen.items()}

    def as_tree(self) -> dict[str, Any]:
        """Return all that was found, as JSON."""
        spent = self.allocated
        total = spent.total(spent.chosen)
        return {
            "table_bits": self.bits,
            "granularity": self.granularity,
            "bytes": total.cost,
            "fp32_bytes": spent.fp32_bytes,
            "expected_loss": total.loss,
            "options": self.options,
            "tables": {
                name: {"rows": self.rows[name], **told} for name, told in spent.as_tree().items()
            },
        }


def table_bits_of(
    path: Path,
    budget: Budget,
    options: Sequence[Bits] = OPTIONS,
    granularity: TableGranularity = "table",
    *,
    data: str | None = None,
    batches: int = 1000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TableBits:
    """Choose the bits of each table by a saved model.

    Args:
        path: a finished run's folder or a checkpoint.
        budget: see :func:`choose_table_bits`.
        options: bits that a table may have.
        granularity: of the scales of the tables to come.
        data: a prepared data set; the one the run was trained on when not given.
        batches: of training rows, as large as the run's and in the order of its first epoch.
        progress: takes the batches done, and all of them; may raise.

    Raises:
        ValueError: there is no checkpoint, it was trained on other columns or vocabularies, or
            even the smallest options take more than the budget.
    """
    checkpoint = find_model(path)
    dataset = PreparedDataset.open(data or training_data(path))
    model = load_saved(checkpoint.path, dataset).model
    config, split = checkpoint.config, dataset.split("train")
    order = RowOrder(split.num_rows, config.train.seed, 0, config.data.window_rows)
    count = min(batches, split.num_batches(config.data.batch_size))
    drawn = itertools.islice(split.batches(config.data.batch_size, order=order), count)
    return choose_table_bits(
        model, drawn, budget, options, granularity, lambda done: progress(done, count)
    )


def choose_table_bits(
    model: DLRM,
    batches: Iterable[Batch],
    budget: Budget,
    options: Sequence[Bits] = OPTIONS,
    granularity: TableGranularity = "table",
    check: Callable[[int], None] = lambda done: None,
) -> TableBits:
    """Choose the bits of each table at the least expected loss.

    Args:
        model: trained, with tables that are not packed; put into evaluation mode, and left with
            gradients for the tables alone.
        batches: of training rows; their size is a part of what the Fisher information means
            (arXiv 2204.09656): take that of the training.
        budget: bytes that the tables may take together; its ``like`` is a position in ``options``.
        options: bits that a table may have.
        granularity: of the scales of the tables to come; ``model``, whose tables are FP32 as a
            rule, says nothing of them.
        check: called after each batch with the number of them; may raise.

    Raises:
        TypeError: the tables are packed, or shared out among processes.
        ValueError: there is no batch, or even the smallest options take more than the budget.
    """
    bags = model.emb_l
    if not isinstance(bags, EmbeddingBagCollection):
        raise TypeError(f"{type(bags).__name__}: packed or shared tables have no gradients")
    losses = expected_losses(model, bags, batches, options, granularity, check)
    candidates = {
        table.name: [
            Candidate(
                packed_table_bytes(table.num_rows, bags.embedding_dim, bits, granularity),
                float(loss),
            )
            for bits, loss in zip(options, of_table, strict=True)
        ]
        for table, of_table in zip(bags.tables, losses, strict=True)
    }
    fp32_bytes = 4 * bags.num_rows * bags.embedding_dim
    rows = {table.name: table.num_rows for table in bags.tables}
    return TableBits(tuple(options), granularity, rows, spend(candidates, fp32_bytes, budget))


def expected_losses(
    model: DLRM,
    bags: EmbeddingBagCollection,
    batches: Iterable[Batch],
    options: Sequence[Bits],
    granularity: TableGranularity,
    check: Callable[[int], None],
) -> Tensor:
    """Return what each option of each table is expected to add to the loss.

    Args:
        model: as in :func:`choose_table_bits`.
        bags: its tables.
        batches: of training rows.
        options: bits.
        granularity: of the scales.
        check: called after each batch.

    Returns:
        float64 [tables, options].

    Raises:
        ValueError: there is no batch.
    """
    model.eval().requires_grad_(False)
    bags.requires_grad_(True)
    largest_value = _largest_values(bags) if granularity == "table" else None
    ends = bags.table_start + torch.tensor([table.num_rows for table in bags.tables])
    sums = torch.zeros(len(options), len(bags.tables), dtype=torch.float64)
    count = 0
    for batch in batches:
        bags.leaf.grad = None
        logits = model(batch.dense, batch.indices, batch.offsets)
        functional.binary_cross_entropy_with_logits(logits, batch.label).backward()  # type: ignore[no-untyped-call]
        count += 1
        gradient = bags.row_gradient()
        assert gradient is not None
        values = bags.storage.read(gradient.rows).detach()
        table = torch.searchsorted(ends, gradient.rows, right=True)
        largest = (
            values.abs().amax(1, keepdim=True)
            if largest_value is None
            else largest_value[table].unsqueeze(1)
        )
        fisher = gradient.values.double().square_()
        for total, bits in zip(sums, options, strict=True):
            if bits != 32:
                error = _rounded(values, largest, bits).sub_(values).double()
                total.index_add_(0, table, (fisher * error.square_()).sum(1))
        check(count)
    bags.leaf.grad = None
    if not count:
        raise ValueError("no batch to take gradients of")
    return sums.T / (2 * count)


def _rounded(values: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Rows on a grid of so many bits, float32 [N, D]; ``largest`` [N, 1] is the scale's value."""
    code = grids.largest_code(bits)
    scale = grids.scale_of(largest, code)
    return grids.dequantize(grids.quantize(values, scale, code), scale)


def _largest_values(bags: EmbeddingBagCollection) -> Tensor:
    """The largest magnitude of each table, float32 [tables]; read by blocks of rows."""
    found = torch.zeros(len(bags.tables))
    for number, (table, start) in enumerate(
        zip(bags.tables, bags.table_start.tolist(), strict=True)
    ):
        for rows in row_blocks(start, table.num_rows):
            found[number] = torch.maximum(
                found[number], bags.storage.read(rows).detach().abs().max()
            )
    return found
