"""What this machine offers to dqrm, what will be used, why, and how to mend what is wrong."""

import importlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dqrm import __version__
from dqrm.runtime import available_cores, available_memory_bytes, choose_threads

Level = Literal["ok", "note", "problem"]

_GIB = 1024**3
_FEATURES = (
    "sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
# The least memory a run of the built-in example was seen to take is about 0.6 GiB.
_LOW_MEMORY_BYTES = 1 * _GIB
# Data-loading and collective libraries exchange buffers there; containers often give 64 MiB.
_LOW_SHM_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    section: str
    name: str
    value: str
    level: Level = "ok"
    """A note costs speed or a feature; a problem keeps something from working."""
    fix: str | None = None


def examine(tracking_uri: str | None = None) -> list[Finding]:
    """Look at everything. Imports torch, but neither IPEX nor MLflow's server parts.

    Args:
        tracking_uri: store to check; the default one when not given.
    """
    findings = [*_software(), *_processor(), *_memory()]
    for section, look in (
        ("kernels", _kernels),
        ("torch", _torch),
        ("exchange", _exchange),
        ("tracking", lambda: _tracking(tracking_uri)),
    ):
        findings += _guarded(section, look)
    return findings


def _guarded(section: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """A part that cannot even be looked at is a finding too: people run this when things break."""
    try:
        return look()
    except Exception as error:
        broken = f"{type(error).__name__}: {error}"
        return [Finding(section, section, broken, "problem", "reinstall: pip install dqrm")]


def as_dicts(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as plain values for JSON."""
    return [asdict(finding) for finding in findings]


def _software() -> list[Finding]:
    python = f"{platform.python_version()} ({sys.executable})"
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return [
        Finding("software", "dqrm", __version__),
        Finding("software", "python", python),
        Finding("software", "system", system),
    ]


def _processor() -> list[Finding]:
    model, features = _cpuinfo()
    cores = available_cores()
    threads = choose_threads()
    known = [feature for feature in _FEATURES if feature in features]
    busy = _load_per_core(cores.count)
    findings = [
        Finding("processor", "model", model),
        Finding("processor", "features", " ".join(known) or "none that kernels use"),
        Finding("processor", "cores", f"{cores.count} to compute with: {cores.reason}"),
        Finding("processor", "threads", f"{threads.count} (from: {threads.reason})"),
    ]
    if threads.count > cores.count:
        findings[-1] = Finding(
            "processor",
            "threads",
            f"{threads.count} (from: {threads.reason}), but only {cores.count} cores are available",
            "note",
            f"set train.threads={cores.count}: threads that wait for each other's core are slow",
        )
    if busy > 0.5:
        findings.append(
            Finding(
                "processor",
                "load",
                f"{busy:.1f} runnable processes a core over the last minute",
                "note",
                "timings mean little while others compute",
            )
        )
    return findings


def _cpuinfo() -> tuple[str, set[str]]:
    model, features = platform.processor() or "unknown", set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return model, features
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            features |= set(value.split())
    return model, features


def _load_per_core(cores: int) -> float:
    try:
        return os.getloadavg()[0] / cores
    except OSError:
        return 0.0


def _memory() -> list[Finding]:
    findings = []
    available = available_memory_bytes()
    if available is not None:
        low = available < _LOW_MEMORY_BYTES
        findings.append(
            Finding(
                "memory",
                "available",
                f"{available / _GIB:.1f} GiB",
                "note" if low else "ok",
                "`dqrm train --dry-run` shows what a run needs" if low else None,
            )
        )
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.is_file():
        modes = pages.read_text(encoding="ascii")
        mode = modes.partition("[")[2].partition("]")[0]
        off = mode == "never"
        findings.append(
            Finding(
                "memory",
                "huge pages",
                f"transparent: {mode}",
                "note" if off else "ok",
                f"echo madvise | sudo tee {pages}: large tables then miss the TLB less"
                if off
                else None,
            )
        )
    shm = Path("/dev/shm")
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        low = usage.total < _LOW_SHM_BYTES
        findings.append(
            Finding(
                "memory",
                "/dev/shm",
                f"{usage.total / _GIB:.2f} GiB, {usage.free / _GIB:.2f} GiB free",
                "note" if low else "ok",
                "give the container more: docker run --shm-size=1g" if low else None,
            )
        )
    return findings


def _kernels() -> list[Finding]:
    from dqrm.kernels import cpu

    if not cpu.native_available():
        return [
            Finding(
                "kernels",
                "native",
                f"not used: {cpu.unavailable_reason()}",
                "note",
                "install with a C++20 compiler at hand: pip install .; plain Python works, slower",
            )
        ]
    try:
        level = cpu.isa_level()
    except ValueError as error:
        return [Finding("kernels", "native", str(error), "problem", f"unset {cpu.ISA_VARIABLE}")]
    levels = ", ".join(cpu.available_levels())
    forced = os.environ.get(cpu.ISA_VARIABLE)
    why = f"forced by {cpu.ISA_VARIABLE}" if forced else "the best this processor has"
    return [
        Finding("kernels", "native", f"{level}: {why} (available: {levels})"),
        Finding("kernels", "bfloat16", _bfloat16(level)),
    ]


def _bfloat16(level: str) -> str:
    """Who multiplies in bfloat16; the same choice as dqrm.kernels.mlp makes."""
    from dqrm.kernels import cpu

    module = cpu.native()
    assert module is not None
    if module.has_amx():
        return "by oneDNN on AMX"
    if module.has_fast_avx512_bf16() and level == "avx512":
        return "by native loops on AVX512-BF16"
    return "no instructions here that are faster than FP32: MLPs multiply in FP32"


def _torch() -> list[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is reported below
        torch = importlib.import_module("torch")
    capability = torch.backends.cpu.get_cpu_capability()
    onednn = "on" if torch.backends.mkldnn.is_available() else "not in this build"
    findings = [
        Finding("torch", "version", torch.__version__),
        Finding("torch", "vector level", f"{capability}: chosen by torch for this processor"),
        Finding("torch", "oneDNN", onednn),
        Finding("torch", "threads", str(torch.get_num_threads())),
    ]
    if "+cu" in torch.__version__ or torch.version.cuda:
        findings.append(
            Finding(
                "torch",
                "build",
                f"with CUDA {torch.version.cuda}, which dqrm does not use",
                "note",
                "the CPU build is gigabytes smaller; `make` installs it",
            )
        )
    return findings


def _exchange() -> list[Finding]:
    from dqrm.comm.backends import probe_backends

    backends = probe_backends()
    usable = {backend.name for backend in backends if backend.usable}
    over = next((name for name in ("oneCCL", "Gloo") if name in usable), None)
    findings = [
        Finding("exchange", "between", f"processes over {over}")
        if over
        else Finding("exchange", "between", "one process only", "note")
    ]
    for backend in backends:
        version = f"{backend.version}: " if backend.version else ""
        # A backend that is merely absent costs nothing; one that is there but broken does.
        level: Level = "note" if backend.version and not backend.usable else "ok"
        state = "usable" if backend.usable else "not usable"
        value = f"{state}, {version}{backend.detail}"
        findings.append(
            Finding("exchange", backend.name, value, level, None if backend.usable else backend.fix)
        )
    return findings


def _tracking(uri: str | None) -> list[Finding]:
    from dqrm.tracking.uri import resolve_uri, sqlite_file

    version = metadata.version("mlflow")
    findings = [Finding("tracking", "mlflow", version)]
    try:
        resolved = resolve_uri(uri)
    except ValueError as error:
        advice = "set MLFLOW_TRACKING_URI or --tracking-uri; --no-track trains without"
        return [*findings, Finding("tracking", "store", str(error), "problem", advice)]
    file = sqlite_file(resolved)
    problem = _unwritable(file) if file is not None else _unreachable(resolved)
    fix: str | None = None
    if problem is not None:
        fix = "name another with --tracking-uri, or train with --no-track"
        if file is None:
            fix = "start the server; until then runs wait on disk for `dqrm tracking sync`"
    state = problem or ("writable" if file is not None else "answers")
    if problem is None and file is not None and not file.exists():
        state = "will be made by the first run"
    level: Level = "ok" if problem is None else "problem" if file is not None else "note"
    return [*findings, Finding("tracking", "store", f"{resolved}: {state}", level, fix)]


def _unwritable(file: Path) -> str | None:
    if file.exists():
        return None if os.access(file, os.W_OK) else "is not writable"
    folder = file.parent
    if not folder.is_dir():
        return f"{folder} does not exist"
    return None if os.access(folder, os.W_OK) else f"{folder} is not writable"


def _unreachable(uri: str) -> str | None:
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(uri)
    if parts.hostname is None or parts.scheme not in ("http", "https"):
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=3.0):
            return None
    except OSError as error:
        return f"does not answer ({error})"
