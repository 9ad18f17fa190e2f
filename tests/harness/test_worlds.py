"""The harness itself: it must fail when ranks fail, and say what they said."""

import os
import signal
import time

import pytest
import torch
from torch import distributed
from worlds import WorldError, run_ranks, run_world


def add_up(rank: int, world_size: int, *, first: int) -> tuple[int, torch.Tensor, str | None]:
    total = torch.tensor([first + rank])
    distributed.all_reduce(total)
    return rank, total, os.environ.get("A_VARIABLE")


def misbehave(rank: int, world_size: int, *, how: str) -> str:
    print(f"rank {rank} was here", flush=True)
    if rank == 1:
        if how == "raise":
            raise ValueError("seven")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return "well"


def test_results_come_back_in_order() -> None:
    found = run_world(add_up, 3, first=10, environment={"A_VARIABLE": "here"})
    assert found == [(rank, torch.tensor([33]), "here") for rank in range(3)]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "ValueError: seven"),
        ("die", "rank 1: killed by SIGKILL"),
        ("hang", "rank 1: hung, killed after 12 s"),
    ],
)
def test_one_failing_rank_fails_the_world(how: str, said: str) -> None:
    # Rank 0 must have been started, and have returned, by then on a busy machine too.
    timeout = 12.0 if how == "hang" else 60.0
    with pytest.raises(WorldError) as caught:
        run_world(misbehave, 2, how=how, timeout=timeout)
    assert said in str(caught.value)
    assert "rank 1 was here" in str(caught.value)
    assert "rank 0: returned" in str(caught.value)
    if how == "hang":
        assert "in misbehave" in str(caught.value)


def test_outcomes_without_a_process_group() -> None:
    well, killed = run_ranks(misbehave, 2, backend=None, how="die")
    assert (well.result, well.exit_code, well.returned) == ("well", 0, True)
    assert (killed.result, killed.exit_code, killed.returned) == (None, -signal.SIGKILL, False)


def test_a_function_that_ranks_cannot_find_is_refused() -> None:
    with pytest.raises(ValueError, match="not at the top level"):
        run_world(lambda rank, world_size: None, 2)
