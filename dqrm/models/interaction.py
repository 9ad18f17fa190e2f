"""How the bottom MLP's output and the pooled embeddings meet."""

import torch
from torch import Tensor, nn


class DotInteraction(nn.Module):
    """Inner products of every pair of feature vectors (arXiv 1906.00091, section 2.1.3).

    Args:
        num_vectors: F, the dense vector and one pooled embedding per table.
        itself: also take each vector's product with itself.
    """

    pairs: Tensor

    def __init__(self, num_vectors: int, *, itself: bool = False) -> None:
        super().__init__()
        row, column = torch.tril_indices(num_vectors, num_vectors, offset=0 if itself else -1)
        self.register_buffer("pairs", row * num_vectors + column, persistent=False)

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Return the dense vector followed by the pairs' products.

        Args:
            dense: [B, D], the bottom MLP's output.
            pooled: [B, F - 1, D].

        Returns:
            [B, D + F(F-1)/2], or F(F+1)/2 with ``itself``; pairs in the order of the rows of
            the lower triangle, as in the reference.
        """
        vectors = torch.cat([dense.unsqueeze(1), pooled.to(dense.dtype)], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat([dense, products.index_select(1, self.pairs)], dim=1)


class ConcatInteraction(nn.Module):
    """The vectors side by side: [B, F * D]."""

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Return dense [B, D] and pooled [B, F - 1, D] as [B, F * D]."""
        return torch.cat([dense, pooled.to(dense.dtype).flatten(1)], dim=1)
