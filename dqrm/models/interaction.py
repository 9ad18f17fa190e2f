"""How the bottom MLP's output and the pooled embeddings meet."""

import torch
from torch import Tensor, nn

from dqrm.kernels.interaction import dot_interaction


class DotInteraction(nn.Module):
    """Inner products of every pair of feature vectors (arXiv 1906.00091, section 2.1.3).

    Args:
        num_vectors: F, the dense vector and one pooled embedding per table.
        itself: also take each vector's product with itself.
    """

    def __init__(self, num_vectors: int, *, itself: bool = False) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.itself = itself

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Return the dense vector followed by the pairs' products.

        Args:
            dense: [B, D], the bottom MLP's output.
            pooled: [B, F - 1, D]; where it is more precise than dense, as under autocast, so are
                the sums.

        Returns:
            [B, D + F(F-1)/2], or F(F+1)/2 with ``itself``, in dense's dtype; pairs in the order
            of the rows of the lower triangle, as in the reference.
        """
        dtype = torch.promote_types(dense.dtype, pooled.dtype)
        vectors = torch.cat([dense.to(dtype).unsqueeze(1), pooled.to(dtype)], dim=1)
        return dot_interaction(vectors, itself=self.itself).to(dense.dtype)

    def extra_repr(self) -> str:
        """Return what repr() adds to the class name."""
        return f"num_vectors={self.num_vectors}, itself={self.itself}"


class ConcatInteraction(nn.Module):
    """The vectors side by side: [B, F * D]."""

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Return dense [B, D] and pooled [B, F - 1, D] as [B, F * D]."""
        return torch.cat([dense, pooled.to(dense.dtype).flatten(1)], dim=1)
