"""Gradients as one bit a value and one scale a block, with error feedback in the same pass.

    compensated  c = gradient + residual
    scale        s = mean |c| of the block ("l1") or sqrt(mean c^2) ("rms"), summed in double
    bit          1 where c >= 0, so for -0.0 as well; value i is bit i % 8 of byte i // 8
    residual     c - s where the bit is 1, else c + s

The scale is float32. A block with NaN or infinity, or whose sums have them, decodes to NaN, and
its residual becomes zero: error feedback must not remember it. All results are the same bits at
every level and for any number of threads: a block's sum is taken in 16 lanes, by chunks of 65536
values, in an order that depends on neither. 1-bit Adam (arXiv 2102.02888) uses the RMS.
"""

from typing import Literal

import torch
from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.row_codecs import bytes_of, require_float32


def sign_blocks(count: int, block: int | None) -> int:
    """Return the number of blocks, and of scales, of ``count`` values."""
    return min(count, 1) if block is None else -(-count // block)


def pack_signs(
    gradient: Tensor,
    residual: Tensor,
    bits: Tensor,
    scales: Tensor,
    *,
    block: int | None = 2048,
    scale: Literal["rms", "l1"] = "rms",
) -> int | None:
    """Encode the sum of gradient and residual; the residual becomes what was lost.

    Args:
        gradient: float32 of any shape, contiguous.
        residual: float32, the same shape, contiguous; read and written.
        bits: uint8 [ceil(count / 8)], contiguous, written.
        scales: float32 [sign_blocks(count, block)] or its bytes as uint8; contiguous, written.
        block: values that share a scale, a multiple of 8; None for all of them.
        scale: how it is taken.

    Returns:
        The first block that is not finite, or None.

    Raises:
        ValueError: an argument is not as above; nothing was written.
    """
    if scale not in ("rms", "l1"):
        raise ValueError(f"scale={scale}: must be rms or l1")
    require_float32("gradient", gradient)
    require_float32("residual", residual)
    if residual.shape != gradient.shape:
        raise ValueError(f"residual: must be {list(gradient.shape)}, is {list(residual.shape)}")
    bits, scales = _payload(bits, scales, gradient.numel(), block)
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        new_bits, new_scales, lost = pack_signs_reference(
            gradient + residual, block=block, scale=scale
        )
        bits.copy_(new_bits)
        scales.copy_(new_scales.view(torch.uint8))
        residual.copy_(lost)
        bad = new_scales.isnan().nonzero()
        return int(bad[0]) if len(bad) else None
    found: int = native.pack_signs(
        capsule(gradient.view(-1)),
        capsule(residual.view(-1)),
        capsule(bits),
        capsule(scales),
        block or max(gradient.numel(), 1),
        scale == "rms",
        torch.get_num_threads(),
        cpu.isa_level(),
    )
    return None if found < 0 else found


def unpack_signs(
    bits: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    block: int | None = 2048,
    add: bool = False,
    alpha: float = 1.0,
) -> None:
    """Write, or add, alpha * s where the bit is 1 and -alpha * s elsewhere.

    Args:
        bits: as :func:`pack_signs` wrote them.
        scales: as :func:`pack_signs` wrote them.
        out: float32 of any shape, contiguous.
        block: values that share a scale.
        add: add to ``out`` rather than overwrite it.
        alpha: factor, in float32.

    Raises:
        ValueError: an argument is not as above; nothing was written.
    """
    require_float32("out", out)
    bits, scales = _payload(bits, scales, out.numel(), block)
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        values = unpack_signs_reference(
            bits, scales.clone().view(torch.float32), out.numel(), block=block, alpha=alpha
        ).view(out.shape)
        out.add_(values) if add else out.copy_(values)
        return
    native.unpack_signs(
        capsule(bits),
        capsule(scales),
        capsule(out.view(-1)),
        block or max(out.numel(), 1),
        add,
        alpha,
        torch.get_num_threads(),
        cpu.isa_level(),
    )


def pack_signs_reference(
    values: Tensor, *, block: int | None = 2048, scale: Literal["rms", "l1"] = "rms"
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode values in plain PyTorch: the definition, but for the order of the double sums.

    Args:
        values: float32 of any shape, gradient and residual added.
        block: values that share a scale.
        scale: how it is taken.

    Returns:
        Bits, uint8 [ceil(count / 8)]; scales, float32 [blocks]; residual, float32 as values.
    """
    flat = values.reshape(-1)
    count = flat.numel()
    block = block or max(count, 1)
    blocks = torch.nn.functional.pad(flat, (0, -count % block)).view(-1, block).double()
    lengths = torch.full((len(blocks),), block, dtype=torch.float64)
    lengths[-1:] -= -count % block
    if scale == "rms":
        scales = (blocks.square().sum(dim=1) / lengths).sqrt().float()
    else:
        scales = (blocks.abs().sum(dim=1) / lengths).float()
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    finite = scales.isfinite().repeat_interleave(block)[:count]
    of_value = scales.repeat_interleave(block)[:count]
    positive = (flat >= 0) & finite
    residual = torch.where(finite, flat - torch.where(positive, of_value, -of_value), 0.0)
    digits = torch.nn.functional.pad(positive.to(torch.uint8), (0, -count % 8)).view(-1, 8)
    bits = (digits << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
    return bits, scales, residual.view(values.shape)


def unpack_signs_reference(
    bits: Tensor, scales: Tensor, count: int, *, block: int | None = 2048, alpha: float = 1.0
) -> Tensor:
    """Decode in plain PyTorch: the definition.

    Args:
        bits: uint8 [ceil(count / 8)].
        scales: float32 [blocks].
        count: values.
        block: values that share a scale.
        alpha: factor of the scales.

    Returns:
        float32 [count].
    """
    digits = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    positive = digits.view(-1)[:count].bool()
    of_value = (scales * alpha).repeat_interleave(block or max(count, 1))[:count]
    return torch.where(positive, of_value, -of_value)


def _payload(bits: Tensor, scales: Tensor, count: int, block: int | None) -> tuple[Tensor, Tensor]:
    if block is not None and (block < 1 or (block % 8 and block < count)):
        raise ValueError(f"block={block}: must be a positive multiple of 8, or None for all values")
    return (
        bytes_of("bits", bits, -(-count // 8), (torch.uint8,)),
        bytes_of("scales", scales, 4 * sign_blocks(count, block), (torch.uint8, torch.float32)),
    )
