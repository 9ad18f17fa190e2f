"""How often rows of an embedding are looked up."""

from collections.abc import Iterable

import torch
from torch import Tensor


def access_frequency(indices: Iterable[Tensor], num_rows: int) -> Tensor:
    """Return the share of the lookups that each row takes, float64 [num_rows]; they sum to 1.

    Args:
        indices: int64, of any shape, one tensor a batch.
        num_rows: of the table.

    Raises:
        ValueError: an index is not a row, or there is no lookup.
    """
    counts = torch.zeros(num_rows, dtype=torch.int64)
    for batch in indices:
        flat = batch.reshape(-1)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < num_rows:
            raise ValueError(
                f"rows {int(flat.min())} to {int(flat.max())} of a table with {num_rows} rows"
            )
        counts += torch.bincount(flat, minlength=num_rows)
    total = int(counts.sum())
    if not total:
        raise ValueError("no lookup to count")
    return counts.double() / total
