"""Cores and memory really available, and threads set before torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dqrm import runtime
from dqrm.runtime import available_cores, available_memory_bytes, cgroup_quota, choose_threads

ENVIRONMENT = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime, "_prepared", None)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 50000"}, 2.0),
        # In a container the group's own folder is not mounted; the root is the group.
        ("0::/system.slice/docker-1.scope", {"cpu.max": "300000 100000"}, 3.0),
        ("0::/../../outside", {"cpu.max": "300000 100000"}, 3.0),
        (
            "4:cpu,cpuacct:/job\n0::/",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "50000"}
            | {"cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            "1:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("7:cpuset:/\n8:memory:/", {"cpu.max": "1 1"}, None),
        ("0::/", {"cpu.max": "garbage"}, None),
    ],
    ids=[
        *("v2", "v2-unlimited", "v2-parent", "v2-tightest", "v2-container", "v2-outside"),
        *("v1", "v1-unlimited", "other-controllers", "unreadable"),
    ],
)
def test_quota(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    root = tree(tmp_path / "cgroup", files)
    member = tmp_path / "membership"
    member.write_text(membership + "\n")
    assert cgroup_quota(root, member) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job", {"job/memory.max": "3000000", "job/memory.current": "1000000"}, 2_000_000),
        ("0::/job", {"job/memory.max": "max", "job/memory.current": "1000000"}, 8_192_000),
        ("0::/job", {"job/memory.max": "100", "job/memory.current": "200"}, 0),
        (
            "3:memory:/job",
            {"memory/job/memory.limit_in_bytes": "5000", "memory/job/memory.usage_in_bytes": "1"},
            4999,
        ),
    ],
    ids=["v2", "v2-unlimited", "full", "v1"],
)
def test_memory(tmp_path: Path, membership: str, files: dict[str, str], expected: int) -> None:
    root = tree(tmp_path / "cgroup", files)
    member = tmp_path / "membership"
    member.write_text(membership + "\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 16000 kB\nMemAvailable:    8000 kB\n")
    assert available_memory_bytes(root, member, meminfo) == expected


def test_memory_of_a_silent_machine(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert available_memory_bytes(tmp_path, absent, absent) is None


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    siblings = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}
    files = {f"cpu{n}/topology/thread_siblings_list": text for n, text in siblings.items()}
    assert runtime._physical_cores({0, 1, 4, 5}, tree(tmp_path, files)) == 2
    assert runtime._physical_cores({0, 1}, tmp_path) == 2
    assert runtime._physical_cores({0, 9}, tmp_path) == 2  # unknown: threads count as cores
    assert runtime._cpu_list("0-2,8") == {0, 1, 2, 8}


def test_affinity_limits_cores() -> None:
    code = (
        "import os; cpu = min(os.sched_getaffinity(0)); os.sched_setaffinity(0, {cpu});"
        "from dqrm.runtime import available_cores as a; print(a().count, a().affinity)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_quota_limits_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_affinity", lambda: set(range(64)))
    monkeypatch.setattr(runtime, "_physical_cores", lambda cpus, topology: 32)
    monkeypatch.setattr(runtime, "cgroup_quota", lambda: 6.5)
    cores = available_cores()
    assert cores.count == 6
    assert "32 physical cores" in cores.reason
    assert "quota of 6.5 cores" in cores.reason
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_cores().count == 1
    monkeypatch.setattr(runtime, "cgroup_quota", lambda: 0.5)
    assert available_cores().count == 1


def test_who_decides_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = available_cores()
    assert choose_threads() == runtime.Threads(cores.count, cores.reason)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert choose_threads() == runtime.Threads(3, "OMP_NUM_THREADS")
    assert choose_threads(5) == runtime.Threads(5, "train.threads")
    # torchrun sets the variable by itself.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert choose_threads().count == cores.count
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    assert choose_threads().count == cores.count


def test_torch_starts_with_the_threads_and_the_reason_stays() -> None:
    code = (
        "import os, sys;"
        "from dqrm.runtime import prepare_threads;"
        "first = prepare_threads(1);"
        "assert 'torch' not in sys.modules;"
        "import torch;"
        "assert torch.get_num_threads() == 1;"
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE';"
        "assert prepare_threads() == first, 'its own variable is not a wish of the user';"
        "prepare_threads(2);"
        "assert torch.get_num_threads() == 2;"
        "print(first.reason)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "train.threads"


def test_a_chosen_waiting_policy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*runtime._THREAD_VARIABLES, *runtime._WAITING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    runtime.prepare_threads(2)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["KMP_BLOCKTIME"] == "0"
    assert os.environ["MKL_NUM_THREADS"] == "2"
