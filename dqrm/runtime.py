"""How many cores this process may really use, and threads set to match.

Imports neither torch nor numpy: thread counts and the waiting policy of OpenMP are read once,
when the first of them is loaded, so they must be in the environment before that.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
_TOPOLOGY_ROOT = Path("/sys/devices/system/cpu")

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_WAITING = {
    # A spinning OpenMP thread beside a busy core made a training step 14 times slower when
    # measured; a passive one costs microseconds to wake.
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}


@dataclass(frozen=True)
class Cores:
    """The cores of the machine and what limits this process."""

    count: int
    """Cores one process of this run should compute with; at least 1."""
    machine: int
    """Hardware threads of the machine."""
    affinity: int
    """Hardware threads this process may be scheduled on."""
    physical: int
    """Cores behind them; hardware threads that share a core count once."""
    quota: float | None
    """CPU time the control group allows, in cores; None without a limit."""
    processes: int
    """Processes of this run on the machine (LOCAL_WORLD_SIZE, as torchrun sets it)."""
    limit: int
    """Cores that all of them should compute with together; at least 1."""

    @property
    def reason(self) -> str:
        """Why ``count`` is what it is, in one line."""
        parts = [f"{self.machine} hardware threads"]
        if self.affinity < self.machine:
            parts.append(f"{self.affinity} allowed by affinity")
        if self.physical < self.affinity:
            parts.append(f"{self.physical} physical cores behind them")
        if self.quota is not None:
            parts.append(f"a control-group quota of {self.quota:g} cores")
        if self.processes > 1:
            parts.append(f"shared by {self.processes} processes")
        return ", ".join(parts)


@dataclass(frozen=True)
class Threads:
    """The number of threads chosen, and why."""

    count: int
    reason: str


_prepared: Threads | None = None
"""What this process put into the environment, so as not to take it for a person's wish."""


def available_cores() -> Cores:
    """Return the cores this process may use: affinity, SMT siblings, quota, ranks per node."""
    allowed = _affinity()
    physical = _physical_cores(allowed, _TOPOLOGY_ROOT)
    quota = cgroup_quota()
    processes = _positive(os.environ.get("LOCAL_WORLD_SIZE")) or 1
    # Rounding a quota of 2.5 down keeps the kernel from throttling all threads at once.
    limit = physical if quota is None else min(physical, int(quota))
    return Cores(
        count=max(1, limit // processes),
        limit=max(1, limit),
        machine=os.cpu_count() or len(allowed),
        affinity=len(allowed),
        physical=physical,
        quota=quota,
        processes=processes,
    )


def choose_threads(requested: int | None = None) -> Threads:
    """Return how many threads to compute with.

    In order: ``requested`` (``train.threads``), OMP_NUM_THREADS where a person set it, the
    cores available. torchrun sets OMP_NUM_THREADS=1 by itself, so it is not followed there.
    """
    if requested is not None:
        return Threads(requested, "train.threads")
    from_environment = _positive(os.environ.get("OMP_NUM_THREADS"))
    if _prepared is not None and _prepared.count == from_environment:
        return _prepared
    if from_environment is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return Threads(from_environment, "OMP_NUM_THREADS")
    cores = available_cores()
    return Threads(cores.count, cores.reason)


def prepare_threads(requested: int | None = None) -> Threads:
    """Choose the threads and set the environment for libraries not loaded yet.

    Thread counts are overwritten; a waiting policy that is already set stays. Where torch is
    loaded already, its thread count is set directly and its waiting stays as it was.
    """
    global _prepared
    _prepared = threads = choose_threads(requested)
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads.count)
    for variable, value in _WAITING.items():
        os.environ.setdefault(variable, value)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads.count)
    return threads


def cgroup_quota(root: Path = _CGROUP_ROOT, membership: Path = _CGROUP_MEMBERSHIP) -> float | None:
    """Return the CPU time the control groups of this process allow, in cores.

    Reads version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``), takes the tightest
    limit from the process's own group up to the root, and returns None where there is none.
    """
    folders = _group_folders("cpu", root, membership)
    return min((quota for folder in folders for quota in _quotas(folder)), default=None)


def available_memory_bytes(
    root: Path = _CGROUP_ROOT,
    membership: Path = _CGROUP_MEMBERSHIP,
    meminfo: Path = Path("/proc/meminfo"),
) -> int | None:
    """Return the memory this process can still take: the machine's, or less by control group.

    None where the machine does not say.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    for folder in _group_folders("memory", root, membership):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            # "max" is no limit: not a number, so skipped.
            with contextlib.suppress(OSError, ValueError):
                limits.append(_number(folder / limit) - _number(folder / used))
    return max(0, min(limits)) if limits else None


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


def _group_folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Folders of the process's control groups that may limit ``controller``, both versions."""
    try:
        entries = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for entry in entries:
        number, controllers, group = entry.split(":", 2)
        if number == "0" and not controllers:
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / controllers, root / controller]
        else:
            continue
        for mount in dict.fromkeys(mounts):
            yield from _upwards(mount, group)


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """The folder of ``group`` and its parents; inside a container only the mount may exist."""
    relative = Path(group.lstrip("/"))
    if ".." not in relative.parts:
        for parent in (relative, *relative.parents):
            if parent != Path():
                yield mount / parent
    yield mount


def _quotas(folder: Path) -> Iterator[float]:
    # Absent files and "max" are no limit; neither is the -1 of version 1.
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        yield int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        microseconds = _number(folder / "cpu.cfs_quota_us")
        period_microseconds = _number(folder / "cpu.cfs_period_us")
        if microseconds > 0 and period_microseconds > 0:
            yield microseconds / period_microseconds


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int], topology: Path) -> int:
    cores = set()
    for cpu in cpus:
        try:
            siblings = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
        except OSError:
            return len(cpus)
        cores.add(min(_cpu_list(siblings)))
    return len(cores)


def _cpu_list(text: str) -> set[int]:
    """CPU numbers of a kernel list such as ``0-3,8``."""
    cpus: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _positive(text: str | None) -> int | None:
    # OMP_NUM_THREADS may be a list, one number a nesting level: the first counts here.
    head = (text or "").partition(",")[0].strip()
    return int(head) if head.isdigit() and int(head) > 0 else None
