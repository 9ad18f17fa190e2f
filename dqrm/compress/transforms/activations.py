"""8-bit inputs of layers: one grid a token, taken from the token itself."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dqrm.compress.grids import affine
from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import (
    ActivationGrid,
    WeightRecord,
    set_weight_record,
    weight_record,
)
from dqrm.compress.grids.straight_through import straight_through
from dqrm.compress.transforms.base import Transform, matching_modules
from dqrm.compress.transforms.latent import weight_steps
from dqrm.kernels.int8_reference import quantize_rows

_HOOK = "_activation_quantizer"


class QuantizeActivations(Transform):
    """Fake-quantizes the inputs of linear layers, token by token.

    Args:
        match: patterns of the layers' names.
        bits: 8.
        grid: of a token.
    """

    order = 3

    def __init__(
        self, match: Sequence[str], bits: int = 8, grid: ActivationGrid = "symmetric"
    ) -> None:
        self.match = tuple(match)
        self.bits = bits
        self.grid = grid
        self._modules: dict[str, nn.Module] = {}

    def attach(self, model: nn.Module, steps: int) -> None:
        """Quantize from now on."""
        self._modules = matching_modules(model, self.match, (nn.Linear,))
        for name, module in self._modules.items():
            if has_activation_quantizer(module):
                raise ValueError(f"{name}: two transforms quantize its input")
            attach_activation_quantizer(module, self.bits, self.grid)

    def freeze(self) -> None:
        """Record it; inputs stay quantized."""
        for name, module in self._modules.items():
            if weight_steps(module):
                raise RuntimeError(f"{name}: weights are frozen before activations")
            plain = WeightRecord("fp32", 32, Granularity("tensor"), torch.empty(0))
            record = weight_record(module) or plain
            record = replace(record, activation_bits=8, activation_grid=self.grid)
            set_weight_record(module, record)


def attach_activation_quantizer(
    module: nn.Module, bits: int, grid: ActivationGrid = "symmetric"
) -> None:
    """Quantize the input of ``module`` from now on, on this grid in place of any other.

    Args:
        module: takes one float tensor [..., K].
        bits: 8.
        grid: of a token.
    """
    if bits != 8:
        raise ValueError(f"activation bits={bits}: must be 8")
    detach_activation_quantizer(module)
    hook = _quantize_input if grid == "symmetric" else _quantize_input_asymmetrically
    setattr(module, _HOOK, module.register_forward_pre_hook(hook))


def detach_activation_quantizer(module: nn.Module) -> None:
    """Leave the input of ``module`` as it is from now on."""
    hook = getattr(module, _HOOK, None)
    if hook is not None:
        hook.remove()
        delattr(module, _HOOK)


def has_activation_quantizer(module: nn.Module) -> bool:
    """Return whether the input of ``module`` is quantized."""
    return hasattr(module, _HOOK)


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """Return ``x`` [..., K] on 8-bit grids, one a token, with the gradient passed straight through.

    The codes and scales are those of INT8 serving (dqrm.kernels.int8_reference), in FP32; what is
    returned has the type of x. An empty x is returned
    as it is: a layer that lost all its units has inputs of no width.
    """
    if x.numel() == 0:
        return x
    with torch.no_grad():
        codes, scale = quantize_rows(x.reshape(-1, x.shape[-1]).float())
        value = codes.mul_(scale).view(x.shape).to(x.dtype)
    return straight_through(x, value)


def _quantize_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return fake_quantize_tokens(inputs[0]), *inputs[1:]


def _quantize_input_asymmetrically(
    module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return affine.fake_quantize_tokens(inputs[0]), *inputs[1:]
