"""Contestants that take turns in one process, timed in CPU and in wall seconds.

On a machine shared with others only CPU time compares: waiting for a core does not count. What
strangers do to caches and to memory does, and changes by the second; so contestants take short
turns, in a new order every round, and every ratio is of the same rounds.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WARM_UP_CALLS = 3
"""Untimed calls of each contestant before the first round: compilation, first touch of memory."""


@dataclass(frozen=True)
class Runner:
    """One contestant, ready to run."""

    name: str
    call: Callable[[int], object]
    """Does the work once, on the batch of that number; any number is good."""


@dataclass(frozen=True)
class Spread:
    """Where the turns of one contestant lay."""

    median: float
    lower_quartile: float
    upper_quartile: float
    smallest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        low, middle, high = (
            statistics.quantiles(values, n=4, method="inclusive")
            if len(values) > 1
            else [values[0]] * 3
        )
        return cls(middle, low, high, min(values))


@dataclass
class Timing:
    """Seconds of one call, a number for every round."""

    calls_per_turn: int
    """Timed calls of one turn; the turn's time is divided by it."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all threads of the process together."""
    wall_seconds: list[float] = field(default_factory=list)


def take_turns(
    runners: Sequence[Runner],
    *,
    rounds: int,
    turn_seconds: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Timing]:
    """Let every runner work in every round.

    A turn begins with one call that is not timed, so that what a contestant keeps in caches is
    its own, and then times as many calls together as fill ``turn_seconds``.

    Args:
        runners: the contestants.
        rounds: turns of each.
        turn_seconds: least time of a turn, so that reading the clock does not count.
        seed: of the order in every round.
        progress: told how many turns of how many are done.

    Returns:
        For each runner its times.
    """
    cursors = [0] * len(runners)

    def work(number: int, calls: int) -> None:
        call, cursor = runners[number].call, cursors[number]
        for batch in range(cursor, cursor + calls):
            call(batch)
        cursors[number] = cursor + calls

    timings = []
    for number in range(len(runners)):
        work(number, WARM_UP_CALLS)
        start = time.process_time()
        work(number, 1)
        seconds = max(time.process_time() - start, 1e-6)
        timings.append(Timing(max(1, round(turn_seconds / seconds))))
        progress(number + 1, len(runners) * (rounds + 1))
    order, generator = list(range(len(runners))), random.Random(seed)
    done = len(runners)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            generator.shuffle(order)
            for number in order:
                timing = timings[number]
                work(number, 1)
                wall, cpu = time.perf_counter(), time.process_time()
                work(number, timing.calls_per_turn)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                timing.cpu_seconds.append(cpu / timing.calls_per_turn)
                timing.wall_seconds.append(wall / timing.calls_per_turn)
                done += 1
                progress(done, len(runners) * (rounds + 1))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return timings
