"""Look-ups in packed embedding tables: all tables of a model in one native call.

Symbols and the layout of a batch as in dqrm.kernels.tables; D is embedding_dim.

The result is defined by :meth:`PackedTables.look_up_reference`, bit for bit, at every instruction
set and for every number of threads, and equals the training forward's: the value of a row is
``scale * float(code)``; a bag's sum is ``((0 + v0) + v1) + ...`` in the order of its ids; a mean
is that sum divided by the number of ids; a weight multiplies a value before it is added. All in
float32, each operation rounded once. NaN stays NaN, with any payload.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from dqrm.kernels.code_layout import packed_dtype, packed_row_bytes, unpack
from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.library import define_operator
from dqrm.kernels.tables import bag_layout, check_ids

MAX_DIM: Final = 1 << 16
"""Widest row; more is a transposed table."""


class PackedTables:
    """Packed tables of a model, held where they are: in memory or in a mapped file.

    Args:
        codes: packed codes of each table, ``[R, ...]`` as made by ``code_layout.pack``; the
            weights themselves, float32 [R, D], at 32 bits. Contiguous, on the CPU.
        scales: float32 [1] or [R] of each table; None at 32 bits.
        bits: 2, 4, 8, 16 or 32 of each table.
        names: the tables' names, for messages.
        embedding_dim: D.
        pooling: how a bag's rows become one vector.

    The instruction set is chosen here (see ``dqrm.kernels.cpu``), not at every call.

    Raises:
        ValueError: a tensor does not have the shape or dtype its bits ask for.
    """

    def __init__(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        bits: Sequence[int],
        names: Sequence[str],
        embedding_dim: int,
        pooling: Literal["sum", "mean"] = "sum",
    ) -> None:
        if pooling not in ("sum", "mean"):
            raise ValueError(f"pooling={pooling!r}: must be 'sum' or 'mean'")
        if not 1 <= embedding_dim <= MAX_DIM:
            raise ValueError(f"embedding_dim={embedding_dim}: must be between 1 and {MAX_DIM}")
        if not len(codes) == len(scales) == len(bits) == len(names) >= 1:
            raise ValueError(
                f"{len(codes)} codes, {len(scales)} scales, {len(bits)} bits, {len(names)} names: "
                "must be one of each a table, and at least one table"
            )
        for table in zip(names, codes, scales, bits, strict=True):
            _check_table(*table, embedding_dim)
        self.codes = tuple(codes)
        self.scales = tuple(scales)
        self.bits = tuple(bits)
        self.names = tuple(names)
        self.embedding_dim = embedding_dim
        self.pooling = pooling
        self._native = self._hold()

    def _hold(self) -> Any:
        """The native object that reads the same memory, or None where nothing is compiled."""
        module = native()
        if module is None:
            announce_fallback()
            return None
        return module.PackedTables(
            [capsule(codes) for codes in self.codes],
            [None if scale is None else capsule(scale) for scale in self.scales],
            self.bits,
            self.names,
            self.embedding_dim,
            self.pooling == "mean",
            isa_level(),
        )

    def look_up(
        self,
        indices: Tensor,
        offsets: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the pooled vectors, float32 [B, T, D]; bags without ids are zero.

        Args:
            indices: int32 or int64 [N], table-major, local to their table; for two tables and
                two samples ``[t0 s0 | t0 s1 | t1 s0 | t1 s1]``.
            offsets: int32 or int64 [T * B + 1] into indices; None when every bag holds exactly
                one id, then N = T * B.
            weights: float32 [N], multiplies the values; with pooling "sum" only.
            out: float32 [B, T, D] to write to and return, tables and columns contiguous, samples
                at any distance; must not overlap the other arguments.

        Raises:
            IndexError: an id is outside its table; the message names table and id.
            TypeError: a tensor has a dtype other than those above.
            ValueError: shapes do not fit each other. Nothing is written in any of these cases.
        """
        # Arguments are looked at closely only when the native function refuses them: at a few
        # hundred look-ups that would take as long as the look-ups.
        if out is None:
            bags = indices.numel() if offsets is None else max(0, offsets.numel() - 1)
            out = torch.empty(bags // len(self.codes), len(self.codes), self.embedding_dim)
        if self._native is None:
            self._check_out(out, self._check_batch(indices, offsets, weights))
            return out.copy_(self.look_up_reference(indices, offsets, weights=weights))
        try:
            self._look_up(indices, offsets, weights, out)
        except (RuntimeError, TypeError, ValueError):
            self._check_out(out, self._check_batch(indices, offsets, weights))
            if offsets is not None:
                offsets = offsets.to(torch.int64).contiguous()
            weights = None if weights is None else weights.contiguous()
            self._look_up(indices.contiguous(), offsets, weights, out)
        return out

    def _look_up(
        self, indices: Tensor, offsets: Tensor | None, weights: Tensor | None, out: Tensor
    ) -> None:
        self._native.look_up(
            capsule(indices),
            None if offsets is None else capsule(offsets),
            None if weights is None else capsule(weights),
            capsule(out),
            torch.get_num_threads(),
        )

    def look_up_reference(
        self, indices: Tensor, offsets: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        """Return what :meth:`look_up` does, by torch operators. Same errors."""
        samples = self._check_batch(indices, offsets, weights)
        if offsets is not None:
            offsets = offsets.to(torch.int64)
        _, table_of_index = bag_layout(indices, offsets, len(self.codes))
        check_ids(indices, table_of_index, self.names, tuple(len(codes) for codes in self.codes))
        counts = torch.bincount(table_of_index, minlength=len(self.codes)).tolist()
        ids_of_tables = enumerate(torch.split(indices.to(torch.int64), counts))
        values = torch.cat([self._values(table, ids) for table, ids in ids_of_tables])
        if weights is not None:
            values = weights.unsqueeze(1) * values
        if offsets is None:
            pooled = values + 0.0
        else:
            pooled = _pool_in_order(values, offsets)
            if self.pooling == "mean":
                pooled /= offsets.diff().clamp_min(1).unsqueeze(1)
        by_table = pooled.view(len(self.codes), samples, self.embedding_dim)
        return by_table.transpose(0, 1).contiguous()

    def _values(self, table: int, ids: Tensor) -> Tensor:
        """Values of rows of one table, float32 [len(ids), D]."""
        rows, scale = self.codes[table][ids], self.scales[table]
        if scale is None:
            return rows
        codes = unpack(rows, self.bits[table], self.embedding_dim)
        return (scale if scale.numel() == 1 else scale[ids, None]) * codes

    def _check_batch(self, indices: Tensor, offsets: Tensor | None, weights: Tensor | None) -> int:
        """Check all but the numbers in indices and offsets; return B."""
        num_tables, num_ids = len(self.codes), indices.numel()
        _check_vector("indices", indices, _INTEGERS)
        if offsets is None:
            samples, rest = divmod(num_ids, num_tables)
            if rest:
                raise ValueError(
                    f"{num_ids} indices do not divide into {num_tables} tables; pass offsets for "
                    "bags of other than one id"
                )
        else:
            _check_vector("offsets", offsets, _INTEGERS)
            samples, rest = divmod(offsets.numel() - 1, num_tables)
            if rest or samples < 0:
                raise ValueError(
                    f"offsets must hold num_tables * batch + 1 numbers from 0 to {num_ids}, the "
                    f"number of indices; got {offsets.numel()} numbers for {num_tables} tables"
                )
        if weights is not None:
            _check_vector("weights", weights, (torch.float32,))
            if weights.numel() != num_ids:
                raise ValueError(f"{weights.numel()} weights for {num_ids} indices")
            if self.pooling != "sum":
                raise ValueError("weights: only with pooling='sum', a weighted mean is undefined")
        return samples

    def _check_out(self, out: Tensor, samples: int) -> None:
        shape = (samples, len(self.codes), self.embedding_dim)
        if out.dtype != torch.float32:
            raise TypeError(f"out: must be float32, is {out.dtype}")
        if tuple(out.shape) != shape:
            raise ValueError(f"out: must have shape {list(shape)}, has {list(out.shape)}")
        row = shape[1] * shape[2]
        if out.numel() and (not out[0].is_contiguous() or (samples > 1 and out.stride(0) < row)):
            raise ValueError(
                f"out: a sample's {shape[1]} x {shape[2]} numbers must be contiguous and samples "
                f"must not overlap; strides are {out.stride()}"
            )


_INTEGERS = (torch.int32, torch.int64)


def _check_vector(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: must be {expected}, is {tensor.dtype}")
    if tensor.dim() != 1 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: must have one dimension and lie on the CPU, has shape "
            f"{list(tensor.shape)} on {tensor.device}"
        )


def _check_table(name: str, codes: Tensor, scale: Tensor | None, bits: int, dim: int) -> None:
    if bits not in (2, 4, 8, 16, 32):
        raise ValueError(f"bits={bits}: must be 2, 4, 8, 16 or 32 (table {name!r})")
    dtype = packed_dtype(bits)
    width = packed_row_bytes(dim, bits) // dtype.itemsize
    if codes.dtype != dtype or codes.dim() != 2 or codes.shape[1] != width:
        raise ValueError(
            f"table {name!r}: codes of {bits} bits and {dim} columns must be {dtype} [rows, "
            f"{width}]; got {codes.dtype} {list(codes.shape)}"
        )
    if not codes.is_contiguous() or codes.device.type != "cpu":
        raise ValueError(f"table {name!r}: codes must be contiguous and on the CPU")
    if bits == 32:
        if scale is not None:
            raise ValueError(f"table {name!r}: has a scale, but 32-bit rows are the weights")
        return
    if scale is None or scale.dtype != torch.float32 or scale.device.type != "cpu":
        raise ValueError(f"table {name!r}: needs a float32 scale on the CPU")
    if scale.dim() != 1 or scale.numel() not in (1, codes.shape[0]) or not scale.is_contiguous():
        raise ValueError(
            f"table {name!r}: scale must have shape [1] or [{codes.shape[0]}], has "
            f"{list(scale.shape)}"
        )


def _pool_in_order(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of bags, float32 [len(offsets) - 1, D], each id added after the one before it."""
    lengths = offsets.diff()
    sums = torch.zeros(lengths.numel(), values.shape[1])
    for position in range(int(lengths.max()) if lengths.numel() else 0):
        bags = (lengths > position).nonzero()[:, 0]
        sums[bags] += values[offsets[bags] + position]
    return sums


def _packed_embedding_bag(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    bits: Sequence[int],
    names: Sequence[str],
    embedding_dim: int,
    pooling: Literal["sum", "mean"],
    indices: Tensor,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """See PackedTables; holding the tables anew costs about a microsecond each."""
    tables = PackedTables(codes, scales, bits, names, embedding_dim, pooling)
    return tables.look_up(indices, offsets, weights=weights)


def _packed_embedding_bag_fake(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    bits: Sequence[int],
    names: Sequence[str],
    embedding_dim: int,
    pooling: str,
    indices: Tensor,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    shape = (bags // len(bits), len(bits), embedding_dim)
    return indices.new_empty(shape, dtype=torch.float32)


define_operator(
    "packed_embedding_bag(Tensor[] codes, Tensor?[] scales, int[] bits, str[] names, "
    "int embedding_dim, str pooling, Tensor indices, Tensor? offsets=None, Tensor? weights=None) "
    "-> Tensor",
    _packed_embedding_bag,
    _packed_embedding_bag_fake,
)
