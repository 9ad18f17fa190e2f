"""What was done to a weight: its grid, its scales and its pattern, kept on its module.

    weight == dequantize(codes(weight, record), record)     exactly

for a module with a record. Whatever compresses a weight for good leaves a record; whatever packs
weights reads it and need not know who made it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dqrm.compress.grids import affine, symmetric
from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.lowbit import binarize, ternarize
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.rounding import Rounding

Grid = Literal["symmetric", "asymmetric", "ternary", "binary", "fp32"]
ActivationGrid = Literal["symmetric", "asymmetric"]

_ATTRIBUTE = "weight_record"


@dataclass(frozen=True, eq=False)
class WeightRecord:
    """How ``module.weight`` is to be stored."""

    grid: Grid
    """fp32: any values, where only a pattern or the activations are compressed."""
    bits: int
    """Of a code: 2 to 16 for symmetric and asymmetric, 2 for ternary, 1 for binary, 32 for fp32."""
    granularity: Granularity
    scale: Tensor
    """float32, one a group of the granularity's view; empty for fp32."""
    mask: NM | None = None
    """The pattern of weights that are not zero."""
    activation_bits: Literal[8, 32] = 32
    """8: the module's input is on a grid of its own for each token."""
    zero: Tensor | None = None
    """Of an asymmetric grid, as scale: which of the codes from 0 stands for 0; whole numbers."""
    activation_grid: ActivationGrid = "symmetric"
    """Of 8-bit inputs. symmetric: scale max|x| / 127. asymmetric: from the smallest to the largest
    value, as in dqrm.compress.grids.affine."""

    def __post_init__(self) -> None:
        allowed = {
            **dict.fromkeys(("symmetric", "asymmetric"), range(2, 17)),
            "ternary": (2,),
            "binary": (1,),
            "fp32": (32,),
        }
        if self.bits not in allowed[self.grid]:
            raise ValueError(f"a {self.grid} grid cannot have {self.bits} bits")
        if (self.zero is not None) != (self.grid == "asymmetric"):
            raise ValueError("an asymmetric grid has zeros, and no other does")
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ValueError(
                f"zeros of shape {list(self.zero.shape)} beside scales {list(self.scale.shape)}"
            )


def fit(
    weight: Tensor,
    grid: Grid,
    bits: int,
    granularity: Granularity,
    kept: Tensor | None = None,
    rounding: Rounding = "nearest",
    *,
    full_range: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the codes of ``weight`` (as weight) and their scales, both float32.

    Args:
        weight: float32 [R, ...].
        grid: not fp32.
        bits: of a code.
        granularity: of the scales.
        kept: bool, as weight: scales are those of these, other codes are 0.
        rounding: of the symmetric and the asymmetric grid.
        full_range: the symmetric scale is max|w| / (n + 1), as DeepSpeed's, in place of / n; the
            asymmetric one likewise.
    """
    found, record = fit_record(
        weight, grid, bits, granularity, kept, rounding, full_range=full_range
    )
    return found, record.scale


def fit_record(
    weight: Tensor,
    grid: Grid,
    bits: int,
    granularity: Granularity,
    kept: Tensor | None = None,
    rounding: Rounding = "nearest",
    *,
    full_range: bool = False,
) -> tuple[Tensor, WeightRecord]:
    """As :func:`fit`, with all that a record says of the grid."""
    view = granularity.view(weight)
    valid = granularity.filled(weight)
    zero = None
    if kept is not None:
        valid = granularity.view(kept)
    if grid == "symmetric":
        largest = symmetric.largest_code(bits)
        if kept is not None:
            view = view * granularity.view(kept)
        scale = symmetric.scale_of(max_abs(view), largest + full_range)
        codes = symmetric.quantize(view, scale, largest, rounding)
    elif grid == "asymmetric":
        if kept is not None:
            view = view * granularity.view(kept)
        scale, zero = affine.range_of(view, bits, full_range=full_range)
        codes = affine.quantize(view, scale, zero, bits, rounding)
    else:
        codes, scale = (ternarize if grid == "ternary" else binarize)(view, valid)
    record = WeightRecord(grid, bits, granularity, scale, zero=zero)
    return granularity.restore(codes, weight.shape), record


def max_abs(view: Tensor) -> Tensor:
    """Return the largest magnitude of each group, [..., 1]; 0 of an empty one."""
    if view.shape[-1] == 0:
        return view.new_zeros(*view.shape[:-1], 1)
    return view.abs().amax(dim=-1, keepdim=True)


def codes(weight: Tensor, record: WeightRecord) -> Tensor:
    """Return the codes of a weight on the record's grid, float32 as ``weight``.

    Those of an asymmetric grid are counted from its zero.
    """
    if record.grid == "fp32":
        return weight
    if record.zero is not None:
        of_groups = record.granularity.view(weight)
        of_groups = affine.quantize(of_groups, record.scale, record.zero, record.bits)
        return record.granularity.restore(of_groups, weight.shape)
    largest = symmetric.largest_code(record.bits) if record.grid == "symmetric" else 1
    view = symmetric.quantize(record.granularity.view(weight), record.scale, largest)
    return record.granularity.restore(view, weight.shape)


def dequantize(codes: Tensor, record: WeightRecord) -> Tensor:
    """Return the weight of ``codes``, float32."""
    if record.grid == "fp32":
        return codes
    view = symmetric.dequantize(record.granularity.view(codes), record.scale)
    return record.granularity.restore(view, codes.shape)


def weight_record(module: nn.Module) -> WeightRecord | None:
    """Return the record of a module's weight, if it has one."""
    record: WeightRecord | None = getattr(module, _ATTRIBUTE, None)
    return record


def check_weight_record(module: nn.Module, record: WeightRecord) -> None:
    """Refuse a record that does not say what the module's weight is.

    Raises:
        ValueError: the weight is off the grid, or has more weights than the pattern.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    if record.grid != "fp32":
        wanted = record.granularity.scale_shape(weight.shape)
        if tuple(record.scale.shape) != wanted:
            raise ValueError(
                f"scales of shape {list(record.scale.shape)}: {record.granularity} of a weight "
                f"{list(weight.shape)} has {list(wanted)}"
            )
    on_grid = dequantize(codes(weight, record), record)
    if not torch.equal(weight, on_grid):
        off = int((weight != on_grid).sum())
        raise ValueError(
            f"{off:,} of {weight.numel():,} weights are not on the grid of {record.bits} bits"
        )
    if record.mask is not None and not record.mask.holds(weight):
        raise ValueError(f"a group has more weights than {record.mask} allows")


def set_weight_record(module: nn.Module, record: WeightRecord) -> None:
    """Keep ``record`` on a module whose weight is on that grid.

    Raises:
        ValueError: the weight is not what the record says.
    """
    check_weight_record(module, record)
    zero = None if record.zero is None else record.zero.detach()
    setattr(module, _ATTRIBUTE, replace(record, scale=record.scale.detach(), zero=zero))
