"""Which collective backends this machine can use, and what speaks against the others.

Nothing here starts a process group. Intel Extension for PyTorch is judged by its metadata
alone: importing it beside another torch than its own raises AttributeError.
"""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dqrm.comm.oneccl import LIBRARY as _ONECCL_LIBRARY
from dqrm.comm.oneccl import PACKAGE as _ONECCL_PACKAGE
from dqrm.comm.oneccl import installed_file, module_problem

_CCL_INTEL_PACKAGE = "oneccl-bind-pt"
_CCL_INTEL_MODULE = "oneccl_bindings_for_pytorch"
_IPEX_PACKAGE = "intel-extension-for-pytorch"
_LOAD_SECONDS = 30.0


@dataclass(frozen=True)
class Backend:
    """What was found about one library."""

    name: str
    usable: bool
    version: str | None
    detail: str
    """Why it is usable or not, in one line."""
    fix: str | None = None
    """What to do to make it usable; None where nothing is wrong or nothing helps."""
    library: Path | None = None


@dataclass(frozen=True)
class Choice:
    """The backend that will be used, and why."""

    backend: str
    reason: str


def probe_oneccl() -> Backend:
    """Look for oneCCL by package metadata and load its library in a process of its own."""
    try:
        distribution = metadata.distribution(_ONECCL_PACKAGE)
    except metadata.PackageNotFoundError:
        return Backend(
            "oneCCL",
            False,
            None,
            f"the package {_ONECCL_PACKAGE} is not installed",
            "pip install oneccl-cpu==2021.16.2 'impi-rt>=2021.16,<2021.19' (Linux on x86-64 only)",
        )
    library = installed_file(_ONECCL_PACKAGE, _ONECCL_LIBRARY)
    reinstall = f"pip install --force-reinstall {_ONECCL_PACKAGE}==2021.16.2"
    if library is None:
        detail = f"{_ONECCL_PACKAGE} is installed but {_ONECCL_LIBRARY} is not among its files"
        return Backend("oneCCL", False, distribution.version, detail, reinstall)
    problem = _load_problem(library)
    if problem is not None:
        detail = f"{library} does not load: {problem}"
        return Backend("oneCCL", False, distribution.version, detail, reinstall, library)
    missing = module_problem()
    if missing is not None:
        detail = f"{library} loads, but {missing}"
        fix = "build dqrm again with oneccl-cpu-devel==2021.16.2 at hand, as `make` does"
        return Backend("oneCCL", False, distribution.version, detail, fix, library)
    return Backend("oneCCL", True, distribution.version, f"{library} loads", None, library)


def probe_ccl_intel() -> Backend:
    """Judge Intel's own binding of oneCCL for torch by metadata; it is not imported."""
    try:
        version = metadata.version(_CCL_INTEL_PACKAGE)
    except metadata.PackageNotFoundError:
        detail = f"the package {_CCL_INTEL_PACKAGE} is not installed; it ended with torch 2.8"
        return Backend("ccl-intel", False, None, detail)
    torch_version = metadata.version("torch")
    if _minor(version) == _minor(torch_version):
        return Backend("ccl-intel", True, version, f"made for the installed torch {torch_version}")
    return Backend(
        "ccl-intel",
        False,
        version,
        f"made for torch {_minor(version)}, but torch {torch_version} is installed",
        "use the backend ccl, which needs no binding of Intel's",
    )


def import_ccl_intel() -> None:
    """Import Intel's binding, which makes its backend "ccl" known to torch."""
    importlib.import_module(_CCL_INTEL_MODULE)


def probe_gloo() -> Backend:
    """Ask torch whether it was built with Gloo. Imports torch."""
    import torch
    from torch import distributed

    if distributed.is_available() and distributed.is_gloo_available():
        return Backend("Gloo", True, torch.__version__, "built into torch")
    return Backend(
        "Gloo",
        False,
        torch.__version__,
        "this build of torch has no Gloo",
        "install the CPU build of torch for Linux",
    )


def probe_ipex() -> Backend:
    """Judge Intel Extension for PyTorch by metadata; it is never imported."""
    try:
        version = metadata.version(_IPEX_PACKAGE)
    except metadata.PackageNotFoundError:
        return Backend("IPEX", False, None, "not installed; not needed, torch has its kernels")
    torch_version = metadata.version("torch")
    if _minor(version) == _minor(torch_version):
        return Backend("IPEX", True, version, f"made for the installed torch {torch_version}")
    return Backend(
        "IPEX",
        False,
        version,
        f"made for torch {_minor(version)}, but torch {torch_version} is installed",
        f"pip uninstall {_IPEX_PACKAGE}, or use an environment with torch {_minor(version)}",
    )


def probe_backends() -> list[Backend]:
    """Return what is known of all, in the order in which they are tried. Imports torch."""
    return [probe_oneccl(), probe_gloo(), probe_ccl_intel(), probe_ipex()]


def _load_problem(library: Path) -> str | None:
    """Why the library does not load, or None. A crash while loading stays in the child."""
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, str(library)],
            capture_output=True,
            text=True,
            timeout=_LOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_LOAD_SECONDS:g} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1].removeprefix("OSError: ") if lines else f"exit status {done.returncode}"


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
