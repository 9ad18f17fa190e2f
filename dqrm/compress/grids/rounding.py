"""How a value between two codes becomes one of them."""

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]


def round_codes(values: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Round ``values`` in place and return them: float32, in units of a step.

    nearest takes even on a tie. stochastic goes up with the probability of the fraction, so that
    the expected code is the value; it draws from torch's generator.
    """
    if rounding == "nearest":
        return values.round_()
    return values.add_(torch.rand_like(values)).floor_()
