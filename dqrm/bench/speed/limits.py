"""The limit that memory sets: rows read at random, and nothing else."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dqrm.bench.speed.contestants import Call, Entry, Unavailable
from dqrm.bench.speed.traffic import Shape, Traffic
from dqrm.kernels import cpu
from dqrm.kernels.gather import gather_rows

DISTANCES = (0, 8, 16, 32)
"""Rows between asking for a row and reading it; the fastest is the limit."""


class RandomGather:
    """Reads the looked-up rows of storage as large as the tables, and writes D floats for each."""

    def __init__(self, storage: Tensor, ahead: int) -> None:
        if not cpu.native_available():
            raise Unavailable(f"the compiled kernels are missing: {cpu.unavailable_reason()}")
        self.storage = storage
        self.ahead = ahead

    def start(self, traffic: Traffic) -> Call:
        """Number the rows of all tables through."""
        counts = torch.tensor(traffic.shape.rows)
        starts = (counts.cumsum(0) - counts).unsqueeze(1)
        ring = [(ids + starts).flatten() for ids in traffic.batches]
        out = torch.zeros(traffic.lookups, 4 * traffic.shape.dim, dtype=torch.uint8)
        storage, ahead = self.storage, self.ahead

        def call(number: int) -> None:
            gather_rows(storage, ring[traffic.pick(number)], out, ahead=ahead)

        return call


def gather_entries(shape: Shape, row_bytes: int) -> list[Entry]:
    """Return the limit at every distance, all over one storage."""

    @cache
    def storage() -> Tensor:
        return torch.ones(shape.total_rows, row_bytes, dtype=torch.uint8)

    def builder(ahead: int) -> Callable[[], RandomGather]:
        return lambda: RandomGather(storage(), ahead)

    return [
        Entry(
            f"random gather, {ahead} ahead",
            "limit",
            builder(ahead),
            bytes_needed=shape.total_rows * row_bytes if ahead == DISTANCES[0] else 0,
            row_bytes=row_bytes,
        )
        for ahead in DISTANCES
    ]
