"""Rows per CPU-second of `dqrm data prepare`, beside pandas only parsing the same file.

CPU time, of all processes of a contestant together, is what a shared machine lets one compare:
waiting for a core does not count. Contestants take turns, each in a fresh process, so that none
profits from a warmer cache; the file is read once before.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dqrm.bench.criteo_text import write_criteo_text

_IMPORT_PANDAS = "import pandas"
# The fastest way to call it: naming text columns as such makes it four times slower.
_PANDAS = """
pandas.read_csv(FILE, sep="\\t", header=None)
"""
_READ = """
with open(FILE, "rb", buffering=0) as file:
    buffer = bytearray(1 << 24)
    while file.readinto(buffer):
        pass
"""
# Workers are forked, as those of the command are.
_IMPORT_DQRM = """
from dqrm.data.pool import use_one_thread
use_one_thread()
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
"""
_PREPARE = """
report = prepare([FILE], OUTPUT, PrepareConfig(SETTINGS))
open(PEAK, "w").write(str(report.peak_bytes))
"""

CONTESTANTS = {
    "read the bytes": ("", _READ),
    "pandas.read_csv": (_IMPORT_PANDAS, _PANDAS),
    "dqrm, vocabularies": (_IMPORT_DQRM, _PREPARE.replace("SETTINGS", "")),
    "dqrm, hashed": (_IMPORT_DQRM, _PREPARE.replace("SETTINGS", "hash_buckets=1_000_000")),
}
"""For each, what starts it up and what it then does."""


@dataclass
class Contestant:
    """A way to read the file. Each list holds one number a repeat."""

    name: str
    start_up_cpu_seconds: list[float] = field(default_factory=list)
    """Python and imports alone."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all processes, start-up included."""
    wall_seconds: list[float] = field(default_factory=list)
    """Start-up included."""
    peak_bytes: list[int] = field(default_factory=list)
    """Largest resident memory; of `prepare`, the sum over its processes."""

    def rows_per_cpu_second(self, rows: int, *, start_up: bool) -> float:
        """Return rows over the median CPU time, with or without that of starting up."""
        seconds = statistics.median(self.cpu_seconds)
        if not start_up:
            seconds -= statistics.median(self.start_up_cpu_seconds)
        return rows / seconds


def compare_preparation(
    rows: int, repeats: int, progress: Callable[[str], None]
) -> tuple[list[Contestant], int]:
    """Measure every contestant on one generated file of ``rows`` rows.

    Returns:
        The contestants, and the size of the file in bytes.
    """
    contestants = [Contestant(name) for name in CONTESTANTS]
    with tempfile.TemporaryDirectory(prefix="dqrm-bench-") as folder:
        file, output, peak = (Path(folder) / name for name in ("train.txt", "output", "peak"))
        progress(f"writing {rows:,} rows")
        write_criteo_text(file, rows)
        names = f"FILE, OUTPUT, PEAK = {str(file)!r}, {str(output)!r}, {str(peak)!r}"
        for repeat in range(repeats):
            for contestant in contestants:
                progress(f"repeat {repeat + 1} of {repeats}: {contestant.name}")
                imports, work = CONTESTANTS[contestant.name]
                contestant.start_up_cpu_seconds.append(_run(imports).cpu_seconds)
                cost = _run(f"{imports}\n{names}\n{work}")
                contestant.cpu_seconds.append(cost.cpu_seconds)
                contestant.wall_seconds.append(cost.wall_seconds)
                contestant.peak_bytes.append(
                    int(peak.read_text()) if peak.exists() else cost.peak_bytes
                )
                peak.unlink(missing_ok=True)
                shutil.rmtree(output, ignore_errors=True)
        return contestants, file.stat().st_size


class _Cost(NamedTuple):
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


# Workers of a fork server outlive it as orphans: adopting them counts their time as well.
_RUNNER = """
import contextlib, ctypes, json, os, resource, subprocess, sys, time
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
start = time.monotonic()
done = subprocess.run([sys.executable, "-c", sys.argv[1]], stdout=subprocess.DEVNULL)
wall = time.monotonic() - start
with contextlib.suppress(ChildProcessError):
    while True:
        os.wait()
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024]))
"""


def _run(script: str) -> _Cost:
    """Run ``script`` in a process whose descendants alone are counted."""
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, script], stdout=subprocess.PIPE, text=True, check=True
    )
    code, cpu, wall, peak = json.loads(done.stdout)
    if code != 0:
        raise RuntimeError("a contestant failed; its message is above")
    return _Cost(cpu, wall, peak)
