"""Linear layers on integer codes in plain PyTorch: the definition of INT8 inference.

Every row of the input is quantized when it comes, symmetrically, to 8 bits:

    scale_x = max(max|x|, 1e-8) / 127                  [B, 1]
    q_x     = clamp(round_half_even(x / scale_x), -128, 127)
    y       = (scale_x * scale_w) * (q_x @ q_w.T) + bias

The sums of products are integers, which any order gives alike; multiplications and additions are
those of the last line, from left to right. Training and serving therefore agree bit for bit,
whichever of them computes in FP32, bfloat16 or INT8.

A sum of K products of 8-bit codes is below 127 * 127 * K: FP32 holds it exactly up to K = 1040
(2^24), for 4-bit weights up to K = 18,872. Beyond that this reference sums in FP64.
"""

from typing import Final

from torch import Tensor

LARGEST: Final = 127
"""The largest code of an activation; with an exact scale -128 does not occur."""

_SMALLEST_MAX_ABS: Final = 1e-8
_EXACT_IN_FP32: Final = 1 << 24


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes [B, K] and scales [B, 1] of the rows of ``x``, all float32.

    A row with NaN or infinity has NaN among its codes, and so has all that is computed of it.
    """
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min(_SMALLEST_MAX_ABS) / LARGEST
    codes = (x / scale).round_().clamp_(-LARGEST - 1, LARGEST)
    return codes, scale


def exact_product(codes_x: Tensor, codes_w: Tensor, largest: int) -> Tensor:
    """Return ``codes_x @ codes_w.T``, exact before it is rounded to float32.

    Args:
        codes_x: float32 [B, K], of 8 bits.
        codes_w: float32 [N, K].
        largest: no magnitude among codes_w is larger.
    """
    if codes_x.shape[1] * LARGEST * largest < _EXACT_IN_FP32:
        return codes_x @ codes_w.T
    return (codes_x.double() @ codes_w.T.double()).float()


def int8_linear_reference(
    codes_x: Tensor,
    scale_x: Tensor,
    codes_w: Tensor,
    scale_w: Tensor,
    bias: Tensor,
    largest: int = LARGEST + 1,
) -> Tensor:
    """Return a layer's output, float32 [B, N], before a ReLU.

    Args:
        codes_x: float32 [B, K].
        scale_x: float32 [B, 1].
        codes_w: float32 [N, K].
        scale_w: float32 [N].
        bias: float32 [N].
        largest: no magnitude among codes_w is larger.
    """
    return (scale_x * scale_w) * exact_product(codes_x, codes_w, largest) + bias
