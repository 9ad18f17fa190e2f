"""Training on weight grids: linear layers by parametrization, embeddings by looked-up rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import (
    Grid,
    WeightRecord,
    dequantize,
    fit,
    set_weight_record,
    weight_record,
)
from dqrm.compress.transforms.base import Transform, matching_modules
from dqrm.compress.transforms.latent import WeightStep, add_step, settle


class QuantizeWeights(Transform):
    """Fake-quantizes weights; gradients pass straight through.

    Args:
        match: patterns of the names of linear layers and embeddings.
        bits: of a code: 1 is binary and 2 ternary unless ``grid`` says otherwise.
        grid: None takes it from the bits.
        granularity: of the scales; an embedding's are per row or k_groups.
    """

    order = 2

    def __init__(
        self,
        match: Sequence[str],
        bits: int,
        granularity: Granularity = Granularity("row"),  # noqa: B008
        grid: Grid | None = None,
    ) -> None:
        self.match = tuple(match)
        self.bits = bits
        self.granularity = granularity
        self.grid = grid
        self._steps: dict[str, FakeQuantizeWeight] = {}
        self._modules: dict[str, nn.Module] = {}

    def attach(self, model: nn.Module, steps: int) -> None:
        """Put the grid behind what else is done to the weights."""
        modules = matching_modules(model, self.match, (nn.Linear, nn.Embedding))
        for name, module in modules.items():
            step = FakeQuantizeWeight(self.granularity, self.bits, self.grid)
            self._steps[name] = step
            self._modules[name] = module
            if isinstance(module, nn.Embedding):
                _quantize_rows(module, step)
            else:
                add_step(model, name, step)

    def freeze(self) -> None:
        """Put the weights on the grid for good."""
        for name, module in self._modules.items():
            if isinstance(module, nn.Embedding):
                _settle_rows(module, self._steps[name])
            else:
                settle(module)

    def metrics(self) -> dict[str, float]:
        """The mean bits of a weight."""
        sizes = [module.weight.numel() for module in self._modules.values()]  # type: ignore[operator]
        bits = [step.bits for step in self._steps.values()]
        total = sum(size * b for size, b in zip(sizes, bits, strict=True))
        return {"bits/mean": total / sum(sizes)}


def grid_of(bits: int, grid: Grid | None = None) -> Grid:
    """Return the grid of a number of bits: binary of 1, ternary of 2, else symmetric."""
    return grid or {1: "binary", 2: "ternary"}.get(bits, "symmetric")  # type: ignore[return-value]


class FakeQuantizeWeight(WeightStep):
    """The step that puts a weight on a grid."""

    def __init__(self, granularity: Granularity, bits: int, grid: Grid | None) -> None:
        super().__init__()
        self.granularity = granularity
        self.bits = bits
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on the grid, with the gradient passed straight through."""
        value: Tensor = _StraightThrough.apply(weight, self)  # type: ignore[no-untyped-call]
        return value

    def quantized(self, weight: Tensor) -> tuple[Tensor, WeightRecord]:
        """Return the value of ``weight`` on the grid and how it is to be stored."""
        grid = grid_of(self.bits, self.grid)
        codes, scale = fit(weight, grid, self.bits, self.granularity)
        record = WeightRecord(grid, self.bits, self.granularity, scale)
        return dequantize(codes, record), record

    def described(self, record: WeightRecord, before: Tensor) -> WeightRecord:
        """Return ``record`` with the grid and the scales of ``before``."""
        mine = self.quantized(before)[1]
        return replace(mine, mask=record.mask, activation_bits=record.activation_bits)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: FakeQuantizeWeight) -> Tensor:
        return step.quantized(weight)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


_HOOK = "_row_quantizer"


def _quantize_rows(module: nn.Embedding, step: FakeQuantizeWeight) -> None:
    """Quantize looked-up rows: no other row's scale matters, no copy of the table is made."""
    if step.granularity.kind not in ("row", "k_groups"):
        raise ValueError(
            f"scales of an embedding are per row or of groups of columns, not {step.granularity}"
        )
    if hasattr(module, _HOOK) or weight_record(module) is not None:
        raise ValueError("two transforms of one kind match an embedding")

    def quantize(module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
        value: Tensor = step(rows.reshape(-1, rows.shape[-1]))
        return value.view(rows.shape)

    setattr(module, _HOOK, module.register_forward_hook(quantize))


@torch.no_grad()
def _settle_rows(module: nn.Embedding, step: FakeQuantizeWeight) -> None:
    hook = getattr(module, _HOOK, None)
    if hook is None:
        return
    hook.remove()
    delattr(module, _HOOK)
    value, record = step.quantized(module.weight)
    module.weight.copy_(value)
    set_weight_record(module, record)
