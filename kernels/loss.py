"""Binary cross-entropy of logits, with its gradient in the same pass."""

import torch
from torch import Tensor
from torch.nn import functional

from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.dlpack import capsule


def bce_with_logits(
    logits: Tensor, labels: Tensor, grad_out: Tensor, *, rows: float | None = None
) -> float:
    """Return the mean loss and write its gradient to ``grad_out``.

        loss = sum(max(z, 0) - z * y + log(1 + exp(-|z|))) / rows
        grad = (sigmoid(z) - y) / rows

    Losses are summed in double precision, with the same bits at every instruction set. NaN
    propagates; an infinite logit gives an infinite loss or NaN. No rows: NaN, as a mean is.

    Args:
        logits: float32 [B] or [B, 1], contiguous.
        labels: float32, as many.
        grad_out: float32 of the shape of logits, contiguous; may be ``logits`` itself.
        rows: what the mean is over, above 0, where these are not all; B when not given.
    """
    for name, tensor in (("logits", logits), ("labels", labels), ("grad_out", grad_out)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous float32, is {tensor.dtype}")
    count = logits.numel()
    if labels.numel() != count or grad_out.shape != logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and grad_out "
            f"{tuple(grad_out.shape)} do not belong together"
        )
    module = native()
    if module is None:
        announce_fallback()
        loss, gradient = bce_with_logits_reference(logits, labels, rows)
        grad_out.copy_(gradient)
        return loss
    divisor = count if rows is None else rows
    total: float = module.bce_with_logits(
        capsule(logits.view(-1)),
        capsule(labels.view(-1)),
        capsule(grad_out.view(-1)),
        1.0 / divisor if divisor else 0.0,
        isa_level(),
    )
    return total / divisor if divisor else float("nan")


@torch.no_grad()
def bce_with_logits_reference(
    logits: Tensor, labels: Tensor, rows: float | None = None
) -> tuple[float, Tensor]:
    """Return what :func:`bce_with_logits` returns and writes, by torch in double precision."""
    z, y = logits.double(), labels.double().view(logits.shape)
    divisor = z.numel() if rows is None else rows
    total = functional.binary_cross_entropy_with_logits(z, y, reduction="sum").item()
    gradient = (torch.sigmoid(z) - y) / (divisor or 1)
    return total / divisor if divisor else float("nan"), gradient.float()
