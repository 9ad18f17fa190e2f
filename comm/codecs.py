"""Codecs of dense gradients: what becomes of float32 values on the wire. They keep no state.

A codec turns values into a payload that tells how long it is by itself, and adds what it lost to
nothing but the residual it is given. NaN and infinity are reported, never sent: a residual would
remember them for ever. Zero has one sign, as the codes have: -0.0 arrives as 0.0, except through
``Cast``, which sends what it gets.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from dqrm.kernels.block_codecs import block_code_bytes, dequantize_blocks, quantize_blocks
from dqrm.kernels.large_values import select_large
from dqrm.kernels.row_messages import encode_rows, merge_messages, row_message_bound
from dqrm.kernels.sign_codec import pack_signs, sign_blocks, unpack_signs
from dqrm.kernels.tables import RowGradient


class Codec(ABC):
    """How values are sent.

    Attributes:
        linear: whether the sum of payloads is the payload of the sum, so that they can be summed
            by a plain all-reduce.
        exact: whether a payload's size does not depend on the values.
    """

    linear: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    @property
    @abstractmethod
    def number(self) -> int:
        """Stands for the codec in headers."""

    @property
    def align(self) -> int:
        """Values may be split at multiples of it without changing what arrives."""
        return 1

    @abstractmethod
    def wire_bytes(self, count: int) -> int:
        """Return the bytes of the payload of ``count`` values, the most where they vary."""

    @abstractmethod
    def encode(
        self,
        values: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        *,
        key: int | None = None,
        first: int = 0,
    ) -> int | None:
        """Encode values.

        Args:
            values: float32 [N], contiguous; left as they are.
            out: uint8, contiguous, at least wire_bytes(N); written.
            residual: float32 [N], contiguous; added to the values first, and becomes what was
                lost.
            key: of stochastic rounding, where the codec uses it.
            first: where the values begin in a larger tensor, a multiple of ``align``.

        Returns:
            The bytes written, or None where a value is NaN or infinity; nothing is to be sent then.
        """

    @abstractmethod
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False, alpha: float = 1.0) -> int:
        """Write, or add, alpha times the values.

        Args:
            payload: uint8, begins with what :meth:`encode` wrote.
            out: float32 [N], contiguous.
            add: add to ``out`` rather than overwrite it.
            alpha: factor.

        Returns:
            The bytes read.

        Raises:
            ValueError: the payload is no such payload.
        """


_CAST_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Cast(Codec):
    """float32 as it is, or rounded to the nearest bfloat16 or float16.

    Values that overflow float16, above 65504, are reported as infinite.
    """

    linear: ClassVar[bool] = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.dtype not in _CAST_NUMBERS:
            raise ValueError(f"Cast to {self.dtype}: must be float32, bfloat16 or float16")

    @property
    @override
    def number(self) -> int:
        return _CAST_NUMBERS[self.dtype]

    @override
    def wire_bytes(self, count: int) -> int:
        return count * self.dtype.itemsize

    @override
    def encode(
        self,
        values: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        *,
        key: int | None = None,
        first: int = 0,
    ) -> int | None:
        given = values if residual is None else values + residual
        sent = given.to(self.dtype)
        if not bool(sent.isfinite().all()):
            return None
        size = self.wire_bytes(values.numel())
        # Bytes, because the payload may lie at any address.
        out[:size] = sent.view(torch.uint8)
        if residual is not None:
            torch.sub(given, sent, out=residual)
        return size

    @override
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False, alpha: float = 1.0) -> int:
        size = self.wire_bytes(out.numel())
        _require(payload, size)
        values = payload[:size].clone().view(self.dtype).float().mul_(alpha)
        out.add_(values) if add else out.copy_(values)
        return size


@dataclass(frozen=True)
class Blocks(Codec):
    """Integers of 8 or 4 bits with a scale every ``block`` values (dqrm.kernels.block_codecs)."""

    bits: Literal[8, 4] = 8
    block: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if self.bits not in (8, 4) or self.block < 2 or self.block % 2:
            raise ValueError(f"{self}: bits must be 8 or 4, block even")

    @property
    @override
    def number(self) -> int:
        return 8 + (self.bits == 4)

    @property
    @override
    def align(self) -> int:
        return self.block

    @override
    def wire_bytes(self, count: int) -> int:
        return 4 * -(-count // self.block) + block_code_bytes(count, self.bits, self.block)

    @override
    def encode(
        self,
        values: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        *,
        key: int | None = None,
        first: int = 0,
    ) -> int | None:
        scales, codes = self._parts(out, values.numel())
        bad = quantize_blocks(
            values,
            codes,
            scales,
            bits=self.bits,
            block=self.block,
            residual=residual,
            carried=residual is not None,
            key=key if self.rounding == "stochastic" else None,
            first_block=first // self.block,
        )
        return self.wire_bytes(values.numel()) if bad is None else None

    @override
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False, alpha: float = 1.0) -> int:
        size = self.wire_bytes(out.numel())
        _require(payload, size)
        scales, codes = self._parts(payload, out.numel())
        dequantize_blocks(
            codes, scales, out, bits=self.bits, block=self.block, add=add, alpha=alpha
        )
        return size

    def _parts(self, payload: Tensor, count: int) -> tuple[Tensor, Tensor]:
        scale_bytes = 4 * -(-count // self.block)
        return payload[:scale_bytes], payload[scale_bytes : self.wire_bytes(count)]


@dataclass(frozen=True)
class Signs(Codec):
    """One bit a value and a scale every ``block`` values (dqrm.kernels.sign_codec).

    The root mean square as scale has no proven contraction in one shot, yet leaves the smaller
    residual in a loop of error feedback.
    """

    block: int = 2048
    scale: Literal["rms", "l1"] = "rms"

    def __post_init__(self) -> None:
        if self.block < 8 or self.block % 8:
            raise ValueError(f"{self}: block must be a multiple of 8")

    @property
    @override
    def number(self) -> int:
        return 16

    @property
    @override
    def align(self) -> int:
        return self.block

    @override
    def wire_bytes(self, count: int) -> int:
        return 4 * sign_blocks(count, self.block) + -(-count // 8)

    @override
    def encode(
        self,
        values: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        *,
        key: int | None = None,
        first: int = 0,
    ) -> int | None:
        scales, bits = self._parts(out, values.numel())
        lost = torch.zeros_like(values) if residual is None else residual
        bad = pack_signs(values, lost, bits, scales, block=self.block, scale=self.scale)
        return self.wire_bytes(values.numel()) if bad is None else None

    @override
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False, alpha: float = 1.0) -> int:
        size = self.wire_bytes(out.numel())
        _require(payload, size)
        scales, bits = self._parts(payload, out.numel())
        unpack_signs(bits, scales, out, block=self.block, add=add, alpha=alpha)
        return size

    def _parts(self, payload: Tensor, count: int) -> tuple[Tensor, Tensor]:
        scale_bytes = 4 * sign_blocks(count, self.block)
        return payload[:scale_bytes], payload[scale_bytes : self.wire_bytes(count)]


@dataclass(frozen=True)
class Largest(Codec):
    """The values of largest magnitude, about ``ratio`` of them, as float32 or bfloat16.

    Their threshold is that of a sample of one value in ``sample``, as in Deep Gradient Compression
    (arXiv 1712.01887, section 4); where more than the fifth over the ratio reach it, the largest of
    those are taken. Few are exact: tensors of up to 16 * sample values are sampled whole.
    """

    exact: ClassVar[bool] = False
    ratio: float = 0.01
    bits: Literal[32, 16] = 16
    sample: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or self.bits not in (32, 16) or self.sample < 1:
            raise ValueError(f"{self}: ratio must be in (0, 1], bits 32 or 16, sample positive")

    @property
    @override
    def number(self) -> int:
        return 24 + (self.bits == 16)

    @override
    def wire_bytes(self, count: int) -> int:
        return 8 + row_message_bound(self._most(count), 1, self.bits)

    @override
    def encode(
        self,
        values: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        *,
        key: int | None = None,
        first: int = 0,
    ) -> int | None:
        count = values.numel()
        given = values.add(residual) if residual is not None else values
        indices = self._select(given)
        if indices is None:
            return None
        picked = RowGradient(indices, given[indices].unsqueeze(1))
        # The values are in `given` already: the residual hands over nothing and takes what is lost.
        if residual is not None:
            residual.copy_(given)
            residual[indices] = 0.0
        size, bad = encode_rows(
            picked,
            out[8 : self.wire_bytes(count)],
            bits=self.bits,
            slots=None if residual is None else indices,
            residual=None if residual is None else residual.view(-1, 1),
        )
        if bad is not None:
            return None
        out[:8] = torch.tensor([len(indices), size], dtype=torch.int32).view(torch.uint8)
        return 8 + size

    @override
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False, alpha: float = 1.0) -> int:
        _require(payload, 8)
        picked, size = payload[:8].clone().view(torch.int32).tolist()
        if not 0 <= picked <= out.numel() or not 0 <= size <= len(payload) - 8:
            raise ValueError(f"{picked} of {out.numel()} values in {size} bytes cannot be")
        room = RowGradient(torch.empty(picked, dtype=torch.int64), torch.empty(picked, 1))
        found = merge_messages(
            payload, [(8, size, picked, 0)], room, bits=self.bits, limit=out.numel(), alpha=alpha
        )
        if not add:
            out.zero_()
        out.index_add_(0, found.rows, found.values.view(-1))
        return 8 + int(size)

    def _most(self, count: int) -> int:
        return min(count, max(1, int(1.2 * self.ratio * count)))

    def _select(self, values: Tensor) -> Tensor | None:
        """Return the places of the largest values, ascending; None where one is not finite."""
        count = values.numel()
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        step = self.sample if count > 16 * self.sample else 1
        sampled = values[::step].abs()
        wanted = max(1, round(self.ratio * len(sampled)))
        threshold = float(sampled.topk(wanted).values[-1])
        if not threshold <= torch.finfo(torch.float32).max:
            return None
        indices = torch.empty(count, dtype=torch.int64)
        found, bad = select_large(values, threshold, indices)
        if bad is not None:
            return None
        indices = indices[:found]
        most = self._most(count)
        if found > most:
            keep = values[indices].abs().topk(most, sorted=False).indices
            indices = indices[keep.sort().values]
        return indices


def codec_named(text: str) -> Codec:
    """Return the codec of a short name: fp32, bf16, fp16, int8, int4, sign, or top:0.01.

    Raises:
        ValueError: there is no such codec.
    """
    simple: dict[str, Codec] = {
        "fp32": Cast(),
        "bf16": Cast(torch.bfloat16),
        "fp16": Cast(torch.float16),
        "int8": Blocks(8),
        "int4": Blocks(4, block=64),
        "sign": Signs(),
    }
    if text in simple:
        return simple[text]
    if text.startswith("top:"):
        try:
            return Largest(float(text.removeprefix("top:")))
        except ValueError as error:
            raise ValueError(f"codec {text!r}: {error}") from error
    raise ValueError(f"codec {text!r}: must be one of {', '.join(simple)}, or top:RATIO")


def _require(payload: Tensor, size: int) -> None:
    if len(payload) < size:
        raise ValueError(f"a payload of {len(payload)} bytes is cut off; it should have {size}")
