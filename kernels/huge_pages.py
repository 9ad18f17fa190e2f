"""Memory for large tables on pages of 2 MB.

A random row of a table of gigabytes misses the processor's address cache at nearly every access
with pages of 4 KB. Linux hands out large pages to memory that asks before it is first touched.
"""

import ctypes
import ctypes.util
import functools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
"""Size and alignment of a huge page on x86-64 and on ARM with 4 KB base pages."""

SMALLEST_BYTES = 16 * PAGE_BYTES
"""Below it ordinary pages fit the processor's second-level address cache (1500 entries and up)
well enough, and rounding to 2 MB would show."""

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialised tensor, aligned to 64 bytes, on huge pages where it is large."""
    tensor = torch.empty(*shape, dtype=dtype)
    advise(tensor)
    return tensor


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of zeros, aligned to 64 bytes, on huge pages where it is large."""
    return empty(*shape, dtype=dtype).zero_()


def advise(tensor: Tensor) -> bool:
    """Ask for huge pages under a contiguous tensor whose memory nobody has touched yet.

    Only whole huge pages inside the tensor are asked for. Returns whether the system agreed;
    False for tensors under SMALLEST_BYTES and where there are no huge pages.
    """
    begin = tensor.data_ptr()
    size = tensor.numel() * tensor.element_size()
    first = -(-begin // PAGE_BYTES) * PAGE_BYTES
    last = (begin + size) // PAGE_BYTES * PAGE_BYTES
    if size < SMALLEST_BYTES or last <= first or not available():
        return False
    return _madvise()(first, last - first, mmap.MADV_HUGEPAGE) == 0


@functools.cache
def available() -> bool:
    """Whether the system hands out huge pages to those who ask."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in _SWITCH.read_text(encoding="ascii")
    except OSError:
        return False


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int

    def call(address: int, length: int, advice: int) -> int:
        return int(function(address, length, advice))

    return call
