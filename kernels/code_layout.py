"""How low-bit codes lie in memory: what packing writes and the native loops read.

Symbols: R rows, D codes in a row.
"""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes of shape [R, D] for storage.

    A byte of 4-bit codes holds the code of element j in its low nibble and that of element
    j + D/2 in its high nibble; 2 bits split the row in quarters the same way, lowest bits
    first. A row so laid out unpacks into contiguous runs, without interleaving. A row length
    that does not fill its last byte is padded with zero codes.

    Returns:
        int16 [R, D] for 16 bits, int8 [R, D] for 8, else uint8 [R, ceil(D * bits / 8)].
    """
    if bits == 16:
        return codes.to(torch.int16)
    if bits == 8:
        return codes.to(torch.int8)
    per_byte = 8 // bits
    rows, dim = codes.shape
    width = -(-dim // per_byte)
    padded = torch.zeros(rows, width * per_byte, dtype=torch.int32)
    padded[:, :dim] = codes.to(torch.int32)
    parts = (padded & (2**bits - 1)).view(rows, per_byte, width)
    packed = torch.zeros(rows, width, dtype=torch.int32)
    for part in range(per_byte):
        packed |= parts[:, part] << (part * bits)
    return packed.to(torch.uint8)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Return the float32 codes [R, dim] of a tensor made by :func:`pack`."""
    if bits in (8, 16):
        return packed.to(torch.float32)
    per_byte = 8 // bits
    wide = packed.to(torch.int32)
    parts = [(wide >> (part * bits)) & (2**bits - 1) for part in range(per_byte)]
    codes = torch.cat(parts, dim=1)[:, :dim]
    # Sign-extend: the upper half of the unsigned range stands for the negative codes.
    sign = 1 << (bits - 1)
    signed: Tensor = (codes ^ sign) - sign
    return signed.to(torch.float32)


def packed_row_bytes(dim: int, bits: int) -> int:
    """Return the bytes of one packed row of ``dim`` codes, scales not counted."""
    return dim * 4 if bits == 32 else -(-dim * bits // 8)


def packed_dtype(bits: int) -> torch.dtype:
    """Return the dtype of packed codes: float32 at 32 bits, where the codes are the weights."""
    return {32: torch.float32, 16: torch.int16, 8: torch.int8}.get(bits, torch.uint8)
