"""Libraries that are there only where somebody installed them."""

import importlib
from importlib import metadata
from typing import Any

from dqrm.bench.speed.contestants import Unavailable

_INSTALL = {
    "fbgemm_gpu": ("FBGEMM", "pip install 'dqrm[bench]'"),
    # TorchRec asks for the GPU build of FBGEMM, whose files would lie over those of the CPU build.
    "torchrec": ("TorchRec", "pip install 'dqrm[bench]' && pip install --no-deps torchrec==1.9.2"),
}
PACKAGES = ("fbgemm-gpu-cpu", "torchrec")
"""Whose versions a report names."""


def peer_module(name: str) -> Any:
    """Import a module of a peer.

    Raises:
        Unavailable: the peer is not installed, or does not load beside this torch.
    """
    package = name.partition(".")[0]
    title, install = _INSTALL[package]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == package:
            raise Unavailable(f"{title} is not installed: {install}") from None
        raise Unavailable(f"{title} does not load: {error}; {install}") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        line = str(error).strip().splitlines()[:1]
        raise Unavailable(f"{title} does not load: {' '.join(line)}; {install}") from error


def peer_versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
