"""torch.ops.dqrm.embedding_lookup: the kernels as autograd and torch.compile see them."""

from typing import Any

import torch
from torch import Tensor

from dqrm.kernels.embedding import tables_of
from dqrm.kernels.library import LIBRARY, define_operator


def embedding_lookup(
    leaf: Tensor,
    weight: Tensor,
    scales: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    sample_weights: Tensor | None,
    tables: int,
) -> Tensor:
    """Look up, quantize and pool; ``leaf`` receives a sparse gradient of the looked-up rows.

    Args:
        leaf: float32 [R, D], of which only the shape is read.
        weight: what the storage keeps of the rows.
        scales: float32 [T].
        indices: int32 or int64 [N], table-major ids local to their table.
        offsets: int64 [T * B + 1], or None for one id a bag.
        sample_weights: float32 [N] or None; receives no gradient.
        tables: ``EmbeddingTables.handle`` of the tables.

    Returns:
        float32 [B, T, D].
    """
    arguments = leaf, weight, scales, indices, offsets, sample_weights, tables
    result: Tensor
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        # A compiled backward has no sparse gradients; this call stays between compiled parts.
        result = torch.compiler.disable(torch.ops.dqrm.embedding_lookup)(*arguments)  # type: ignore[no-untyped-call]
    else:
        result = torch.ops.dqrm.embedding_lookup(*arguments)
    return result


def _lookup(
    leaf: Tensor,
    weight: Tensor,
    scales: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    sample_weights: Tensor | None,
    tables: int,
) -> Tensor:
    out = _empty_output(leaf, scales, indices, offsets)
    kernel = tables_of(tables).on(weight, scales)
    kernel.lookup(indices.contiguous(), offsets, out, sample_weights)
    return out


def _empty_output(leaf: Tensor, scales: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    return leaf.new_empty(bags // scales.shape[0], scales.shape[0], leaf.shape[1])


def _fake_lookup(
    leaf: Tensor,
    weight: Tensor,
    scales: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    sample_weights: Tensor | None,
    tables: int,
) -> Tensor:
    return _empty_output(leaf, scales, indices, offsets)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    leaf, weight, scales, indices, offsets, sample_weights, tables = inputs
    ctx.shape = leaf.shape
    ctx.save_for_backward(weight, scales, indices, offsets, sample_weights)
    ctx.tables = tables


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scales, indices, offsets, sample_weights = ctx.saved_tensors
    kernel = tables_of(ctx.tables).on(weight, scales)
    rows, values = kernel.row_gradient(
        indices.contiguous(), offsets, grad.contiguous(), sample_weights
    )
    sparse = torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, ctx.shape, check_invariants=False, is_coalesced=True
    )
    return sparse, None, None, None, None, None, None


define_operator(
    "embedding_lookup(Tensor leaf, Tensor weight, Tensor scales, Tensor indices, "
    "Tensor? offsets, Tensor? sample_weights, int tables) -> Tensor",
    _lookup,
    _fake_lookup,
)
torch.library.register_autograd(
    "dqrm::embedding_lookup", _backward, setup_context=_setup_context, lib=LIBRARY
)
