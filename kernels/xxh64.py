"""XXH64 in plain Python, from the public specification (github.com/Cyan4973/xxHash, doc/)."""

from typing import Final

_MASK: Final = (1 << 64) - 1
_PRIME1: Final = 0x9E3779B185EBCA87
_PRIME2: Final = 0xC2B2AE3D27D4EB4F
_PRIME3: Final = 0x165667B19E3779F9
_PRIME4: Final = 0x85EBCA77C2B2AE63
_PRIME5: Final = 0x27D4EB2F165667C5

EMPTY_KEY: Final = 0xEF46DB3751D8E999  # xxh64_reference(b""): the key of a missing category


def _rotate(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & _MASK


def _round(accumulator: int, lane: int) -> int:
    return _rotate((accumulator + lane * _PRIME2) & _MASK, 31) * _PRIME1 & _MASK


def xxh64_reference(data: bytes) -> int:
    """Hash bytes to 64 bits, seed 0."""
    size = len(data)
    at = 0
    if size >= 32:
        lanes = [(_PRIME1 + _PRIME2) & _MASK, _PRIME2, 0, -_PRIME1 & _MASK]
        while size - at >= 32:
            for i in range(4):
                word = int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little")
                lanes[i] = _round(lanes[i], word)
            at += 32
        state = sum(_rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
        for lane in lanes:
            state = ((state ^ _round(0, lane)) * _PRIME1 + _PRIME4) & _MASK
    else:
        state = _PRIME5
    state = (state + size) & _MASK
    while size - at >= 8:
        state ^= _round(0, int.from_bytes(data[at : at + 8], "little"))
        state = (_rotate(state, 27) * _PRIME1 + _PRIME4) & _MASK
        at += 8
    if size - at >= 4:
        state ^= int.from_bytes(data[at : at + 4], "little") * _PRIME1 & _MASK
        state = (_rotate(state, 23) * _PRIME2 + _PRIME3) & _MASK
        at += 4
    for byte in data[at:]:
        state ^= byte * _PRIME5 & _MASK
        state = _rotate(state, 11) * _PRIME1 & _MASK
    state = (state ^ (state >> 33)) * _PRIME2 & _MASK
    state = (state ^ (state >> 29)) * _PRIME3 & _MASK
    return state ^ (state >> 32)
