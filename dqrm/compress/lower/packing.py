"""Compressed weights as few tensors of few bytes, as pure functions of codes and their record.

    codes   uint8     of every weight, or of the kept ones of each group of an N:M pattern; float32
                      for values that are on no grid
    places  uint8     of the kept ones within their group, ceil(log2(group)) bits each
    scale   float32   as the record has it; float16 where that is exact
    zero    uint8     of an asymmetric grid, as scale: the code that stands for 0, counted from the
                      smallest; int32 of more than 8 bits

Codes of an asymmetric grid are stored counted from the middle one, 2^(bits-1).

A group of an N:M pattern with fewer weights than it may keep has zeros among the kept ones.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from dqrm.compress.grids.affine import most_codes
from dqrm.compress.grids.granularity import Granularity, matrix_shape
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import ActivationGrid, Grid, WeightRecord
from dqrm.compress.lower.codes import (
    CODINGS,
    Coding,
    code_bytes,
    coding_of,
    decode,
    deflate,
    encode,
    inflate,
)

NAMES: Final = ("codes", "places", "scale", "zero")
"""Of the tensors a packed weight may have."""

_DEFLATED_AS_CELLS: Final = (3, 5, 6, 7)
"""Bits of codes that fill no byte."""


@dataclass(frozen=True)
class Layout:
    """What the tensors of a packed weight mean."""

    shape: tuple[int, ...]
    """Of the weight."""
    grid: Grid
    bits: int
    granularity: Granularity
    coding: Coding
    """Of the codes; without meaning for fp32."""
    sparse: bool
    """Whether only the kept ones of each group are stored, and their places."""
    mask: NM | None = None
    activation_bits: Literal[8, 32] = 32
    activation_grid: ActivationGrid = "symmetric"

    def __post_init__(self) -> None:
        if self.coding not in CODINGS:
            raise ValueError(f"coding {self.coding!r}: must be {', '.join(CODINGS)}")
        if self.sparse and self.mask is None:
            raise ValueError("sparse without a pattern")

    @property
    def count(self) -> int:
        """Codes that are stored."""
        rows, columns = matrix_shape(self.shape)
        if not self.sparse or self.mask is None:
            return rows * columns
        return rows * -(-columns // self.mask.group) * self.mask.keep

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> "Layout":
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: it describes no layout.
        """
        try:
            mask = described["mask"]
            return cls(
                **{
                    **described,
                    "shape": tuple(described["shape"]),
                    "granularity": Granularity(**described["granularity"]),
                    "mask": None if mask is None else NM(**mask),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no layout of a packed weight: {described}") from error


@dataclass(frozen=True)
class PackedWeight:
    """A weight as it is stored."""

    layout: Layout
    tensors: dict[str, Tensor]
    """Some of NAMES."""

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def pack_weight(codes: Tensor, record: WeightRecord, *, shrink: bool = True) -> PackedWeight:
    """Return the fewest bytes that hold a weight.

    Args:
        codes: float32, as the weight: what ``dqrm.compress.grids.record.codes`` returns.
        record: of the weight.
        shrink: deflate what gets smaller by it.

    Raises:
        ValueError: codes beyond the record's bits, or more of them than its pattern keeps.
    """
    _check_range(codes, record)
    if record.mask is None:
        return _packed(codes, record, sparse=False, shrink=shrink)
    sparse = _packed(codes, record, sparse=True, shrink=shrink)
    if record.grid == "fp32":
        return sparse
    # Few bits a code: zeros among the codes may take less than the places of what is not zero.
    dense = _packed(codes, record, sparse=False, shrink=shrink)
    return min(sparse, dense, key=lambda packed: packed.nbytes)


def _packed(codes: Tensor, record: WeightRecord, *, sparse: bool, shrink: bool) -> PackedWeight:
    tensors: dict[str, Tensor] = {}
    stored = codes.flatten()
    offset = _offset(record, codes.shape)
    if sparse:
        assert record.mask is not None
        order, places = _kept(codes, record.mask)
        stored = record.mask.view(codes).gather(-1, order).flatten()
        if offset is not None:
            stored = stored + record.mask.view(offset).gather(-1, order).flatten()
        tensors["places"] = encode(places, "bits", _place_bits(record.mask))
    elif offset is not None:
        stored = stored + offset.flatten()
    # Two bits hold -1, 0 and 1 as well, and are what it says if another code is there.
    narrow = record.grid in ("ternary", "binary")
    narrow |= record.grid == "symmetric" and record.bits == 2
    coding = coding_of(stored) if narrow else "bits"
    if record.grid != "fp32":
        coding, tensors["codes"] = _shortest(stored, coding, record.bits, shrink=shrink)
        half = record.scale.half()
        tensors["scale"] = half if torch.equal(half.float(), record.scale) else record.scale
    else:
        tensors["codes"] = stored.to(torch.float32)
    layout = Layout(
        tuple(codes.shape),
        record.grid,
        record.bits,
        record.granularity,
        coding,
        sparse,
        record.mask,
        record.activation_bits,
        record.activation_grid,
    )
    if record.zero is not None:
        tensors["zero"] = record.zero.to(_zero_type(record.bits))
    if shrink and sparse:
        tensors["places"] = deflate(tensors["places"])
    return PackedWeight(layout, tensors)


def _shortest(stored: Tensor, coding: Coding, bits: int, *, shrink: bool) -> tuple[Coding, Tensor]:
    """The bytes of codes, and how they came about; deflated in the way that leaves fewest."""
    data = encode(stored, coding, bits)
    if not shrink:
        return coding, data
    data = deflate(data)
    if coding == "bits" and bits in _DEFLATED_AS_CELLS:
        cells = deflate(encode(stored, "cells", bits))
        if len(cells) < len(data):
            return "cells", cells
    return coding, data


def unpack_weight(packed: PackedWeight) -> tuple[Tensor, WeightRecord]:
    """Return the codes (float32, as the weight) and the record that ``packed`` was made of.

    Raises:
        ValueError: the tensors are not what the layout says.
    """
    layout, tensors = packed.layout, packed.tensors
    missing = {"codes"} - tensors.keys()
    missing |= {"places"} - tensors.keys() if layout.sparse else set()
    missing |= {"scale"} - tensors.keys() if layout.grid != "fp32" else set()
    missing |= {"zero"} - tensors.keys() if layout.grid == "asymmetric" else set()
    if missing:
        raise ValueError(f"a packed weight without its {' and '.join(sorted(missing))}")
    if layout.grid == "fp32":
        stored = tensors["codes"]
        if stored.dtype != torch.float32 or stored.shape != (layout.count,):
            raise ValueError(f"values must be float32 [{layout.count}]")
        scale = torch.empty(0)
    else:
        size = code_bytes(layout.count, layout.coding, layout.bits)
        data = inflate(tensors["codes"], size)
        stored = decode(data, layout.count, layout.coding, layout.bits)
        scale = tensors["scale"].float()
        wanted = layout.granularity.scale_shape(layout.shape)
        if tuple(scale.shape) != wanted:
            raise ValueError(f"scales of shape {list(scale.shape)}, wanted {list(wanted)}")
    record = WeightRecord(
        layout.grid,
        layout.bits,
        layout.granularity,
        scale,
        layout.mask,
        layout.activation_bits,
        _zero_of(packed),
        layout.activation_grid,
    )
    offset = _offset(record, layout.shape)
    if not layout.sparse:
        found = stored.view(layout.shape)
        return found if offset is None else found - offset, record
    assert layout.mask is not None
    bits = _place_bits(layout.mask)
    data = inflate(tensors["places"], code_bytes(layout.count, "bits", bits))
    places = decode(data, layout.count, "bits", bits)
    return _spread(stored, places, layout.mask, layout.shape, offset), record


def _zero_type(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32


def _zero_of(packed: PackedWeight) -> Tensor | None:
    layout = packed.layout
    if layout.grid != "asymmetric":
        return None
    zero = packed.tensors["zero"]
    most = most_codes(layout.bits)
    wanted = layout.granularity.scale_shape(layout.shape)
    if zero.dtype != _zero_type(layout.bits) or tuple(zero.shape) != wanted:
        raise ValueError(f"zeros {zero.dtype} {list(zero.shape)}, wanted {list(wanted)}")
    if bool(((zero < 0) | (zero > most)).any()):
        raise ValueError(f"a zero beyond the codes 0 to {most}")
    return zero.float()


def _offset(record: WeightRecord, shape: Sequence[int]) -> Tensor | None:
    """What is added to a code counted from zero to make it a stored one, float32 as the weight."""
    if record.zero is None:
        return None
    view = record.granularity.view(torch.zeros(tuple(shape)))
    middle = 1 << (record.bits - 1)
    return record.granularity.restore(view + (record.zero - middle), shape)


def _place_bits(mask: NM) -> int:
    return (mask.group - 1).bit_length()


def _check_range(codes: Tensor, record: WeightRecord) -> None:
    if record.grid == "fp32":
        return
    largest = (1 << (record.bits - 1)) - 1 if record.bits > 1 else 1
    smallest = -largest - 1
    if record.grid in ("ternary", "binary"):
        smallest, largest = -1, 1
    offset = _offset(record, codes.shape)
    stored = codes if offset is None else codes + offset
    inside = (stored >= smallest) & (stored <= largest)
    if not inside.all():
        raise ValueError(
            f"{int((~inside).sum()):,} of {codes.numel():,} codes are not in {smallest}..{largest}"
        )


def _kept(codes: Tensor, mask: NM) -> tuple[Tensor, Tensor]:
    """Which codes of each group are kept [rows, groups, keep], and the same as a row."""
    view = mask.view(codes)
    zero = view == 0
    most = int((~zero).sum(dim=-1).max()) if view.numel() else 0
    if most > mask.keep:
        raise ValueError(f"a group has {most} weights, {mask} keeps {mask.keep}")
    order = zero.to(torch.uint8).argsort(dim=-1, stable=True)[..., : mask.keep]
    places = order.sort(dim=-1).values
    return places, places.flatten()


def _spread(
    stored: Tensor, places: Tensor, mask: NM, shape: tuple[int, ...], offset: Tensor | None
) -> Tensor:
    """Put stored codes at the places where they were kept, and 0 elsewhere."""
    rows, columns = matrix_shape(shape)
    places = places.to(torch.int64).bitwise_and_((1 << _place_bits(mask)) - 1)
    if bool((places >= mask.group).any()):
        raise ValueError(f"a place beyond the {mask.group} of a group")
    view = torch.zeros(rows, -(-columns // mask.group), mask.group)
    kept = (*view.shape[:2], mask.keep)
    places, values = places.view(kept), stored.view(kept)
    if offset is not None:
        values = values - mask.view(offset).gather(-1, places)
    view.scatter_(-1, places, values)
    return Granularity("k_groups", mask.group).restore(view, shape)
