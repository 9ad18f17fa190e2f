"""How processes join: which backend is chosen, why, and how oneCCL is set up."""

import logging
import os
import re
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from backends_here import CCL
from worlds import run_ranks, run_world

from dqrm.comm import oneccl, process_group
from dqrm.comm.errors import MissingRanksError

NO_ONECCL = "dqrm was built without it"


def pretend_there_is_no_oneccl() -> None:
    def fail() -> None:
        raise ImportError(NO_ONECCL)

    oneccl.load = fail  # type: ignore[assignment]


def choose(rank: int, size: int, *, without: list[int]) -> tuple[str, str, list[str]]:
    if rank in without:
        pretend_there_is_no_oneccl()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dqrm.comm").addHandler(handler)
    chosen = process_group.init("auto", timeout=20)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == size
    return chosen, dist.get_backend(), lines


@pytest.mark.parametrize("backend", [CCL])
def test_auto_is_oneccl_where_all_ranks_have_it(backend: str) -> None:
    assert run_world(choose, 2, backend=None, without=[]) == [("ccl", "ccl", [])] * 2


@pytest.mark.parametrize("without", [[0, 1], [1]])
def test_auto_is_gloo_where_a_rank_lacks_oneccl(without: list[int]) -> None:
    if without == [1] and oneccl.module_problem() is not None:
        pytest.skip("needs oneCCL on one rank")
    first, second = run_world(choose, 2, backend=None, without=without)
    [line] = first[2]
    assert line.startswith("exchange over Gloo, many times slower for small messages: ")
    assert f"{len(without)} of 2 ranks" in line
    assert NO_ONECCL in line
    assert first[:2] == second[:2] == ("gloo", "watched_gloo")
    assert second[2] == []  # only one rank says it


def ask_for(rank: int, size: int, *, asked: str) -> str:
    pretend_there_is_no_oneccl()
    with pytest.raises(ValueError, match=f"backend='?{asked}") as caught:
        process_group.init(asked, timeout=5)
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("ccl", NO_ONECCL),
        ("ccl-intel", "oneccl-bind-pt"),
        ("mpi", "must be auto, ccl, gloo, ccl-i"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(asked: str, reason: str) -> None:
    [said] = run_world(ask_for, 1, backend=None, asked=asked)
    assert reason in said


def shared_memory_files() -> set[str]:
    names = {path.name for path in Path("/dev/shm").iterdir()}
    return {name for name in names if re.fullmatch(r"\d+:\d+:\d+", name)}


def join_with_shared_memory(rank: int, size: int) -> list[str]:
    assert os.environ[oneccl.SHM_VARIABLE] == "1"
    tensor = torch.full((300_000,), float(rank))
    dist.all_reduce(tensor)
    assert tensor.unique().tolist() == [sum(range(size))]
    used = [name for name in shared_memory_files() if name.startswith(f"{os.getpid()}:")]
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(MissingRanksError):
        dist.all_reduce(tensor)
    return used


@pytest.mark.parametrize("backend", [CCL])
def test_shared_memory_on_request_is_removed_after_a_failure(backend: str) -> None:
    if shutil.disk_usage("/dev/shm").free < 4 * oneccl.SHM_BYTES_PER_RANK:
        pytest.skip("/dev/shm is too small")
    before = shared_memory_files()
    environment = {oneccl.SHM_VARIABLE: "1"}
    told, killed = run_ranks(
        join_with_shared_memory, 2, backend=backend, timeout=40, operation_timeout=4,
        environment=environment,
    )  # fmt: skip
    assert killed.exit_code == -signal.SIGKILL
    assert told.returned, told.error
    assert told.result  # it was really used
    assert not shared_memory_files() - before


def prepared(monkeypatch: pytest.MonkeyPatch, **given: str) -> dict[str, str]:
    monkeypatch.setattr(os, "environ", dict(given))
    oneccl.prepare_environment()
    return dict(os.environ)


def test_oneccl_is_set_up_without_workers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepared(monkeypatch, LOCAL_RANK="1", LOCAL_WORLD_SIZE="3", CCL_LOG_LEVEL="info")
    assert found["CCL_WORKER_OFFLOAD"] == "0"
    assert found["CCL_PROCESS_LAUNCHER"] == "none"
    assert found["CCL_ATL_TRANSPORT"] == "ofi"
    assert found["CCL_ATL_SHM"] == "0"
    assert (found["CCL_LOCAL_RANK"], found["CCL_LOCAL_SIZE"]) == ("1", "3")
    assert found["CCL_LOG_LEVEL"] == "info"  # what the user set, stays


@pytest.mark.parametrize(("free", "used"), [(129, "1"), (127, "0")])
def test_shared_memory_needs_room(
    monkeypatch: pytest.MonkeyPatch, free: int, used: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free << 20))
    found = prepared(monkeypatch, CCL_ATL_SHM="1", LOCAL_WORLD_SIZE="2")
    assert found["CCL_ATL_SHM"] == used
    assert ("127 MiB free, 2 ranks on this machine need 128 MiB" in caplog.text) == (used == "0")


@pytest.mark.parametrize(
    ("up", "interface"), [(["lo"], "lo"), (["lo", "eth0"], None), (["eth0"], None)]
)
def test_a_host_with_loopback_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, up: list[str], interface: str | None
) -> None:
    everything = list(enumerate(["lo", "eth0"], start=1))
    monkeypatch.setattr(socket, "if_nameindex", lambda: everything)
    monkeypatch.setattr(oneccl, "_is_up", lambda name: name in up)
    assert prepared(monkeypatch).get("CCL_KVS_IFACE") == interface
