"""Rows of gradients as integer codes with a scale each, for a message of bytes.

The arithmetic, the layout of the codes and what becomes of NaN are in
:mod:`dqrm.kernels.row_codecs_reference`. Codes and scales go to the caller's memory, which may be a
slice of a message at any address. All results are the same bits at every level and for any number
of threads.
"""

import torch
from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.row_codecs_reference import code_bytes, decode_reference, encode_reference

_SCALE_DTYPES = (torch.float32, torch.bfloat16)


def quantize_rows(
    values: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int = 8,
    scale_dtype: torch.dtype = torch.bfloat16,
    residual: Tensor | None = None,
    carried: bool = False,
    key: int | None = None,
    numbers: Tensor | None = None,
) -> int | None:
    """Encode rows into the caller's memory.

    Args:
        values: float32 [N, D], contiguous.
        codes: uint8 or int8, N * code_bytes(D, bits) contiguous bytes, written.
        scales: N scales of scale_dtype, or their bytes as uint8; contiguous, written.
        bits: 8 or 4.
        scale_dtype: float32 or bfloat16. float16 would lose gradients below 6e-8.
        residual: float32 [N, D], contiguous; becomes what was lost. It may be ``values`` itself.
        carried: add the residual to the values first: it holds what earlier calls lost.
        key: of stochastic rounding, from :func:`dqrm.kernels.rounding.step_key`; None rounds to
            nearest.
        numbers: int64 [N], the rows' numbers, which their random bits depend on; None counts them
            from 0.

    Returns:
        The first row that holds NaN or infinity, or None.

    Raises:
        ValueError: an argument is not as above; nothing was written.
    """
    if values.dim() != 2:
        raise ValueError(f"values: must be [N, D], is {list(values.shape)}")
    rows, dim = values.shape
    if numbers is not None and (numbers.dtype != torch.int64 or numbers.shape != (rows,)):
        raise ValueError(f"numbers: must be int64 [{rows}], is {_shown(numbers)}")
    return encode(values, codes, scales, dim, bits, scale_dtype, residual, carried, key, numbers, 0)


def dequantize_rows(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    bits: int = 8,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Decode rows.

    Args:
        codes: as :func:`quantize_rows` wrote them.
        scales: as :func:`quantize_rows` wrote them.
        out: float32 [N, D], contiguous, written.
        bits: 8 or 4.
        scale_dtype: what the scales are.

    Raises:
        ValueError: an argument is not as above; nothing was written.
    """
    if out.dim() != 2:
        raise ValueError(f"out: must be [N, D], is {list(out.shape)}")
    decode(codes, scales, out, None, out.shape[1], bits, scale_dtype, False, 1.0)


def add_dequantized_rows(
    codes: Tensor,
    scales: Tensor,
    rows: Tensor,
    out: Tensor,
    *,
    bits: int = 8,
    scale_dtype: torch.dtype = torch.bfloat16,
    alpha: float = 1.0,
) -> None:
    """Add (alpha * s) * q of row i to row ``rows[i]`` of ``out``, in the order of i.

    Args:
        codes: as :func:`quantize_rows` wrote them.
        scales: as :func:`quantize_rows` wrote them.
        rows: int64 [N]. Rows that ascend without repeats are shared out over threads.
        out: float32 [R, D], contiguous, added to.
        bits: 8 or 4.
        scale_dtype: what the scales are.
        alpha: factor, in float32.

    Raises:
        IndexError: a row is outside ``out``; nothing was written.
        ValueError: an argument is not as above; nothing was written.
    """
    if out.dim() != 2:
        raise ValueError(f"out: must be [R, D], is {list(out.shape)}")
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows: must be int64 [N], is {_shown(rows)}")
    decode(codes, scales, out, rows, out.shape[1], bits, scale_dtype, True, alpha)


def encode(
    values: Tensor,
    codes: Tensor,
    scales: Tensor,
    dim: int,
    bits: int,
    scale_dtype: torch.dtype,
    residual: Tensor | None,
    carried: bool,
    key: int | None,
    numbers: Tensor | None,
    first: int,
) -> int | None:
    """Encode contiguous values as rows of ``dim``, the last of which may be shorter.

    :mod:`dqrm.kernels.block_codecs` has rows of its own; the arguments are those of
    :func:`quantize_rows`. Rows without ``numbers`` count from ``first``.
    """
    require_float32("values", values)
    if residual is not None:
        require_float32("residual", residual)
        if residual.shape != values.shape:
            raise ValueError(f"residual: must be {list(values.shape)}, is {list(residual.shape)}")
    elif carried:
        raise ValueError("carried=True: needs a residual")
    codes, scales = _payload(codes, scales, values.numel(), dim, bits, scale_dtype)
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        return encode_reference(
            values, codes, scales, dim, bits, scale_dtype, residual, carried, key, numbers, first
        )
    row: int = native.encode_rows(
        capsule(values.view(-1)),
        capsule(codes),
        capsule(scales),
        dim,
        bits,
        scale_dtype == torch.bfloat16,
        None if residual is None else capsule(residual.view(-1)),
        carried,
        key,
        None if numbers is None else capsule(numbers.contiguous()),
        first,
        torch.get_num_threads(),
        cpu.isa_level(),
    )
    return None if row < 0 else row


def decode(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    rows: Tensor | None,
    dim: int,
    bits: int,
    scale_dtype: torch.dtype,
    add: bool,
    alpha: float,
) -> None:
    """Decode rows of ``dim`` into contiguous values, or into some rows of them; see encode."""
    require_float32("out", out)
    count = out.numel() if rows is None else rows.numel() * dim
    codes, scales = _payload(codes, scales, count, dim, bits, scale_dtype)
    native = cpu.native()
    if native is None:
        cpu.announce_fallback()
        decode_reference(codes, scales, out, rows, dim, bits, scale_dtype, add, alpha)
        return
    native.decode_rows(
        capsule(codes),
        capsule(scales),
        capsule(out.view(-1)),
        None if rows is None else capsule(rows.contiguous()),
        dim,
        bits,
        scale_dtype == torch.bfloat16,
        add,
        alpha,
        torch.get_num_threads(),
        cpu.isa_level(),
    )


def require_float32(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor is contiguous float32 on the CPU."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{name}: must be contiguous float32 on the CPU, is {_shown(tensor)}")


def bytes_of(name: str, tensor: Tensor, count: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Return a contiguous tensor of one of some dtypes as its ``count`` bytes, uint8 [count].

    Raises:
        ValueError: it is another dtype or size, or not contiguous.
    """
    if tensor.dtype not in dtypes or not tensor.is_contiguous():
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: must be contiguous {names}, is {_shown(tensor)}")
    got = tensor.numel() * tensor.element_size()
    if got != count:
        raise ValueError(f"{name}: must have {count} bytes, has {got}")
    # A single element is contiguous whatever its stride, which view() would keep and then refuse.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _payload(
    codes: Tensor, scales: Tensor, count: int, dim: int, bits: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: must be 4 or 8")
    if scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale_dtype={scale_dtype}: must be float32 or bfloat16")
    if dim < 1:
        raise ValueError(f"rows of {dim} values cannot be encoded")
    rows, rest = divmod(count, dim)
    size = rows * code_bytes(dim, bits) + code_bytes(rest, bits)
    scale_bytes = (rows + (rest > 0)) * scale_dtype.itemsize
    return (
        bytes_of("codes", codes, size, (torch.uint8, torch.int8)),
        bytes_of("scales", scales, scale_bytes, (torch.uint8, scale_dtype)),
    )


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
