"""Ranks that die, stall, leave or never come: the others say which, in time, over both backends."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from backends_here import BACKENDS
from torch.nn.parallel import DistributedDataParallel
from worlds import run_ranks

from dqrm.comm import process_group
from dqrm.comm.errors import MismatchError, MissingRanksError

TIMEOUT = 4.0


def lose_one(rank: int, size: int, *, how: str) -> tuple[str, tuple[int, ...], float]:
    """Rank 1 is lost after the first collective; what the others are told, and how soon."""
    tensor = torch.ones(1000)
    dist.all_reduce(tensor)
    if rank == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stalls":
            time.sleep(2 * TIMEOUT)
        return "", (), 0.0
    start = time.monotonic()
    with pytest.raises(MissingRanksError) as caught:
        dist.all_reduce(tensor)
    waited = time.monotonic() - start
    # The group is of no use any more, and says so at once.
    with pytest.raises(MissingRanksError):
        dist.all_gather_into_tensor(torch.empty(size), torch.ones(1))
    assert time.monotonic() - start - waited < 1
    return str(caught.value), caught.value.ranks, waited


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies", "rank 1 gave no sign of life"),
        ("stalls", "rank 1 is alive but has entered only 1 collectives, this is 2"),
        ("leaves", "rank 1 has left"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_others_name_a_lost_rank(backend: str, how: str, said: str) -> None:
    outcomes = run_ranks(
        lose_one, 3, backend=backend, timeout=40, operation_timeout=TIMEOUT, how=how
    )
    assert outcomes[1].exit_code == (-signal.SIGKILL if how == "dies" else 0)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.returned, outcome.error
        text, ranks, waited = outcome.result
        assert said in text
        assert f"over {backend} failed (time-out 4 s" in text
        assert ranks == (1,)
        assert waited < TIMEOUT + 1


def lose_one_in_backward(rank: int, size: int) -> str:
    model = DistributedDataParallel(torch.nn.Linear(50, 50))
    batch = torch.ones(4, 50)
    model(batch).sum().backward()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        model(batch).sum().backward()
    return str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_lost_during_a_training_step_is_named(backend: str) -> None:
    killed, told = run_ranks(
        lose_one_in_backward, 2, backend=backend, timeout=40, operation_timeout=TIMEOUT
    )
    assert killed.exit_code == -signal.SIGKILL
    assert told.returned, told.error
    assert "rank 0 gave no sign of life" in told.result


def join_without_the_last(rank: int, size: int, *, over: str) -> tuple[str, tuple[int, ...]]:
    if rank == size - 1:
        return "", ()
    with pytest.raises(MissingRanksError) as caught:
        process_group.init(over, timeout=2.0)
    return str(caught.value), caught.value.ranks


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_never_joins_is_named(backend: str) -> None:
    outcomes = run_ranks(join_without_the_last, 3, backend=None, timeout=40, over=backend)
    for outcome in outcomes[:2]:
        assert outcome.returned, outcome.error
        assert outcome.result == (
            "joining the process group: rank 2 did not arrive within 2 s", (2,)
        )  # fmt: skip


def make_a_group_without_one(rank: int, size: int) -> tuple[int, ...]:
    if rank != 2:
        return ()
    with pytest.raises(MissingRanksError, match="making the group") as caught:
        dist.new_group([1, 2])
    return caught.value.ranks


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_does_not_make_a_group_is_named(backend: str) -> None:
    outcomes = run_ranks(
        make_a_group_without_one, 3, backend=backend, timeout=40, operation_timeout=2.0
    )
    assert outcomes[2].returned, outcomes[2].error
    assert outcomes[2].result == (1,)


def join_without_a_store(rank: int, size: int) -> str:
    os.environ.update(MASTER_PORT="1", TORCHELASTIC_USE_AGENT_STORE="False", RANK="1")
    with pytest.raises(MissingRanksError, match="rank 0, which keeps it, did not arrive") as caught:
        process_group.init("gloo", timeout=1.0)
    return str(caught.value)


def test_rank_0_that_keeps_the_store_and_never_comes_is_named() -> None:
    [outcome] = run_ranks(join_without_a_store, 1, backend=None, timeout=40)
    assert outcome.returned, outcome.error
    assert outcome.result.startswith("the store at 127.0.0.1:1 did not answer within 1 s")


def disagree(rank: int, size: int) -> list[str]:
    said = []
    unlike = torch.float32 if rank == 0 else torch.float64
    parts = [torch.empty(1 + r) for r in range(size)]
    calls = [
        lambda: dist.all_reduce(torch.ones(10 + rank)),
        lambda: dist.all_reduce(torch.ones(3, dtype=unlike)),
        lambda: dist.broadcast(torch.ones(3), src=rank),
        lambda: dist.barrier() if rank == 0 else dist.all_reduce(torch.ones(3)),
        lambda: dist.all_gather(parts, torch.ones(1 + rank)) if rank == 0 else dist.all_gather(
            [torch.empty(5)] * size, torch.ones(5)),
        lambda: dist.all_to_all_single(torch.empty(4), torch.ones(4), [1, 3], [2, 2]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(MismatchError) as caught:
            call()
        said.append(str(caught.value))
    # Nothing was sent: the group goes on.
    token = torch.ones(1)
    dist.all_reduce(token)
    assert token.item() == size
    return said


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_checking_mode_names_what_differs(backend: str) -> None:
    outcomes = run_ranks(
        disagree, 2, backend=backend, timeout=40, environment={"DQRM_COMM_CHECK": "1"}
    )
    assert all(outcome.returned for outcome in outcomes), outcomes[0].error
    first, second = (outcome.result for outcome in outcomes)
    assert first == second
    sizes, dtypes, roots, kinds, gathered, splits = first
    assert "rank 0: all_reduce (sum) of float32, 10 values; rank 1: " in sizes
    assert "11 values" in sizes
    assert "of float32" in dtypes
    assert "of float64" in dtypes
    assert "(from 0)" in roots
    assert "(from 1)" in roots
    assert "rank 0 calls barrier" in kinds
    assert "rank 1 all_reduce" in kinds
    assert "rank 0 has 1 values for rank 1, which expects 5" in gathered
    assert "in all_to_all of float32 rank 0 has 2 values for rank 0, which expects 1" in splits


def leave_after_a_death(rank: int, size: int, *, dead: int) -> str:
    dist.barrier()
    if rank == dead:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    dist.destroy_process_group()
    return "left"


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_does_not_wait_for_the_dead(backend: str, dead: int) -> None:
    outcomes = run_ranks(
        leave_after_a_death, 3, backend=backend, timeout=30, operation_timeout=4, dead=dead
    )
    assert [outcome.exit_code for outcome in outcomes if outcome.rank != dead] == [0, 0]


def need(lost: int, how: str, rank: int, size: int) -> None:
    """Do what cannot end without the lost rank."""
    tensor = torch.ones(1000)
    if lost == 0:
        dist.all_reduce(tensor)
    elif how == "killed":
        # Leaves of the tree end early or late: some wait here, others in the next collective.
        dist.broadcast(tensor, src=size - 1)
        dist.all_reduce(tensor)
    else:
        # Only one rank waits for the lost one itself, the next waits for that one.
        dist.recv(tensor, src=(rank - 1) % size)
        dist.send(tensor, dst=(rank + 1) % size)


def lose_one_of_many(
    rank: int, size: int, *, over: str, how: str, lost: int, folder: str
) -> tuple[str, tuple[int, ...], float, float]:
    """What is told when a rank is lost on which only some wait, or that keeps the store."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text(encoding="ascii")
    process_group.init(over, timeout=TIMEOUT)
    dist.barrier()
    if rank == lost:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        Path(folder, "stopped").write_text(str(os.getpid()), encoding="ascii")
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(MissingRanksError) as caught:
        need(lost, how, rank, size)
    waited = time.monotonic() - start
    start = time.monotonic()
    dist.destroy_process_group()
    left = time.monotonic() - start
    Path(folder, f"left-{rank}").touch()
    if how == "stopped" and len(list(Path(folder).glob("left-*"))) == size - 1:
        os.kill(int(Path(folder, "stopped").read_text(encoding="ascii")), signal.SIGKILL)
    return str(caught.value), caught.value.ranks, waited, left


@pytest.mark.parametrize(
    ("how", "lost", "said"),
    [
        ("killed", 0, "rank 0, which keeps it, ended or is stopped"),
        ("stopped", 0, "rank 0, which keeps it, ended or is stopped"),
        ("killed", 1, "rank 1 gave no sign of life"),
        ("stopped", 1, "rank 1 gave no sign of life"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_lost_rank_is_named_by_all(
    backend: str, how: str, lost: int, said: str, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]), encoding="ascii")
    outcomes = run_ranks(
        lose_one_of_many, 4, backend=None, timeout=40,
        over=backend, how=how, lost=lost, folder=str(tmp_path),
    )  # fmt: skip
    assert outcomes[lost].exit_code == -signal.SIGKILL
    for outcome in outcomes[:lost] + outcomes[lost + 1 :]:
        assert outcome.returned, outcome.error
        text, ranks, waited, left = outcome.result
        assert said in text
        assert ranks == (lost,)
        assert waited < TIMEOUT + 1
        assert left < TIMEOUT
