"""What a compressed model takes: bytes by what they are for, and multiplications.

Bytes follow from shapes and records alone, so that a plan has them as well as a model. They are
those of the file that ``dqrm.compress.lower`` writes before it deflates anything; the file can only
be smaller. Ratios of papers count codes alone, files have places, scales and all the rest too: the
parts are told apart.

A MAC is one multiplication and one addition, counted for each row of a layer's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor, nn

from dqrm.compress.grids.granularity import Granularity, matrix_shape
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import Grid, WeightRecord, codes
from dqrm.compress.grids.records_file import records
from dqrm.compress.grids.symmetric import largest_code
from dqrm.compress.lower.codes import Coding, code_bytes
from dqrm.compress.lower.tensors import dense_tensors, in_layers

_FP32_BYTES = 4


@dataclass(frozen=True)
class WeightCost:
    """What a weight takes."""

    fp32_bytes: int
    """Before it was compressed."""
    code_bytes: int
    """Of codes, or of FP32 values where it is on no grid."""
    place_bytes: int
    """That say which weights of each group of a pattern are kept."""
    scale_bytes: int
    """Of scales and, on asymmetric grids, of the codes of zero."""
    macs: int
    """For each row of the input, none left out; 0 of an embedding."""
    kept_macs: int
    """Of these, with weights that a pattern keeps."""

    @property
    def stored_bytes(self) -> int:
        """Of all that is stored."""
        return self.code_bytes + self.place_bytes + self.scale_bytes

    def __add__(self, other: "WeightCost") -> "WeightCost":
        return WeightCost(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(WeightCost))
        )


NOTHING = WeightCost(0, 0, 0, 0, 0, 0)


def weight_cost(
    shape: Sequence[int],
    grid: Grid,
    bits: int,
    granularity: Granularity,
    mask: NM | None = None,
    *,
    multiplies: bool = True,
    full_range: bool = False,
) -> WeightCost:
    """Return what a weight takes on a grid.

    Args:
        shape: of the weight.
        grid: of its values.
        bits: of a code.
        granularity: of the scales.
        mask: its pattern.
        multiplies: whether inputs are multiplied with it, as those of an embedding are not.
        full_range: whether a symmetric grid may have the code -2^(bits-1); of 2 bits, a code then
            takes all of them.
    """
    trits = grid in ("ternary", "binary") or (grid == "symmetric" and bits == 2 and not full_range)
    rows, columns = matrix_shape(shape)
    count = rows * columns
    kept = count if mask is None else rows * _kept(columns, mask)
    places = 0
    if grid == "fp32":
        stored, scales = _FP32_BYTES * count, 0
    else:
        scales = _FP32_BYTES * _scales(shape, granularity)
        if grid == "asymmetric":
            scales += (1 if bits <= 8 else 4) * _scales(shape, granularity)
        stored = _codes(count, bits, trits=trits, zeros=grid != "binary" or mask is not None)
    if mask is not None:
        slots = rows * -(-columns // mask.group) * mask.keep
        if grid == "fp32":
            sparse = _FP32_BYTES * slots
        else:
            sparse = _codes(slots, bits, trits=trits, zeros=grid != "binary" or slots > kept)
        sparse_places = code_bytes(slots, "bits", (mask.group - 1).bit_length())
        # Of few bits, a zero can take less than the place of what is not zero.
        if grid == "fp32" or sparse + sparse_places <= stored:
            stored, places = sparse, sparse_places
    macs = count if multiplies else 0
    kept_macs = kept if multiplies else 0
    return WeightCost(_FP32_BYTES * count, stored, places, scales, macs, kept_macs)


@dataclass(frozen=True)
class Account:
    """What a model takes."""

    weights: dict[str, WeightCost]
    """Of compressed weights, by module."""
    rest_bytes: int
    """Of all other tensors, as they are: biases, norms, uncompressed weights."""
    rest_macs: int
    """Of linear layers that are not compressed."""

    @property
    def total(self) -> WeightCost:
        """The sum over the compressed weights."""
        return sum(self.weights.values(), NOTHING)

    @property
    def stored_bytes(self) -> int:
        """Of the whole model."""
        return self.total.stored_bytes + self.rest_bytes

    @property
    def fp32_bytes(self) -> int:
        """Of the whole model before."""
        return self.total.fp32_bytes + self.rest_bytes

    def __str__(self) -> str:
        smaller = self.fp32_bytes / self.stored_bytes
        return f"{self.stored_bytes:,} bytes, {smaller:.1f} x smaller"

    def metrics(self) -> dict[str, float]:
        """Return the sums by the names MLflow shows."""
        total = self.total
        return {
            "size/packed_bytes": float(self.stored_bytes),
            "size/code_bytes": float(total.code_bytes),
            "size/place_bytes": float(total.place_bytes),
            "size/scale_bytes": float(total.scale_bytes),
            "size/rest_bytes": float(self.rest_bytes),
            "size/macs_per_row": float(total.macs + self.rest_macs),
            "size/kept_macs_per_row": float(total.kept_macs + self.rest_macs),
        }


def account(model: nn.Module, *, layers_only: bool = False) -> Account:
    """Return what ``model`` takes, its compressed modules having records.

    Args:
        model: of any kind.
        layers_only: counts only what is of a layer (:func:`dqrm.compress.lower.tensors.in_layers`).
    """
    weights = {
        name: _cost(model.get_submodule(name), record) for name, record in records(model).items()
    }
    return account_of(model, weights, layers_only=layers_only)


def account_of(
    model: nn.Module, weights: dict[str, WeightCost], *, layers_only: bool = False
) -> Account:
    """Return what ``model`` takes when its compressed weights take ``weights``.

    Args:
        model: with or without values.
        weights: by module.
        layers_only: as of :func:`account`.
    """

    def counts(tensor: str) -> bool:
        return not layers_only or in_layers(tensor)

    rest_bytes = sum(
        tensor.nbytes for name, tensor in dense_tensors(model, weights).items() if counts(name)
    )
    rest_macs = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in weights and counts(f"{name}.weight")
    )
    counted = {name: cost for name, cost in weights.items() if counts(f"{name}.weight")}
    return Account(counted, rest_bytes, rest_macs)


def _cost(module: nn.Module, record: WeightRecord) -> WeightCost:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight_cost(
        weight.shape,
        record.grid,
        record.bits,
        record.granularity,
        record.mask,
        multiplies=not isinstance(module, nn.Embedding),
        full_range=_has_smallest_code(weight.detach(), record),
    )


def _has_smallest_code(weight: Tensor, record: WeightRecord) -> bool:
    """Whether two symmetric bits say -2: of a full range, or where GPTQ went beyond the scale."""
    if record.grid != "symmetric" or record.bits != 2:
        return False
    return bool((codes(weight, record) < -largest_code(2)).any())


def _kept(columns: int, mask: NM) -> int:
    """Weights of a row that a pattern keeps."""
    full, rest = divmod(columns, mask.group)
    return full * mask.keep + min(rest, mask.keep)


def _codes(count: int, bits: int, *, trits: bool, zeros: bool) -> int:
    """Bytes of so many codes; of ``trits``, -1, 0 and 1, five fit a byte, or eight without 0."""
    coding: Coding = "bits"
    if trits:
        coding = "trits" if zeros else "signs"
    return code_bytes(count, coding, bits)


def _scales(shape: Sequence[int], granularity: Granularity) -> int:
    count = 1
    for size in granularity.scale_shape(shape):
        count *= size
    return count
