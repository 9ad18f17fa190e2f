"""The dot interaction of feature vectors (arXiv 1906.00091, section 2.1.3), forward and backward.

Symbols: B samples, F vectors a sample, of which slot 0 is the dense one, D values a vector,
P pairs: F(F-1)/2, or F(F+1)/2 with each vector's product with itself.

A row of the output is the dense vector followed by the products of vectors i and j, row after row
of the lower triangle. For F = 4 (d for dense), without and with ``itself``:

    [ d | 1.0 | 2.0 2.1 | 3.0 3.1 3.2 ]
    [ d | 0.0 | 1.0 1.1 | 2.0 2.1 2.2 | 3.0 3.1 3.2 3.3 ]

Sums are float32 in an order that differs between instruction sets but not between numbers of
threads. NaN and infinity reach exactly the products, and the gradients, that they are factors of;
the plain backward also multiplies them with the zeros it keeps for pairs that do not exist.
"""

from typing import Any

import torch
from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.library import LIBRARY, define_operator


def interaction_width(num_vectors: int, dim: int, *, itself: bool = False) -> int:
    """Return D + P, the width of the output."""
    return dim + num_vectors * (num_vectors + (1 if itself else -1)) // 2


def dot_interaction_reference(vectors: Tensor, *, itself: bool = False) -> Tensor:
    """Return the dense vectors and the pairs' products, in plain PyTorch: the definition.

    Args:
        vectors: [B, F, D] of any floating dtype and device.
        itself: also take each vector's product with itself.

    Returns:
        [B, D + P].
    """
    products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
    return torch.cat([vectors[:, 0], products.index_select(1, _pairs(vectors, itself))], dim=1)


def dot_interaction_backward_reference(
    vectors: Tensor, grad_out: Tensor, *, itself: bool = False
) -> Tensor:
    """Return the gradient of the vectors, [B, F, D]: the symmetric matrix of grad_out times them.

    Args:
        vectors: [B, F, D].
        grad_out: [B, D + P].
        itself: as in the forward.
    """
    batch, count, dim = vectors.shape
    matrix = grad_out.new_zeros(batch, count * count)
    matrix = matrix.index_copy(1, _pairs(vectors, itself), grad_out[:, dim:])
    matrix = matrix.view(batch, count, count)
    grad = torch.bmm(matrix + matrix.transpose(1, 2), vectors)
    grad[:, 0] += grad_out[:, :dim]
    return grad


def interaction_forward(vectors: Tensor, out: Tensor, itself: bool = False) -> None:
    """Write the interaction of ``vectors`` into ``out``.

    Args:
        vectors: float32 [B, F, D]; a sample's vectors are contiguous, samples may be apart.
        out: float32 [B, D + P]; rows are contiguous, and may be apart. Shares no memory with
            vectors.
        itself: also take each vector's product with itself.

    Raises:
        ValueError: a dtype, shape or stride is not as above; nothing was written.
    """
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        out.copy_(dot_interaction_reference(vectors, itself=itself))
        return
    native.interaction_forward(
        capsule(vectors), capsule(out), itself, torch.get_num_threads(), cpu.isa_level()
    )


def interaction_backward(
    vectors: Tensor, grad_out: Tensor, grad_vectors: Tensor, itself: bool = False
) -> None:
    """Write the gradient of the vectors, that of the copied dense vector included.

    Args:
        vectors: float32 [B, F, D], what the forward was given.
        grad_out: float32 [B, D + P]; rows are contiguous, and may be apart.
        grad_vectors: float32 [B, F, D], written; as vectors, with which it shares no memory.
        itself: as in the forward.

    Raises:
        ValueError: a dtype, shape or stride is not as above; nothing was written.
    """
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        grad_vectors.copy_(dot_interaction_backward_reference(vectors, grad_out, itself=itself))
        return
    native.interaction_backward(
        capsule(vectors),
        capsule(grad_out),
        capsule(grad_vectors),
        itself,
        torch.get_num_threads(),
        cpu.isa_level(),
    )


def dot_interaction(vectors: Tensor, *, itself: bool = False) -> Tensor:
    """Return the dense vectors and the pairs' products; torch sees it and differentiates it once.

    Args:
        vectors: [B, F, D]. float32 on the CPU takes the compiled loops, anything else the plain
            definition.
        itself: also take each vector's product with itself.

    Returns:
        [B, D + P].
    """
    if vectors.dtype != torch.float32 or vectors.device.type != "cpu":
        return dot_interaction_reference(vectors, itself=itself)
    out: Tensor = torch.ops.dqrm.dot_interaction(vectors, itself)
    return out


def _pairs(vectors: Tensor, itself: bool) -> Tensor:
    """Positions of the pairs in a flattened F x F matrix, int64 [P]."""
    count = vectors.shape[1]
    pairs = torch.tril_indices(count, count, offset=0 if itself else -1, device=vectors.device)
    return pairs[0] * count + pairs[1]


def _forward_op(vectors: Tensor, itself: bool) -> Tensor:
    vectors = vectors.contiguous()
    out = vectors.new_empty(_shape_of_output(vectors, itself))
    interaction_forward(vectors, out, itself)
    return out


def _backward_op(vectors: Tensor, grad_out: Tensor, itself: bool) -> Tensor:
    vectors = vectors.contiguous()
    grad_vectors = torch.empty_like(vectors)
    interaction_backward(vectors, grad_out.contiguous(), grad_vectors, itself)
    return grad_vectors


def _shape_of_output(vectors: Tensor, itself: bool) -> tuple[int, int]:
    batch, count, dim = vectors.shape
    return batch, interaction_width(count, dim, itself=itself)


def _forward_fake(vectors: Tensor, itself: bool) -> Tensor:
    return vectors.new_empty(_shape_of_output(vectors, itself))


def _backward_fake(vectors: Tensor, grad_out: Tensor, itself: bool) -> Tensor:
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    vectors, ctx.itself = inputs
    ctx.save_for_backward(vectors)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
    (vectors,) = ctx.saved_tensors
    return torch.ops.dqrm.dot_interaction_backward(vectors, grad_out, ctx.itself), None


define_operator(
    "dot_interaction(Tensor vectors, bool itself) -> Tensor", _forward_op, _forward_fake
)
define_operator(
    "dot_interaction_backward(Tensor vectors, Tensor grad_out, bool itself) -> Tensor",
    _backward_op,
    _backward_fake,
)
torch.library.register_autograd(
    "dqrm::dot_interaction", _differentiate, setup_context=_remember, lib=LIBRARY
)
