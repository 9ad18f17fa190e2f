"""The communication thread: in order, one at a time, and no waiting for what cannot come."""

import threading
import time

import pytest
import torch
from torch import distributed
from worlds import run_ranks

from dqrm.comm import Cast, Exchange, Meter, Policy, Recipe
from dqrm.comm.errors import AgreedError
from dqrm.comm.thread import Communication


def test_work_is_done_in_order_by_one_other_thread() -> None:
    meter = Meter()
    thread = Communication(meter)
    order: list[int] = []
    threads = set()

    def work(number: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.002 * (number % 3))
        order.append(number)
        return number

    pending = [thread.submit(lambda number=number: work(number)) for number in range(20)]
    assert [one.wait(10) for one in reversed(pending)] == list(reversed(range(20)))
    assert order == list(range(20))
    assert threads.isdisjoint({threading.get_ident()})
    assert len(threads) == 1
    assert meter.busy_seconds > 0.03
    assert meter.exposed_seconds > 0
    thread.close(10)
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(lambda: None)
    thread.close(10)


def test_without_a_thread_the_caller_works_when_it_waits() -> None:
    meter = Meter()
    communication = Communication(meter, overlap=False)
    order: list[tuple[int, int]] = []
    pending = [
        communication.submit(lambda number=number: order.append((number, threading.get_ident())))
        for number in range(6)
    ]
    assert not order
    pending[2].wait()
    assert [number for number, _ in order] == [0, 1, 2]
    pending[0].wait()
    assert pending[2].done()
    assert not pending[3].done()
    heard: list[bool] = []
    pending[3].then(lambda future: heard.append(future.done()))
    assert heard == [True]
    communication.close()
    assert [number for number, _ in order] == list(range(6))
    assert {ident for _, ident in order} == {threading.get_ident()}
    assert meter.busy_seconds > 0
    communication.close()
    with pytest.raises(RuntimeError, match="closed"):
        communication.submit(lambda: None)


@pytest.mark.parametrize("overlap", [True, False])
def test_after_a_failure_that_others_may_not_share_nothing_runs(overlap: bool) -> None:
    thread = Communication(Meter(), overlap=overlap)

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(AgreedError, match="all of us"):
        thread.submit(lambda: fail(AgreedError("all of us"))).wait(10)
    assert thread.submit(lambda: 5).wait(10) == 5
    ran = []
    with pytest.raises(OSError, match="cable"):
        thread.submit(lambda: fail(OSError("cable"))).wait(10)
    with pytest.raises(OSError, match="cable"):
        thread.submit(lambda: ran.append(1)).wait(10)
    assert not ran
    thread.close(10)


def test_waiting_has_an_end_and_the_work_goes_on() -> None:
    thread = Communication(Meter())
    gate = threading.Event()
    pending = thread.submit(gate.wait)
    with pytest.raises(TimeoutError):
        pending.wait(0.05)
    assert not pending.done()
    gate.set()
    assert pending.wait(10)
    assert pending.done()
    thread.close(10)


def leave_early(rank: int, world: int) -> str:
    exchange = Exchange(Policy([("*", Recipe(Cast()))]), {"w": 100})
    exchange.reduce_dense({"w": torch.ones(100)}).wait()
    distributed.barrier()
    if rank == 1:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError) as first:
        exchange.reduce_dense({"w": torch.ones(100)}).wait()
    begin = time.perf_counter()
    with pytest.raises(RuntimeError):
        exchange.reduce_dense({"w": torch.ones(100)}).wait()
    assert time.perf_counter() - begin < 1.0
    return str(first.value)


def test_a_killed_rank_fails_the_others_within_the_time_out() -> None:
    outcomes = run_ranks(leave_early, 3, operation_timeout=6.0, timeout=50)
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        assert outcomes[rank].result
        assert outcomes[rank].seconds < 25
