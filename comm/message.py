"""A message: 32 bytes of header, then the payload, in one run of bytes.

What is sent is what is counted: nothing about a message travels beside it. All numbers are
unsigned and little-endian.

    0   4  checksum    low half of XXH64 of all bytes behind it, payload included
    4   2  magic
    6   1  version
    7   1  codec       number of the codec; REFUSAL where the sender gave up, with its reason
    8   2  rank        of the sender
    10  2  generation  of the world, so that a rank of an earlier one is not listened to
    12  4  step
    16  4  name        checksum of the name of what is exchanged
    20  4  count       values or rows
    24  4  size        bytes of the payload
    28  4  largest     bytes of the largest message that the sender has in this exchange, header
                       included: where it did not fit, all ranks see that and repeat
"""

import struct
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Final

from torch import Tensor

from dqrm.kernels.row_messages import hash_bytes

HEADER_BYTES: Final = 32
REFUSAL: Final = 255
"""Codec of a message that says why its sender has nothing to send."""

_MAGIC: Final = 0x5144
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<IHBBHHIIIII")
_MOST: Final = 2**32 - 1


class MessageError(RuntimeError):
    """Received bytes are not the message that was expected."""


@dataclass(frozen=True)
class Header:
    """What a message says about itself."""

    codec: int
    rank: int
    generation: int
    step: int
    name: int
    count: int
    size: int
    largest: int


@cache
def name_checksum(name: str) -> int:
    """Return what stands for a name in headers."""
    return zlib.crc32(name.encode())


def write_header(message: Tensor, header: Header) -> None:
    """Write the header of a message whose payload is in place.

    Args:
        message: uint8, contiguous, HEADER_BYTES + header.size bytes at least.
        header: what it says.

    Raises:
        MessageError: the message is 4 GiB or longer.
    """
    if header.size + HEADER_BYTES > _MOST or header.count > _MOST:
        raise MessageError(f"{header.size} bytes are too many for one message; make smaller ones")
    view = message.numpy().data
    fields = (
        header.codec,
        header.rank,
        header.generation & 0xFFFF,
        header.step & _MOST,
        header.name,
        header.count,
        header.size,
        header.largest,
    )
    _HEADER.pack_into(view, 0, 0, _MAGIC, _VERSION, *fields)
    checksum = hash_bytes(message[4 : HEADER_BYTES + header.size]) & _MOST
    struct.pack_into("<I", view, 0, checksum)


def read_header(message: Tensor, sender: int) -> Header:
    """Return the header of a message, of which the payload may be cut off.

    Args:
        message: uint8, contiguous, what was received.
        sender: rank it should be from.

    Raises:
        MessageError: it is no message of this version, or another rank's.
    """
    if len(message) < HEADER_BYTES:
        raise MessageError(f"{len(message)} bytes from rank {sender} are shorter than a header")
    _, magic, version, *fields = _HEADER.unpack_from(message.numpy().data, 0)
    if magic != _MAGIC or version != _VERSION:
        raise MessageError(
            f"rank {sender} sent no message of version {_VERSION}: it starts with {magic:#06x}, "
            f"version {version}; do all ranks run the same release?"
        )
    header = Header(*fields)
    if header.rank != sender:
        raise MessageError(f"a message of rank {header.rank} came in place of rank {sender}'s")
    return header


def check_message(message: Tensor, header: Header, expected: Header) -> None:
    """Raise MessageError unless a message is whole, undamaged, and the one expected.

    Args:
        message: uint8, contiguous, what was received, at least the whole message.
        header: what it says.
        expected: what it should say; count, size and largest are the sender's matter, and so is to
            refuse.
    """
    end = HEADER_BYTES + header.size
    where = f"message of rank {header.rank}"
    if len(message) < end:
        raise MessageError(f"{where}: {end} bytes were announced, {len(message)} came")
    if hash_bytes(message[4:end]) & _MOST != int.from_bytes(
        message[:4].numpy().tobytes(), "little"
    ):
        raise MessageError(f"{where}: damaged on its way, its checksum is wrong")
    for field in ("generation", "step", "name"):
        got, wanted = getattr(header, field), getattr(expected, field)
        bits = 0xFFFF if field == "generation" else _MOST
        if got != wanted & bits:
            raise MessageError(f"{where}: {field} {got} where {wanted & bits} was expected")
    # A rank that refuses itself cannot tell what else was to come.
    if REFUSAL not in (header.codec, expected.codec) and header.codec != expected.codec:
        raise MessageError(f"{where}: codec {header.codec} where {expected.codec} was expected")
