"""Asymmetric integer grids: from the smallest to the largest value of a group, zero among them.

With b bits and N = 2**b - 1, a group of values w, lo = min(min w, 0) and hi = max(max w, 0):

    scale   s     = max(hi / N - lo / N, 1e-8 / N)
    zero    z     = clamp(round_half_even(-lo / s), 0, N)
    code    q     = clamp(round_half_even(w / s) + z, 0, N)
    value   w_hat = s * (q - z)

Zero is a code, so that a pattern's holes stay holes and padding stays nothing, and what a group of
one sign gains is a bit. DeepSpeed's grid has no zero where a group has one sign. What is called
codes outside of a packed weight is q - z: its product with the scale is the value, as on all grids.
A group with NaN or infinity has a scale that is not finite, and no value that is not NaN.
"""

import torch
from torch import Tensor

from dqrm.compress.grids.rounding import Rounding, round_codes
from dqrm.compress.grids.straight_through import straight_through
from dqrm.compress.grids.symmetric import SMALLEST_MAX_ABS


def most_codes(bits: int) -> int:
    """Return N = 2**bits - 1, the largest q: 15 for 4 bits, 255 for 8."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits={bits}: must be from 2 to 16")
    return (1 << bits) - 1


def range_of(view: Tensor, bits: int, *, full_range: bool = False) -> tuple[Tensor, Tensor]:
    """Return scale and zero of each group, float32 [..., 1], zeros whole numbers.

    Args:
        view: float32 [..., size]; the last dimension is a group.
        bits: of a code.
        full_range: the scale is the range / 2**bits, as DeepSpeed's, in place of / N.
    """
    most = most_codes(bits)
    steps = most + full_range
    if view.shape[-1] == 0:
        view = view.new_zeros(*view.shape[:-1], 1)
    low, high = view.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    # Divided first: the range of huge values is beyond float32.
    scale = (high / steps - low / steps).clamp_min(SMALLEST_MAX_ABS / steps)
    zero = (-low / scale).round_().clamp_(0, most).add_(0.0)
    return scale, zero


def quantize(
    values: Tensor, scale: Tensor, zero: Tensor, bits: int, rounding: Rounding = "nearest"
) -> Tensor:
    """Return q - z in float32; scale and zero broadcast to ``values``."""
    codes = round_codes(values / scale, rounding)
    codes = torch.minimum(torch.maximum(codes, -zero), most_codes(bits) - zero)
    # Adding zero turns -0.0 into 0.0, the only zero a packed code can say.
    return codes.add_(0.0)


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """Return ``x`` [..., K] on 8-bit grids, one a token, with the gradient passed straight through.

    Computed in FP32; what is returned has the type of x.
    """
    if x.numel() == 0:
        return x
    with torch.no_grad():
        rows = x.float()
        scale, zero = range_of(rows, 8)
        value = quantize(rows, scale, zero, 8).mul_(scale).to(x.dtype)
    return straight_through(x, value)
