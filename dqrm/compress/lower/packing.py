"""Compressed weights as few tensors of few bytes, as pure functions of codes and their record.

    codes   uint8     of every weight, or of the kept ones of each group of an N:M pattern; float32
                      for values that are on no grid
    places  uint8     of the kept ones within their group, ceil(log2(group)) bits each
    scale   float32   as the record has it; float16 where that is exact

A group of an N:M pattern with fewer weights than it may keep has zeros among the kept ones.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from dqrm.compress.grids.granularity import Granularity, matrix_shape
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import Grid, WeightRecord
from dqrm.compress.lower.codes import (
    Coding,
    code_bytes,
    coding_of,
    decode,
    deflate,
    encode,
    inflate,
)

NAMES: Final = ("codes", "places", "scale")
"""Of the tensors a packed weight may have."""


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

    def __post_init__(self) -> None:
        if self.coding not in ("signs", "trits", "bits"):
            raise ValueError(f"coding {self.coding!r}: must be signs, trits or bits")
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
    if sparse:
        assert record.mask is not None
        stored, places = _kept(codes, record.mask)
        tensors["places"] = encode(places, "bits", _place_bits(record.mask))
    # Two bits hold -1, 0 and 1 as well, and are what it says if another code is there.
    narrow = record.grid in ("ternary", "binary") or record.bits == 2
    coding = coding_of(stored) if narrow else "bits"
    layout = Layout(
        tuple(codes.shape),
        record.grid,
        record.bits,
        record.granularity,
        coding,
        sparse,
        record.mask,
        record.activation_bits,
    )
    if record.grid == "fp32":
        tensors["codes"] = stored.to(torch.float32)
    else:
        tensors["codes"] = encode(stored, coding, record.bits)
        half = record.scale.half()
        tensors["scale"] = half if torch.equal(half.float(), record.scale) else record.scale
    if shrink:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8:
                tensors[name] = deflate(tensor)
    return PackedWeight(layout, tensors)


def unpack_weight(packed: PackedWeight) -> tuple[Tensor, WeightRecord]:
    """Return the codes (float32, as the weight) and the record that ``packed`` was made of.

    Raises:
        ValueError: the tensors are not what the layout says.
    """
    layout, tensors = packed.layout, packed.tensors
    missing = {"codes"} - tensors.keys()
    missing |= {"places"} - tensors.keys() if layout.sparse else set()
    missing |= {"scale"} - tensors.keys() if layout.grid != "fp32" else set()
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
        layout.grid, layout.bits, layout.granularity, scale, layout.mask, layout.activation_bits
    )
    if not layout.sparse:
        return stored.view(layout.shape), record
    assert layout.mask is not None
    bits = _place_bits(layout.mask)
    data = inflate(tensors["places"], code_bytes(layout.count, "bits", bits))
    places = decode(data, layout.count, "bits", bits)
    return _spread(stored, places, layout.mask, layout.shape), record


def _place_bits(mask: NM) -> int:
    return (mask.group - 1).bit_length()


def _check_range(codes: Tensor, record: WeightRecord) -> None:
    if record.grid == "fp32":
        return
    largest = (1 << (record.bits - 1)) - 1 if record.grid == "symmetric" else 1
    smallest = -largest - 1 if record.grid == "symmetric" else -1
    inside = (codes >= smallest) & (codes <= largest)
    if not inside.all():
        raise ValueError(
            f"{int((~inside).sum()):,} of {codes.numel():,} codes are not in {smallest}..{largest}"
        )


def _kept(codes: Tensor, mask: NM) -> tuple[Tensor, Tensor]:
    """The kept codes and their places, both [rows * groups * keep], in the order of the places."""
    view = mask.view(codes)
    zero = view == 0
    most = int((~zero).sum(dim=-1).max()) if view.numel() else 0
    if most > mask.keep:
        raise ValueError(f"a group has {most} weights, {mask} keeps {mask.keep}")
    order = zero.to(torch.uint8).argsort(dim=-1, stable=True)[..., : mask.keep]
    places = order.sort(dim=-1).values
    return view.gather(-1, places).flatten(), places.flatten()


def _spread(stored: Tensor, places: Tensor, mask: NM, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`_kept`."""
    rows, columns = matrix_shape(shape)
    places = places.to(torch.int64).bitwise_and_((1 << _place_bits(mask)) - 1)
    if bool((places >= mask.group).any()):
        raise ValueError(f"a place beyond the {mask.group} of a group")
    view = torch.zeros(rows, -(-columns // mask.group), mask.group)
    kept = (*view.shape[:2], mask.keep)
    view.scatter_(-1, places.view(kept), stored.view(kept))
    return Granularity("k_groups", mask.group).restore(view, shape)
