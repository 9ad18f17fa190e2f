"""Huge pages for everybody: peers do not ask for them, and gathers gain up to half by them."""

import os
import sys
from pathlib import Path

# torch asks for them where it allocates large tensors.
_TORCH = "THP_MEM_ALLOC_ENABLE"
# The C library does for everything else; settings are separated by colons.
_LIBC = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb=1"


def huge_pages_forced() -> bool:
    """Whether this process was started with them for every allocation."""
    return os.environ.get(_TORCH) == "1" and _TUNABLE in os.environ.get(_LIBC, "").split(":")


def start_again_with_huge_pages() -> None:
    """Replace this process by itself with huge pages forced; return where they are already.

    Both variables are read once, when a process starts.
    """
    if huge_pages_forced() or not sys.platform.startswith("linux"):
        return
    tunables = [text for text in (os.environ.get(_LIBC), _TUNABLE) if text]
    environment = {**os.environ, _TORCH: "1", _LIBC: ":".join(tunables)}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def huge_page_bytes() -> int:
    """Return how much memory of this process lies in huge pages now; 0 where nobody says."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0
