"""Intel oneCCL: where its library is, how it is set up, and the compiled module that drives it.

The library comes with the package ``oneccl-cpu``, libfabric with ``impi-rt``. Neither is on the
loader's path: both are found through package metadata, and loaded for the whole process before
the module ``dqrm.comm._ccl``, which is not linked to them.
"""

import atexit
import ctypes
import importlib.util
import logging
import os
import re
import shutil
import socket
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Final

PACKAGE: Final = "oneccl-cpu"
LIBRARY: Final = "libccl.so.1"
FABRIC_PACKAGE: Final = "impi-rt"
FABRIC_LIBRARY: Final = "libfabric.so.1"
MODULE: Final = "dqrm.comm._ccl"
SHM_VARIABLE: Final = "CCL_ATL_SHM"
# What one rank takes in /dev/shm: seen with oneCCL 2021.16.2.
SHM_BYTES_PER_RANK: Final = 64 * 1024**2
_SHM: Final = Path("/dev/shm")

_log = logging.getLogger(__name__)


def installed_file(package: str, name: str) -> Path | None:
    """Return the file of that name among those a package installed; None without one."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate())).resolve()
        if file.name == name and path.is_file():
            return path
    return None


def module_problem() -> str | None:
    """Why the compiled module cannot be there, without loading anything; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"it exists for Linux only, not for {sys.platform}"
    if importlib.util.find_spec(MODULE) is None:
        return "dqrm was built without oneCCL's headers"
    return None


@cache
def load() -> ModuleType:
    """Set the environment up, load oneCCL into the process and return the compiled module.

    Raises ImportError with the reason where that is not possible.
    """
    problem = module_problem()
    if problem is not None:
        raise ImportError(problem)
    library = installed_file(PACKAGE, LIBRARY)
    if library is None:
        raise ImportError(f"{LIBRARY} is not installed (package {PACKAGE})")
    prepare_environment()
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"{library} does not load: {error}") from error
    module = importlib.import_module(MODULE)
    atexit.register(_leave, module)
    return module


def _leave(module: ModuleType) -> None:
    module.stop()
    remove_shared_memory()


def prepare_environment() -> None:
    """Give oneCCL's variables the values that serve it best here; what the user set, stays.

    Its own worker threads stay off, as they spin on cores that compute. Shared memory is off
    unless CCL_ATL_SHM=1 asks for it, and even then where /dev/shm has no room for it.
    """
    defaults = {
        "CCL_PROCESS_LAUNCHER": "none",
        "CCL_ATL_TRANSPORT": "ofi",
        "CCL_WORKER_OFFLOAD": "0",
        "CCL_LOG_LEVEL": "error",
        SHM_VARIABLE: "0",
        "CCL_LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
        "CCL_LOCAL_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1"),
    }
    fabric = installed_file(FABRIC_PACKAGE, FABRIC_LIBRARY)
    if fabric is not None:
        defaults["CCL_OFI_LIBRARY_PATH"] = str(fabric)
        defaults["FI_PROVIDER_PATH"] = str(fabric.parent)
    if only_loopback():
        defaults["CCL_KVS_IFACE"] = "lo"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if os.environ[SHM_VARIABLE] != "0" and not _shm_has_room():
        os.environ[SHM_VARIABLE] = "0"


def only_loopback() -> bool:
    """Whether the loopback interface is the only one that is up."""
    return not any(name != "lo" and _is_up(name) for _, name in socket.if_nameindex())


def remove_shared_memory() -> None:
    """Delete what a group that ended badly leaves in /dev/shm, for all ranks of this machine.

    Every rank has the files of all mapped. A file that is deleted stays usable to who mapped it.
    """
    if os.environ.get(SHM_VARIABLE, "0") == "0":
        return
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    for name in {line.split(maxsplit=5)[-1] for line in lines}:
        # libfabric calls them <process>:<endpoint>:<number>.
        if re.fullmatch(rf"{_SHM}/\d+:\d+:\d+", name):
            Path(name).unlink(missing_ok=True)


def _is_up(name: str) -> bool:
    # IFF_UP is bit 0. Without sysfs nothing can be told: count the interface as up.
    try:
        flags = Path(f"/sys/class/net/{name}/flags").read_text(encoding="ascii")
    except OSError:
        return True
    return bool(int(flags, 16) & 1)


def _shm_has_room() -> bool:
    ranks = int(os.environ["CCL_LOCAL_SIZE"])
    needed = ranks * SHM_BYTES_PER_RANK
    free = shutil.disk_usage(_SHM).free if _SHM.is_dir() else 0
    if free >= needed:
        return True
    _log.warning(
        "%s=1 is not used: /dev/shm has %d MiB free, %d ranks on this machine need %d MiB",
        SHM_VARIABLE,
        free >> 20,
        ranks,
        needed >> 20,
    )
    return False
