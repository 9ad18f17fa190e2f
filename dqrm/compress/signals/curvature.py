"""Curvature of a loss: Hessian traces and the largest eigenvalues of its blocks.

Both differentiate twice. Attention has to be computed by operators that can be (transformers:
``attn_implementation="eager"``), in FP32.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def hutchinson_trace(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    probes: int,
    generator: torch.Generator,
) -> list[float]:
    """Estimate the trace of each parameter's block of the Hessian (Hutchinson 1989).

    The mean over ``probes`` of v . Hv, v of -1 and 1 with equal chance. Noise may make an estimate
    negative where the block hardly curves.

    Args:
        loss: computes the scalar anew, with a graph.
        parameters: leaves that require gradients.
        probes: products with the Hessian, one double backward each.
        generator: draws the probes.
    """
    gradients = torch.autograd.grad(
        loss(), tuple(parameters), create_graph=True, materialize_grads=True
    )
    traces = [0.0] * len(parameters)
    for _ in range(probes):
        signs = [
            torch.randint(0, 2, p.shape, generator=generator).to(p.dtype).mul_(2).sub_(1)
            for p in parameters
        ]
        products = _hessian_times(gradients, parameters, signs)
        for index, (sign, product) in enumerate(zip(signs, products, strict=True)):
            traces[index] += float((sign * product).sum()) / probes
    return traces


def block_eigenvalue(
    loss: Callable[[], Tensor],
    block: Sequence[Tensor],
    generator: torch.Generator,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-2,
    stability: float = 1e-6,
) -> float:
    """Return the eigenvalue of largest magnitude, with its sign, of one block of the Hessian.

    Power iteration with the Rayleigh quotient v . Hv of unit vectors v. The quotient keeps its
    sign when v turns round at every step, so a negative eigenvalue converges as well (a norm's
    ratio would not tell the sign, and a component's would never settle).

    Args:
        loss: computes the scalar anew, with a graph.
        block: the parameters of the block.
        generator: draws the first vector.
        max_iterations: products with the Hessian.
        tolerance: relative change of the quotient to stop at.
        stability: added to the norm that a vector is divided by.

    Returns:
        The eigenvalue; 0 where the curvature is not finite.
    """
    gradients = torch.autograd.grad(loss(), tuple(block), create_graph=True, materialize_grads=True)
    vectors = _unit(
        [torch.randn(p.shape, generator=generator).to(p.dtype) for p in block], stability
    )
    value = 0.0
    for _ in range(max_iterations):
        products = _hessian_times(gradients, block, vectors)
        before, value = value, _dot(vectors, products)
        if not math.isfinite(value):
            return 0.0
        if value == 0.0 or abs(value - before) <= tolerance * abs(value):
            break
        vectors = _unit(products, stability)
    return value


def relative_curvature(eigenvalues: Sequence[float]) -> list[float]:
    """Return |eigenvalue| / the largest of them, in (0, 1].

    A zero, which is what is not known, counts as 1.0: the block is treated with most care
    (DeepSpeed's ``post_process``).
    """
    magnitudes = [abs(value) for value in eigenvalues]
    largest = max(magnitudes, default=0.0)
    return [value / largest if value else 1.0 for value in magnitudes]


def _hessian_times(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    # A gradient that depends on no parameter (of a linear loss) has no graph.
    with_graph = [pair for pair in zip(gradients, vectors, strict=True) if pair[0].requires_grad]
    if not with_graph:
        return [torch.zeros_like(parameter) for parameter in parameters]
    outputs, outer = zip(*with_graph, strict=True)
    return list(
        torch.autograd.grad(
            outputs, tuple(parameters), outer, retain_graph=True, materialize_grads=True
        )
    )


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def _unit(vectors: Sequence[Tensor], stability: float) -> list[Tensor]:
    norm = math.sqrt(_dot(vectors, vectors)) + stability
    return [vector.detach() / norm for vector in vectors]
