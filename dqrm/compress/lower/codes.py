"""Codes of weights as bytes, and back: as many bits a code as its grid needs.

    signs      1 bit     -1, 1
    trits      1.6 bits  -1, 0, 1: five digits of base 3 a byte
    bits       b bits    two's complement: bytes of 2, 4 and 8 bits as in dqrm.kernels.code_layout,
                         16 bits as pairs of bytes, the lower one first, other widths as planes
    cells              two's complement as of 4 bits where the code has 3, of 8 where it has 5 to 7

A plane is bit i of every code, eight codes a byte. The last byte of a run is filled up with zero
bits. All that fits into fewer bytes when it is deflated by zstd may be kept so. Planes hardly do:
zstd counts how often bytes occur, and a byte of a plane is the same bit of eight codes. Cells are
longer, but a byte of theirs is one or two whole codes, and deflated they take what the codes'
entropy asks for (MiniLM: 2.0 bits a code of 3, 4.3 of 5, 5.3 of 6).
"""

from typing import Final, Literal, get_args

import torch
import zstandard
from torch import Tensor

from dqrm.kernels.code_layout import pack, unpack

Coding = Literal["signs", "trits", "bits", "cells"]

CODINGS: Final = get_args(Coding)

_TRITS_A_BYTE: Final = 5
_POWERS = torch.tensor([3**place for place in range(_TRITS_A_BYTE)])
_LEVEL: Final = 1
"""Of zstd. Codes have no repetitions to find, the gain is from their unequal frequencies: higher
levels gave no fewer bytes (MiniLM at 8, 4 and 1.6 bits)."""


def coding_of(codes: Tensor) -> Coding:
    """Return the coding with the fewest bits that can hold ``codes``.

    Args:
        codes: whole numbers, any type.
    """
    if codes.numel() and int(codes.abs().max()) <= 1:
        return "trits" if bool((codes == 0).any()) else "signs"
    return "bits"


def code_bytes(count: int, coding: Coding, bits: int) -> int:
    """Return how many bytes so many codes take."""
    if coding == "trits":
        return -(-count // _TRITS_A_BYTE)
    width = 1 if coding == "signs" else _width(coding, bits)
    if width in (2, 4, 8, 16):
        return -(-count * width // 8)
    return width * -(-count // 8)


def encode(codes: Tensor, coding: Coding, bits: int) -> Tensor:
    """Return the bytes of codes, uint8 [code_bytes].

    Args:
        codes: whole numbers [N] that the coding can hold, any type.
        coding: how.
        bits: of a code, for "bits" and "cells".
    """
    codes = codes.to(torch.int64)
    if coding == "signs":
        return _planes(codes > 0, 1)
    if coding == "trits":
        digits = torch.ones(code_bytes(len(codes), coding, bits) * _TRITS_A_BYTE, dtype=torch.int64)
        digits[: len(codes)] = codes + 1
        return (digits.view(-1, _TRITS_A_BYTE) @ _POWERS).to(torch.uint8)
    width = _width(coding, bits)
    if width in (2, 4, 8, 16):
        return pack(codes[None], width)[0].view(torch.uint8)
    return _planes(codes, width)


def decode(data: Tensor, count: int, coding: Coding, bits: int) -> Tensor:
    """Return the codes, float32 [count], of what :func:`encode` made.

    Raises:
        ValueError: there are more or fewer bytes than so many codes take, or codes of more bits.
    """
    wanted = code_bytes(count, coding, bits)
    if data.dtype != torch.uint8 or data.shape != (wanted,):
        raise ValueError(
            f"{data.dtype} of shape {list(data.shape)}: {count:,} codes are uint8 [{wanted}]"
        )
    if coding == "signs":
        return _from_planes(data, 1, count).float().mul_(2.0).sub_(1.0)
    if coding == "trits":
        table = (torch.arange(3**_TRITS_A_BYTE)[:, None] // _POWERS % 3 - 1).float()
        if bool((data >= len(table)).any()):
            raise ValueError(f"a byte above {len(table) - 1} holds no trits")
        return table[data.to(torch.int64)].flatten()[:count]
    codes = _signed(data, count, _width(coding, bits))
    sign = 1 << (bits - 1)
    if coding == "cells" and bool(((codes < -sign) | (codes >= sign)).any()):
        raise ValueError(f"a cell holds no code of {bits} bits")
    return codes


def _width(coding: Coding, bits: int) -> int:
    """Bits that a code takes before it is deflated."""
    if coding != "cells":
        return bits
    return 4 if bits <= 4 else 8


def _signed(data: Tensor, count: int, width: int) -> Tensor:
    """Codes in two's complement of ``width`` bits, float32 [count]."""
    if width in (2, 4):
        return unpack(data[None], width, count)[0]
    if width in (8, 16):
        return data.view(torch.int8 if width == 8 else torch.int16).float()
    codes, sign = _from_planes(data, width, count), 1 << (width - 1)
    return ((codes ^ sign) - sign).float()


def deflate(data: Tensor) -> Tensor:
    """Return ``data`` (uint8 [N]) in fewer bytes, or itself where zstd finds none to save."""
    small = zstandard.ZstdCompressor(level=_LEVEL).compress(data.numpy().tobytes())
    if len(small) >= len(data):
        return data
    return torch.frombuffer(bytearray(small), dtype=torch.uint8)


def inflate(data: Tensor, size: int) -> Tensor:
    """Return the ``size`` bytes that :func:`deflate` made ``data`` of.

    Raises:
        ValueError: it made it of something else.
    """
    if len(data) == size:
        return data
    packed = data.numpy().tobytes()
    try:
        # Asked before memory is taken: a damaged file may name any size.
        found = zstandard.frame_content_size(packed)
        raw = zstandard.ZstdDecompressor().decompress(packed) if found == size else b""
    except zstandard.ZstdError as error:
        raise ValueError(f"{len(data):,} bytes cannot be inflated: {error}") from error
    if found != size:
        raise ValueError(f"{len(data):,} bytes inflate to {found:,}, wanted {size:,}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _planes(codes: Tensor, bits: int) -> Tensor:
    width = -(-len(codes) // 8)
    padded = torch.zeros(width * 8, dtype=torch.int64)
    padded[: len(codes)] = codes
    places = torch.arange(8)
    planes = [((padded >> bit & 1).view(width, 8) << places).sum(dim=1) for bit in range(bits)]
    return torch.cat(planes).to(torch.uint8)


def _from_planes(data: Tensor, bits: int, count: int) -> Tensor:
    """Codes as unsigned numbers, int64 [count]."""
    wide = data.to(torch.int64).view(bits, -1, 1)
    single = (wide >> torch.arange(8) & 1).view(bits, -1)[:, :count]
    return (single << torch.arange(bits)[:, None]).sum(dim=0)
