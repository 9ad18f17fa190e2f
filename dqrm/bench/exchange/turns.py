"""Contestants that take turns on all ranks in lock step.

Every turn begins at a barrier, and lasts as long as the slowest rank takes: wall time, because
waiting for each other is part of an exchange. Turns are short and come in a new order every round,
the same on all ranks, so that what strangers do to the machine meets everybody; ratios are of the
same rounds.
"""

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from dqrm.bench.speed.timing import WARM_UP_CALLS


@dataclass(frozen=True)
class Runner:
    """One contestant on one rank."""

    name: str
    call: Callable[[int], object]
    """Does this rank's part of the work, on the batch of that number; any number is good."""


@dataclass(frozen=True)
class Turns:
    """Seconds of one call, a number for every round."""

    wall_seconds: list[float]
    """Of the slowest rank."""
    cpu_seconds: list[float]
    """Of all threads of a process, the mean over ranks."""


def take_turns_together(
    runners: Sequence[Runner],
    group: ProcessGroup,
    *,
    rounds: int,
    turn_seconds: float,
    seed: int,
) -> list[Turns]:
    """Let every runner work in every round; all ranks call this with the same runners.

    A turn begins with one call that is not timed, and then times as many calls together as fill
    ``turn_seconds``.

    Args:
        runners: the contestants.
        group: of all ranks, for barriers; nobody's exchange uses it.
        rounds: turns of each.
        turn_seconds: least time of a turn.
        seed: of the order in every round.

    Returns:
        For each runner its times, on all ranks the same.
    """
    cursors = [0] * len(runners)

    def work(number: int, calls: int) -> None:
        call, cursor = runners[number].call, cursors[number]
        for batch in range(cursor, cursor + calls):
            call(batch)
        cursors[number] = cursor + calls

    took = torch.empty(len(runners), dtype=torch.float64)
    for number in range(len(runners)):
        work(number, WARM_UP_CALLS)
        distributed.barrier(group)
        begin = time.perf_counter()
        work(number, 1)
        took[number] = time.perf_counter() - begin
    distributed.all_reduce(took, distributed.ReduceOp.MAX, group)
    calls = [max(1, round(turn_seconds / seconds)) for seconds in took.tolist()]
    wall = torch.empty(len(runners), rounds, dtype=torch.float64)
    cpu = torch.empty_like(wall)
    order, generator = list(range(len(runners))), random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            generator.shuffle(order)
            for number in order:
                work(number, 1)
                distributed.barrier(group)
                begin, used = time.perf_counter(), time.process_time()
                work(number, calls[number])
                wall[number, turn] = (time.perf_counter() - begin) / calls[number]
                cpu[number, turn] = (time.process_time() - used) / calls[number]
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    distributed.all_reduce(wall, distributed.ReduceOp.MAX, group)
    distributed.all_reduce(cpu, distributed.ReduceOp.SUM, group)
    cpu /= distributed.get_world_size(group)
    return [Turns(*each) for each in zip(wall.tolist(), cpu.tolist(), strict=True)]
