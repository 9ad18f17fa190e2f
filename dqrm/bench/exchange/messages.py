"""Collectives on their own: what a small message, an uneven gather and bandwidth come to."""

from collections.abc import Callable

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from dqrm.bench.exchange.turns import Runner

SMALL = "all-reduce 4 KiB"
UNEVEN = "uneven all-gather 1 MiB"
LARGE = "all-reduce 64 MiB"
_SMALL_VALUES = 1024
_LONGEST = 2**20
LARGE_BYTES = 64 * 2**20


def message_runners(name: str, group: ProcessGroup, *, uneven: bool) -> list[Runner]:
    """Return the collectives of one backend.

    Args:
        name: of the backend.
        group: over it.
        uneven: whether it gathers parts of different lengths; else they are padded.
    """
    calls: dict[str, Callable[[int], object]] = {
        SMALL: _all_reduce(_SMALL_VALUES, group),
        UNEVEN: _uneven_gather(group, uneven),
        LARGE: _all_reduce(LARGE_BYTES // 4, group),
    }
    return [Runner(f"{what}, {name}", call) for what, call in calls.items()]


def _all_reduce(count: int, group: ProcessGroup) -> Callable[[int], object]:
    values = torch.zeros(count)
    return lambda number: distributed.all_reduce(values, group=group)


def _uneven_gather(group: ProcessGroup, uneven: bool) -> Callable[[int], object]:
    """Rank r of W sends (r + 1) / W of 1 MiB."""
    world, rank = distributed.get_world_size(group), distributed.get_rank(group)
    sizes = [_LONGEST * (other + 1) // world for other in range(world)]
    room = sizes if uneven else [_LONGEST] * world
    parts = [torch.empty(size, dtype=torch.uint8) for size in room]
    own = torch.zeros(room[rank], dtype=torch.uint8)
    return lambda number: distributed.all_gather(parts, own, group=group)
